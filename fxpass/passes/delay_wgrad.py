"""Compute a layer's input gradient before its weight gradient, where that holds fewer bytes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from torch.fx import Node

from ..analysis.cost import flops
from ..analysis.nodes import nbytes
from ..ir.alias import is_view, storage_of
from ..ir.edit import Editor
from ..ir.graph import Phase, StepGraph, phase
from .graph_pass import GraphPass


@dataclass(frozen=True)
class DelayWgrad(GraphPass):
    """Swap a weight gradient with the input gradient that follows it.

    The input gradient needs a cast of the weight, which dies with it; the
    weight gradient stays. Autograd computes them in either order (a head
    without bias: weight first), and then both are alive with the cast: two
    copies of a vocabulary at the peak of a step that frees its gradients. The
    weight gradient may go second unless it frees more than it makes: with many
    tokens, the activations it is the last to read.
    """

    name: ClassVar[str] = "delay_wgrad"

    def run(self, step: StepGraph, edit: Editor) -> None:
        order = {n: i for i, n in enumerate(step.graph.nodes)}
        products = [n for n in step.nodes() if phase(n) is Phase.BACKWARD and flops(n)]
        for first, second in pairwise(products):
            moving = _with_views(first, order[second], order)
            if moving is None or not _share_an_input(first, second):
                continue
            if nbytes(first) <= _freed(first, order):
                continue
            behind = second
            for node in moving:
                edit.move_after(node, behind)
                behind = node


def _with_views(node: Node, before: int, order: dict[Node, int]) -> list[Node] | None:
    """``node`` and views of it that stand before position ``before``; None if more than views do."""
    nodes = [node]
    for current in nodes:
        for user in current.users:
            if order[user] > before:
                continue
            if not is_view(user):
                return None
            nodes.append(user)
    return sorted(nodes, key=order.__getitem__)


def _share_an_input(first: Node, second: Node) -> bool:
    sources = {storage_of(n) for n in first.all_input_nodes}
    return any(storage_of(n) in sources for n in second.all_input_nodes)


def _freed(node: Node, order: dict[Node, int]) -> int:
    """Bytes of the inputs that ``node`` is the last to read."""
    return sum(
        nbytes(n) for n in {storage_of(n) for n in node.all_input_nodes} if _last(n, order) <= order[node]
    )


def _last(value: Node, order: dict[Node, int]) -> int:
    last, views = order[value], [value]
    for view in views:
        for user in view.users:
            last = max(last, order[user])
            views += [user] if is_view(user) else []
    return last
