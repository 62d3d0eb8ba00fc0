"""Attention in which several query heads share a key and a value: ``enable_gqa``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node

from ..ir.graph import FP32, is_tagged

_HEADS = -3
_NAMES = ("query", "key", "value")


def repeat_groups(graph: Graph) -> None:
    """Give each query head a key and a value of its own, on CUDA.

    The trace is in float32, for which no fused kernel there takes groups:
    attention would be taken apart, scores and all. With as many keys as queries
    it stays whole, and the attention pass can put flash attention there. It is
    what torch itself does, where it takes attention apart.
    """
    for node in graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention):
        if node.kwargs.get("enable_gqa") is not True or is_tagged(node, FP32):
            continue
        query, key, value = (_argument(node, index) for index in range(len(_NAMES)))
        if not _on_cuda(query):
            continue
        with graph.inserting_before(node):
            node.args = (query, _repeated(query, key, node), _repeated(query, value, node), *node.args[3:])
        dropped = (*_NAMES, "enable_gqa")
        node.kwargs = {name: given for name, given in node.kwargs.items() if name not in dropped}


def _repeated(query: Node, shared: Node, attention: Node) -> Node:
    """``shared`` once for each of the query's heads; a call where the graph inserts."""
    times = _tensor(query).shape[_HEADS] // _tensor(shared).shape[_HEADS]
    repeat = attention.graph.call_function(torch.repeat_interleave, (shared, times), {"dim": _HEADS})
    repeat.meta = {key: value for key, value in attention.meta.items() if key != "example_value"}
    return repeat


def _argument(node: Node, index: int) -> Any:
    return node.args[index] if index < len(node.args) else node.kwargs[_NAMES[index]]


def _tensor(part: Node) -> Tensor:
    """The fake tensor that Dynamo has traced."""
    return part.meta["example_value"]


def _on_cuda(part: Node) -> bool:
    return _tensor(part).device.type == "cuda"
