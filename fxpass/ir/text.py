"""A step graph as text: one line per node, with dtype, shape, phase and who inserted it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch.fx import Node

from .dtypes import in_graph
from .graph import StepGraph
from .provenance import origin


def type_text(value: Any) -> str:
    """``f16[8, 64]`` for a tensor, a tuple of them for several, the value itself for a number."""
    if isinstance(value, torch.Tensor):
        return f"{in_graph(value.dtype)}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(type_text(v) for v in value)})"
    return "" if value is None else str(value)


def op_text(node: Node) -> str:
    """``aten.mm.default``; of a function of Python's its name."""
    target = node.target
    return (
        str(target) if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", str(target))
    )


def arguments_text(node: Node, names: Mapping[Node, str] = MappingProxyType({})) -> str:
    """What a node reads, by ``names`` where they differ from the graph's."""
    parts = [_argument(a, names) for a in node.args]
    return ", ".join(parts + [f"{k}={_argument(v, names)}" for k, v in node.kwargs.items()])


def _argument(value: Any, names: Mapping[Node, str]) -> str:
    if isinstance(value, Node):
        return names.get(value, value.name)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_argument(v, names) for v in value)}]"
    return str(value)


def line_text(name: str, kind: str, op: str, arguments: str, notes: Iterable[str]) -> str:
    """The text form of a node: ``name: type = op(arguments)  # phase, pass: reason``."""
    return f"{name}: {kind} = {op}({arguments})  # {', '.join(filter(None, notes))}"


def node_text(node: Node) -> str:
    """One node, by the graph's names."""
    kind, arguments = type_text(node.meta.get("val")), arguments_text(node)
    if node.op == "placeholder":
        return f"{node.name}: {kind}"
    if node.op == "output":
        return f"return {arguments}"
    made = origin(node)
    when = node.meta["fxpass_phase"].value if "fxpass_phase" in node.meta else ""
    notes = (when, f"{made.pass_name}: {made.reason}" if made else "")
    return line_text(node.name, kind, op_text(node), arguments, notes)


def to_text(step: StepGraph) -> str:
    """The whole graph, inputs with their roles first."""
    lines = []
    for node in step.graph.nodes:
        line = node_text(node)
        if node.op == "placeholder" and node in step.roles:
            line += f"  # {step.roles[node].value}: {step.names.get(node, '')}"
        lines.append(line)
    return "\n".join(lines)
