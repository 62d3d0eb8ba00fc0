"""What is kept of a compiled step for the next process, and how it is found there again.

The key is the captured step as text (capture/key.py) with the options; in the entry are Inductor's
compiled graphs and ``Kept``, which is all that the stages after capture would find out.
"""

from __future__ import annotations

import dataclasses
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from .. import _torch
from ..analysis.memory import MemoryProfile
from ..capture.key import Unspeakable, text_of
from ..capture.scalars import Comparison
from ..capture.step import Captured
from ..ir.graph import StepGraph
from ..ir.slots import Slot
from ..lower.callable import Lowered, assembled, settings_of
from ..options import Options
from ..passes import passes_for
from ..passes.pipeline import PassRecord
from ..passes.results import Checked
from .dry_run_hooks import dry_run_hooks


@dataclass(frozen=True)
class KeptColumn:
    """A column of the watch table: whose gradient it is about, and how many elements are sampled."""

    name: str
    sampled: int
    slot: Slot | None  # of the parameter, if an optimizer has it


@dataclass(frozen=True)
class Kept:
    """What is known of a compiled step beside its program."""

    before: str  # the graph as captured, as text
    after: str
    passes: list[PassRecord]
    memory: MemoryProfile
    columns: list[KeptColumn]
    comparisons: Sequence[Sequence[Comparison]]  # by event: how settings compared while it was traced
    calls: Sequence[int]  # which compiled graph each call in the step runs
    warned: Sequence[tuple[Warning, str, int]]  # what the user was warned of, and its file and line


@contextmanager
def listening(warned: list[tuple[Warning, str, int]]) -> Iterator[None]:
    """Note in ``warned`` what the user is warned of inside, which the user hears all the same."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        yield
    warned += [(w.message, w.filename, w.lineno) for w in heard if isinstance(w.message, Warning)]
    warn_again(warned)


def warn_again(warned: Sequence[tuple[Warning, str, int]]) -> None:
    """Warn the user of what was found when the step was compiled."""
    for message, file, line in warned:
        warnings.warn_explicit(message, type(message), file, line)


def columns_of(step: StepGraph) -> list[KeptColumn]:
    """The columns of the watch table of ``step``."""
    slots, columns = {node: slot for slot, node in step.slots.items()}, []
    checked = step.result(Checked)
    for mark in checked.gradients:
        leaf = step.gradients[mark].leaf
        name = step.gradients[mark].name if leaf is None else step.names[leaf]
        sampled = checked.tiny[mark][2] if mark in checked.tiny else 0
        columns.append(KeptColumn(name, sampled, None if leaf is None else slots.get(leaf)))
    return columns


def warm(
    options: Options,
    mode: str | None,
    captured: Captured,
    *,
    names: Mapping[str, str],
    inputs: Sequence[Any],
    restore: Callable[[Kept], None],
) -> tuple[_torch.Warm | None, str]:
    """How a step is looked up on disk, None if it is not; and "miss", or why not."""
    settings = settings_of(inputs, options, mode)
    if dry_run_hooks() is not None:
        return None, ""
    if options.codegen != "inductor":
        return None, f"there is no code: codegen={options.codegen!r}"
    if options.data_parallel is not None:
        return None, "ranks agree on each compilation"
    if reason := _torch.not_cached(settings):
        return None, reason
    try:
        text = "\n".join((_options(options), _passes(options), repr(mode), text_of(captured, names)))
    except Unspeakable as reason:
        return None, str(reason)

    def load(parts: list[Callable[..., Any]], kept: bytes) -> Callable[..., Any]:
        restored: Kept = pickle.loads(kept)
        restore(restored)
        return assembled(parts, restored.calls)

    return _torch.Warm(text, settings, load), "miss"


def as_code(lowered: Lowered, kept: Kept) -> Callable[..., Any]:
    """The callable of a lowered step, with what is kept of it if that can be written down."""
    try:
        written = pickle.dumps(kept)
    except (pickle.PicklingError, AttributeError, TypeError):
        written = b""
    return _torch.step_code(lowered.call, lowered.parts, written)


def _passes(options: Options) -> str:
    passes = passes_for(options)
    if foreign := next((p for p in passes if not type(p).__module__.startswith("fxpass.")), None):
        raise Unspeakable(f"pass {foreign.name!r} is the user's: its code may change")
    return repr(passes)


def _options(options: Options) -> str:
    scale = options.policy
    if scale is not None and not type(scale).__module__.startswith("fxpass."):
        raise Unspeakable("the loss scale is a class of the user's: its code may change")
    decides = [f.name for f in dataclasses.fields(Options) if f.name != "progress"]
    return repr([(name, getattr(options, name)) for name in decides])
