"""How the loss scale starts and moves: one file per policy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .dynamic import DynamicLossScale as DynamicLossScale
from .headroom import HeadroomLossScale as HeadroomLossScale
from .loss_scale import LossScale as LossScale
from .loss_scale import NoLossScale as NoLossScale
from .loss_scale import is_number
from .static import StaticLossScale as StaticLossScale
from .static import parse_scale

POLICIES: tuple[type[LossScale], ...] = (StaticLossScale, DynamicLossScale, HeadroomLossScale)
NAMED: dict[str, type[LossScale]] = {policy.name: policy for policy in POLICIES if policy.name}
KEPT: Mapping[str, float] = {name: first for policy in POLICIES for name, first in policy.keeps.items()}


def policy_of(value: Any) -> Any:
    """The policy that ``value`` stands for: a name of ``NAMED``, or a number, which may be text.

    Anything else is returned as it is.
    """
    if isinstance(value, str) and value in NAMED:
        return NAMED[value]()
    number = parse_scale(value)
    return StaticLossScale(float(number)) if is_number(number) else number
