"""One finite check over every gradient the optimizers read, on the values as stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from ..ir.edit import Editor
from ..ir.graph import Phase, StepGraph, tensor
from ..ir.marks import GRAD, MARK, READ
from .base import GraphPass

aten = torch.ops.aten


@dataclass(frozen=True)
class CheckFinite(GraphPass):
    """Reduce each gradient once, as it leaves backward, to what the verdict and the norm need.

    A gradient needs only its sum of squares: in float32 for a float16 gradient
    (65504**2 times 1e28 elements still fits), in float64 for the others, so
    that the sum is finite exactly when every element is (ORT checks the norm
    the same way). The verdict of an optimizer is over the gradients of all
    optimizers that stepped up to the same backward.
    """

    name: ClassVar[str] = "check_finite"

    def run(self, step: StepGraph, edit: Editor) -> None:
        if not step.trains:
            edit.decline("no optimizer step")
            return
        sources = {read: _gradients_behind(read) for read in step.marks(READ)}
        finite: dict[Node, Node] = {}
        for mark in step.marks(GRAD):
            if any(mark in found for found in sources.values()) and tensor(mark).numel() != 0:
                finite[mark] = self._reduce(step, edit, mark)
        if not finite:
            edit.decline("no gradient reaches an optimizer")
            return
        verdicts: dict[int, Node] = {}
        for event, backwards in enumerate(step.backwards_before):
            if backwards not in verdicts:
                events = {e for e, b in enumerate(step.backwards_before) if b <= backwards}
                read = [
                    found
                    for (_, found), e in zip(sources.items(), step.read_events, strict=True)
                    if e in events
                ]
                values = [value for mark, value in finite.items() if any(mark in found for found in read)]
                with edit.after(_latest(step, values)):
                    verdicts[backwards] = _any_non_finite(edit, values)
            step.found_inf[event] = verdicts[backwards]
        step.checked = list(finite.items())

    def _reduce(self, step: StepGraph, edit: Editor, mark: Node) -> Node:
        dtype = torch.float32 if tensor(mark).dtype is torch.float16 else torch.float64
        reason = "norm and finite check"
        with edit.after(mark):
            wide = edit.cast(mark, dtype, when=Phase.CHECK, reason=reason)
            square = edit.call(aten.mul.Tensor, wide, wide, when=Phase.CHECK, reason=reason)
            total = edit.call(aten.sum.default, square, when=Phase.CHECK, reason=reason)
            total = edit.cast(total, torch.float64, when=Phase.CHECK, reason=reason)
        step.square_sums[mark] = total
        return total


def _gradients_behind(read: Node) -> set[Node]:
    """The GRAD marks whose values a READ mark depends on."""
    found: set[Node] = set()
    seen: set[Node] = set()
    stack = [read]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.target is MARK and node.args[1] == GRAD:
            found.add(node)
            continue
        stack += [n for n in node.all_input_nodes if n.op != "placeholder"]
    return found


def _latest(step: StepGraph, nodes: list[Node]) -> Node:
    order = {n: i for i, n in enumerate(step.graph.nodes)}
    return max(nodes, key=order.__getitem__)


def _any_non_finite(edit: Editor, values: list[Node]) -> Node:
    reason = "one verdict for the whole step"
    stacked = edit.call(aten.stack.default, values, when=Phase.CHECK, reason=reason)
    finite = edit.call(aten.isfinite.default, stacked, when=Phase.CHECK, reason=reason)
    bad = edit.call(aten.logical_not.default, finite, when=Phase.CHECK, reason=reason)
    return edit.call(aten.any.default, bad, when=Phase.CHECK, reason=reason)
