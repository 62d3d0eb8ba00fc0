"""In-place writes that autograd need not see.

``average.data.mul_(0.9)`` writes to a parameter while grad mode is on.
AOTAutograd takes that for an update whose own gradient is wanted after the
step. No operand of such a write requires grad, so it is done under no_grad.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from .casts import WRITES


def hide_writes(graph: Graph) -> None:
    """Wrap each in-place operation none of whose operands requires grad in no_grad."""
    enabled = torch.is_grad_enabled()  # as the frame was entered
    for node in list(graph.nodes):
        if node.target is torch._C._set_grad_enabled:
            enabled = bool(node.args[0])
        elif enabled and _writes(node) and not any(_requires_grad(n) for n in node.all_input_nodes):
            with graph.inserting_before(node):
                graph.call_function(torch._C._set_grad_enabled, (False,))
            with graph.inserting_after(node):
                graph.call_function(torch._C._set_grad_enabled, (True,))


def _writes(node: Node) -> bool:
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name in WRITES or (name.endswith("_") and not name.endswith("__"))


def _requires_grad(node: Node) -> bool:
    return any(isinstance(t, Tensor) and t.requires_grad for t in _flat(node.meta.get("example_value")))


def _flat(value: Any) -> Iterable[Any]:
    return value if isinstance(value, (tuple, list)) else (value,)
