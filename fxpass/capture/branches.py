"""Branches of an optimizer's Python on values that only the device knows: traced both ways, then selected.

``if step == 1``, ``if num_sma >= 5``, ``if norm > 0``: the function is run once for each
way through its conditions, and the results are merged by ``torch.where``, innermost
condition first. A condition that was decided before, on the same numbers, is not asked again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..ir.slots import Slot

LIMIT = 16  # ways through one step
Values = Mapping[Slot, Any]  # what a step leaves: a tensor, or a number


class TooManyWays(Exception):
    """There are more than LIMIT ways."""


class Impossible(Exception):
    """A way on which Python raises an error: no values go there that do not raise it in eager, too."""


@dataclass
class Way:
    """One way through a function: the conditions it met, and how each was decided."""

    decided: Sequence[bool]  # the first ones; all later conditions are taken as true
    conditions: list[Tensor] = field(default_factory=list)
    outcomes: list[bool] = field(default_factory=list)
    known: dict[Hashable, bool] = field(default_factory=dict)

    def take(self, condition: Tensor, key: Hashable) -> bool:
        """How the 0-d ``condition`` is decided on this way; ``key``: equal for equal conditions."""
        if key not in self.known:
            place = len(self.outcomes)
            self.known[key] = place >= len(self.decided) or self.decided[place]
            self.conditions.append(condition.reshape(()) != 0)
            self.outcomes.append(self.known[key])
        return self.known[key]


def merged_ways(run: Callable[[Way], Values]) -> dict[Slot, Any]:
    """What ``run`` leaves, whichever way the values go.

    Raises:
        TooManyWays: more than LIMIT.
    """
    ways: list[tuple[Way, Values | None]] = []
    decided: list[bool] = []
    while True:
        way = Way(decided)
        try:
            ways.append((way, run(way)))
        except Impossible:
            ways.append((way, None))
        decided = list(way.outcomes)
        while decided and not decided[-1]:
            decided.pop()
        if not decided:
            return _merged(ways, 0)
        decided[-1] = False
        if len(ways) == LIMIT:
            raise TooManyWays


def _merged(ways: list[tuple[Way, Values | None]], depth: int) -> dict[Slot, Any]:
    ways = [way for way in ways if way[1] is not None]
    if not ways:
        return {}
    way, values = ways[0]
    if len(ways) == 1:
        return dict(values or {})
    yes = _merged([w for w in ways if w[0].outcomes[depth]], depth + 1)
    no = _merged([w for w in ways if not w[0].outcomes[depth]], depth + 1)
    if not yes or not no:
        return yes or no
    return selected(way.conditions[depth], yes, no)


def selected(condition: Tensor, yes: Values, no: Values) -> dict[Slot, Any]:
    """``yes`` where the 0-d ``condition`` holds, else ``no``."""
    return {slot: _select(condition, value, no[slot]) for slot, value in yes.items()}


def _select(condition: Tensor, yes: Any, no: Any) -> Any:
    if not isinstance(yes, Tensor) and not isinstance(no, Tensor):
        if yes == no:
            return yes
        yes = torch.tensor(yes, dtype=torch.float64, device=condition.device)
    return torch.where(condition, yes, no)
