"""Expands ``optimizer.step()``: the optimizer's own Python, run on traced tensors.

Dynamo left one opaque node per ``step()``. While AOTAutograd traces the graph,
:func:`run_step` runs the optimizer's undecorated ``step`` on a stand-in object
whose parameters, gradients, state and learning rate are the traced tensors. So
any optimizer made of tensor maths works, Dynamo neither traces nor guards its
internals, and the user's optimizer object is never touched by tracing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import _torch
from ..errors import OptimizerError
from ..ir.marks import OLD, UPDATE, mark
from ..ir.slots import Slot
from .assumptions import Assumptions
from .optim_state import (
    copied,
    dampens,
    filled_momentum,
    first_rate,
    line_of,
    prime_momentum,
    stand_in,
    undecorated,
)
from .scalars import ScalarTensors, as_number, tensor_functions

State = defaultdict[Any, dict[Any, Any]]
# Capturable formulas divide by the learning rate; where that is zero, only the ordinary ones, which
# eager runs, are right. Of these the ordinary formula branches on a step count or writes by a mask,
# and the capturable one agrees with it everywhere.
_BRANCHING = (torch.optim.RAdam, torch.optim.ASGD, torch.optim.Rprop)


@dataclass
class StepTensors:
    """The traced tensors that stand for one optimizer's during a trace."""

    params: dict[Slot, Tensor]  # those that have a gradient
    grads: dict[Slot, Tensor]  # by the slot of the parameter
    state: dict[Slot, Tensor]
    settings: dict[Slot, Any]  # learning rates, settings that are tensors or that the step has set


def run_step(
    optimizer: Optimizer, tensors: StepTensors, numbers: Mapping[Slot, int], where: str
) -> Assumptions:
    """Update ``tensors`` in place as ``optimizer.step()`` would; mark every new value with UPDATE.

    ``numbers``: of the mark of each parameter and state. Returns what the trace took for granted.
    """
    name = type(optimizer).__name__
    with torch.no_grad():
        written = {**tensors.params, **tensors.state}
        olds = {slot: mark(written[slot], OLD, number) for slot, number in numbers.items()}
    groups = _traced_groups(optimizer, tensors)
    state: State = defaultdict(dict)
    traced = stand_in(optimizer, groups, state)
    for slot, value in tensors.settings.items():
        slot.write(traced, value)
    with torch.no_grad():
        state.update(_traced_state(optimizer, tensors, groups))
    before = copied(groups)
    mode = ScalarTensors(_known_settings(optimizer, tensors))
    try:
        with torch.no_grad(), _torch.compiling_flag(), _torch.python_values(mode.truth):
            with tensor_functions(type(optimizer)), mode:
                result = undecorated(type(optimizer).step)(traced)
    except Exception as error:
        hint = (
            "its step() must be plain tensor maths: no reads of values, and in place of a branch on one "
            "torch.where(torch.as_tensor(condition), a, b)"
        )
        found = f"{name}.step() could not be traced: {error}{line_of(error)}"
        raise OptimizerError(found, where=where, hint=hint) from error
    if result is not None:
        hint = "let it return nothing, and compute in the step itself what it returned"
        raise OptimizerError(f"{name}.step() returns {result!r}, which would be lost", where=where, hint=hint)
    if changed := _hidden_changes(optimizer, traced, before) or _new_state(optimizer, tensors, state):
        hint = "keep what changes from step to step in optimizer.state[parameter], as tensors or numbers"
        found = f"{name}.step() {changed}, which a compiled step cannot follow"
        raise OptimizerError(found, where=where, hint=hint)
    with torch.no_grad():
        _write_back(optimizer, tensors, state, groups, olds, numbers)
    number = next(iter(tensors.params)).optimizer
    return Assumptions.of(optimizer, number, where, mode.comparisons)


def _traced_groups(optimizer: Optimizer, tensors: StepTensors) -> list[dict[str, Any]]:
    groups = []
    for group in optimizer.param_groups:
        traced = {**copied(group), "params": []}
        if "foreach" in group:  # a foreach list keeps all of its gradients alive
            traced["foreach"] = False
        if any(c.__module__.startswith("torch.optim.") for c in _bases(optimizer)):
            if "fused" in group:  # one opaque kernel; the formula is fused with unscale, clip and skip
                traced["fused"] = False
            if "capturable" in group:
                traced["capturable"] = isinstance(optimizer, _BRANCHING)
        groups.append(traced)
    for slot, param in tensors.params.items():
        param.grad = tensors.grads[slot]
        slot.of_group(groups)["params"].append(param)
    return groups


def _bases(optimizer: Optimizer) -> Sequence[type]:
    return type(optimizer).__mro__[: type(optimizer).__mro__.index(Optimizer)]


def _traced_state(optimizer: Optimizer, tensors: StepTensors, groups: list[dict[str, Any]]) -> State:
    state: State = defaultdict(dict)
    for slot, param in tensors.params.items():
        group, count = slot.of_group(groups), tensors.state.get(slot.state("step"))
        for key, value in optimizer.state.get(slot.read(optimizer), {}).items():
            value = tensors.state.get(slot.state(key), value)
            if count is not None and isinstance(value, Tensor):
                value = first_rate(optimizer, key, value, count, group.get("lr"))
            if isinstance(optimizer, _BRANCHING) and key in ("step", "eta", "mu"):
                # the ordinary formula computes with Python numbers: 1 - 0.999**step needs their precision
                value = as_number(value)
            if dampens(optimizer, group) and key == "momentum_buffer" and isinstance(value, Tensor):
                value = prime_momentum(value, param, tensors.grads[slot], group)
            state[param][key] = value
    return state


def _known_settings(optimizer: Optimizer, tensors: StepTensors) -> list[tuple[Slot, Tensor, float]]:
    """The settings that are tensors in the trace and numbers in the user's optimizer, with these numbers."""
    known = [(at, tensor, at.read(optimizer)) for at, tensor in tensors.settings.items()]
    return [(at, t, n) for at, t, n in known if isinstance(t, Tensor) and isinstance(n, (int, float))]


def _new_state(optimizer: Optimizer, tensors: StepTensors, state: State) -> str:
    """What the step did to its state beyond new values for the tensors in it; empty if nothing."""
    slots = {param: slot for slot, param in tensors.params.items()}
    for owner, entries in state.items():
        if entries and (not isinstance(owner, Tensor) or owner not in slots):
            return f"keeps state under {owner!r}, not under a parameter"
        real = optimizer.state.get(slots[owner].read(optimizer), {}) if entries else {}
        for key in entries.keys() | real.keys():
            was, now = real.get(key), entries.get(key)
            if not isinstance(was, Tensor) and was is not now and was != now:
                return f"changes state[{key!r}] from {was!r}"
            if isinstance(was, Tensor) and not isinstance(now, (Tensor, int, float)):
                return f"changes state[{key!r}] from a tensor to {now!r}"
    return ""


def _write_back(
    optimizer: Optimizer,
    tensors: StepTensors,
    state: State,
    groups: list[dict[str, Any]],
    olds: Mapping[Slot, Tensor],
    numbers: Mapping[Slot, int],
) -> None:
    news: dict[Slot, Any] = dict(tensors.params)
    for slot in tensors.state:
        new = state[tensors.params[slot.owner]][slot.key]
        if dampens(optimizer, slot.of_group(groups)) and slot.key == "momentum_buffer":
            new = filled_momentum(new)
        news[slot] = new
    for slot, old in {**tensors.params, **tensors.state}.items():
        new = news[slot]
        new = new.to(old.dtype) if isinstance(new, Tensor) else torch.full_like(old, new)
        old.copy_(mark(new, UPDATE, numbers[slot], olds[slot]))
    for param in tensors.params.values():
        param.grad = None


def _hidden_changes(optimizer: Optimizer, traced: Any, groups: list[dict[str, Any]]) -> str:
    """Which attribute or setting the step changed, in words; empty if none. ``groups``: as before."""
    for name in vars(traced).keys() | vars(optimizer).keys():
        if name not in ("state", "param_groups", "step"):
            if not _unchanged(vars(traced).get(name), vars(optimizer).get(name), {id(traced)}):
                return f"changes self.{name}"
    for now, then in zip(traced.param_groups, groups, strict=True):
        for key in now.keys() | then.keys():
            if key != "params" and not _unchanged(now.get(key), then.get(key), set()):
                return f"changes param_groups[...][{key!r}]"
    return ""


def _unchanged(now: Any, then: Any, seen: set[int]) -> bool:
    """Whether a deep copy still equals its original; ``seen``: objects compared already, by id."""
    if now is then or id(now) in seen:
        return True
    if type(now) is not type(then) or isinstance(now, Tensor):
        return False
    seen.add(id(now))
    if isinstance(now, dict):
        return now.keys() == then.keys() and all(_unchanged(v, then[k], seen) for k, v in now.items())
    if isinstance(now, (list, tuple)):
        return len(now) == len(then) and all(_unchanged(a, b, seen) for a, b in zip(now, then, strict=True))
    if isinstance(now, (bool, int, float, complex, str, bytes, set, frozenset)):
        return bool(now == then)
    # what pickle would store tells two objects apart that know no equality
    return bool(now == then) or _unchanged(now.__reduce_ex__(4), then.__reduce_ex__(4), seen)
