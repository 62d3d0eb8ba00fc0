"""Runs passes in order: edits, verification, timing and records, in one place."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..clock import stage, tell
from ..ir.edit import Editor
from ..ir.graph import StepGraph
from ..ir.verify import verify
from .base import GraphPass


@dataclass(frozen=True)
class PassRecord:
    """What one pass did: nodes it inserted and removed, what it declined, CPU seconds it took."""

    name: str
    inserted: int
    removed: int
    declined: tuple[str, ...]
    seconds: float


def run_pipeline(
    step: StepGraph,
    passes: Sequence[GraphPass],
    *,
    check: bool = True,
    after_each: Callable[[str, StepGraph], None] = lambda name, step: None,
) -> list[PassRecord]:
    """Apply ``passes`` to ``step`` in place; verify after each if ``check``.

    Raises:
        VerifyError: a pass left an illegal graph; names the pass and the node.
    """
    records = []
    for graph_pass in passes:
        start = time.process_time()
        tell(f"{graph_pass.name}, {len(step.graph.nodes)} nodes")
        edit = Editor(step, graph_pass.name)
        graph_pass.run(step, edit)
        seconds = time.process_time() - start
        if check:
            with stage("verify"):
                verify(step, graph_pass.name, edit.unproven())
        records.append(
            PassRecord(graph_pass.name, len(edit.inserted), edit.removed, tuple(edit.declined), seconds)
        )
        after_each(graph_pass.name, step)
    step.graph.lint()
    return records
