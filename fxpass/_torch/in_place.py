"""What an operation of Dynamo's graph writes in place.

Dynamo's graph has functions and methods of Python, without schemas: names and signatures tell.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from torch.fx import Node

UPDATES = "fxpass_updates"  # key in the metadata of an optimizer's node: what it writes
_OPERATORS = frozenset(
    "setitem iadd isub imul itruediv ifloordiv imod ipow imatmul iand ior ixor ilshift irshift".split()
)


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


def _inplace(node: Node) -> bool:
    """Whether a function of torch.nn.functional was called with ``inplace=True``."""
    if "inplace" in node.kwargs or node.op == "call_method" or not inspect.isfunction(node.target):
        return bool(node.kwargs.get("inplace"))
    names = list(inspect.signature(node.target).parameters)
    position = names.index("inplace") if "inplace" in names else len(node.args)
    return position < len(node.args) and bool(node.args[position])


def _flat(value: Any) -> Iterable[Any]:
    return value if isinstance(value, (tuple, list)) else (value,)
