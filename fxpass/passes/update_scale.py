"""Advance the loss scale and the counters, on the device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import ClassVar

import torch
from torch.fx import Node

from ..ir.edit import Editor
from ..ir.graph import Phase, StepGraph
from ..runtime.scale import DynamicLossScale, HeadroomLossScale, LossScale
from .base import GraphPass, Writer
from .results import Checked, Clipped, GlobalNorm, NextScale

aten = torch.ops.aten
# Doublings: gradients keep 24 of float16's 40, and batches that are nan whatever the scale do no more harm.
MARGIN_LIMIT = 16.0


@dataclass(frozen=True)
class UpdateScale(GraphPass):
    """Move the loss scale by its policy and count, as selects on ``found_inf``.

    ``DynamicLossScale`` is torch.amp's update. Overflow: ``scale * backoff``
    (after ``hysteresis`` overflows, not below ``min_scale``), tracker 0.
    ``growth_interval`` good steps in a row: ``scale * growth`` if that is finite
    and at most ``max_scale``, tracker 0. ``HeadroomLossScale`` follows the
    largest gradient magnitude. A static scale stays.
    """

    name: ClassVar[str] = "update_scale"
    requires: ClassVar = (Checked,)
    uses: ClassVar = (GlobalNorm, Clipped)
    ensures: ClassVar = (NextScale,)
    loss_scale: LossScale | None = None
    dtype: torch.dtype = torch.float16

    def run(self, step: StepGraph, edit: Editor) -> None:
        checked = step.result(Checked)
        if not checked.found_inf:
            edit.decline("no finite check to act on")
            return
        found = checked.last
        output = next(n for n in reversed(step.graph.nodes) if n.op == "output")
        with edit.before(output):
            out = Writer(step, edit, Phase.SCALE, "loss scale state")
            _count(out, found)
            if isinstance(self.loss_scale, DynamicLossScale):
                _move_dynamic(out, found, self.loss_scale)
            elif isinstance(self.loss_scale, HeadroomLossScale) and checked.gradients:
                _move_headroom(out, found, self.loss_scale, torch.finfo(self.dtype).max)
            out.flush()
        step.result(NextScale).written.update(out.written)


def _count(out: Writer, found: Node) -> None:
    read, step = out.step.scaler, out.step
    out.write("steps", out.op(aten.add.Tensor, read["steps"], 1))
    out.write("skipped", out.op(aten.add.Tensor, read["skipped"], out.cast(found, torch.int64)))
    again = out.op(aten.add.Tensor, read["consecutive_skipped"], 1)
    out.write("consecutive_skipped", out.select(found, again, _zero(out, "consecutive_skipped")))
    if (norm := step.result(GlobalNorm).norm) is not None:
        out.write("grad_norm", out.cast(norm, torch.float32))
    if (acted := step.result(Clipped).acted) is not None:
        good = out.op(aten.logical_and.default, acted, out.op(aten.logical_not.default, found))
        out.write("clipped", out.op(aten.add.Tensor, read["clipped"], out.cast(good, torch.int64)))


def _zero(out: Writer, field: str) -> Node:
    return out.op(aten.mul.Tensor, out.step.scaler[field], 0)


def _move_dynamic(out: Writer, found: Node, settings: DynamicLossScale) -> None:
    read = out.step.scaler
    scale, tracker = read["scale"], read["growth_tracker"]
    overflows = out.op(aten.add.Tensor, read["overflows"], 1)
    patient = out.op(aten.lt.Scalar, overflows, settings.hysteresis)
    smaller = out.op(aten.mul.Tensor, scale, settings.backoff_factor)
    backed_off = out.select(patient, scale, out.op(aten.clamp_min.default, smaller, settings.min_scale))

    good = out.op(aten.add.Tensor, tracker, 1)
    grows = out.op(aten.ge.Scalar, good, settings.growth_interval)  # more than it: a loaded checkpoint's
    larger = out.op(aten.mul.Tensor, scale, settings.growth_factor)
    if settings.saturate:
        larger, allowed = out.op(aten.clamp_max.default, larger, settings.max_scale), grows
    else:
        fits = out.op(aten.le.Scalar, larger, settings.max_scale)
        allowed = out.op(aten.logical_and.default, grows, fits)
    out.write("scale", out.select(found, backed_off, out.select(allowed, larger, scale)))

    none = _zero(out, "growth_tracker")
    restart = out.op(aten.sub.Tensor, none, settings.growth_delay)
    out.write("growth_tracker", out.select(found, restart, out.select(grows, none, good)))
    forgiven = _zero(out, "overflows")
    if not settings.consecutive_hysteresis:
        forgiven = out.select(grows, forgiven, read["overflows"])
    out.write("overflows", out.select(found, overflows, forgiven))
    backs_off = out.op(aten.logical_and.default, found, out.op(aten.logical_not.default, patient))
    _count_stuck(out, backs_off, settings.min_scale)


def _count_stuck(out: Writer, found: Node, minimum: float) -> None:
    at_floor = out.op(aten.le.Scalar, out.step.scaler["scale"], minimum)
    stuck = out.op(aten.logical_and.default, found, at_floor)
    count = out.op(aten.add.Tensor, out.step.scaler["stuck"], 1)
    out.write("stuck", out.select(stuck, count, _zero(out, "stuck")))


def _move_headroom(out: Writer, found: Node, settings: HeadroomLossScale, limit: float) -> None:
    """``2**floor(-(mean + z * deviation + margin))``, of ``log2(largest / scale / limit)``."""
    read = out.step.scaler
    log_scale = out.op(aten.log2.default, read["scale"])
    share = _share_of_range(out, limit)
    finite = out.op(aten.isfinite.default, share)  # not where the user's code removed an inf of its own
    good = out.op(aten.logical_and.default, finite, out.op(aten.logical_not.default, found))
    seen = out.op(aten.logical_and.default, out.op(aten.gt.Scalar, share, 0.0), good)
    height = out.op(aten.log2.default, out.select(seen, share, 1.0))
    mean, variance = _running_statistics(out, seen, out.op(aten.sub.Tensor, height, log_scale), settings)
    margin = _margin(out, found, settings)

    z = NormalDist().inv_cdf(1.0 - settings.overflow_rate)
    deviation = out.op(aten.mul.Tensor, out.op(aten.sqrt.default, variance), z)
    needed = out.op(aten.add.Tensor, out.op(aten.add.Tensor, mean, deviation), margin)
    lower, higher = out.op(aten.sub.Tensor, log_scale, 1.0), out.op(aten.add.Tensor, log_scale, 1.0)
    # gradients that are all zero have underflowed, perhaps: a doubling a step until they show
    unseen = out.select(finite, higher, log_scale)
    wanted = out.select(seen, out.op(aten.neg.default, needed), unseen)
    known = out.op(aten.gt.Scalar, read["headroom_count"], 0)
    less = out.op(aten.minimum.default, out.op(aten.neg.default, needed), lower)
    wanted = out.select(found, out.select(known, less, lower), wanted)
    limits = (math.ceil(math.log2(settings.min_scale)), math.floor(math.log2(settings.max_scale)))
    exponent = out.op(aten.clamp.default, out.op(aten.floor.default, wanted), *limits)
    out.write("scale", _power_of_two(out, exponent))
    _count_stuck(out, found, 2.0 ** limits[0])


def _running_statistics(
    out: Writer, seen: Node, value: Node, settings: HeadroomLossScale
) -> tuple[Node, Node]:
    """Mean and variance of ``value``, each step less by ``1/window``; unchanged where not ``seen``."""
    read = out.step.scaler
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


def _margin(out: Writer, found: Node, settings: HeadroomLossScale) -> Node:
    """A doubling more for an overflow that the statistics missed, ``overflow_rate`` of one less else."""
    margin = out.step.scaler["headroom_margin"]
    foreseen = out.op(aten.eq.Scalar, out.step.scaler["headroom_count"], 0)  # there are none yet
    wider = out.select(foreseen, margin, out.op(aten.add.Tensor, margin, 1.0))
    narrower = out.op(aten.sub.Tensor, margin, settings.overflow_rate)
    new = out.op(aten.clamp.default, out.select(found, wider, narrower), 0.0, MARGIN_LIMIT)
    out.write("headroom_margin", new)
    return new


def _gain(out: Writer, number: Node, settings: HeadroomLossScale) -> Node:
    """The weight of the ``number``-th observation: that of a plain mean at first, then that of a window."""
    return out.op(aten.clamp_min.default, out.op(aten.reciprocal.default, number), 1.0 / settings.window)


def _share_of_range(out: Writer, limit: float) -> Node:
    """The largest gradient magnitude as stored, divided by the largest number of the compute dtype.

    That is also the limit of gradients stored in float32: backward came to them through the compute dtype.
    """
    checked = out.step.result(Checked)
    values = [out.cast(checked.largest[mark], torch.float32) for mark in checked.gradients]
    largest = out.op(aten.amax.default, out.op(aten.stack.default, values), [])
    return out.op(aten.mul.Tensor, largest, 1.0 / limit)


def _power_of_two(out: Writer, exponent: Node) -> Node:
    """``2.0**exponent``, exact on every device: the exponent is put in its place in a float32's bits."""
    biased = out.op(aten.add.Tensor, out.cast(exponent, torch.int32), 127)
    return out.op(aten.view.dtype, out.op(aten.mul.Tensor, biased, 1 << 23), torch.float32)
