"""Check each gradient as it is born, update its parameter as soon as may be, and free it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from ..analysis.nodes import is_large
from ..analysis.updates import update_groups
from ..ir.alias import input_storages
from ..ir.edit import Editor
from ..ir.graph import Phase, StepGraph, phase, source
from .graph_pass import GraphPass

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
        mover = _Mover(step)
        for node in step.nodes():
            if _reduces_a_gradient(node):
                mover.plan([node])
        if self.skip == "step" and not self.release:
            edit.decline("one verdict over all gradients: every update waits for the last of them")
        else:
            for group in update_groups(step):
                if not mover.plan(group.writes):
                    name = step.names.get(source(group.writes[0]), "?")
                    edit.decline(f"{name}: its update needs no gradient")
        mover.move(edit)


def _reduces_a_gradient(node: Node) -> bool:
    """Norms, finite checks and magnitudes: something small made of something large after backward."""
    inputs = node.all_input_nodes
    return phase(node) in (Phase.GRADIENT, Phase.CHECK) and not is_large(node) and any(map(is_large, inputs))


@dataclass
class _Plan:
    """Nodes that move up together, as far as what they read and what they overwrite allow."""

    nodes: set[Node]
    readers: set[Node]  # who reads what ``nodes`` overwrite, other than they themselves
    place: int  # the position they follow


class _Mover:
    """Moves nodes up in plans: a node goes where the earliest plan that needs it goes."""

    def __init__(self, step: StepGraph) -> None:
        self.nodes: list[Node] = list(step.graph.nodes)
        self.order = {n: i for i, n in enumerate(self.nodes)}
        self.plans: list[_Plan] = []
        self.readers: dict[Node, list[Node]] = {}
        lies = input_storages(step.graph)
        for node in step.nodes():
            for base in {base for value in node.all_input_nodes for base in lies.get(value, ())}:
                self.readers.setdefault(base, []).append(node)

    def plan(self, results: list[Node]) -> bool:
        """Plan to move ``results`` with what they need; False if they could stand anywhere."""
        needed = set(results)
        stack = list(results)
        while stack:
            for node in stack.pop().all_input_nodes:
                if node not in needed and node.op == "call_function" and phase(node) in MOVABLE:
                    needed.add(node)
                    stack.append(node)
        before = {n for node in needed for n in node.all_input_nodes if n.op == "call_function"} - needed
        overwritten = [source(n) for n in results if n.target is aten.copy_.default]
        readers = {n for old in overwritten for n in self.readers.get(old, ())} - needed
        if before or readers:
            self.plans.append(_Plan(needed, readers, max(map(self.order.__getitem__, before), default=0)))
        return bool(before or readers)

    def move(self, edit: Editor) -> None:
        """Put every planned node behind the place of its earliest plan; all else stays where it is."""
        places = self._settle()
        last: dict[int, Node] = {}
        for node in self.nodes:
            place = places.get(node, self.order[node])
            if place < self.order[node]:
                edit.move_after(node, last.get(place, self.nodes[place]))
                last[place] = node

    def _settle(self) -> dict[Node, int]:
        """Every planned node's place; a plan waits for the readers of what it overwrites, which move too."""
        places: dict[Node, int] = {}
        while True:
            before = [plan.place for plan in self.plans]
            places.clear()
            for plan in self.plans:
                for node in plan.nodes:
                    places[node] = min(plan.place, places.get(node, self.order[node]))
            for plan in self.plans:
                ends = [places.get(n, self.order[n]) for n in plan.readers]
                plan.place = max([plan.place, *ends])
            if before == [plan.place for plan in self.plans]:
                return places
