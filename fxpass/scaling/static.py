"""A scale that stays."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from .loss_scale import LARGEST, SMALLEST, LossScale, check, is_number

_POWER = re.compile(r"2\s*(?:\*\*|\^)\s*([+-]?\d+)")


@dataclass(frozen=True)
class StaticLossScale(LossScale):
    """A constant scale (a number, or text as in Apex); an overflow is still found, and skips the step."""

    scale: float

    def __post_init__(self) -> None:
        value = parse_scale(self.scale)
        object.__setattr__(self, "scale", value)
        ok = is_number(value) and SMALLEST <= value <= LARGEST
        check(type(self), "scale", value, ok, "a finite number > 0 that float32 holds")

    @property
    def init(self) -> float:
        return float(self.scale)


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
