"""How the loss scale starts and moves: plain settings, checked when made."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from ..errors import OptionError

SMALLEST, LARGEST = 2.0**-126, (2.0 - 2.0**-23) * 2.0**127  # normal float32 numbers: 1/scale stays finite
_POWER = re.compile(r"2\s*(?:\*\*|\^)\s*([+-]?\d+)")


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
    if not _is_number(value) or not ok:
        raise OptionError(f"{cls.__name__}({field}={value!r}): {field} must be {allowed}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_range(policy: Any) -> None:
    """Check init_scale, min_scale, max_scale and patience, which all moving scales have."""
    cls = type(policy)
    for name in ("init_scale", "min_scale", "max_scale"):
        value = getattr(policy, name)
        ok = _is_number(value) and SMALLEST <= value <= LARGEST
        _check(cls, name, value, ok, "a finite number > 0 that float32 holds")
    _check(cls, "min_scale", policy.min_scale, policy.min_scale <= policy.init_scale, "at most init_scale")
    _check(cls, "max_scale", policy.max_scale, policy.max_scale >= policy.init_scale, "at least init_scale")
    _check_counts(policy, "patience")


def _check_counts(policy: Any, *names: str, least: int = 1) -> None:
    for name in names:
        value = getattr(policy, name)
        ok = isinstance(value, int) and value >= least
        _check(type(policy), name, value, ok, f"an integer >= {least}")


def parse_scale(value: Any) -> Any:
    """A scale written as text (Apex: ``"128.0"``; a power of two: ``"2**16"``, ``"2^16"``) as a number.

    Anything else is returned as it is.
    """
    if not isinstance(value, str):
        return value
    power = _POWER.fullmatch(value.strip())
    try:
        return 2.0 ** int(power[1]) if power else float(value)
    except (ValueError, OverflowError):
        return value


@dataclass(frozen=True)
class StaticLossScale(LossScale):
    """A constant scale (a number, or text as in Apex); an overflow is still found, and skips the step."""

    scale: float

    def __post_init__(self) -> None:
        value = parse_scale(self.scale)
        object.__setattr__(self, "scale", value)
        ok = _is_number(value) and SMALLEST <= value <= LARGEST
        _check(type(self), "scale", value, ok, "a finite number > 0 that float32 holds")

    @property
    def init(self) -> float:
        return float(self.scale)


@dataclass(frozen=True)
class DynamicLossScale(LossScale):
    """torch.amp.GradScaler's state machine, with a floor, a ceiling and hysteresis.

    An overflow multiplies the scale by ``backoff_factor`` and never takes it
    below ``min_scale``; ``growth_interval`` good steps in a row multiply it by
    ``growth_factor`` if the result is finite and at most ``max_scale``.
    ``patience`` overflows in a row at ``min_scale`` raise
    ``fxpass.LossScaleError``.

    Args:
        hysteresis: the ``hysteresis``-th overflow is the first that lowers the scale.
        consecutive_hysteresis: a good step forgives earlier overflows (Apex); else
            only a growth does (DeepSpeed's default).
        growth_delay: more good steps than ``growth_interval`` that the first growth
            takes, from the start or after an overflow (DeepSpeed: 1).
        saturate: grow to ``max_scale`` itself rather than stop below it (Apex).

    Raises:
        OptionError: a setting of the wrong type or out of range.
    """

    init_scale: float = 2.0**16
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    hysteresis: int = 1
    min_scale: float = 1.0
    max_scale: float = 2.0**24
    patience: int = 50
    consecutive_hysteresis: bool = True
    growth_delay: int = 0
    saturate: bool = False

    def __post_init__(self) -> None:
        cls = type(self)
        _check_counts(self, "growth_interval", "hysteresis")
        _check_counts(self, "growth_delay", least=0)
        _check_range(self)
        _check(cls, "growth_factor", self.growth_factor, self.growth_factor >= 1, "a finite number >= 1")
        _check(cls, "backoff_factor", self.backoff_factor, 0 < self.backoff_factor < 1, "between 0 and 1")
        for name in ("consecutive_hysteresis", "saturate"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise OptionError(f"{cls.__name__}({name}={value!r}): {name} must be True or False")

    @classmethod
    def like(cls, library: str, **settings: Any) -> DynamicLossScale:
        """Defaults and sequence of ``"torch"``, ``"apex"`` or ``"deepspeed"``, with ``settings`` on top.

        The library's own names of settings are understood too
        (``initial_scale_power=16`` of DeepSpeed, ``scale_window=2000`` of Apex).
        Not reproduced are their faults: the scale never becomes 0.0, where
        GradScaler and Apex end up, and gradients are divided by the scale they
        were multiplied by, where DeepSpeed takes the one after it.

        Raises:
            OptionError: an unknown library or setting, or a value out of range.
        """
        if library not in _LIBRARIES:
            allowed = " or ".join(map(repr, _LIBRARIES))
            raise OptionError(f"DynamicLossScale.like({library!r}): allowed is {allowed}")
        defaults, names = _LIBRARIES[library]
        values = dict(defaults)
        for name, value in settings.items():
            if name == "initial_scale_power" and library == "deepspeed":
                _check(cls, name, value, isinstance(value, int) and -126 <= value <= 127, "an integer")
                values["init_scale"] = 2.0**value
                continue
            own = names.get(name, name)
            if own not in cls.__dataclass_fields__:
                hint = f"the settings are {', '.join([*cls.__dataclass_fields__, *names])}"
                raise OptionError(f"DynamicLossScale.like({library!r}) has no setting {name!r}", hint=hint)
            values[own] = value
        return cls(**values)

    @property
    def init(self) -> float:
        return float(self.init_scale)

    @property
    def dynamic(self) -> bool:
        return True


# By library: its defaults where they differ from ours, and its names for our settings.
_LIBRARIES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "torch": ({"min_scale": SMALLEST, "max_scale": LARGEST}, {}),
    "apex": (
        {"min_scale": SMALLEST, "saturate": True},
        {"scale_window": "growth_interval", "min_loss_scale": "min_scale", "max_loss_scale": "max_scale"},
    ),
    "deepspeed": (
        {
            "growth_interval": 1000,
            "growth_delay": 1,
            "hysteresis": 2,
            "consecutive_hysteresis": False,
            "max_scale": LARGEST,
            "patience": 1,
        },
        {"loss_scale_window": "growth_interval", "min_loss_scale": "min_scale"},
    ),
}


@dataclass(frozen=True)
class HeadroomLossScale(LossScale):
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

    init_scale: float = 2.0**16
    overflow_rate: float = 1e-3
    window: int = 100
    min_scale: float = 1.0
    max_scale: float = 2.0**32
    patience: int = 50

    def __post_init__(self) -> None:
        _check_range(self)
        _check_counts(self, "window", least=2)
        rate = self.overflow_rate
        ok = isinstance(rate, float) and 0 < rate < 0.5
        _check(type(self), "overflow_rate", rate, ok, "between 0 and 0.5")
        if math.ceil(math.log2(self.min_scale)) > math.floor(math.log2(self.max_scale)):
            found = f"no power of two between min_scale={self.min_scale} and max_scale={self.max_scale}"
            raise OptionError(f"HeadroomLossScale: {found}")

    @property
    def init(self) -> float:
        return float(self.init_scale)

    @property
    def dynamic(self) -> bool:
        return True
