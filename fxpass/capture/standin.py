"""A copy of an optimizer that can be run in its place, and what it is copied from."""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def undecorated(function: Any) -> Any:
    """``function`` without torch's own decorators: profiling, grad mode, graph breaks."""
    while (
        isinstance(function, FunctionType)
        and hasattr(function, "__wrapped__")
        and str(function.__globals__.get("__name__")).startswith("torch.")
    ):
        function = vars(function)["__wrapped__"]
    return function


def is_torchs(optimizer: Optimizer) -> bool:
    """Whether ``step`` and ``_init_group`` are those of a class in ``torch.optim``."""
    methods = [inspect.unwrap(getattr(type(optimizer), n, len)) for n in ("step", "_init_group")]
    return all((getattr(m, "__module__", "") or "").startswith("torch.optim.") for m in methods)


def stand_in(optimizer: Optimizer, groups: Sequence[dict[str, Any]], state: Any) -> Any:
    """An optimizer of the same class, with other groups and state and a deep copy of its attributes."""
    other = object.__new__(type(optimizer))
    shared = [*optimizer.defaults.values(), *(p for g in optimizer.param_groups for p in g["params"])]
    memo: dict[int, Any] = {id(value): value for value in shared if isinstance(value, Tensor)}
    memo[id(optimizer)] = other
    for name, value in vars(optimizer).items():
        if name not in ("param_groups", "state", "step"):  # step: an LR scheduler's wrapper
            if is_wrapped(optimizer, value):
                inner = stand_in(value, groups, state)
                inner.step = partial(undecorated(type(value).step), inner)
                other.__dict__[name] = inner
                continue
            try:
                other.__dict__[name] = copy.deepcopy(value, memo)
            except Exception:  # a lock, a file: no state of an optimizer
                other.__dict__[name] = value
    other.__dict__.update(param_groups=groups, state=state)
    return other


def copied(value: Any) -> Any:
    """A copy of nested lists, dicts and tuples; what they hold is shared."""
    if type(value) in (dict, defaultdict):
        new = copy.copy(value)
        new.update({k: copied(v) for k, v in value.items()})
        return new
    return type(value)(map(copied, value)) if type(value) in (list, tuple) else value


def classes_of(optimizer: Optimizer) -> list[type]:
    """The classes whose methods a step may run: the optimizer's up to torch's, and those of what it wraps."""
    own = type(optimizer).__mro__
    inner = [value for value in vars(optimizer).values() if is_wrapped(optimizer, value)]
    own = own[: own.index(Optimizer)] if Optimizer in own else own
    return [*own, *(cls for value in inner for cls in classes_of(value))]


def is_wrapped(optimizer: Optimizer, value: Any) -> bool:
    """Whether ``value`` is an optimizer that ``optimizer`` wraps: it has the same groups and state."""
    return (
        isinstance(value, Optimizer)
        and value is not optimizer
        and value.param_groups is optimizer.param_groups
        and value.state is optimizer.state
    )


def as_tensor(value: Any, device: torch.device) -> Any:
    """A number as a float64 tensor, as precise as Python's; a 0-d tensor on ``device``."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return torch.tensor(value, dtype=torch.float64, device=device)
    return value.to(device) if isinstance(value, Tensor) and value.ndim == 0 else value


def holds_tensor(value: Any) -> bool:
    """Whether a tensor is in ``value``: in a list or dict, or in an object's attributes."""
    if isinstance(value, Tensor):
        return True
    if isinstance(value, dict):
        return any(map(holds_tensor, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(holds_tensor, value))
    return any(isinstance(kept, Tensor) for kept in getattr(value, "__dict__", {}).values())
