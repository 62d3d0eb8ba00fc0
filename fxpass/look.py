"""A dry run: compilations that end after the passes, with a look at the graph, and compile nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from .analysis.memory import MemoryProfile
from .ir.graph import StepGraph
from .options import Options


class DryRunEnd(BaseException):
    """The passes of a training step have run; ends the call of the compiled function."""


@dataclass(frozen=True)
class Look:
    """What a dry run does with a graph."""

    after_each: Callable[[str, StepGraph], None]  # sees the graph as captured and after each pass
    profile: Callable[[StepGraph, list[Any], Options, str | None], MemoryProfile]  # may take the graph apart


_look: ContextVar[Look | None] = ContextVar("fxpass_look", default=None)


@contextmanager
def looking(look: Look) -> Iterator[None]:
    """Compilations inside are dry runs; that of a training step ends the block."""
    token = _look.set(look)
    try:
        yield
    except DryRunEnd:
        pass
    finally:
        _look.reset(token)


def current_look() -> Look | None:
    """What the dry run around does; None if there is none."""
    return _look.get()
