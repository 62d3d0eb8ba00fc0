"""What a loss scale policy is: its settings, what the graph keeps for it, how its scale moves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch.fx import Node

from ..errors import OptionError
from .writer import Writer

SMALLEST, LARGEST = 2.0**-126, (2.0 - 2.0**-23) * 2.0**127  # normal float32 numbers: 1/scale stays finite
aten = torch.ops.aten


class LossScale:
    """Base of the loss scale policies. One that only defines ``init`` stays where it starts."""

    name: ClassVar[str] = ""  # by which option ``loss_scale`` knows it, with its default settings
    # Inputs of the graph with their first values: whole numbers are int64, others float32. A checkpoint
    # has all of them; ``scale`` starts as ``init``.
    keeps: ClassVar[Mapping[str, float]] = {"scale": 1.0}

    @property
    def init(self) -> float:
        """The scale of the first step."""
        raise AssertionError(f"{type(self).__name__} must define init")

    @property
    def dynamic(self) -> bool:
        """Whether the scale changes during training."""
        return False

    @property
    def lowest(self) -> float:
        """The scale below which it never goes."""
        return 1.0

    @property
    def stuck_after(self) -> int | None:
        """Overflows in a row at the lowest scale that end the training; None: it goes on."""
        return None

    def first(self) -> dict[str, float]:
        """The first values of ``keeps``."""
        return {name: self.init if name == "scale" else value for name, value in self.keeps.items()}

    def grad_scaler(self) -> dict[str, float]:
        """The settings that a GradScaler needs to go on from here: it keeps still, too."""
        return {"growth_factor": 1.0, "backoff_factor": 1.0, "growth_interval": 2000}

    def resumed(self, scale: float, growth_tracker: int) -> dict[str, float]:
        """What is taken over of a checkpoint's scale and good steps since it moved; nothing: it stays."""
        return {}

    def move(self, out: Writer, overflow: Node, magnitudes: Sequence[Node], limit: float) -> None:
        """Write the graph's rule: the next value of each of ``keeps``.

        Args:
            out: reads and writes what is kept.
            overflow: 0-d bool, whether the step is skipped.
            magnitudes: the largest magnitude of each gradient as stored, scaled.
            limit: the largest number of the compute dtype.
        """


class NoLossScale(LossScale):
    """Of a step whose loss is not scaled."""

    keeps: ClassVar[Mapping[str, float]] = {}

    @property
    def init(self) -> float:
        return 1.0


class MovingLossScale(LossScale):
    """Base of the policies whose scale moves, between bounds; each gives these settings its defaults."""

    init_scale: float
    min_scale: float
    max_scale: float
    patience: int  # overflows in a row at ``min_scale`` that end the training

    @property
    def init(self) -> float:
        return float(self.init_scale)

    @property
    def dynamic(self) -> bool:
        return True

    @property
    def lowest(self) -> float:
        return self.min_scale

    @property
    def stuck_after(self) -> int | None:
        return self.patience

    def within(self, scale: float) -> float:
        """``scale``, or the bound that it is beyond."""
        return min(max(scale, self.min_scale), self.max_scale)

    def check_range(self) -> None:
        """Raise ``OptionError`` for a bound, a first scale or a patience that makes no sense."""
        cls = type(self)
        for name in ("init_scale", "min_scale", "max_scale"):
            value = getattr(self, name)
            ok = is_number(value) and SMALLEST <= value <= LARGEST
            check(cls, name, value, ok, "a finite number > 0 that float32 holds")
        check(cls, "min_scale", self.min_scale, self.min_scale <= self.init_scale, "at most init_scale")
        check(cls, "max_scale", self.max_scale, self.max_scale >= self.init_scale, "at least init_scale")
        check_counts(self, "patience")


def count_stuck(out: Writer, overflow: Node, lowest: float) -> None:
    """Write the field ``stuck``: overflows in a row at the lowest scale."""
    at_floor = out.op(aten.le.Scalar, out.read["scale"], lowest)
    stuck = out.op(aten.logical_and.default, overflow, at_floor)
    count = out.op(aten.add.Tensor, out.read["stuck"], 1)
    out.write("stuck", out.select(stuck, count, out.zero("stuck")))


def check(cls: type, field: str, value: object, ok: bool, allowed: str) -> None:
    """Raise ``OptionError`` unless ``value`` is a number and ``ok``."""
    if not is_number(value) or not ok:
        raise OptionError(f"{cls.__name__}({field}={value!r}): {field} must be {allowed}")


def is_number(value: object) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_counts(policy: Any, *names: str, least: int = 1) -> None:
    """Raise ``OptionError`` unless these settings are whole numbers."""
    for name in names:
        value = getattr(policy, name)
        ok = isinstance(value, int) and value >= least
        check(type(policy), name, value, ok, f"an integer >= {least}")
