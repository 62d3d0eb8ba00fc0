"""Optimizer state before the first step: made as eager would make it, in the form the graph reads it.

A graph needs every state tensor as an input, so state is created before the
step is traced. Numbers become tensors: an exact skip holds them back on the
device, without asking the host.
"""

from __future__ import annotations

import copy
import inspect
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import _torch
from ..errors import OptimizerError
from ..ir.slots import Slot


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


def stand_in(optimizer: Optimizer, groups: list[dict[str, Any]], state: Any) -> Any:
    """An optimizer of the same class, with other groups and state and a deep copy of its attributes."""
    other = object.__new__(type(optimizer))
    shared = [*optimizer.defaults.values(), *(p for g in optimizer.param_groups for p in g["params"])]
    memo: dict[int, Any] = {id(value): value for value in shared if isinstance(value, Tensor)}
    memo[id(optimizer)] = other
    for name, value in vars(optimizer).items():
        if name not in ("param_groups", "state", "step"):  # step: an LR scheduler's wrapper
            try:
                other.__dict__[name] = copy.deepcopy(value, memo)
            except Exception:  # a lock, a file: no state of an optimizer
                other.__dict__[name] = value
    other.__dict__.update(param_groups=groups, state=state)
    return other


def create_state(optimizer: Optimizer, slots: Iterable[Slot], where: str) -> Callable[[], None]:
    """Create what the parameters ``slots`` lack of state as eager's first step would; returns an undo.

    torch's optimizers do it in ``_init_group``, which gets a zero-stride zero
    gradient that costs nothing. For a user-written one the step is run on a
    clone of one parameter at a time and each state value is kept as it was when
    first assigned.
    """
    params = [(slot, slot.read(optimizer)) for slot in slots]
    before = {p: dict(optimizer.state[p]) for _, p in params if p in optimizer.state}

    def undo() -> None:
        for _, param in params:
            optimizer.state.pop(param, None)
            if param in before:
                optimizer.state[param] = before[param]

    create = _initial_state_of_torch if is_torchs(optimizer) else _initial_state_of_user
    try:
        for slot, param in params:
            state = dict(before.get(param, {}))
            if not state or any(value is None for value in state.values()):
                state = {**create(optimizer, slot, where), **_present(state)}
            if state:
                optimizer.state[param] = {k: _as_tensor(v, param) for k, v in state.items()}
    except BaseException:
        undo()
        raise
    return undo


def fit_state(optimizer: Optimizer, params: Iterable[Slot], forms: Mapping[Slot, Tensor], where: str) -> None:
    """Bring state that was replaced (``load_state_dict``) or cleared into the form the graph reads.

    ``forms``: see :func:`state_of`.

    Raises:
        OptimizerError: a tensor of another shape.
    """
    create_state(optimizer, params, where)
    for slot, form in forms.items():
        param, value = slot.owner.read(optimizer), slot.read(optimizer)
        if not isinstance(value, Tensor) or value.shape != form.shape:
            found = f"state[{slot.key!r}] of {slot.name}, of shape {tuple(param.shape)}, is {_short(value)}"
            hint = f"load state of the shape the step was compiled for, {tuple(form.shape)}"
            raise OptimizerError(found, where=where, hint=hint)
        if value.dtype != form.dtype or value.stride() != form.stride() or value.device != param.device:
            slot.write(optimizer, torch.empty_like(form, device=param.device).copy_(value))


def state_of(optimizer: Optimizer, params: Iterable[Slot]) -> dict[Slot, Tensor]:
    """Every tensor of the state of ``params``, in a fixed order.

    Each with its form: dtype, shape and strides, without its values.
    """
    return {
        slot.state(key): value.detach().to("meta")
        for slot in params
        for key, value in optimizer.state.get(slot.read(optimizer), {}).items()
        if isinstance(value, Tensor)
    }


def _short(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _present(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if value is not None}


def _as_tensor(value: Any, param: Tensor) -> Any:
    """A number as a float64 tensor, as precise as Python's; a 0-d tensor on the parameter's device."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return torch.tensor(value, dtype=torch.float64, device=param.device)
    return value.to(param.device) if isinstance(value, Tensor) and value.ndim == 0 else value


# ---------------------------------------------------------------- as the first step would make it


def _initial_state_of_torch(optimizer: Optimizer, slot: Slot, where: str) -> dict[str, Any]:
    init_group = inspect.unwrap(getattr(type(optimizer), "_init_group"))  # noqa: B009 - not of every Optimizer
    proxy = slot.read(optimizer).detach()
    proxy.grad = torch.zeros((), dtype=proxy.dtype, device=proxy.device).expand(proxy.shape)
    settings = {**slot.of_group(optimizer.param_groups), "params": [proxy]}
    other = stand_in(optimizer, [settings], defaultdict(dict))
    lists = [[] for name in inspect.signature(init_group).parameters if name not in ("self", "group")]
    with torch.no_grad():
        init_group(other, settings, *lists)
    state = _present(other.state.get(proxy, {}))
    if isinstance(optimizer, torch.optim.SGD) and settings["momentum"] != 0:
        state["momentum_buffer"] = torch.full_like(proxy, EMPTY_MOMENTUM)
    return state


# SGD's "no buffer yet", the first gradient becoming the buffer: -0.0 throughout. From zeros the update
# rule gives just that, unless it dampens: then prime_momentum tells them from what a step has written.
EMPTY_MOMENTUM = -0.0


def dampens(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """Whether the first gradient enters SGD's buffer differently from later ones."""
    if not isinstance(optimizer, torch.optim.SGD):
        return False
    return all(isinstance(group[key], Tensor) or group[key] != 0 for key in ("momentum", "dampening"))


def prime_momentum(buffer: Tensor, param: Tensor, grad: Tensor, group: dict[str, Any]) -> Tensor:
    """``buffer``; an empty one such that ``m * buffer + (1 - d) * grad`` is the gradient itself.

    Empty is all of it or nothing: single elements of -0.0 occur in buffers that eager filled.
    """
    grad = (-grad if group["maximize"] else grad) + group["weight_decay"] * param
    empty = (torch.signbit(buffer) & (buffer == 0)).all()
    return torch.where(empty, grad * (group["dampening"] / group["momentum"]), buffer)


def first_rate(optimizer: Optimizer, key: str, value: Tensor, step: Tensor, lr: Any) -> Tensor:
    """``value`` of the state; before its first step, the learning rate that eager would start it from.

    Eager makes the state at the first step that is not skipped, with the learning rate of then.
    """
    started = {torch.optim.ASGD: "eta", torch.optim.Rprop: "step_size"}
    if not any(isinstance(optimizer, kind) and key == name for kind, name in started.items()):
        return value
    lr = lr.to(value.dtype) if isinstance(lr, Tensor) else torch.full_like(step, lr, dtype=value.dtype)
    return torch.where(step == 0, lr, value)


def filled_momentum(buffer: Tensor) -> Tensor:
    """``buffer`` without -0.0: it is no longer empty."""
    return buffer.masked_fill(buffer == 0, 0.0)


class _FirstValues(dict[str, Any]):
    """A state dict that remembers each entry as it was when first assigned."""

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[str, Any] = {}

    def __setitem__(self, key: str, value: Any) -> None:
        if key not in self.first:
            self.first[key] = value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)
        super().__setitem__(key, value)

    def get(self, key: str, default: Any = None) -> Any:
        if key not in self and default is not None:
            self.first.setdefault(key, copy.deepcopy(default))
        return super().get(key, default)

    def setdefault(self, key: str, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def update(self, *args: Any, **kwargs: Any) -> None:
        for key, value in dict(*args, **kwargs).items():
            self[key] = value


def _initial_state_of_user(optimizer: Optimizer, slot: Slot, where: str) -> dict[str, Any]:
    name = type(optimizer).__name__
    runs = [_try_step(optimizer, slot, fill, {}, where) for fill in (0.0, 1.0)]
    first = runs[0].state.first
    for key, value in first.items():
        if not _equal(value, runs[1].state.first.get(key)):
            hint = f"initialise state[{key!r}] (with zeros, say) before the first gradient enters it"
            found = f"{name} creates state[{key!r}] from the gradient itself"
            raise OptimizerError(found, where=where, hint=hint)
    again = _try_step(optimizer, slot, 1.0, copy.deepcopy(first), where)
    for what, value in {**again.state, "the parameter": again.param}.items():
        if not _equal(value, {**runs[1].state, "the parameter": runs[1].param}.get(what)):
            hint = "let the first step make its state (zeros, say) and then do what every later step does"
            found = f"{name}.step() takes its first step differently from the others: {what} differs"
            raise OptimizerError(found, where=where, hint=hint)
    return first


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and bool(a == b or (a != a and b != b))


@dataclass
class _Trial:
    """A parameter and its state after one step on a clone."""

    param: Tensor
    state: _FirstValues


def _try_step(optimizer: Optimizer, slot: Slot, fill: float, start: dict[str, Any], where: str) -> _Trial:
    """One step of a clone of one parameter, its gradient full of ``fill``, from the state ``start``."""
    param = slot.read(optimizer)
    proxy = param.detach().clone()
    proxy.grad = torch.full_like(proxy, fill)
    own = slot.of_group(optimizer.param_groups)
    groups = [{**group, "params": [proxy] if group is own else []} for group in optimizer.param_groups]
    state: defaultdict[Any, _FirstValues] = defaultdict(_FirstValues)
    if start:
        state[proxy].update(start)
    other = stand_in(optimizer, groups, state)
    try:
        with torch.no_grad(), torch.random.fork_rng([param.device] if param.is_cuda else []):
            undecorated(type(optimizer).step)(other)
    except Exception as error:
        name = type(optimizer).__name__
        found = f"{name}.step() failed where it was tried on one parameter alone, to see its state: {error}"
        hint = (
            "let step() take each parameter for itself, or fill optimizer.state for all parameters "
            "before the first call"
        )
        raise OptimizerError(f"{found}{line_of(error)}", where=where, hint=hint) from error
    made = state.get(proxy, _FirstValues())
    made.first = {key: value for key, value in made.first.items() if key in made}
    return _Trial(proxy, made)


def line_of(error: Exception) -> str:
    """Where in the optimizer's own code ``error`` arose."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if _torch.is_users(f.filename)]
    return f" ({frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line})" if frames else ""


def copied(value: Any) -> Any:
    """A copy of nested lists, dicts and tuples; what they hold is shared."""
    if type(value) in (dict, defaultdict):
        new = copy.copy(value)
        new.update({k: copied(v) for k, v in value.items()})
        return new
    return type(value)(map(copied, value)) if type(value) in (list, tuple) else value
