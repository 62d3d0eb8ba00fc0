"""Gradients that stay in ``.grad`` for somebody else are finite."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from ..ir.edit import Editor
from ..ir.graph import Phase, StepGraph, tensor
from .graph_pass import GraphPass
from .results import Checked

aten = torch.ops.aten
REASON = "nobody outside of the step checks for the loss scale's overflow"


@dataclass(frozen=True)
class HandOver(GraphPass):
    """Leave ``.grad`` as it was where the step is skipped or the gradient itself is not finite.

    For leaves that no optimizer of the step updates: an optimizer outside of the
    compiled function, or nobody, reads them. They are unscaled already. Where
    ``.grad`` was None it becomes zeros: whether it is None cannot depend on data.
    """

    name: ClassVar[str] = "hand_over"
    requires: ClassVar = (Checked,)

    def run(self, step: StepGraph, edit: Editor) -> None:
        if not step.result(Checked).found_inf or not step.handed_over:
            edit.decline("no gradient leaves the step")
            return
        output = next(n for n in reversed(step.graph.nodes) if n.op == "output")
        results = list(output.args[0])
        skipped = step.result(Checked).last
        for position, before in step.handed_over:
            grad = results[position]
            if isinstance(grad, Node) and tensor(grad).numel() != 0:
                with edit.before(output):
                    results[position] = _guarded(edit, grad, skipped, before)
        edit.set_arg(output, 0, tuple(results))


def _guarded(edit: Editor, grad: Node, skipped: Node, before: Node | None) -> Node:
    def call(target: torch._ops.OpOverload, *args: object) -> Node:
        return edit.call(target, *args, when=Phase.AFTER, reason=REASON)

    finite = call(aten.isfinite.default, call(aten.amax.default, call(aten.abs.default, grad)))
    bad = call(aten.logical_or.default, skipped, call(aten.logical_not.default, finite))
    if before is None:
        return call(aten.where.ScalarSelf, bad, 0.0, grad)
    return call(aten.where.self, bad, before, grad)
