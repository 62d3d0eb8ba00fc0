"""Indexing with 0-d tensors, ``h[i]`` and ``h[:, i] = 0``: the number is taken out and selected with.

Written for torch 2.11 to 2.13; active only inside ``dynamo.py``'s patches. Python's
own indexing asks for the number while tracing, when nobody knows it; ``torch.select``
takes one that is known only when the step runs, and gives a view as indexing does.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.variables.builtin import BuiltinVariable
from torch._dynamo.variables.constant import ConstantVariable
from torch._dynamo.variables.lists import TupleVariable
from torch._dynamo.variables.tensor import SymNodeVariable, TensorVariable

from .dynamo_common import call, is_none


def get_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    """For ``BuiltinVariable.call_function``, which is told of ``h[key]``."""

    def call_function(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        if self.fn is not operator.getitem:
            return original(self, tx, args, kwargs)
        variable, key = (arg.realize() for arg in args)
        if not isinstance(variable, TensorVariable):
            return original(self, tx, args, kwargs)
        selected, rest = _select(tx, variable, key)
        return selected if rest is None else original(self, tx, [selected, rest], kwargs)

    return call_function


def set_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    """For ``TensorVariable.method___setitem__``, which is told of ``h[key] = value``."""

    def setitem(self: Any, tx: Any, key: Any, value: Any) -> Any:
        selected, rest = _select(tx, self, key.realize())
        return original(selected, tx, ConstantVariable.create(...) if rest is None else rest, value)

    return setitem


def _select(tx: Any, variable: Any, key: Any) -> tuple[Any, Any]:
    """What is left of a tensor when its 0-d indices are selected, and of the key, None if nothing."""
    alone = not isinstance(key, TupleVariable)
    items = [key] if alone else [item.realize() for item in key.items]
    at = [i for i, item in enumerate(items) if _is_number(item, alone)]
    if not at or variable.ndim is None:
        return variable, key
    taken = [_dims(item) for item in items]
    rest = variable.ndim - sum(taken)
    taken = [rest if _is_ellipsis(item) else n for item, n in zip(items, taken, strict=True)]
    for position in reversed(at):
        index = items[position]
        number = index if isinstance(index, SymNodeVariable) else index.call_method(tx, "item", [], {})
        variable = call(tx, torch.select, variable, sum(taken[:position]), number)
    left = [item for i, item in enumerate(items) if i not in at]
    return variable, TupleVariable(left) if left else None


def _is_number(item: Any, alone: bool) -> bool:
    """Whether ``item`` is an index whose value Python would ask for; Dynamo knows of a lone symbol itself."""
    if isinstance(item, SymNodeVariable):
        return not alone
    if not isinstance(item, TensorVariable) or item.ndim != 0 or item.dtype is None:
        return False
    return item.dtype not in (torch.bool, torch.uint8) and not item.dtype.is_floating_point


def _dims(item: Any) -> int:
    """How many dimensions of the tensor an index is for."""
    if is_none(item) or _is_ellipsis(item):
        return 0
    mask = isinstance(item, TensorVariable) and item.dtype in (torch.bool, torch.uint8)
    return item.ndim if mask else 1


def _is_ellipsis(item: Any) -> bool:
    return item.is_python_constant() and item.as_python_constant() is ...


HOOKS: list[tuple[Any, str, Callable[..., Any]]] = [
    (BuiltinVariable, "call_function", get_hook),
    (TensorVariable, "method___setitem__", set_hook),
]
