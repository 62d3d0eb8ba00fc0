"""Check each gradient as it is born, update its parameter as soon as may be, and free it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from ..analysis.nodes import is_large
from ..analysis.updates import update_groups
from ..ir.alias import is_view
from ..ir.edit import Editor
from ..ir.graph import Phase, StepGraph, phase, source
from .base import GraphPass

aten = torch.ops.aten
# What may move: everything after the backward that made a gradient.
MOVABLE = (Phase.GRADIENT, Phase.CHECK, Phase.UPDATE)


@dataclass(frozen=True)
class Release(GraphPass):
    """Move checks and updates up to where the last value they need is born.

    In the graph as captured gradients are looked at when backward is over, so
    all of them live at once. The norm and the finite check of a gradient need
    only itself: they follow its birth. An update needs its own gradient, its
    verdict and clip coefficient, and that nobody reads the old parameter any
    more: where that is known early (``skip="tensor"``, or gradients computed a
    second time after the verdict) one gradient is alive at a time. With one
    verdict over all gradients of one backward, updates stay where they are.
    """

    name: ClassVar[str] = "release"
    skip: str = "step"
    release: bool = False

    def run(self, step: StepGraph, edit: Editor) -> None:
        order = {n: i for i, n in enumerate(step.graph.nodes)}
        plans = [_plan(order, [node]) for node in step.nodes() if _reduces_a_gradient(node)]
        if self.skip == "step" and not self.release:
            edit.decline("one verdict over all gradients: every update waits for the last of them")
        else:
            for group in update_groups(step):
                plans.append(_plan(order, group.writes))
                if plans[-1] is None:
                    name = step.names.get(source(group.writes[0]), "?")
                    edit.decline(f"{name}: its update needs no gradient")
        _move(edit, sorted((p for p in plans if p is not None), key=lambda plan: order[plan.anchor]))


def _reduces_a_gradient(node: Node) -> bool:
    """Norms, finite checks and magnitudes: something small made of something large after backward."""
    inputs = node.all_input_nodes
    return phase(node) in (Phase.GRADIENT, Phase.CHECK) and not is_large(node) and any(map(is_large, inputs))


@dataclass(frozen=True)
class _Plan:
    """Nodes that may stand right behind ``anchor``, in order."""

    anchor: Node
    nodes: list[Node]


def _plan(order: dict[Node, int], results: list[Node]) -> _Plan | None:
    """How far up ``results`` can move, with what they need; None if they could stand anywhere."""
    needed = set(results)
    stack = list(results)
    while stack:
        for node in stack.pop().all_input_nodes:
            if node not in needed and node.op == "call_function" and phase(node) in MOVABLE:
                needed.add(node)
                stack.append(node)
    before = {n for node in needed for n in node.all_input_nodes if n.op == "call_function"} - needed
    for write in results:
        if write.target is aten.copy_.default:
            before |= _readers(source(write), needed)
    if not before:
        return None
    anchor = max(before, key=order.__getitem__)
    return _Plan(anchor, sorted((n for n in needed if order[n] > order[anchor]), key=order.__getitem__))


def _move(edit: Editor, plans: list[_Plan]) -> None:
    last: dict[Node, Node] = {}  # the last node moved behind an anchor
    moved: set[Node] = set()
    for plan in plans:
        for node in plan.nodes:
            if node not in moved:
                edit.move_after(node, last.get(plan.anchor, plan.anchor))
                last[plan.anchor] = node
                moved.add(node)


def _readers(old: Node, needed: set[Node]) -> set[Node]:
    """Who reads an input before it is written, directly or through views, other than its own update."""
    found: set[Node] = set()
    stack = [old]
    while stack:
        node = stack.pop()
        for user in node.users:
            if user in needed or user in found or user.op == "output":
                continue
            found.add(user)
            if is_view(user):
                stack.append(user)
    return found
