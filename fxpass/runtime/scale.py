"""How the loss scale starts and moves: plain settings, checked when made."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import OptionError


class LossScale:
    """Base of the loss scale policies."""

    @property
    def init(self) -> float:
        """The scale of the first step."""
        raise AssertionError(f"{type(self).__name__} must define init")

    @property
    def dynamic(self) -> bool:
        """Whether the scale changes during training."""
        return False


def _check(cls: type, field: str, value: object, ok: bool, allowed: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or not ok:
        raise OptionError(f"{cls.__name__}({field}={value!r}): {field} must be {allowed}")


@dataclass(frozen=True)
class StaticLossScale(LossScale):
    """A constant scale; gradients are still checked and an overflow skips the step."""

    scale: float

    def __post_init__(self) -> None:
        value = self.scale
        _check(
            type(self), "scale", value, isinstance(value, (int, float)) and value > 0, "a finite number > 0"
        )

    @property
    def init(self) -> float:
        return float(self.scale)


@dataclass(frozen=True)
class DynamicLossScale(LossScale):
    """torch.amp.GradScaler's state machine, with a floor, a ceiling and Apex's hysteresis.

    An overflow multiplies the scale by ``backoff_factor`` (after ``hysteresis``
    consecutive overflows) and never takes it below ``min_scale``;
    ``growth_interval`` good steps in a row multiply it by ``growth_factor`` if
    the result is finite and at most ``max_scale``. ``patience`` overflows in a
    row at ``min_scale`` raise :class:`~fxpass.LossScaleError`.
    """

    init_scale: float = 2.0**16
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    hysteresis: int = 1
    min_scale: float = 1.0
    max_scale: float = 2.0**24
    patience: int = 50

    def __post_init__(self) -> None:
        cls = type(self)
        for name in ("growth_interval", "hysteresis", "patience"):
            value = getattr(self, name)
            _check(cls, name, value, isinstance(value, int) and value >= 1, "an integer >= 1")
        for name in ("init_scale", "min_scale", "max_scale"):
            value = getattr(self, name)
            _check(cls, name, value, isinstance(value, (int, float)) and value > 0, "a finite number > 0")
        _check(cls, "growth_factor", self.growth_factor, self.growth_factor >= 1, "a finite number >= 1")
        _check(cls, "backoff_factor", self.backoff_factor, 0 < self.backoff_factor < 1, "between 0 and 1")
        _check(cls, "min_scale", self.min_scale, self.min_scale <= self.init_scale, "at most init_scale")
        _check(cls, "max_scale", self.max_scale, self.max_scale >= self.init_scale, "at least init_scale")

    @property
    def init(self) -> float:
        return float(self.init_scale)

    @property
    def dynamic(self) -> bool:
        return True
