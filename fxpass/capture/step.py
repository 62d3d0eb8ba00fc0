"""From Dynamo's graph of a frame to a ``StepGraph``.

The graph Dynamo made is copied, each opaque optimizer node becomes a call that
runs the optimizer on traced tensors, and the scaler state, learning rates and
optimizer state become extra inputs at the end. AOTAutograd then flattens all of
it into one ATen graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Graph, GraphModule, Node
from torch.fx.traceback import annotate

from .. import _torch
from ..errors import CaptureError
from ..ir.graph import Gradient, Read, Role, StepGraph, Update
from ..ir.marks import GRAD, READ, TEXT, UPDATE
from ..ir.shards import Shard
from ..ir.slots import Slot
from . import gradients, optim, optim_state, phases
from .activation_checkpoint import recompute_checkpoints
from .casts import spell_out_casts
from .effects import drop_tokens
from .events import Event
from .grouped import repeat_groups
from .numbers import as_tensor, spell_out_numbers
from .parts import split
from .readings import read_afterwards
from .regions import annotate_regions
from .renorm import spell_out_renorm
from .writes import hide_writes


@dataclass
class Captured:
    """A step ready to be traced: the rewritten Dynamo graph and what its inputs are."""

    gm: GraphModule
    events: list[Event]
    gradients: list[_torch.LeafGrad]  # by GRAD mark
    inputs: list[Node]  # Dynamo's placeholders; those of the scaler's fields and of slots follow them
    scaler: dict[str, Node] = field(default_factory=dict)
    slots: dict[Slot, Node] = field(default_factory=dict)  # parameters that are updated too
    writes: list[tuple[int, Slot]] = field(default_factory=list)  # by UPDATE mark, the event and what it sets
    kept: list[Slot] = field(default_factory=list)  # parameters whose gradients are extra outputs
    outputs: int = 0
    # output that is a gradient, the placeholder of the .grad before
    handed_over: list[tuple[int, str | None]] = field(default_factory=list)
    numbers: set[int] = field(default_factory=set)  # outputs that the caller gets as Python numbers
    in_place: set[str] = field(default_factory=set)  # placeholders of parameters whose .grad stays
    data: list[str] = field(default_factory=list)  # placeholders of what the function was called with
    shards: dict[Node, Shard] = field(default_factory=dict)  # placeholders of which this rank holds a part


def capture(
    gm: GraphModule,
    record: _torch.FrameRecord,
    events: list[Event],
    *,
    scaler_fields: Sequence[str],
    shards: Mapping[str, Shard],
    names: Mapping[str, str],
    keep_grads: bool,
) -> Captured:
    """Rewrite a copy of Dynamo's graph; the original stays as Dynamo needs it.

    ``scaler_fields`` become inputs after Dynamo's, and after them ``Event.inputs`` of every event.
    ``shards``: inputs of which this rank holds a part; ``names``: the user's, by Dynamo input.
    """
    graph = Graph()
    copies: dict[Node, Node] = {}
    graph.output(graph.graph_copy(gm.graph, copies))
    for old, new in copies.items():
        for attribute in ("_dynamo_source",):
            if hasattr(old, attribute):
                setattr(new, attribute, getattr(old, attribute))
    new_gm = GraphModule(gm, graph)
    by_name = {old.name: new for old, new in copies.items()}
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    captured = Captured(new_gm, events, list(record.leaf_grads), placeholders)
    captured.shards = {by_name[name]: shard for name, shard in shards.items()}
    split(graph, captured.shards, names)
    inputs = _ExtraInputs(graph, placeholders)
    captured.scaler = {name: inputs.add() for name in scaler_fields}
    phases.declare(graph, gradients.differentiated(graph))
    captured.in_place = gradients.written_in_place(graph)
    scaled, leaf_grads = gradients.mark_gradients(graph, len(record.backwards), len(record.leaf_grads))
    captured.gradients += leaf_grads
    captured.data = [n.name for n in placeholders if phases.is_data(n)]
    backwards = 0
    for node in list(graph.nodes):
        if node.target is _torch.optimizer_step:
            events[node.args[0]].backwards = backwards
            _expand_optimizer(node, captured, inputs, by_name)
        backwards += node in scaled
    _finish_outputs(graph, record, captured, by_name, keep_grads)
    captured.numbers = read_afterwards(graph)
    annotate_regions(graph)
    repeat_groups(graph)
    spell_out_casts(graph)
    spell_out_renorm(graph)
    spell_out_numbers(graph)
    hide_writes(graph)
    graph.lint()
    new_gm.recompile()
    return captured


class _ExtraInputs:
    """Appends placeholders after the last one."""

    def __init__(self, graph: Graph, placeholders: list[Node]) -> None:
        self.graph = graph
        self.last = placeholders[-1] if placeholders else None
        self.count = 0

    def add(self) -> Node:
        where = self.graph.inserting_after(self.last) if self.last else self.graph.inserting_before(None)
        with where:
            node = self.graph.placeholder(f"fxpass_{self.count}")
        vars(node)["_dynamo_source"] = None  # not an input of Dynamo's
        self.last = node
        self.count += 1
        return node


def _expand_optimizer(
    node: Node, captured: Captured, inputs: _ExtraInputs, by_name: Mapping[str, Node]
) -> None:
    arguments: Any = node.args
    index, params, grads, dynamic = arguments
    event = captured.events[index]
    optimizer = event.optimizer()
    forms = optim_state.state_of(optimizer, event.params, event.counters)
    event.state = {slot: form for slot, form in forms.items() if slot not in captured.slots}
    event.settings = [slot for slot in event.lr if slot not in captured.slots]
    captured.slots |= {slot: by_name[name] for slot, name in event.params.items()}
    captured.slots |= {slot: inputs.add() for slot in event.inputs}
    state = [captured.slots[slot] for slot in forms]
    numbers = {slot: number for number, slot in enumerate((*event.params, *forms), len(captured.writes))}
    captured.writes += [(index, slot) for slot in numbers]

    def expand(params: Any, grads: Any, state: Any, lr: Any, dynamic: Any) -> None:
        rates = zip(event.lr, lr, strict=True)
        settings = {slot: rate for slot, rate in rates if slot.read(optimizer) is not None}
        settings |= zip(event.dynamic, dynamic, strict=True)
        tensors = optim.StepTensors(
            dict(zip(event.params, params, strict=True)),
            dict(zip(event.params, grads, strict=True)),
            dict(zip(forms, state, strict=True)),
            settings,
        )
        if not _torch.is_recorded():
            optim.write_all(tensors)
            return
        with annotate({"fxpass": "update"}):
            event.assumed = optim.run_step(optimizer, tensors, numbers, event.habits, event.where)

    vars(expand)[TEXT] = f"step {index} {sorted(numbers.values())}"
    node.target = expand
    node.meta[_torch.UPDATES] = [*params, *state]
    device = next(iter(event.params)).read(optimizer).device
    values = [as_tensor(node, n, device) if isinstance(n, Node) else n for n in dynamic]
    node.args = (params, grads, state, [captured.slots[slot] for slot in event.lr], values)


def _finish_outputs(
    graph: Graph,
    record: _torch.FrameRecord,
    captured: Captured,
    by_name: Mapping[str, Node],
    keep_grads: bool,
) -> None:
    output = next(n for n in reversed(graph.nodes) if n.op == "output")
    (values,) = output.args
    results = []
    for value in values:  # type: ignore[union-attr]
        if isinstance(value, Node) and value.name in record.consumed:
            with graph.inserting_before(output):
                value = graph.call_method("detach", (value,))
                value.meta["custom"] = {
                    phases.STEPS: 0
                }  # what the user returns is no computation after the step
        results.append(value)
    captured.outputs = len(results)
    positions = {value.name: i for i, value in enumerate(values) if isinstance(value, Node)}
    for leaf, grad in record.escaping.items():
        if grad in positions:
            old = by_name.get(record.earlier_grads.get(leaf, ""))
            name = old.name if old is not None and old.op == "placeholder" else None
            captured.handed_over.append((positions[grad], name))
    if keep_grads:
        slots = {name: slot for event in captured.events for slot, name in event.all_params.items()}
        captured.kept = [slots[param] for param, _ in record.kept]
        with graph.inserting_before(output):  # gradients with a graph of their own, maybe
            results += [graph.call_method("detach", (by_name[grad],)) for _, grad in record.kept]
    output.args = (tuple(results),)


def to_step(captured: Captured, gm: GraphModule, names: Mapping[str, str]) -> StepGraph:
    """Read phases, roles and names into a ``StepGraph``; ``names`` are user names by Dynamo input."""
    drop_tokens(gm.graph)
    phases.mark_backward(gm.graph)
    recompute_checkpoints(gm.graph)
    step = StepGraph(gm, outputs=captured.outputs)
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    dynamo = [n for n in captured.gm.graph.nodes if n.op == "placeholder"]
    if len(placeholders) != len(dynamo):
        raise CaptureError(
            f"AOTAutograd changed the inputs of the step ({len(dynamo)} to {len(placeholders)})"
        )
    ours = dict(zip(dynamo, placeholders, strict=True))
    by_name = {d.name: p for d, p in ours.items()}
    for old in captured.inputs:
        step.roles[ours[old]], step.names[ours[old]] = Role.INPUT, names.get(old.name, old.name)
    for name, old in captured.scaler.items():
        step.roles[ours[old]], step.names[ours[old]] = Role.SCALER, name
        step.scaler[name] = ours[old]
    settings = {slot for event in captured.events for slot in event.settings}
    for slot, old in captured.slots.items():
        step.roles[ours[old]] = Role.LR if slot in settings else _role(slot)
        step.names[ours[old]] = str(slot)
        step.slots[slot] = ours[old]
    step.shards = {ours[old]: shard for old, shard in captured.shards.items()}
    _read_marks(step, captured, by_name)
    step.handed_over = [(i, by_name[old] if old else None) for i, old in captured.handed_over]
    phases.set_phases(step, {by_name[name] for name in captured.data})
    return step


def _role(slot: Slot) -> Role:
    return Role.PARAMETER if slot.key is None else Role.STATE


def _read_marks(step: StepGraph, captured: Captured, by_name: Mapping[str, Node]) -> None:
    """What capture knows of the marks by their numbers, from here on of the nodes.

    A mark that nothing needs is gone: of a gradient that no optimizer looks at, say.
    """
    grads, reads, updates = (step.numbered(role) for role in (GRAD, READ, UPDATE))
    for number, grad in enumerate(captured.gradients):
        if number in grads:
            step.gradients[grads[number]] = Gradient(by_name.get(grad.leaf), grad.leaf, grad.backward)
    for event in captured.events:
        marked = [(reads[n], slot) for slot, n in event.reads.items() if n in reads]
        step.reads += [Read(mark, slot, event.index) for mark, slot in marked]
    for number, (index, slot) in enumerate(captured.writes):
        if number in updates:
            step.updates.append(Update(updates[number], slot, index))
    step.backwards_before = [event.backwards for event in captured.events]
