"""What ends compilations after the passes: a dry run sees the graphs, and nothing is compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from ..analysis.memory import MemoryProfile
from ..ir.graph import StepGraph
from ..options import Options


class DryRunEnd(BaseException):
    """The passes of a training step have run; ends the call of the compiled function."""


@dataclass(frozen=True)
class DryRunHooks:
    """What a dry run does with a graph."""

    after_each: Callable[[str, StepGraph], None]  # sees the graph as captured and after each pass
    profile: Callable[[StepGraph, list[Any], Options, str | None], MemoryProfile]  # may take the graph apart


_hooks: ContextVar[DryRunHooks | None] = ContextVar("fxpass_dry_run", default=None)


@contextmanager
def running_dry(hooks: DryRunHooks) -> Iterator[None]:
    """Compilations inside are dry runs; that of a training step ends the block."""
    token = _hooks.set(hooks)
    try:
        yield
    except DryRunEnd:
        pass
    finally:
        _hooks.reset(token)


def dry_run_hooks() -> DryRunHooks | None:
    """What the dry run around does; None if there is none."""
    return _hooks.get()
