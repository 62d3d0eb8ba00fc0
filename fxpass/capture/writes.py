"""In-place writes in Dynamo's graph: which operations write, to what, and those that autograd need not see.

``average.data.mul_(0.9)`` writes to a parameter while grad mode is on.
AOTAutograd takes that for an update whose own gradient is wanted after the
step. No operand of such a write requires grad, so it is done under no_grad.

Dynamo's graph has functions and methods of Python, without schemas. What shares
a storage is read off its fake values instead.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from .. import _torch

UPDATES = "fxpass_updates"  # key in the metadata of an optimizer's node: what it writes
_OPERATORS = frozenset("setitem iadd isub imul itruediv ifloordiv imod ipow imatmul iand ior ixor".split())


def hide_writes(graph: Graph) -> None:
    """Wrap each in-place operation none of whose operands requires grad in no_grad."""
    enabled = torch.is_grad_enabled()  # as the frame was entered
    for node in list(graph.nodes):
        if node.target is _torch.set_grad_enabled:
            enabled = bool(node.args[0])
        elif enabled and written(node) and not any(_requires_grad(n) for n in node.all_input_nodes):
            with graph.inserting_before(node):
                graph.call_function(_torch.set_grad_enabled, (False,))
            with graph.inserting_after(node):
                graph.call_function(_torch.set_grad_enabled, (True,))


def written(node: Node) -> list[Node]:
    """The values that an operation of Dynamo's graph writes in place."""
    if node.op not in ("call_function", "call_method"):
        return []
    if UPDATES in node.meta:
        return list(node.meta[UPDATES])
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    targets = [node.kwargs.get("out")]
    if name in _OPERATORS or (name.endswith("_") and not name.endswith("__")) or _inplace(node):
        targets += node.args[:1] or [node.kwargs.get("input")]
    return [n for value in targets for n in _flat(value) if isinstance(n, Node)]


def storages(node: Node) -> set[int]:
    """The storages that a value of Dynamo's graph lies in."""
    values = _flat(node.meta.get("example_value"))
    tensors = (v for v in values if isinstance(v, Tensor) and not (v.is_sparse or _torch.is_wrapped(v)))
    return {_torch.storage_id(v) for v in tensors}


def _inplace(node: Node) -> bool:
    """Whether a function of torch.nn.functional was called with ``inplace=True``."""
    if "inplace" in node.kwargs or node.op == "call_method" or not inspect.isfunction(node.target):
        return bool(node.kwargs.get("inplace"))
    names = list(inspect.signature(node.target).parameters)
    position = names.index("inplace") if "inplace" in names else len(node.args)
    return position < len(node.args) and bool(node.args[position])


def _requires_grad(node: Node) -> bool:
    return any(isinstance(t, Tensor) and t.requires_grad for t in _flat(node.meta.get("example_value")))


def _flat(value: Any) -> Iterable[Any]:
    return value if isinstance(value, (tuple, list)) else (value,)
