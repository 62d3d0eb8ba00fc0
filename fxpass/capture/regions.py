"""Regions in which the user says how to compute: with autocast off, with chosen kernels of attention."""

from __future__ import annotations

from torch.fx import Graph, Node

from .. import _torch
from ..ir.graph import FP32, NO_FLASH


def annotate_regions(graph: Graph) -> None:
    """Tag nodes whose dtype or kernel is the user's choice, in their ``custom`` meta."""
    _annotate_autocast(graph)
    _annotate_attention(graph)


def _annotate_autocast(graph: Graph) -> None:
    """Where the user switched autocast off, nodes stay in float32."""
    stack: list[bool] = []
    for node in graph.nodes:
        if node.target is _torch.enter_autocast:
            stack.append(bool(node.args[2]))
        elif node.target is _torch.exit_autocast:
            stack.pop()
        elif stack and not stack[-1]:
            _tag(node, FP32)


def _annotate_attention(graph: Graph) -> None:
    """Where ``sdpa_kernel`` allows no flash attention, the attention pass uses none."""
    allowed = True
    for node in graph.nodes:
        kernels = _torch.allowed_kernels(node)
        if kernels is not None:
            allowed = "FLASH_ATTENTION" in kernels
        elif not allowed:
            _tag(node, NO_FLASH)


def _tag(node: Node, name: str) -> None:
    node.meta["custom"] = {**node.meta.get("custom", {}), name: True}
