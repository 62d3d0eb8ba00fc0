"""A tensor that a step reaches by two roads is one tensor; once the roads part, the step is another.

Written for torch 2.11 to 2.13; active only inside ``dynamo.py``'s patches. Dynamo guards on that,
but not where one road leads through an optimizer, nor from a local name and a global
one: a layer replaced in the model would be trained in the place of what the optimizer holds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.source import is_from_local_source, is_from_optimizer_source


def same_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    """For ``VariableBuilder.__call__``: guards for a tensor that is found again, where Dynamo has none."""

    def __call__(self: Any, value: Any) -> Any:
        variable = original(self, value)
        first = variable.source if isinstance(value, torch.Tensor) else None
        if first is None or first == self.source:
            return variable
        by_optimizer = is_from_optimizer_source(first) or is_from_optimizer_source(self.source)
        apart = is_from_local_source(first) != is_from_local_source(self.source)
        if by_optimizer or (apart and isinstance(value, torch.nn.Parameter)):
            for source in (first, self.source):  # they stay: to know each is cheaper than to compare
                install_guard(source.make_guard(GuardBuilder.ID_MATCH))
        elif apart:
            alike = functools.partial(GuardBuilder.DUPLICATE_INPUT, source_b=first)
            install_guard(self.source.make_guard(alike))
        return variable

    return __call__
