"""Which writes of a step belong together: a parameter, its optimizer state, and what computes them."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch.fx import Node

from ..ir.graph import Phase, Role, StepGraph, phase, source
from ..ir.marks import GRAD, MARK, UPDATE
from ..ir.provenance import origin
from .homogeneous import reads_values

aten = torch.ops.aten


@dataclass
class UpdateGroup:
    """One parameter with its state, and every other one that shares computation with it."""

    writes: list[Node]  # copy_ nodes, in graph order
    body: set[Node]  # update nodes, and the unscale of their gradients


def update_groups(step: StepGraph) -> list[UpdateGroup]:
    """The writes of parameters and optimizer states, grouped, in the order of their first write.

    A parameter and its state stay together even where they share no computation, as a step count
    that only counts: they follow one verdict, and one may read what the other replaces.
    """
    owner: dict[Node, int] = {}  # of computation, and of parameters: the group that has it
    parameter = {node: step.slots[slot.owner] for slot, node in step.slots.items()}
    groups: dict[int, UpdateGroup] = {}
    for number, write in enumerate(n for n in step.graph.nodes if n.target is aten.copy_.default):
        old = source(write)
        if step.roles.get(old) not in (Role.PARAMETER, Role.STATE):
            continue
        body = _body(write)
        shared = {n for n in body if phase(n) is Phase.UPDATE} | {parameter.get(old, old)}
        group = UpdateGroup([write], body)
        for other in {owner[n] for n in shared if n in owner}:
            merged = groups.pop(other)
            group = UpdateGroup([*merged.writes, *group.writes], merged.body | group.body)
        groups[number] = group
        owner.update({n: number for n in group.body if phase(n) is Phase.UPDATE})
        owner.update({parameter.get(n, n): number for n in map(source, group.writes)})
    order = {n: i for i, n in enumerate(step.graph.nodes)}
    for group in groups.values():
        group.writes.sort(key=order.__getitem__)
    return sorted(groups.values(), key=lambda g: order[g.writes[0]])


def gradients_behind(nodes: set[Node]) -> list[Node]:
    """The GRAD marks that values depend on."""
    return marks_behind(nodes, GRAD)


def gradients_before(marks: set[Node]) -> set[Node]:
    """The GRAD marks that ``marks`` depend on by way of a later forward: the first backward of SAM."""
    earlier: set[Node] = set()
    new = marks
    while new:
        new = set(marks_behind({source(mark) for mark in new}, GRAD, guarded=True)) - earlier
        earlier |= new
    return earlier - marks


def marks_behind(nodes: set[Node], role: str, *, guarded: bool = False) -> list[Node]:
    """The marks of ``role`` that values depend on, up to the GRAD marks.

    ``guarded``: the value of an UPDATE mark depends only on the one it replaces, as on a skipped step.
    """
    marks: dict[Node, None] = {}
    seen: set[Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.target is MARK and node.args[1] == role:
            marks[node] = None
        if node.target is MARK and node.args[1] == GRAD:
            continue
        stack += [n for n in _depends_on(node, guarded) if n.op != "placeholder"]
    return list(marks)


def _depends_on(node: Node, guarded: bool) -> list[Node]:
    """What the value is computed from: not what a copy overwrites, nor a guarded update's new value."""
    if node.target is aten.copy.default:
        return [source(node, 1)]
    if not reads_values(node):
        return []
    if guarded and node.target is MARK and node.args[1] == UPDATE:
        return [source(node, 3)]
    if node.target is operator.getitem and _is_foreach(source(node)):
        index = node.args[1]
        assert isinstance(index, int)
        parts = [a[index] if isinstance(a, (list, tuple)) else a for a in source(node).args]
        return [part for part in parts if isinstance(part, Node)]
    return node.all_input_nodes


def _is_foreach(node: Node) -> bool:
    """One operator over lists of tensors, as clip_grad_value_ calls: each result has its own element's."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.name.startswith("aten::_foreach_")


def follows_gradient(step: StepGraph) -> list[Node]:
    """Writes of values that depend on a gradient although updates are guarded: the user's statistics of it.

    A parameter after its guarded update is clean: what is made of it follows eager.
    """
    scaler = set(step.scaler.values())
    tainted: set[Node] = set()
    writes = []
    for node in step.graph.nodes:
        if node.target is MARK and node.args[1] == GRAD:
            tainted.add(node)
        elif node.target is aten.copy_.default:
            if source(node, 1) in tainted and source(node) not in scaler:
                writes.append(node)
        elif not tainted.isdisjoint(_depends_on(node, guarded=True)):
            tainted.add(node)
    return writes


def _body(write: Node) -> set[Node]:
    body: set[Node] = set()
    stack = list(write.all_input_nodes)
    while stack:
        node = stack.pop()
        if node not in body and _belongs(node):
            body.add(node)
            stack += node.all_input_nodes
    return body


def _belongs(node: Node) -> bool:
    if node.op != "call_function":
        return False
    unscales = phase(node) is Phase.GRADIENT and origin(node) is not None
    return phase(node) is Phase.UPDATE or unscales
