"""Runs passes in order: edits, verification, timing and records, in one place."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import VerifyError
from ..ir.edit import Editor
from ..ir.graph import StepGraph
from ..ir.verify import VERIFIED, verify
from ..timing.clock import stage, tell
from .graph_pass import GraphPass


@dataclass(frozen=True)
class PassRecord:
    """What one pass did: nodes it inserted and removed, what it declined, CPU seconds it took."""

    name: str
    inserted: int
    removed: int
    seconds: float
    declined: tuple[str, ...]


def run_pipeline(
    step: StepGraph,
    passes: Sequence[GraphPass],
    *,
    check: bool = True,
    after_each: Callable[[str, StepGraph], None] = lambda name, step: None,
) -> list[PassRecord]:
    """Apply ``passes`` to ``step`` in place; if ``check``, verify after the first and each that changes it.

    Raises:
        VerifyError: a pass left an illegal graph, and names the pass and the node; or it left what it
            ensures wrong, or stands before a pass that leaves what it reads.
    """
    check_order(passes)
    records = []
    legal: list[object] = []  # the graph when it was verified last
    for graph_pass in passes:
        start = time.process_time()
        tell(f"{graph_pass.name}, {len(step.graph.nodes)} nodes")
        edit = Editor(step, graph_pass.name)
        graph_pass.run(step, edit)
        seconds = time.process_time() - start
        if check:
            with stage("verify"):
                now = _parts(step)
                if len(now) != len(legal) or any(a is not b for a, b in zip(now, legal, strict=True)):
                    verify(step, graph_pass.name, edit.unproven())
                legal = now
                _check_results(step, graph_pass)
        records.append(
            PassRecord(graph_pass.name, len(edit.inserted), edit.removed, seconds, tuple(edit.declined))
        )
        after_each(graph_pass.name, step)
    step.graph.lint()
    return records


def _parts(step: StepGraph) -> list[object]:
    """All that ``verify`` looks at: the same objects in the same order are the same graph."""
    return [
        part
        for node in step.graph.nodes
        for part in (node, node.target, node.args, node.kwargs, *map(node.meta.get, VERIFIED))
    ]


def check_order(passes: Sequence[GraphPass]) -> None:
    """Raise ``VerifyError`` unless what a pass requires is ensured before it, and what it reads not after."""
    for position, graph_pass in enumerate(passes):
        before = {kind for p in passes[:position] for kind in p.ensures}
        after = {kind: p.name for p in reversed(passes[position + 1 :]) for kind in p.ensures}
        for kind in graph_pass.requires:
            if kind not in before:
                raise _fault(graph_pass, f"requires {kind.__name__}, which no pass before it ensures")
        for kind in (*graph_pass.requires, *graph_pass.uses):
            if kind in after:
                raise _fault(graph_pass, f"reads {kind.__name__}, and pass {after[kind]!r} changes it later")


def _check_results(step: StepGraph, graph_pass: GraphPass) -> None:
    for kind in graph_pass.ensures:
        for fault in step.result(kind).faults(step):
            raise _fault(graph_pass, f"ensures {kind.__name__}, but {fault}")


def _fault(graph_pass: GraphPass, what: str) -> VerifyError:
    hint = "this is a bug of fxpass, please report it"
    return VerifyError(f"pass {graph_pass.name!r} {what}", hint=hint)
