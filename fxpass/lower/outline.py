"""Compile repeated parameter updates once.

A model has hundreds of parameters but few shapes. In one graph Inductor would
fuse, generate and compile every update anew; here each update is cut out as a
small graph of its own, equal ones are compiled once, and the step's graph calls
them, each where it stood.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from .. import _torch
from ..analysis.updates import UpdateGroup, update_groups
from ..ir.alias import input_storages, written
from ..ir.graph import Phase, StepGraph, phase
from ..ir.verify import check_hazards, failure
from .hoist import hold_scalars

aten = torch.ops.aten

_library = torch.library.Library("fxpass", "FRAGMENT")
_library.define("update(Tensor(a!)[] writes, Tensor[] reads, int[] runs) -> ()")
_running = threading.local()
UPDATE = torch.ops.fxpass.update.default


def _update(writes: list[Tensor], reads: list[Tensor], runs: list[int]) -> None:
    """Run updates of the running step: by number, since the graph may be cached on disk.

    ``runs`` has three numbers for each: which it is, how many of ``writes`` and of ``reads`` are its own.
    """
    units, write, read = _running.units[-1], 0, 0
    for at in range(0, len(runs), 3):
        number, writing, reading = runs[at : at + 3]
        units[number]([*writes[write : write + writing], *reads[read : read + reading]])
        write += writing
        read += reading


_library.impl("update", _update, "CompositeExplicitAutograd")
torch.library.register_fake("fxpass::update", lambda writes, reads, runs: None, lib=_library)


@dataclass
class Unit:
    """One update: nodes to run, the inputs it writes, other values it reads, a text of all that."""

    nodes: list[Node]  # in graph order, copy_ nodes last
    writes: list[Node]
    reads: list[Node]
    key: str

    @property
    def inputs(self) -> list[Node]:
        """The arguments of its call, in their order."""
        return self.writes + self.reads

    @property
    def place(self) -> Node:
        """The first write, where the call will stand."""
        return next(n for n in self.nodes if n.target is aten.copy_.default)


def find_units(step: StepGraph) -> list[Unit]:
    """The updates that occur at least twice and that nothing else in the graph reads."""
    order = {n: i for i, n in enumerate(step.graph.nodes)}
    units = []
    for group in update_groups(step):
        if _is_read_elsewhere(group):
            continue
        nodes = sorted(group.body, key=order.__getitem__) + group.writes
        inputs = dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in group.body)
        writes = list(dict.fromkeys(n for write in group.writes if isinstance(n := write.args[0], Node)))
        reads = [n for n in inputs if n not in writes and n not in group.writes]
        if all(isinstance(n.meta["val"], Tensor) for n in reads):
            units.append(Unit(nodes, writes, reads, _key(nodes, writes + reads)))
    units = _in_order(step, units, order)
    counts: dict[str, int] = {}
    for unit in units:
        counts[unit.key] = counts.get(unit.key, 0) + 1
    return [unit for unit in units if counts[unit.key] > 1]


def _in_order(step: StepGraph, units: list[Unit], order: dict[Node, int]) -> list[Unit]:
    """The units that can run as one where their first write stands.

    All that a unit reads is then read later, all that it writes is written
    earlier than in the graph: an update that reads what another one has
    overwritten by then (a neighbour's old weight) stays in the graph.
    """
    lies = input_storages(step.graph)

    def inputs(nodes: Iterable[Node]) -> set[Node]:
        return {base for node in nodes for base in lies.get(node, ())}

    # in a unit's own graph, a view of what it writes would be an input unrelated to it
    units = [unit for unit in units if inputs(unit.reads).isdisjoint(unit.writes)]
    while True:
        inside = {node: unit for unit in units for node in unit.nodes}
        actions = [(order[u.place], u, inputs(u.reads), set(u.writes)) for u in units]
        actions += [
            (order[n], None, inputs(n.all_input_nodes), inputs(written(n)))
            for n in step.nodes()
            if n not in inside
        ]
        writers = {base: (place, unit) for place, unit, _, writes in actions for base in writes}
        late: list[Unit] = []
        for place, unit, reads, _ in actions:
            for base in reads & writers.keys():
                written_at, writer = writers[base]
                if written_at < place and (reader := unit or writer) is not None:
                    late.append(reader)
        if not late:
            return units
        units = [unit for unit in units if not any(unit is other for other in late)]


def _is_read_elsewhere(group: UpdateGroup) -> bool:
    inside = group.body.union(group.writes)
    return any(
        user not in inside
        for node in (*group.body, *group.writes)
        for user in node.users
        if phase(node) is Phase.UPDATE or node in group.writes
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


def call_units(step: StepGraph, units: list[Unit], *, check: bool = True) -> list[Node]:
    """Replace the nodes of each unit by a call, where its first write stood; returns each unit's call.

    Neighbours are one call, since each takes as long as the update of a small parameter.

    Raises:
        VerifyError: with ``check``, where something would read what a call has overwritten.
    """
    calls = []
    for number, unit in enumerate(units):
        with step.graph.inserting_before(unit.place):
            runs = [number, len(unit.writes), len(unit.reads)]
            call = step.graph.call_function(UPDATE, (unit.writes, unit.reads, runs))
            call.meta.update(val=None, fxpass_phase=Phase.UPDATE)
            calls.append(call)
        for node in reversed(unit.nodes):
            if not node.users:
                step.graph.erase_node(node)
    step.graph.eliminate_dead_code()
    joined = _join_neighbours(step, calls)
    if check:
        check_hazards(step.graph, failure("outlining"))
    return joined


def _join_neighbours(step: StepGraph, calls: list[Node]) -> list[Node]:
    """Make calls with nothing between them one; returns the call that each of ``calls`` is part of.

    What they read is alive at the first of them anyway, and none allocates more than scalars.
    """
    lies = input_storages(step.graph)
    part_of: dict[Node, Node] = {}
    last: Node | None = None
    for node in list(step.graph.nodes):
        if node.target is not UPDATE:
            last = None
            continue
        if last is not None:
            both: list[Any] = [a + b for a, b in zip(last.args, node.args, strict=True)]
            writes, reads = ({base for n in part for base in lies.get(n, {n})} for part in both[:2])
            if writes.isdisjoint(reads) and len(set(both[0])) == len(both[0]):
                last.args = tuple(both)
                part_of[node] = last
                step.graph.erase_node(node)
                continue
        part_of[node] = last = node
    return [part_of[call] for call in calls]


def with_units(main: Callable[..., Any], units: list[Callable[..., Any]]) -> Callable[..., Any]:
    """``main`` with its calls of updates led to ``units``."""

    def run(inputs: list[Any]) -> Any:
        stack = vars(_running).setdefault("units", [])
        stack.append(units)
        try:
            return main(inputs)
        finally:
            stack.pop()

    return _torch.boxed(run)
