"""A step graph as plain data: what a person, a report or JSON needs to know of each node, and no more."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch.fx import Node

from ..ir.dtypes import name_of
from ..ir.graph import Role, StepGraph, phase
from ..ir.provenance import origin, user_line
from ..ir.text import arguments_text, line_text, op_text, type_text
from .modules import module_names
from .policy import colour_of

INPUT, OUTPUT = "input", "output"


@dataclass(frozen=True)
class NodeView:
    """One node. ``name`` is the graph's, or the user's for an input (``blocks.0.qkv.weight``)."""

    name: str
    op: str  # aten.mm.default; "input"; "output"
    args: str  # as text, with the names of this view
    inputs: tuple[str, ...]  # names of the nodes it reads
    type: str  # f16[8, 64]
    dtype: str  # float16; of several values, that of the first
    phase: str
    role: str  # of an input: parameter, optimizer state ...
    made_by: str  # the pass that inserted it; "" for the user's own
    reason: str
    colour: str  # the op policy's rule; "" if it has none
    module: str  # of the user's model
    where: str  # file.py:12 in forward, the user's line
    node: str  # its name in the graph

    @property
    def short(self) -> str:
        """The op policy's name of the operator: ``mm`` for aten.mm.default."""
        return self.op.split(".")[1] if self.op.count(".") > 1 else self.op

    def line(self, role: str = "") -> str:
        """``name: type = op(arguments)  # phase, role, pass: reason``."""
        if self.op == INPUT:
            return f"{self.name}: {self.type}  # {self.role}"
        if self.op == OUTPUT:
            return f"return {self.args}"
        notes = [self.phase, role or self.role, f"{self.made_by}: {self.reason}" if self.made_by else ""]
        return line_text(self.name, self.type, self.op, self.args, notes)


@dataclass(frozen=True)
class GraphView:
    """All nodes of a graph at one point of the pipeline, in order."""

    point: str  # "captured", or the pass that has just run
    nodes: tuple[NodeView, ...]
    by_name: dict[str, NodeView] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.by_name.update({n.name: n for n in self.nodes})

    @cached_property
    def readers(self) -> dict[str, list[str]]:
        """By name, the nodes that read it."""
        readers: dict[str, list[str]] = {n.name: [] for n in self.nodes}
        for node in self.nodes:
            for name in node.inputs:
                readers[name].append(node.name)
        return readers

    def find(self, name: str) -> NodeView | None:
        """The node of that name, the graph's or the user's."""
        return self.by_name.get(name) or next((n for n in self.nodes if n.node == name), None)

    def around(self, name: str, distance: int = 2) -> tuple[NodeView, ...]:
        """What is at most ``distance`` edges away from a node, in order."""
        near = {name}
        for _ in range(distance):
            readers = {n.name for n in self.nodes if near & set(n.inputs)}
            near |= readers | {i for n in near if n in self.by_name for i in self.by_name[n].inputs}
        return tuple(n for n in self.nodes if n.name in near)


def view(step: StepGraph, point: str) -> GraphView:
    """``step`` as it is now."""
    names = _names(step)
    modules = module_names(step)
    return GraphView(point, tuple(_node(step, n, names, modules) for n in step.graph.nodes))


def _names(step: StepGraph) -> dict[Node, str]:
    """The user's names of inputs; of two that are equal, the second keeps the graph's."""
    names = {n: n.name for n in step.graph.nodes}
    taken = set(names.values())
    for node, name in step.names.items():
        if step.roles.get(node) is Role.SCALER:
            name = f"scaler.{name}"
        if name and name not in taken:
            names[node] = name
            taken.add(name)
    return names


def _node(step: StepGraph, node: Node, names: dict[Node, str], modules: dict[Node, Any]) -> NodeView:
    value = node.meta.get("val")
    made = origin(node)
    op = {"placeholder": INPUT, "output": OUTPUT}.get(node.op) or op_text(node)
    colour = colour_of(node.target) if node.op == "call_function" else None
    return NodeView(
        name=names[node],
        op=op,
        args="" if node.op == "placeholder" else arguments_text(node, names),
        inputs=tuple(names[n] for n in node.all_input_nodes),
        type=type_text(value),
        dtype=_dtype(value),
        phase=phase(node).value if "fxpass_phase" in node.meta else node.op,
        role=step.roles[node].value if node in step.roles else "",
        made_by=made.pass_name if made else "",
        reason=made.reason if made else "",
        colour=colour.value if colour else "",
        module=(modules.get(node) or ("",))[-1],
        where=user_line(node),
        node=node.name,
    )


def _dtype(value: Any) -> str:
    values = value if isinstance(value, (list, tuple)) else [value]
    return next((name_of(v.dtype) for v in values if isinstance(v, torch.Tensor)), "")
