"""A tensor that a step reaches by two roads is one tensor; once the roads part, the step is another.

Written for torch 2.11 to 2.13; active only inside ``dynamo.py``'s patches. Dynamo guards on that,
but not where one road leads through an optimizer, nor from a local name and a global
one: a layer replaced in the model would be trained in the place of what the optimizer holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.source import is_from_local_source, is_from_optimizer_source


def same_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    """For ``VariableBuilder.__call__``: where it finds a tensor again, guard on which tensor it is."""

    def __call__(self: Any, value: Any) -> Any:
        found = original(self, value)
        first = found.source if isinstance(value, torch.Tensor) else None
        if first is not None and first != self.source and not _guarded(first, self.source):
            for source in (first, self.source):
                install_guard(source.make_guard(GuardBuilder.ID_MATCH))
        return found

    return __call__


def _guarded(a: Any, b: Any) -> bool:
    """Whether Dynamo itself guards on that both lead to one object."""
    apart = is_from_local_source(a) != is_from_local_source(b)
    return not (apart or is_from_optimizer_source(a) or is_from_optimizer_source(b))
