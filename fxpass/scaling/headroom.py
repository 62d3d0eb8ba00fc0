"""A scale that leaves the gradients the headroom they need."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import ClassVar

import torch
from torch.fx import Node

from ..errors import OptionError
from .loss_scale import MovingLossScale, check, check_counts, count_stuck
from .writer import Writer

aten = torch.ops.aten
# Doublings: gradients keep 24 of float16's 40, and batches that are nan whatever the scale do no more harm.
MARGIN_LIMIT = 16.0


@dataclass(frozen=True)
class HeadroomLossScale(MovingLossScale):
    """The largest power of two that leaves the gradients the headroom they need.

    Each step the largest gradient magnitude, which the finite check finds
    anyway, says how many doublings below the largest float16 it was. The scale
    follows the running mean and spread of that number over the last ``window``
    good steps: as high as a share ``overflow_rate`` of steps allows, were the
    number normally distributed. It isn't always (nor does a parameter's
    gradient see every overflow on its way), so a margin is learnt as well: an
    overflow adds one doubling to it, a good step takes ``overflow_rate`` of
    one away, which balances where overflows are that rare.

    Raises:
        OptionError: a setting of the wrong type or out of range.
    """

    name: ClassVar[str] = "headroom"
    keeps: ClassVar[Mapping[str, float]] = {
        "scale": 1.0,
        "stuck": 0,
        "headroom_count": 0,  # steps seen
        "headroom_mean": 0.0,  # of the largest magnitude, in doublings below the limit
        "headroom_variance": 1.0,  # as if one difference had been seen
        "headroom_last": 0.0,
        "headroom_margin": 0.0,
    }

    init_scale: float = 2.0**16  # pyrefly: ignore[bad-override]
    overflow_rate: float = 1e-3
    window: int = 100
    min_scale: float = 1.0  # pyrefly: ignore[bad-override]
    max_scale: float = 2.0**32  # pyrefly: ignore[bad-override]
    patience: int = 50  # pyrefly: ignore[bad-override]

    def __post_init__(self) -> None:
        self.check_range()
        check_counts(self, "window", least=2)
        rate = self.overflow_rate
        ok = isinstance(rate, float) and 0 < rate < 0.5
        check(type(self), "overflow_rate", rate, ok, "between 0 and 0.5")
        if math.ceil(math.log2(self.min_scale)) > math.floor(math.log2(self.max_scale)):
            found = f"no power of two between min_scale={self.min_scale} and max_scale={self.max_scale}"
            raise OptionError(f"HeadroomLossScale: {found}")

    def grad_scaler(self) -> dict[str, float]:
        return {"growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000}  # its defaults

    def resumed(self, scale: float, growth_tracker: int) -> dict[str, float]:
        return {"scale": self.within(scale), "growth_tracker": max(growth_tracker, 0)}

    def move(self, out: Writer, overflow: Node, magnitudes: Sequence[Node], limit: float) -> None:
        """``2**floor(-(mean + z * deviation + margin))``, of ``log2(largest / scale / limit)``."""
        if not magnitudes:
            return
        read = out.read
        log_scale = out.op(aten.log2.default, read["scale"])
        share = _share_of_range(out, magnitudes, limit)
        finite = out.op(aten.isfinite.default, share)  # not where the user's code removed an inf of its own
        good = out.op(aten.logical_and.default, finite, out.op(aten.logical_not.default, overflow))
        seen = out.op(aten.logical_and.default, out.op(aten.gt.Scalar, share, 0.0), good)
        height = out.op(aten.log2.default, out.select(seen, share, 1.0))
        mean, variance = _running_statistics(out, seen, out.op(aten.sub.Tensor, height, log_scale), self)
        margin = _margin(out, overflow, self)

        z = NormalDist().inv_cdf(1.0 - self.overflow_rate)
        deviation = out.op(aten.mul.Tensor, out.op(aten.sqrt.default, variance), z)
        needed = out.op(aten.add.Tensor, out.op(aten.add.Tensor, mean, deviation), margin)
        lower, higher = out.op(aten.sub.Tensor, log_scale, 1.0), out.op(aten.add.Tensor, log_scale, 1.0)
        # gradients that are all zero have underflowed, perhaps: a doubling a step until they show
        unseen = out.select(finite, higher, log_scale)
        wanted = out.select(seen, out.op(aten.neg.default, needed), unseen)
        known = out.op(aten.gt.Scalar, read["headroom_count"], 0)
        less = out.op(aten.minimum.default, out.op(aten.neg.default, needed), lower)
        wanted = out.select(overflow, out.select(known, less, lower), wanted)
        limits = (math.ceil(math.log2(self.min_scale)), math.floor(math.log2(self.max_scale)))
        exponent = out.op(aten.clamp.default, out.op(aten.floor.default, wanted), *limits)
        out.write("scale", _power_of_two(out, exponent))
        count_stuck(out, overflow, 2.0 ** limits[0])


def _running_statistics(
    out: Writer, seen: Node, value: Node, settings: HeadroomLossScale
) -> tuple[Node, Node]:
    """Mean and variance of ``value``, each step less by ``1/window``; unchanged where not ``seen``."""
    read = out.read
    count = out.op(aten.add.Tensor, read["headroom_count"], out.cast(seen, torch.int64))
    number = out.op(aten.clamp_min.default, out.cast(count, torch.float32), 1.0)
    mean = out.select(out.op(aten.eq.Scalar, read["headroom_count"], 0), value, read["headroom_mean"])
    away = out.op(aten.sub.Tensor, value, mean)
    moved = out.op(aten.add.Tensor, mean, out.op(aten.mul.Tensor, _gain(out, number, settings), away))
    # Half the squared difference of neighbours: a drift of the mean, as in training, adds next to nothing.
    # It starts as 1, as if one had been seen: after a first step nobody knows that it is 0.
    first = out.op(aten.eq.Scalar, read["headroom_count"], 0)
    change = out.op(aten.sub.Tensor, value, out.select(first, value, read["headroom_last"]))
    half = out.op(aten.mul.Tensor, out.op(aten.mul.Tensor, change, change), 0.5)
    excess = out.op(aten.sub.Tensor, half, read["headroom_variance"])
    gain = _gain(out, out.op(aten.add.Tensor, number, 1.0), settings)
    adapted = out.op(aten.add.Tensor, read["headroom_variance"], out.op(aten.mul.Tensor, gain, excess))
    new_mean = out.select(seen, moved, read["headroom_mean"])
    new_variance = out.select(seen, adapted, read["headroom_variance"])
    out.write("headroom_count", count)
    out.write("headroom_mean", new_mean)
    out.write("headroom_variance", new_variance)
    out.write("headroom_last", out.select(seen, value, read["headroom_last"]))
    return new_mean, new_variance


def _margin(out: Writer, overflow: Node, settings: HeadroomLossScale) -> Node:
    """A doubling more for an overflow that the statistics missed, ``overflow_rate`` of one less else."""
    margin = out.read["headroom_margin"]
    foreseen = out.op(aten.eq.Scalar, out.read["headroom_count"], 0)  # there are none yet
    wider = out.select(foreseen, margin, out.op(aten.add.Tensor, margin, 1.0))
    narrower = out.op(aten.sub.Tensor, margin, settings.overflow_rate)
    new = out.op(aten.clamp.default, out.select(overflow, wider, narrower), 0.0, MARGIN_LIMIT)
    out.write("headroom_margin", new)
    return new


def _gain(out: Writer, number: Node, settings: HeadroomLossScale) -> Node:
    """The weight of the ``number``-th observation: that of a plain mean at first, then that of a window."""
    return out.op(aten.clamp_min.default, out.op(aten.reciprocal.default, number), 1.0 / settings.window)


def _share_of_range(out: Writer, magnitudes: Sequence[Node], limit: float) -> Node:
    """The largest gradient magnitude as stored, divided by the largest number of the compute dtype.

    That is also the limit of gradients stored in float32: backward came to them through the compute dtype.
    """
    values = [out.cast(magnitude, torch.float32) for magnitude in magnitudes]
    largest = out.op(aten.amax.default, out.op(aten.stack.default, values), [])
    return out.op(aten.mul.Tensor, largest, 1.0 / limit)


def _power_of_two(out: Writer, exponent: Node) -> Node:
    """``2.0**exponent``, exact on every device: the exponent is put in its place in a float32's bits."""
    biased = out.op(aten.add.Tensor, out.cast(exponent, torch.int32), 127)
    return out.op(aten.view.dtype, out.op(aten.mul.Tensor, biased, 1 << 23), torch.float32)
