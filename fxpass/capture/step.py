"""From Dynamo's graph of a frame to a :class:`StepGraph`.

The graph Dynamo made is copied, each opaque optimizer node becomes a call that
runs the optimizer on traced tensors, and the scaler state, learning rates and
optimizer state become extra inputs at the end. AOTAutograd then flattens all of
it into one ATen graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.traceback import annotate

from .. import _torch
from ..errors import CaptureError
from ..ir.graph import Role, StepGraph, Update
from ..ir.slots import Slot
from . import optim, optim_state, phases
from .assumptions import Assumptions
from .casts import spell_out_casts
from .checkpoint import recompute_checkpoints
from .effects import drop_tokens
from .numbers import as_tensor, spell_out_numbers
from .renorm import spell_out_renorm
from .writes import UPDATES, hide_writes


@dataclass
class Event:
    """One ``optimizer.step()``: which tensors it needs at run time, in input order."""

    optimizer: Callable[[], torch.optim.Optimizer]
    places: list[tuple[int, int]]
    state: list[optim_state.StateKey]
    groups: int
    where: str
    dynamic: list[Slot]
    assumed: Assumptions | None = None  # known when the update is traced


@dataclass
class Captured:
    """A step ready to be traced: the rewritten Dynamo graph and what its inputs are."""

    gm: GraphModule
    events: list[Event]
    parameters: list[Node]  # placeholders of parameters some optimizer updates
    kept: list[int]  # input positions of the parameters whose gradients are extra outputs
    outputs: int
    handed_over: list[
        tuple[int, str | None]
    ]  # output that is a gradient, the placeholder of the .grad before
    extra_roles: list[tuple[Role, str]]
    first_extra: int
    data: list[str] = field(default_factory=list)  # placeholders of what the function was called with
    # per UPDATE mark: event, placeholder, placeholder of the parameter it belongs to
    update_slots: list[tuple[int, str, str]] = field(default_factory=list)


def capture(gm: GraphModule, record: Any, scaler_fields: Sequence[str], *, keep_grads: bool) -> Captured:
    """Rewrite a copy of Dynamo's graph; the original stays as Dynamo needs it."""
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
    captured = Captured(new_gm, [], [], [], 0, [], [], len(placeholders))
    inputs = _ExtraInputs(graph, placeholders, captured.extra_roles)
    if record.events:
        for name in scaler_fields:
            inputs.add(Role.SCALER, name)
    phases.declare(graph)
    captured.data = [n.name for n in placeholders if phases.is_data(n)]
    for node in list(graph.nodes):
        if node.target is _torch.optimizer_step:
            _expand_optimizer(node, record, captured, inputs, by_name)
        elif node.target is torch.autograd.grad:
            node.target = _torch.grad_with_forward_links
    _finish_outputs(graph, record, captured, by_name, keep_grads)
    _annotate_autocast(graph)
    spell_out_casts(graph)
    spell_out_renorm(graph)
    spell_out_numbers(graph)
    hide_writes(graph)
    graph.lint()
    new_gm.recompile()
    return captured


class _ExtraInputs:
    """Appends placeholders after the last one."""

    def __init__(self, graph: Graph, placeholders: list[Node], roles: list[tuple[Role, str]]) -> None:
        self.graph = graph
        self.last = placeholders[-1] if placeholders else None
        self.roles = roles
        self.states: dict[tuple[int, optim_state.StateKey], Node] = {}  # by id of the optimizer

    def add(self, role: Role, name: str) -> Node:
        where = self.graph.inserting_after(self.last) if self.last else self.graph.inserting_before(None)
        with where:
            node = self.graph.placeholder(f"fxpass_{len(self.roles)}")
        vars(node)["_dynamo_source"] = None  # not an input of Dynamo's
        self.last = node
        self.roles.append((role, name))
        return node


def _expand_optimizer(
    node: Node, record: Any, captured: Captured, inputs: _ExtraInputs, by_name: dict[str, Node]
) -> None:
    arguments: Any = node.args
    index, params, grads, dynamic = arguments
    found = record.events[index]
    optimizer = found.live()
    number = record.number_of(optimizer)
    places = [(p.group, p.position) for p in found.params if p.has_grad]
    keys = optim_state.state_keys(optimizer, places)
    fetched = [k for k in keys if (id(optimizer), k) not in inputs.states]  # not by an earlier step()
    for k in fetched:
        name = f"{k.key}[{_param_name(by_name, found, k)}]"
        inputs.states[(id(optimizer), k)] = inputs.add(Role.STATE, name)
    state = [inputs.states[(id(optimizer), k)] for k in keys]
    lr = [inputs.add(Role.LR, f"lr[{g}]") for g in range(len(optimizer.param_groups))]
    event = Event(found.live, places, fetched, len(lr), found.where, found.dynamic)
    first = len(captured.update_slots)
    owners = dict(zip(places, params, strict=True))
    captured.update_slots += [(index, n.name, n.name) for n in params]
    captured.update_slots += [
        (index, n.name, owners[k.group, k.position].name) for k, n in zip(keys, state, strict=True)
    ]
    captured.parameters += [n for n in params if n not in captured.parameters]
    captured.events.append(event)

    def expand(params: Any, grads: Any, state: Any, lr: Any, dynamic: Any) -> None:
        rates = zip((Slot(number, g, key="lr") for g in range(len(lr))), lr, strict=True)
        settings = {slot: rate for slot, rate in rates if slot.read(optimizer) is not None}
        settings |= zip(event.dynamic, dynamic, strict=True)
        tensors = optim.StepTensors(
            places, list(params), list(grads), dict(zip(keys, state, strict=True)), settings
        )
        with annotate({"fxpass": "update"}):
            event.assumed = optim.run_step(optimizer, number, tensors, first, event.where)

    node.target = expand
    node.meta[UPDATES] = [*params, *state]
    device = optim_state.parameter(optimizer, *places[0]).device
    numbers = [as_tensor(node, n, device) if isinstance(n, Node) else n for n in dynamic]
    node.args = (params, grads, state, lr, numbers)


def _param_name(by_name: dict[str, Node], found: Any, key: optim_state.StateKey) -> str:
    for p in found.params:
        if (p.group, p.position) == (key.group, key.position):
            return str(p.node)
    return "?"


def _finish_outputs(
    graph: Graph, record: Any, captured: Captured, by_name: dict[str, Node], keep_grads: bool
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
            old = by_name.get(record.found.get(leaf, ""))
            name = old.name if old is not None and old.op == "placeholder" else None
            captured.handed_over.append((positions[grad], name))
    if keep_grads:
        positions = {n: i for i, n in enumerate(graph.nodes) if n.op == "placeholder"}
        for param, grad in record.kept:
            captured.kept.append(positions[by_name[param]])
            results.append(by_name[grad])
    output.args = (tuple(results),)


def _annotate_autocast(graph: Graph) -> None:
    """Tag nodes of regions where the user switched autocast off: they stay in float32."""
    stack: list[bool] = []
    for node in graph.nodes:
        if node.target is torch.amp.autocast_mode._enter_autocast:
            stack.append(bool(node.args[2]))
        elif node.target is torch.amp.autocast_mode._exit_autocast:
            stack.pop()
        elif stack and not stack[-1]:
            node.meta["custom"] = {**node.meta.get("custom", {}), "fxpass_fp32": True}


def to_step(captured: Captured, gm: GraphModule, names: Mapping[str, str]) -> StepGraph:
    """Read phases, roles and names into a :class:`StepGraph`; ``names`` are user names by Dynamo input."""
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
    by_name = {d.name: p for d, p in zip(dynamo, placeholders, strict=True)}
    for node in captured.parameters:
        step.roles[by_name[node.name]] = Role.PARAMETER
    for old, node in zip(dynamo[: captured.first_extra], placeholders, strict=False):
        step.names[node] = names.get(old.name, old.name)
        step.roles.setdefault(node, Role.INPUT)
    for node, (role, name) in zip(placeholders[captured.first_extra :], captured.extra_roles, strict=True):
        step.roles[node] = role
        step.names[node] = _user_name(name, names)
        if role is Role.SCALER:
            step.scaler[name] = node
    for index, (event, name, owner) in enumerate(captured.update_slots):
        step.updates.append(Update(index, event, by_name[name], by_name[owner]))
    step.handed_over = [(i, by_name[old] if old else None) for i, old in captured.handed_over]
    phases.set_phases(step, {by_name[name] for name in captured.data})
    return step


def _user_name(name: str, names: Mapping[str, str]) -> str:
    """``exp_avg[l_self_weight]`` with the user's name of the parameter in the brackets."""
    key, bracket, node = name.rstrip("]").partition("[")
    return f"{key}[{names.get(node, node)}]" if bracket else name
