"""Compute the gradients a second time, after the verdict, so that none has to wait for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from ..analysis.cost import is_deterministic
from ..analysis.nodes import is_large
from ..ir.alias import is_view
from ..ir.edit import Editor
from ..ir.graph import Phase, StepGraph, phase, source
from ..ir.marks import MARK, SEED
from .graph_pass import GraphPass
from .results import Checked

NAN_TO_NUM = torch.ops.aten.nan_to_num.default
AGAIN = (Phase.BACKWARD, Phase.GRADIENT)


@dataclass(frozen=True)
class SecondBackward(GraphPass):
    """Repeat backward after the verdict and let the updates read the second gradients.

    The first backward then serves the finite check and the global norm alone:
    each of its gradients is reduced to a number and freed. The second one
    computes the same bits from what forward saved, and each gradient goes
    straight into its parameter's update. Exact skip and exact clipping for
    2 bytes per parameter less, at the price of one more backward; activations
    live until the second backward is through with them.

    Not every kernel gives the same bits twice: sums by atomic additions (of a
    table's gradient, of attention's on CUDA) depend on the order in which
    threads come. The verdict is about the first gradients, so what is not
    finite in the second ones alone is read as 0: no update writes it.
    """

    name: ClassVar[str] = "second_backward"
    requires: ClassVar = (Checked,)
    release: bool = False

    def run(self, step: StepGraph, edit: Editor) -> None:
        if not self.release:
            edit.decline("release is False: gradients wait for the verdict")
            return
        seeds = step.marks(SEED)
        if len(seeds) != 1 or not step.result(Checked).found_inf:
            edit.decline(f"{len(seeds)} backwards: the activations of all would have to be kept")
            return
        first = edit.first(n for n in step.nodes() if phase(n) is Phase.UPDATE)
        reads = [(user, n) for user in step.nodes() if phase(user) is Phase.UPDATE for n in _large(user)]
        if first is None or not reads:
            edit.decline("no large gradient reaches an update")
            return
        again = _behind([n for _, n in reads])
        copies: dict[Node, Node] = {}
        verdict = edit.last(step.result(Checked).found_inf.values())
        with edit.before(edit.last([first, verdict.next])):
            for node in [n for n in step.graph.nodes if n in again]:
                if node.target is MARK:
                    copies[node] = copies.get(source(node), source(node))
                else:
                    reason = "the gradient again, after the verdict"
                    copies[node] = edit.copy(node, copies, when=phase(node), reason=reason)
        finite: dict[Node, Node] = {}
        for user, value in reads:
            if copies[value] is not value:
                if value not in finite:
                    finite[value] = self._finite(edit, copies[value])
                edit.read_instead(user, value, finite[value])

    def _finite(self, edit: Editor, gradient: Node) -> Node:
        with edit.after(gradient):
            reason = "the verdict was about the first gradient"
            return edit.call(NAN_TO_NUM, gradient, 0.0, 0.0, 0.0, when=Phase.UPDATE, reason=reason)


def _large(user: Node) -> list[Node]:
    return [n for n in user.all_input_nodes if phase(n) in AGAIN and is_large(n)]


def _behind(values: list[Node]) -> set[Node]:
    """What has to be computed again for ``values``: large results of backward, and the views between."""
    nodes: set[Node] = set()
    stack = list(values)
    while stack:
        node = stack.pop()
        if node in nodes or node.op != "call_function" or phase(node) not in AGAIN or not _repeats(node):
            continue
        nodes.add(node)
        stack += node.all_input_nodes
    return nodes


def _repeats(node: Node) -> bool:
    if node.target is MARK:
        return True
    tensors = is_large(node) or not hasattr(node.meta["val"], "shape")
    return is_deterministic(node) and (tensors or is_view(node))
