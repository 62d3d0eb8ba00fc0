"""Compile repeated parameter updates once.

A model has hundreds of parameters but few shapes. In one graph Inductor would
fuse, generate and compile every update anew; here each update is cut out as a
small graph of its own, equal ones are compiled once, and the step calls them
in turn. A gradient is dropped as soon as its update has run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from .. import _torch
from ..ir.graph import Phase, Role, StepGraph, origin, phase
from .scalars import hold_scalars

aten = torch.ops.aten


@dataclass
class Unit:
    """One update: nodes to run, the values they read, and a text equal for equal updates."""

    nodes: list[Node]  # in graph order, copy_ nodes last
    inputs: list[Node]
    key: str


def find_units(step: StepGraph) -> list[Unit]:
    """The updates that occur at least twice and that nothing else in the graph reads."""
    order = {n: i for i, n in enumerate(step.graph.nodes)}
    groups = _group(step)
    units = []
    for writes in groups:
        body = set().union(*(_body(w) for w in writes))
        if any(
            user not in body
            for node in body
            for user in node.users
            if user.target is not aten.copy_.default and phase(node) is Phase.UPDATE
        ):
            continue
        nodes = sorted(body, key=order.__getitem__) + sorted(writes, key=order.__getitem__)
        inputs = list(dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in body))
        if all(isinstance(n.meta["val"], torch.Tensor) for n in inputs):
            units.append(Unit(nodes, inputs, _key(nodes, inputs)))
    counts: dict[str, int] = {}
    for unit in units:
        counts[unit.key] = counts.get(unit.key, 0) + 1
    return [unit for unit in units if counts[unit.key] > 1]


def _group(step: StepGraph) -> list[list[Node]]:
    """The writes of parameters and states, those that share computation together."""
    owner: dict[Node, int] = {}
    groups: dict[int, list[Node]] = {}
    for number, write in enumerate(n for n in step.graph.nodes if n.target is aten.copy_.default):
        if step.roles.get(write.args[0]) not in (Role.PARAMETER, Role.STATE):
            continue
        members = [write]
        shared = {owner[n] for n in _body(write) if n in owner and phase(n) is Phase.UPDATE}
        for other in shared:
            members += groups.pop(other)
        groups[number] = members
        for member in members:
            owner.update(dict.fromkeys(_body(member), number))
    return list(groups.values())


def _body(write: Node) -> set[Node]:
    """What has to be computed for one write: update nodes, and the unscale of its gradient."""
    found: set[Node] = set()
    stack = [n for n in write.all_input_nodes]
    while stack:
        node = stack.pop()
        if node not in found and _belongs(node):
            found.add(node)
            stack += node.all_input_nodes
    return found


def _belongs(node: Node) -> bool:
    if node.op != "call_function":
        return False
    made = origin(node)
    return phase(node) is Phase.UPDATE or (
        made is not None and made.pass_name == "unscale" and phase(node) is Phase.GRADIENT
    )


def _key(nodes: list[Node], inputs: list[Node]) -> str:
    names = {n: f"i{k}" for k, n in enumerate(inputs)} | {n: f"n{k}" for k, n in enumerate(nodes)}
    shown = [_type(n) for n in inputs]
    for node in nodes:
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: _Name(names[n]))
        shown.append(f"{node.target}{args}{kwargs}")
    return "\n".join(shown)


class _Name(str):
    """A name that prints without quotes."""

    def __repr__(self) -> str:
        return str(self)


def _type(node: Node) -> str:
    value = node.meta["val"]
    return f"{value.dtype} {tuple(value.shape)} {value.stride()} {value.device}"


def to_graph(unit: Unit) -> GraphModule:
    """The unit as a graph of its own, with the unit's inputs as placeholders."""
    graph = Graph()
    copies: dict[Node, Node] = {}
    for number, node in enumerate(unit.inputs):
        copies[node] = graph.placeholder(f"arg{number}_1")
        copies[node].meta["val"] = node.meta["val"]
    for node in unit.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(())
    hold_scalars(graph)
    graph.lint()
    return GraphModule(torch.nn.Module(), graph)


def cut(step: StepGraph, units: list[Unit]) -> list[Node]:
    """Remove the units from ``step`` and append what they read to its outputs; returns those values."""
    output = next(n for n in reversed(step.graph.nodes) if n.op == "output")
    for unit in units:
        for node in reversed(unit.nodes):
            if not node.users:
                step.graph.erase_node(node)
    values = list(dict.fromkeys(n for unit in units for n in unit.inputs if n.op != "placeholder"))
    output.args = ((*output.args[0], *values),)
    step.graph.eliminate_dead_code()
    return values


def run_with_updates(
    main: Callable[..., Any], updates: list[tuple[Callable[..., Any], list[tuple[int, bool]]]], outputs: int
) -> Callable[..., Any]:
    """Run ``main``, then each update on its (position, whether in the inputs or in ``main``'s results)."""
    last_use = {
        p: number for number, (_, reads) in enumerate(updates) for p, is_input in reads if not is_input
    }
    dying = [[p for p, last in last_use.items() if last == number] for number in range(len(updates))]

    def run(inputs: list[Any]) -> Any:
        kept = list(inputs)
        inputs.clear()
        results = list(main(list(kept)))
        values: list[Any] = results[outputs:]
        del results[outputs:]
        for (call, reads), dead in zip(updates, dying, strict=True):
            call([kept[p] if is_input else values[p] for p, is_input in reads])
            for p in dead:
                values[p] = None
        return results

    return _torch.boxed(run)
