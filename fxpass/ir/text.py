"""A step graph as text: one line per node, with dtype, shape, phase and who inserted it."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from .graph import StepGraph, origin

_SHORT = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float64: "f64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "b8",
}


def type_text(value: Any) -> str:
    """``f16[8, 64]`` for a tensor, a tuple of them for several, the value itself for a number."""
    if isinstance(value, torch.Tensor):
        return f"{_SHORT.get(value.dtype, str(value.dtype))}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(type_text(v) for v in value)})"
    return "" if value is None else str(value)


def node_text(node: Node) -> str:
    """One node: ``name: type = op(arguments)  # phase, pass: reason``."""
    if node.op == "placeholder":
        return f"{node.name}: {type_text(node.meta.get('val'))}"
    if node.op == "output":
        return f"return {node.args[0]}"
    target = (
        str(node.target)
        if isinstance(node.target, torch._ops.OpOverload)
        else getattr(node.target, "__name__", "?")
    )
    arguments = [str(a) for a in node.args] + [f"{k}={v}" for k, v in node.kwargs.items()]
    made = origin(node)
    note = node.meta["fxpass_phase"].value if "fxpass_phase" in node.meta else ""
    note += f", {made.pass_name}: {made.reason}" if made else ""
    return f"{node.name}: {type_text(node.meta.get('val'))} = {target}({', '.join(arguments)})  # {note}"


def to_text(step: StepGraph) -> str:
    """The whole graph, inputs with their roles first."""
    lines = []
    for node in step.graph.nodes:
        line = node_text(node)
        if node.op == "placeholder" and node in step.roles:
            line += f"  # {step.roles[node].value}: {step.names.get(node, '')}"
        lines.append(line)
    return "\n".join(lines)
