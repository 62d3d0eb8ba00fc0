"""Lets an optimizer's Python treat 0-d tensors as the numbers it expects.

While a step is captured, learning rate, step counts and norms are tensors, so
that nothing is baked into the graph and nothing is read back to the host.
torch's arithmetic takes a 0-d tensor nearly everywhere a number may stand; this
module covers the rest: ``.item()`` (also where torch's own optimizers do without it
while compiling), ``alpha=``/``value=`` arguments, ``lerp``,
``min``, ``max`` and the functions of ``math``, ``count += 1``, which gives a new number,
and comparisons of a setting with a number (``if momentum != 0``), which are decided by
the setting's present value and remembered so that the runtime can check them. All
other conditions go both ways: see branches.py.
"""

from __future__ import annotations

import inspect
import math
import operator
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .. import _torch
from ..ir.slots import Slot
from .branches import Way

_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}

# Augmented assignment makes a new number; to a tensor it writes.
_IN_PLACE: dict[str, Callable[..., Any]] = {
    f"__i{name}__": getattr(operator, name)
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
}
_DIVIDES = {
    "__truediv__": 1,
    "__div__": 1,
    "div": 1,
    "true_divide": 1,
    "__rtruediv__": 0,
    "__rdiv__": 0,
}  # the divisor
_SET_DATA: Any = Tensor.data.__set__  # pyrefly: ignore[missing-attribute]


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
    """Interprets 0-d tensors as numbers.

    ``settings`` are tensors of settings with their present values, ``numbers`` all tensors that stand
    for numbers of Python's; ``way`` is how conditions on values are decided, None where none may be.
    """

    def __init__(
        self,
        settings: Sequence[tuple[Slot, Tensor, float]] = (),
        numbers: Iterable[Tensor] = (),
        way: Way | None = None,
    ) -> None:
        super().__init__()
        self.settings = list(settings)
        self.way = way
        self.comparisons: list[Comparison] = []
        self.keys: dict[int, tuple[Tensor, Hashable]] = {}  # by id: equal keys are equal values
        self.asked: list[Tensor] = []  # kept alive: no other gets its id
        for number in numbers:
            self._is_number(number, ("input", len(self.keys)))

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
            return self._number_in(args[0])
        if id(args[0] if args else None) in self.keys and name in _IN_PLACE:
            name, func = f"__{name[3:]}", _IN_PLACE[name]
        if name in _DIVIDES and not kwargs:
            self._divide(*(args if _DIVIDES[name] else reversed(args)))
        result = self._call(func, name, args, kwargs)
        if args and isinstance(result, Tensor) and result.numel() == 1 and not kwargs:
            parts = [self._key_of(arg) for arg in args]
            if None not in parts:
                self._is_number(result, (name, *parts))
        return result

    def _call(
        self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if func == _SET_DATA:
            return args[0].copy_(args[1])  # the parameter itself must receive the value
        op = name.strip("_")
        if op in _COMPARE and isinstance(args[1], (int, float)):
            for setting, tensor, value in self.settings:
                if args[0] is tensor:
                    return self._decide(setting, value, op, args[1])
        if op == "lerp":
            return func(*_same_dtype(args), **{k: _as(args[0], v) for k, v in kwargs.items()})
        if op == "full_like" and isinstance(
            fill := args[1] if args[1:] else kwargs.get("fill_value"), Tensor
        ):
            kwargs.pop("fill_value", None)
            return torch.ones_like(args[0], **kwargs) * fill
        if isinstance(kwargs.get("alpha"), Tensor):
            return _with_alpha(name, *args, **kwargs)
        if "addc" in name and isinstance(args[3] if len(args) > 3 else kwargs.get("value"), Tensor):
            return _with_value(name, *args, **kwargs)
        return func(*args, **kwargs)

    def truth(self, tensor: Tensor) -> bool:
        """``bool(tensor)``: of a setting by its value, of others as this way through the step has it.

        Raises:
            TypeError: it is no setting, and conditions may not be decided.
        """
        for setting, known, value in self.settings:
            if known is tensor:
                return self._decide(setting, value, "ne", 0)
        if self.way is None or tensor.numel() != 1:
            raise TypeError("it branches on the value of a tensor")
        key = self._key_of(tensor)
        return self.way.take(tensor, key if key is not None else ("value", id(self._kept(tensor))))

    def _decide(self, setting: Slot, value: float, op: str, number: float) -> bool:
        outcome = _COMPARE[op](value, number)
        self.comparisons.append(Comparison(setting, op, number, outcome))
        return outcome

    def _number_in(self, tensor: Tensor) -> Tensor:
        """The number in a tensor: a new one, what is written into the tensor later does not reach it."""
        if id(tensor) in self.keys:
            return tensor
        number = as_number(tensor)
        number = number.clone() if number.dtype == tensor.dtype else number
        self._is_number(number, ("item", id(number)))
        return number

    def _divide(self, number: Any, divisor: Any) -> None:
        """Python raises where a number is divided by zero; asked only in functions that expect it."""
        numbers = self._key_of(number) is not None and id(divisor) in self.keys
        if numbers and self.way is not None and _expects_zero_division() and self.truth(divisor == 0):
            raise ZeroDivisionError("division by zero")

    def _key_of(self, value: Any) -> Hashable:
        if isinstance(value, (bool, int, float)):
            return (type(value), value)
        return self.keys[id(value)][1] if id(value) in self.keys else None

    def _is_number(self, tensor: Tensor, key: Hashable) -> None:
        self.keys[id(tensor)] = (tensor, key)

    def _kept(self, tensor: Tensor) -> Tensor:
        self.asked.append(tensor)
        return tensor


def _expects_zero_division() -> bool:
    """Whether the user's function that divides, a few frames from here, handles ZeroDivisionError."""
    frame = sys._getframe(2)
    for _ in range(4):
        if frame is None or "ZeroDivisionError" in frame.f_code.co_names:
            return frame is not None
        frame = frame.f_back
    return False


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
    stand_ins = {k: v for k, v in _BUILTINS.items() if k not in names}
    for name, value in names.items():
        if value is math:
            stand_ins[name] = _MATH_MODULE
        elif type(value) is type(math.sqrt) and value in _MATH:
            stand_ins[name] = _MATH[value]
        elif value is _torch.get_value:
            stand_ins[name] = as_number
    return stand_ins


@contextmanager
def tensor_functions(owners: Sequence[type]) -> Iterator[None]:
    """``min``, ``max`` and ``math`` take tensors too, in the modules that define methods of ``owners``.

    The builtins and ``math`` would ask the host for a number. For numbers the
    stand-ins do what the originals do, and the originals are put back.
    """
    methods = [f for cls in owners for f in vars(cls).values() if isinstance(f, FunctionType)]
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
