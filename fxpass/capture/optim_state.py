"""Optimizer state before the first step: made as eager would make it, in the form the graph reads it.

A graph needs every state tensor as an input, so state is created before the
step is traced. Numbers become tensors: an exact skip holds them back on the
device, without asking the host.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import _torch
from ..errors import OptimizerError
from ..ir.slots import Slot
from . import counters
from .standin import as_tensor, holds_tensor, is_torchs, stand_in
from .trial import Trial, equal, steps_alone, try_step


@dataclass(frozen=True)
class Habits:
    """What trials have shown of a step that is not torch's."""

    first: Mapping[Slot, str] = field(default_factory=dict)  # see primed
    alone: bool = False  # it does the same to each parameter with or without the others


def habits_of(optimizer: Optimizer, slots: Sequence[Slot], where: str) -> Habits:
    """Try the step of ``optimizer``.

    Raises:
        OptimizerError: see ``primed``.
    """
    if is_torchs(optimizer):
        return Habits()
    return Habits(primed(optimizer, slots, where), steps_alone(optimizer, slots))


def create_state(optimizer: Optimizer, slots: Iterable[Slot], where: str) -> Callable[[], None]:
    """Create what the parameters ``slots`` lack of state as eager's first step would; returns an undo.

    torch's optimizers do it in ``_init_group``, which gets a zero-stride zero
    gradient that costs nothing. For a user-written one the step is tried on one
    parameter at a time, and each state value is kept as it was when first assigned,
    or empty where the first gradient makes it.
    """
    params = [(slot, slot.read(optimizer)) for slot in slots]
    if not is_torchs(optimizer) and any(_torch.shard_of(param) is not None for _, param in params):
        name = type(optimizer).__name__
        found = f"{name} is none of torch's, and its step would see some rows of each parameter"
        hint = "use one of torch.optim, or data_parallel=mesh in the place of fxpass.shard_"
        raise OptimizerError(found, where=where, hint=hint)
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
            for key, value in state.items():
                _check_part(slot.state(key), value, param, where)
            if not state or any(value is None for value in state.values()):
                made = create(optimizer, slot, where)
                _check_made(optimizer, made, param, where)
                state = {**made, **_present(state)}
            if state:
                optimizer.state[param] = {k: as_tensor(v, param.device) for k, v in state.items()}
    except BaseException:
        undo()
        raise
    return undo


def fit_state(
    optimizer: Optimizer,
    params: Iterable[Slot],
    counted: counters.Counters,
    forms: Mapping[Slot, Tensor],
    where: str,
) -> None:
    """Bring state that was replaced (``load_state_dict``) or cleared into the form the graph reads.

    ``forms``: see ``state_of``.

    Raises:
        OptimizerError: a tensor of another shape.
    """
    create_state(optimizer, params, where)
    counters.fit(optimizer, counted)
    device = optimizer.param_groups[0]["params"][0].device
    for slot, form in forms.items():
        value = slot.read(optimizer)
        param = slot.owner.read(optimizer) if slot.position is not None else None
        _check_part(slot, value, param, where)
        device = device if param is None else param.device
        part = _torch.part_of(value)
        if not isinstance(part, Tensor) or part.shape != form.shape:
            found = f"{slot.path} is {_short(value)}"
            hint = f"load state of the shape the step was compiled for, {tuple(form.shape)}"
            raise OptimizerError(found, where=where, hint=hint)
        if part.dtype != form.dtype or part.stride() != form.stride() or part.device != device:
            new = torch.empty_like(form, device=device).copy_(part)
            slot.write(optimizer, new if part is value else _torch.like(new, value))


def _is_part(value: Any, param: Any) -> bool:
    """Whether a state is spread over the ranks as its parameter is, or is a single number."""
    if not isinstance(value, Tensor) or _torch.shard_of(param) is None or not value.ndim:
        return True
    return _torch.spread_alike(value, param)


def _check_made(optimizer: Optimizer, made: Mapping[str, Any], param: Any, where: str) -> None:
    """Raise unless each rank can keep its rows of the state that an optimizer makes."""
    for key, value in made.items():
        if not _is_part(value, param):
            found = f"{type(optimizer).__name__} keeps state[{key!r}], {_short(value)}, for a parameter "
            found += f"of shape {tuple(param.shape)} of which each rank has some rows"
            hint = "use torch.optim.AdamW, or data_parallel=mesh in the place of fxpass.shard_"
            raise OptimizerError(found, where=where, hint=hint)


def _check_part(slot: Slot, value: Any, param: Any, where: str) -> None:
    """Raise unless state that somebody has put there is this rank's rows."""
    if not _is_part(value, param):
        found = f"{slot.path} is {_short(value)}, not spread over the ranks as its parameter is"
        hint = (
            "load it with torch.distributed.checkpoint.state_dict.set_optimizer_state_dict, "
            "with full_state_dict=True for the state of one device"
        )
        raise OptimizerError(found, where=where, hint=hint)


def state_of(
    optimizer: Optimizer, params: Iterable[Slot], counted: Iterable[Slot] = ()
) -> dict[Slot, Tensor]:
    """Every tensor of the state of ``params``, in a fixed order, and those that the optimizer counts with.

    Each with its form: dtype, shape and strides, without its values.
    """
    forms = {
        slot.state(key): _torch.part_of(value).detach().to("meta")
        for slot in params
        for key, value in optimizer.state.get(slot.read(optimizer), {}).items()
        if isinstance(value, Tensor)
    }
    return forms | {slot: slot.read(optimizer).detach().to("meta") for slot in counted}


def _short(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _present(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if value is not None}


# ---------------------------------------------------------------- as the first step would make it


def _initial_state_of_torch(optimizer: Optimizer, slot: Slot, where: str) -> dict[str, Any]:
    init_group = _torch.init_group(optimizer)
    proxy = slot.read(optimizer).detach()
    part = _torch.part_of(proxy)
    grad = torch.zeros((), dtype=proxy.dtype, device=proxy.device).expand(part.shape)
    proxy.grad = grad if part is proxy else _torch.like(grad, proxy)
    settings = {**slot.of_group(optimizer.param_groups), "params": [proxy]}
    other = stand_in(optimizer, [settings], defaultdict(dict))
    lists = [[] for name in inspect.signature(init_group).parameters if name not in ("self", "group")]
    with torch.no_grad():
        init_group(other, settings, *lists)
    state = _present(other.state.get(proxy, {}))
    if isinstance(optimizer, torch.optim.SGD) and settings["momentum"] != 0:
        state["momentum_buffer"] = torch.full_like(proxy, EMPTY)
    return state


# "Nothing there yet", -0.0 throughout, of a state that the first gradient makes: SGD's momentum_buffer
# (from zeros the update rule gives just that, unless it dampens: see prime_momentum), and users' own.
# After a step there is no -0.0 in it: see filled.
EMPTY = -0.0


def is_empty(buffer: Tensor) -> Tensor:
    """Whether a state has not had its first step. All of it or nothing: single elements of -0.0 occur."""
    return (torch.signbit(buffer) & (buffer == 0)).all()


def dampens(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """Whether the first gradient enters SGD's buffer differently from later ones."""
    if not isinstance(optimizer, torch.optim.SGD):
        return False
    return all(isinstance(group[key], Tensor) or group[key] != 0 for key in ("momentum", "dampening"))


def prime_momentum(buffer: Tensor, param: Tensor, grad: Tensor, group: dict[str, Any]) -> Tensor:
    """``buffer``; an empty one such that ``m * buffer + (1 - d) * grad`` is the gradient itself."""
    grad = (-grad if group["maximize"] else grad) + group["weight_decay"] * param
    return torch.where(is_empty(buffer), grad * (group["dampening"] / group["momentum"]), buffer)


def first_rate(optimizer: Optimizer, key: str, value: Tensor, step: Tensor, lr: Any) -> Tensor:
    """``value`` of the state; before its first step, the learning rate that eager would start it from.

    Eager makes the state at the first step that is not skipped, with the learning rate of then.
    """
    started = {torch.optim.ASGD: "eta", torch.optim.Rprop: "step_size"}
    if not any(isinstance(optimizer, kind) and key == name for kind, name in started.items()):
        return value
    lr = lr.to(value.dtype) if isinstance(lr, Tensor) else torch.full_like(step, lr, dtype=value.dtype)
    return torch.where(step == 0, lr, value)


def filled(buffer: Tensor) -> Tensor:
    """``buffer`` without -0.0: it is no longer empty."""
    return buffer.masked_fill(buffer == 0, 0.0)


def _initial_state_of_user(optimizer: Optimizer, slot: Slot, where: str) -> dict[str, Any]:
    key = primed(optimizer, [slot], where).get(slot)
    made = try_step(optimizer, slot, [1.0], where, random=True)
    if key is None:
        return made.state.first
    state = {k: torch.zeros_like(v) if isinstance(v, Tensor) else v for k, v in made.state.items()}
    told = state[key]
    return {**state, key: torch.full_like(told, EMPTY) if isinstance(told, Tensor) else EMPTY}


def primed(optimizer: Optimizer, slots: Sequence[Slot], where: str) -> dict[Slot, str]:
    """The parameters whose first step differs from later ones, each with the state that tells the first.

    Before it, that state is :data:`EMPTY` throughout.

    Raises:
        OptimizerError: no state can tell, or a later step makes more of it.
    """
    known: dict[Any, str | None] = {}
    for slot in slots:
        kind = (slot.group, slot.read(optimizer).shape)
        if kind not in known:
            known[kind] = _telling_first(optimizer, slot, where)
    kinds = [(slot, known[slot.group, slot.read(optimizer).shape]) for slot in slots]
    return {slot: key for slot, key in kinds if key is not None}


def _telling_first(optimizer: Optimizer, slot: Slot, where: str) -> str | None:
    """The state that tells whether a parameter has made its first step; None if that is like all others."""
    name = type(optimizer).__name__
    other, one = (try_step(optimizer, slot, [fill], where) for fill in (-0.5, 1.0))
    for key, value in one.state.items():
        if not isinstance(value, Tensor) and holds_tensor(value):
            found = f"{name} keeps tensors in a {type(value).__name__}, state[{key!r}]"
            hint = "keep each in an entry of its own"
            raise OptimizerError(f"{found}, which a compiled step cannot follow", where=where, hint=hint)
    later = try_step(optimizer, slot, [1.0, 0.5, 1.0], where)
    if added := later.state.keys() - one.state.keys():
        hint = "make all of the state in the first step"
        found = f"{name}.step() makes state[{min(added)!r}] in a later step than the first"
        raise OptimizerError(found, where=where, hint=hint)
    first = other.state.first
    made_alike = all(equal(value, one.state.first.get(key)) for key, value in first.items())
    if made_alike and _same(try_step(optimizer, slot, [1.0], where, state=first), one):
        return None
    for key, value in one.state.items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
            return key
    for key, value in one.state.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return key  # as a tensor it is one of floats
    hint = "keep a tensor of floats or a number in the state of each parameter"
    found = f"{name}.step() takes its first step differently from the others, and no state tells which it is"
    raise OptimizerError(found, where=where, hint=hint)


def _same(a: Trial, b: Trial) -> bool:
    """Whether two trials end alike."""
    return equal(a.param, b.param) and all(equal(value, b.state.get(key)) for key, value in a.state.items())
