"""The user's own casts to float32, kept through autograd.

``x.float()`` of a value that is float32 in the uncompiled step does nothing
there, and AOTAutograd drops it. But the value may be float16 once the policy
has decided, and the user asked for float32 from here on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from .. import _torch
from .writes import storages


def spell_out_casts(graph: Graph) -> None:
    """Write each ``x.float()`` of a float32 ``x`` as a copy, which autograd keeps.

    The cast pass drops those that still do nothing. Not where the storage is
    written later on: then the result has to stay ``x`` itself.
    """
    later: set[int] = set()  # storages that are written behind the node
    for node in reversed(graph.nodes):
        if _asks_for_float32(node) and _is_float32(node.args[0]) and later.isdisjoint(storages(node)):
            kwargs = {"dtype": torch.float32, **_asked_besides(node)}
            node.op, node.target = "call_function", torch.ops.aten._to_copy.default
            node.args, node.kwargs = node.args[:1], kwargs
        later.update(s for value in _torch.written(node) for s in storages(value))


def _asks_for_float32(node: Node) -> bool:
    if node.op != "call_method" or node.target not in ("float", "to", "type"):
        return False
    asked = [*node.args[1:], *node.kwargs.values()]
    return node.target == "float" or torch.float32 in asked


def _asked_besides(node: Node) -> dict[str, Any]:
    """What ``x.to(...)`` asks for besides float32 and does not have: a device, a memory format."""
    (x,) = (n.meta["example_value"] for n in node.all_input_nodes if n is node.args[0])
    asked: dict[str, Any] = {}
    for name, value in (*(("", a) for a in node.args[1:]), *node.kwargs.items()):
        if isinstance(value, torch.memory_format) and value is not torch.preserve_format:
            asked["memory_format"] = value
        elif name == "device" or (name == "" and isinstance(value, (str, torch.device))):
            device = node.meta["example_value"].device
            asked |= {} if device == x.device else {"device": device}
    if "device" in asked and node.kwargs.get("non_blocking"):
        asked["non_blocking"] = True
    return asked


def _is_float32(node: object) -> bool:
    value = node.meta.get("example_value") if isinstance(node, Node) and node.op != "placeholder" else None
    return isinstance(value, Tensor) and value.dtype is torch.float32
