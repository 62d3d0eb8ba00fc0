"""Lets an optimizer's Python treat 0-d tensors as the numbers it expects.

While a step is captured, learning rate, step counts and norms are tensors, so
that nothing is baked into the graph and nothing is read back to the host.
torch's arithmetic takes a 0-d tensor nearly everywhere a number may stand; this
mode covers the rest: ``.item()``, ``alpha=``/``value=`` arguments, and
comparisons of a setting with a number (``if momentum != 0``), which are decided
by the setting's present value and remembered so that the runtime can check them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "__eq__": operator.eq,
    "__ne__": operator.ne,
    "__lt__": operator.lt,
    "__le__": operator.le,
    "__gt__": operator.gt,
    "__ge__": operator.ge,
}


@dataclass(frozen=True)
class Comparison:
    """``setting <op> number`` was ``outcome`` when the step was captured."""

    setting: int
    op: str
    number: float
    outcome: bool

    def holds(self, value: float) -> bool:
        """Whether ``value`` of the setting still gives the captured outcome."""
        return _COMPARE[self.op](value, self.number) == self.outcome


class ScalarTensors(TorchFunctionMode):
    """Interprets 0-d tensors as numbers; ``settings`` pairs a tensor with its present value."""

    def __init__(self, settings: Sequence[tuple[Tensor, float]] = ()) -> None:
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
            return args[0].reshape(())
        if name in _COMPARE and isinstance(args[1], (int, float)):
            for index, (tensor, value) in enumerate(self.settings):
                if args[0] is tensor:
                    outcome = _COMPARE[name](value, args[1])
                    self.comparisons.append(Comparison(index, name, args[1], outcome))
                    return outcome
        if isinstance(kwargs.get("alpha"), Tensor):
            return _with_alpha(name, *args, **kwargs)
        if isinstance(kwargs.get("value"), Tensor) and name.startswith("addc"):
            return _with_value(name, *args, **kwargs)
        return func(*args, **kwargs)


def _with_alpha(name: str, x: Tensor, other: Any, *, alpha: Tensor, out: Tensor | None = None) -> Tensor:
    sign = -1 if name.startswith("sub") else 1
    term = other * (alpha * sign)
    assert out is None, f"{name}(alpha=<tensor>, out=...) is not used by any optimizer of torch"
    return x.add_(term) if name.endswith("_") else x.add(term)


def _with_value(name: str, x: Tensor, a: Tensor, b: Tensor, *, value: Tensor) -> Tensor:
    term = a * value / b if name.startswith("addcdiv") else a * value * b
    return x.add_(term) if name.endswith("_") else x.add(term)


def _extreme(pick: Callable[..., Tensor], builtin: Callable[..., Any]) -> Callable[..., Any]:
    def extreme(*args: Any, **kwargs: Any) -> Any:
        if len(args) != 2 or kwargs or not any(isinstance(a, Tensor) for a in args):
            return builtin(*args, **kwargs)
        like = next(a for a in args if isinstance(a, Tensor))
        first, second = (a if isinstance(a, Tensor) else torch.full_like(like, a) for a in args)
        return pick(first, second)

    return extreme


@contextmanager
def tensor_min_max(function: Any) -> Iterator[None]:
    """``min`` and ``max`` of two scalars for tensors too, in the module of one of torch's own optimizers.

    Adafactor takes ``max(eps, norm)`` with the builtins, which would ask the
    host. Only torch's modules are changed, never the user's.
    """
    if not isinstance(function, FunctionType) or not function.__module__.startswith("torch.optim."):
        yield
        return
    names = function.__globals__
    names.update(min=_extreme(torch.minimum, min), max=_extreme(torch.maximum, max))
    try:
        yield
    finally:
        del names["min"], names["max"]
