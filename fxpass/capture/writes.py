"""In-place writes in Dynamo's graph: those that autograd need not see, and what lies in which storage.

``average.data.mul_(0.9)`` writes to a parameter while grad mode is on.
AOTAutograd takes that for an update whose own gradient is wanted after the
step. No operand of such a write requires grad, so it is done under no_grad.

Dynamo's graph has no schemas: what shares a storage is read off its fake values.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from .. import _torch


def hide_writes(graph: Graph) -> None:
    """Wrap each in-place operation none of whose operands requires grad in no_grad."""
    enabled = torch.is_grad_enabled()  # as the frame was entered
    for node in list(graph.nodes):
        if node.target is _torch.set_grad_enabled:
            enabled = bool(node.args[0])
        elif enabled and _torch.written(node) and not any(_requires_grad(n) for n in node.all_input_nodes):
            with graph.inserting_before(node):
                graph.call_function(_torch.set_grad_enabled, (False,))
            with graph.inserting_after(node):
                graph.call_function(_torch.set_grad_enabled, (True,))


def storages(node: Node) -> set[int]:
    """The storages that a value of Dynamo's graph lies in."""
    values = _flat(node.meta.get("example_value"))
    tensors = (v for v in values if isinstance(v, Tensor) and not (v.is_sparse or _torch.is_wrapped(v)))
    return {_torch.storage_id(v) for v in tensors}


def _requires_grad(node: Node) -> bool:
    return any(isinstance(t, Tensor) and t.requires_grad for t in _flat(node.meta.get("example_value")))


def _flat(value: Any) -> Iterable[Any]:
    return value if isinstance(value, (tuple, list)) else (value,)
