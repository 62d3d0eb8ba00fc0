"""Expands ``optimizer.step()``: the optimizer's own Python, run on traced tensors.

Dynamo left one opaque node per ``step()``. While AOTAutograd traces the graph,
``run_step`` runs the optimizer's undecorated ``step`` on a stand-in object
whose parameters, gradients, state and learning rate are the traced tensors. So
any optimizer made of tensor maths works, Dynamo neither traces nor guards its
internals, and the user's optimizer object is never touched by tracing.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.compiler import set_stance
from torch.optim import Optimizer

from .. import _torch
from ..errors import OptimizerError
from ..ir.marks import OLD, UPDATE, mark
from ..ir.slots import Slot
from .assumptions import Assumptions
from .branches import Impossible, TooManyWays, Way, merged_ways, selected
from .optim_state import Habits, dampens, filled, first_rate, is_empty, prime_momentum
from .scalars import Comparison, ScalarTensors, as_number, tensor_functions
from .standin import classes_of, copied, is_torchs, is_wrapped, stand_in, undecorated
from .trial import line_of

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
    state: dict[Slot, Tensor]  # of parameters, and the optimizer's counters
    settings: dict[Slot, Any]  # learning rates, settings that are tensors or that the step has set

    @property
    def written(self) -> dict[Slot, Tensor]:
        """What a step replaces."""
        return {**self.params, **self.state}

    def copy(self, only: Slot | None = None) -> StepTensors:
        """Copies that one way through the step may write to; ``only``: of one parameter."""
        params = {s: p.clone() for s, p in self.params.items() if only in (None, s)}
        state = {s: v.clone() for s, v in self.state.items() if s.position is None or s.owner in params}
        return StepTensors(params, {s: self.grads[s].clone() for s in params}, state, self.settings)


@dataclass
class Traced:
    """One optimizer whose ``step()`` is traced."""

    optimizer: Optimizer
    tensors: StepTensors
    habits: Habits
    where: str
    comparisons: list[Comparison] = field(default_factory=list)


def write_all(tensors: StepTensors) -> None:
    """Write what a step writes, of no value: where nobody looks but at what is written."""
    with torch.no_grad():
        for old in tensors.written.values():
            old.zero_()


def run_step(
    optimizer: Optimizer,
    tensors: StepTensors,
    numbers: Mapping[Slot, int],
    habits: Habits,
    where: str,
) -> Assumptions:
    """Update ``tensors`` in place as ``optimizer.step()`` would; mark every new value with UPDATE.

    ``numbers``: of the mark of each parameter and state; ``habits``: what trials of its step have shown.
    Returns what the trace took for granted.
    """
    traced = Traced(optimizer, tensors, habits, where)
    with torch.no_grad():
        olds = {slot: mark(tensors.written[slot], OLD, number) for slot, number in numbers.items()}
        news = _once(traced, tensors, None) if is_torchs(optimizer) else _any_way(traced)
        for slot, key in habits.first.items():
            new = news[slot.state(key)]
            news[slot.state(key)] = filled(new) if isinstance(new, Tensor) else new
        for slot, old in tensors.written.items():
            new = news[slot]
            new = new.to(old.dtype) if isinstance(new, Tensor) else torch.full_like(old, new)
            new = new if new.shape == old.shape else new.reshape(old.shape)  # a number of shape (1,)
            old.copy_(mark(new, UPDATE, numbers[slot], olds[slot]))
    counted = [slot for slot in tensors.state if slot.position is None]
    number = next(iter(tensors.params)).optimizer
    return Assumptions.of(optimizer, number, where, traced.comparisons, counted)


def _any_way(traced: Traced) -> dict[Slot, Any]:
    """The new values, whichever way the step's conditions go, of first steps and of later ones."""
    tensors, first = traced.tensors, traced.habits.first
    later = _all_ways(traced, first=False)
    if not first:
        return later
    made = _all_ways(traced, first=True)
    empty = {slot: is_empty(tensors.state[slot.state(key)]) for slot, key in first.items()}
    any_empty = torch.stack(list(empty.values())).any()
    news = {}
    for slot, value in later.items():
        condition = empty.get(slot.owner, any_empty)
        news |= selected(condition, {slot: made[slot]}, {slot: value})
    return news


def _all_ways(traced: Traced, *, first: bool) -> dict[Slot, Any]:
    tensors = traced.tensors
    with contextlib.suppress(TooManyWays):  # all parameters at once; or else one after the other
        return merged_ways(lambda way: _once(traced, tensors.copy(), way, first=first))
    news: dict[Slot, Any] = {}
    try:
        for slot in (
            tensors.params if traced.habits.alone else ()
        ):  # one at a time: each has conditions of its own
            own = merged_ways(lambda way, s=slot: _once(traced, tensors.copy(s), way, first=first))
            news = {**own, **news}
    except TooManyWays:
        news = {}
    if not news:
        found = f"{type(traced.optimizer).__name__}.step() branches on too many values"
        hint = "in place of a branch write torch.where(torch.as_tensor(condition), a, b)"
        raise OptimizerError(found, where=traced.where, hint=hint)
    return news


def _once(traced: Traced, tensors: StepTensors, way: Way | None, *, first: bool = False) -> dict[Slot, Any]:
    """The new values on one way through the step, which writes to ``tensors``."""
    optimizer, name, where = traced.optimizer, type(traced.optimizer).__name__, traced.where
    groups = _traced_groups(optimizer, tensors)
    state: State = defaultdict(dict)
    other = stand_in(optimizer, groups, state)
    counters = {slot: value for slot, value in tensors.state.items() if slot.position is None}
    for slot, value in {**tensors.settings, **counters}.items():
        slot.write(other, value)
    state.update(_traced_state(optimizer, tensors, groups, traced.habits.first if first else {}))
    before = copied(groups)
    known = [*(t for t in tensors.state.values() if t.ndim == 0 and t.dtype == torch.float64)]
    known += [value for value in tensors.settings.values() if isinstance(value, Tensor)]
    mode = ScalarTensors(_known_settings(optimizer, tensors), known, way)
    try:
        # what the step compiles itself is traced with the rest
        with _torch.compiling_flag(), _torch.python_values(mode.truth), set_stance("force_eager"):
            with tensor_functions(classes_of(optimizer)), mode:
                result = undecorated(type(optimizer).step)(other)
    except Exception as error:
        if isinstance(error, ZeroDivisionError) and way is not None and way.outcomes:
            raise Impossible from error
        hint = (
            "its step() must be plain tensor maths: no reads of values by float() or int(), and in place of "
            "an error raised on a condition nothing, or torch.where(torch.as_tensor(condition), a, b)"
        )
        found = f"{name}.step() could not be traced: {error}{line_of(error)}"
        raise OptimizerError(found, where=where, hint=hint) from error
    traced.comparisons += mode.comparisons
    if result is not None:
        hint = "let it return nothing, and compute in the step itself what it returned"
        raise OptimizerError(f"{name}.step() returns {result!r}, which would be lost", where=where, hint=hint)
    changed = _hidden_changes(optimizer, other, before, counters) or _new_state(optimizer, tensors, state)
    if changed:
        hint = "keep what changes from step to step in optimizer.state[parameter], as tensors or numbers"
        found = f"{name}.step() {changed}, which a compiled step cannot follow"
        raise OptimizerError(found, where=where, hint=hint)
    news: dict[Slot, Any] = dict(tensors.params)
    for slot in tensors.state:
        new = slot.read(other) if slot in counters else state[tensors.params[slot.owner]][slot.key]
        if (
            slot not in counters
            and dampens(optimizer, slot.of_group(groups))
            and slot.key == "momentum_buffer"
        ):
            new = filled(new)
        news[slot] = new
    for param in tensors.params.values():
        param.grad = None
    return news


def _traced_groups(optimizer: Optimizer, tensors: StepTensors) -> list[dict[str, Any]]:
    groups = []
    for group in optimizer.param_groups:
        traced = {**copied(group), "params": []}
        if "foreach" in group:  # a foreach list keeps all of its gradients alive
            traced["foreach"] = False
        if any(c.__module__.startswith("torch.optim.") for c in classes_of(optimizer)):
            if "fused" in group:  # one opaque kernel; the formula is fused with unscale, clip and skip
                traced["fused"] = False
            if "capturable" in group:
                traced["capturable"] = isinstance(optimizer, _BRANCHING)
        groups.append(traced)
    for slot, param in tensors.params.items():
        param.grad = tensors.grads[slot]
        slot.of_group(groups)["params"].append(param)
    return groups


def _traced_state(
    optimizer: Optimizer, tensors: StepTensors, groups: list[dict[str, Any]], without: Container[Slot]
) -> State:
    state: State = defaultdict(dict)
    for slot, param in tensors.params.items():
        if slot in without:  # its first step, which makes the state
            continue
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
            if not isinstance(was, Tensor) and not _unchanged(now, was, set()):
                return f"changes state[{key!r}] from {was!r}"
            if isinstance(was, Tensor) and not isinstance(now, (Tensor, int, float)):
                return f"changes state[{key!r}] from a tensor to {now!r}"
    return ""


def _hidden_changes(
    optimizer: Optimizer, traced: Any, groups: list[dict[str, Any]], counters: Iterable[Slot]
) -> str:
    """Which attribute or setting, no counter, the step changed, in words; empty if none.

    ``groups``: as before.
    """
    counted = {(slot.group, slot.key) for slot in counters}
    for name in vars(traced).keys() | vars(optimizer).keys():
        if name in ("state", "param_groups", "step") or is_wrapped(optimizer, vars(optimizer).get(name)):
            continue
        if (None, name) not in counted:
            if not _unchanged(vars(traced).get(name), vars(optimizer).get(name), {id(traced)}):
                return f"changes self.{name}"
    for g, (now, then) in enumerate(zip(traced.param_groups, groups, strict=True)):
        for key in now.keys() | then.keys():
            if (
                key != "params"
                and (g, key) not in counted
                and not _unchanged(now.get(key), then.get(key), set())
            ):
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
