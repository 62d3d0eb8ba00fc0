"""Lets an optimizer's Python treat 0-d tensors as the numbers it expects.

While a step is captured, learning rate, step counts and norms are tensors, so
that nothing is baked into the graph and nothing is read back to the host.
torch's arithmetic takes a 0-d tensor nearly everywhere a number may stand; this
module covers the rest: ``.item()`` (also where torch's own optimizers do without it
while compiling), ``alpha=``/``value=`` arguments, ``lerp``,
``min``, ``max`` and the functions of ``math``, and comparisons of a setting with
a number (``if momentum != 0``), which are decided by the setting's present value
and remembered so that the runtime can check them.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .. import _torch
from ..ir.slots import Slot

_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}

_SET_DATA: Any = Tensor.data.__set__  # pyright: ignore


@dataclass(frozen=True)
class Comparison:
    """``setting <op> number`` was ``outcome`` when the step was captured."""

    setting: Slot
    op: str
    number: Any
    outcome: bool

    def holds(self, value: Any) -> bool:
        """Whether ``value`` of the setting still gives the captured outcome."""
        return _COMPARE[self.op](value, self.number) == self.outcome


class ScalarTensors(TorchFunctionMode):
    """Interprets 0-d tensors as numbers; ``settings`` are tensors of settings with their present values."""

    def __init__(self, settings: Sequence[tuple[Slot, Tensor, float]] = ()) -> None:
        super().__init__()
        self.settings = list(settings)
        self.comparisons: list[Comparison] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "item" and args[0].numel() == 1:
            return as_number(args[0])
        if func == _SET_DATA:
            return args[0].copy_(args[1])  # the parameter itself must receive the value
        op = name.strip("_")
        if op in _COMPARE and isinstance(args[1], (int, float)):
            for setting, tensor, value in self.settings:
                if args[0] is tensor:
                    return self._decide(setting, value, op, args[1])
        if op == "lerp":
            return func(*_same_dtype(args), **{k: _as(args[0], v) for k, v in kwargs.items()})
        if isinstance(kwargs.get("alpha"), Tensor):
            return _with_alpha(name, *args, **kwargs)
        if "addc" in name and isinstance(args[3] if len(args) > 3 else kwargs.get("value"), Tensor):
            return _with_value(name, *args, **kwargs)
        return func(*args, **kwargs)

    def truth(self, tensor: Tensor) -> bool:
        """``bool(tensor)`` of a setting.

        Raises:
            TypeError: it is no setting, and its value is not known.
        """
        for setting, known, value in self.settings:
            if known is tensor:
                return self._decide(setting, value, "ne", 0)
        raise TypeError("it branches on the value of a tensor")

    def _decide(self, setting: Slot, value: float, op: str, number: float) -> bool:
        outcome = _COMPARE[op](value, number)
        self.comparisons.append(Comparison(setting, op, number, outcome))
        return outcome


def as_number(value: Any) -> Any:
    """The 0-d tensor that stands for ``value.item()``: as precise as Python's numbers."""
    if not isinstance(value, Tensor):
        return value
    return value.reshape(()).double() if value.is_floating_point() else value.reshape(())


def _as(like: Tensor, value: Any) -> Any:
    return value.to(like.dtype) if isinstance(value, Tensor) and value.ndim == 0 else value


def _same_dtype(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """``lerp`` alone refuses a weight of another dtype."""
    return (args[0], *(_as(args[0], a) for a in args[1:]))


def _with_alpha(name: str, x: Any, other: Any, *, alpha: Tensor) -> Any:
    return _call(name, x, _scaled(x, other, alpha))


def _with_value(name: str, x: Any, a: Any, b: Any, value: Tensor) -> Any:
    return _call(name, x, _scaled(x, a, value), b)


def _scaled(x: Any, term: Any, factor: Tensor) -> Any:
    """``term * factor``, in the dtype in which ``x + term`` is computed."""
    if isinstance(x, (list, tuple)):
        return [_scaled(y, t, factor) for y, t in zip(x, term, strict=True)]
    return (term.to(torch.result_type(x, term)) if isinstance(term, Tensor) else term) * factor


def _call(name: str, x: Any, *args: Any) -> Any:
    function: Callable[..., Any] = getattr(torch if name.startswith("_foreach_") else Tensor, name)
    return function(x, *args)


# ---------------------------------------------------------------- min, max and math


def _extreme(replaces: Callable[[Any, Any], Any], builtin: Callable[..., Any]) -> Callable[..., Any]:
    """Python's rule, the second where it ``replaces`` the first: a NaN never does."""

    def extreme(*args: Any, **kwargs: Any) -> Any:
        if len(args) != 2 or kwargs or not any(isinstance(a, Tensor) for a in args):
            return builtin(*args, **kwargs)
        like = next(a for a in args if isinstance(a, Tensor))
        first, second = (a if isinstance(a, Tensor) else torch.full_like(like, a) for a in args)
        return torch.where(replaces(second, first), second, first)

    return extreme


def _of_tensors(function: Callable[..., Any], on_tensors: Callable[..., Any]) -> Callable[..., Any]:
    def either(*args: Any) -> Any:
        return on_tensors(*args) if any(isinstance(a, Tensor) for a in args) else function(*args)

    return either


_MATH: dict[Any, Callable[..., Any]] = {
    getattr(math, name): _of_tensors(getattr(math, name), getattr(torch, name))
    for name in dir(math)
    if callable(getattr(math, name)) and hasattr(torch, name)
}
_MATH_MODULE: Any = SimpleNamespace(**vars(math) | {f.__name__: new for f, new in _MATH.items()})
_BUILTINS = {"min": _extreme(operator.lt, min), "max": _extreme(operator.gt, max)}


def _stand_ins(names: dict[str, Any]) -> dict[str, Any]:
    found = {k: v for k, v in _BUILTINS.items() if k not in names}
    for name, value in names.items():
        if value is math:
            found[name] = _MATH_MODULE
        elif type(value) is type(math.sqrt) and value in _MATH:
            found[name] = _MATH[value]
        elif value is _torch.get_value:
            found[name] = as_number
    return found


@contextmanager
def tensor_functions(owner: type) -> Iterator[None]:
    """``min``, ``max`` and ``math`` take tensors too, in the modules that define ``owner``'s methods.

    The builtins and ``math`` would ask the host for a number. For numbers the
    stand-ins do what the originals do, and the originals are put back.
    """
    methods = [f for cls in owner.__mro__ for f in vars(cls).values() if isinstance(f, FunctionType)]
    modules = {id(names): names for names in (inspect.unwrap(f).__globals__ for f in methods)}
    before: list[tuple[dict[str, Any], dict[str, Any]]] = []
    try:
        for names in modules.values():
            new = _stand_ins(names)
            before.append((names, {k: names[k] for k in new if k in names}))
            names.update(new)
        yield
    finally:
        for names, old in before:
            for name in _BUILTINS.keys() - old.keys():
                if names.get(name) is _BUILTINS[name]:
                    del names[name]
            names.update(old)
