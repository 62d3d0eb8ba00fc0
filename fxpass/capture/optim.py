"""Expands ``optimizer.step()``: the optimizer's own Python, run on traced tensors.

Dynamo left one opaque node per ``step()``. While AOTAutograd traces the graph,
:func:`run_step` runs the optimizer's undecorated ``step`` on a stand-in object
whose parameters, gradients, state and learning rate are the traced tensors. So
any optimizer made of tensor maths works, Dynamo neither traces nor guards its
internals, and the user's optimizer object is never touched by tracing.
"""

from __future__ import annotations

import sys
import traceback
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import _torch
from ..errors import OptimizerError
from ..ir.marks import OLD, UPDATE, mark
from .optim_state import (
    StateKey,
    copied,
    filled_momentum,
    is_torchs,
    parameter,
    prime_momentum,
    stand_in,
    undecorated,
)
from .scalars import Comparison, ScalarTensors, Setting, as_number, tensor_functions

_LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))  # no code of the user's
State = defaultdict[Any, dict[str, Any]]
# Capturable formulas divide by the learning rate; where that is zero, only the ordinary ones, which
# eager runs, are right. Of these the ordinary formula branches on a step count or writes by a mask,
# and the capturable one agrees with it everywhere.
_BRANCHING = (torch.optim.RAdam, torch.optim.ASGD, torch.optim.Rprop)


def check(optimizer: Optimizer, where: str) -> None:
    """Raise :class:`OptimizerError` for an optimizer whose step cannot become graph nodes."""
    refused = _refused_hooks(optimizer) or _refused_attributes(optimizer)
    for number, group in enumerate(optimizer.param_groups):
        refused = refused or _refused_group(type(optimizer).__name__, number, group)
        for param in group["params"]:
            refused = refused or _refused_parameter(type(optimizer).__name__, param)
    if refused:
        found, hint = refused
        raise OptimizerError(found, where=where, hint=hint)


def _refused_group(name: str, number: int, group: dict[str, Any]) -> tuple[str, str] | None:
    if group.get("fused"):
        hint = f"build {name} without fused=True; fxpass fuses the update with unscale, clip and skip itself"
        return f"{name} was built with fused=True (param group {number})", hint
    if group.get("differentiable"):
        return f"{name} was built with differentiable=True", "build it with differentiable=False"
    for key, value in group.items():
        values = value if isinstance(value, tuple) else (value,)
        if key not in ("params", "lr", "initial_lr") and any(isinstance(v, Tensor) for v in values):
            found = f"{name} was built with a tensor as {key} (param group {number})"
            return found, "give a Python number; one that changes from step to step is followed all the same"
    return None


def _refused_parameter(name: str, param: Tensor) -> tuple[str, str] | None:
    if param.is_complex():
        hint = "store real and imaginary part as a real parameter (torch.view_as_real)"
        return f"a complex parameter of shape {tuple(param.shape)} in {name}", hint
    if param.dtype in (torch.float16, torch.bfloat16):
        hint = "keep the model in float32 (model.float()); fxpass computes in low precision by itself"
        return f"a parameter of dtype {param.dtype} and shape {tuple(param.shape)} in {name}", hint
    return None


def _refused_attributes(optimizer: Optimizer) -> tuple[str, str] | None:
    own = {} if is_torchs(optimizer) else vars(optimizer)
    for key, value in own.items():
        if key not in ("defaults", "param_groups", "state") and _holds_tensor(value):
            found = f"{type(optimizer).__name__} keeps tensors in self.{key}"
            hint = "keep them in optimizer.state[parameter], and parameters in param_groups alone"
            return f"{found}, which a compiled step cannot see", hint
        if isinstance(value, (Optimizer, torch.nn.Module)):
            found = f"{type(optimizer).__name__} holds another {type(value).__name__} in self.{key}"
            hint = "step that one in the compiled function, and subclass it rather than wrap it"
            return f"{found}, whose tensors a compiled step cannot see", hint
    return None


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_tensor, value.values()))
    return isinstance(value, Tensor) or (isinstance(value, (list, tuple)) and any(map(_holds_tensor, value)))


def _refused_hooks(optimizer: Optimizer) -> tuple[str, str] | None:
    name = type(optimizer).__name__
    names = ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")
    everywhere = [getattr(sys.modules[Optimizer.__module__], n, None) for n in names]
    if any([optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks, *everywhere]):
        hint = "call what the hook does in the step itself, or before and after the compiled step"
        return f"{name} has step hooks registered, which would not run", hint
    step = vars(optimizer).get("step")
    if step is not None and not hasattr(step, "_wrapped_by_lr_sched"):
        return f"the step method of this {name} was replaced on the object", "override step in a subclass"
    return None


@dataclass
class StepTensors:
    """The traced tensors that stand for one optimizer's during a trace."""

    places: list[tuple[int, int]]  # of the parameters that have a gradient
    params: list[Tensor]
    grads: list[Tensor]
    state: dict[StateKey, Tensor]
    lr: list[Tensor]  # one 0-d float64 per param group
    dynamic: list[tuple[tuple[int, str, int | None], Any]]  # settings that are tensors, or set by the step


def run_step(optimizer: Optimizer, tensors: StepTensors, first_update: int, where: str) -> list[Comparison]:
    """Update ``tensors`` in place as ``optimizer.step()`` would; mark every new value with UPDATE.

    The marks are numbered from ``first_update``: parameters first, then state,
    in the order of ``tensors``. Returns what the trace took for granted.
    """
    name = type(optimizer).__name__
    with torch.no_grad():
        written = [*tensors.params, *tensors.state.values()]
        olds = [mark(old, OLD, number) for number, old in enumerate(written, first_update)]
    groups = _traced_groups(optimizer, tensors)
    with torch.no_grad():
        state = _traced_state(optimizer, tensors, groups)
    traced, before = stand_in(optimizer, groups, state), copied(groups)
    mode = ScalarTensors(_settings(optimizer, tensors))
    try:
        with torch.no_grad(), _torch.compiling_flag(), _torch.python_values(mode.truth):
            with tensor_functions(type(optimizer)), mode:
                undecorated(type(optimizer).step)(traced)
    except Exception as error:
        hint = "its step() must be plain tensor maths: no reads of values, no branches on tensors"
        found = f"{name}.step() could not be traced: {error}{_line(error)}"
        raise OptimizerError(found, where=where, hint=hint) from error
    if changed := _hidden_changes(optimizer, traced, before) or _new_state(optimizer, tensors, state):
        hint = "keep what changes from step to step in optimizer.state[parameter], as tensors or numbers"
        found = f"{name}.step() {changed}, which a compiled step cannot follow"
        raise OptimizerError(found, where=where, hint=hint)
    with torch.no_grad():
        _write_back(optimizer, tensors, state, groups, olds, first_update)
    return mode.comparisons + _constants(optimizer)


def _line(error: Exception) -> str:
    """Where in the optimizer's own code the error arose."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_LIBRARIES)]
    return f" ({frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line})" if frames else ""


def _traced_groups(optimizer: Optimizer, tensors: StepTensors) -> list[dict[str, Any]]:
    groups = []
    for g, group in enumerate(optimizer.param_groups):
        traced = {**copied(group), "params": []}
        if group.get("lr") is not None:  # None: the optimizer finds its own
            traced["lr"] = tensors.lr[g]
        if "foreach" in group:  # a foreach list keeps all of its gradients alive
            traced["foreach"] = False
        if "capturable" in group and any(c.__module__.startswith("torch.optim.") for c in _bases(optimizer)):
            traced["capturable"] = isinstance(optimizer, _BRANCHING)
        groups.append(traced)
    for (g, key, position), tensor in tensors.dynamic:
        if position is None:
            groups[g][key] = tensor
        else:
            items = list(groups[g][key])
            items[position] = tensor
            groups[g][key] = tuple(items)
    for (g, _), param, grad in zip(tensors.places, tensors.params, tensors.grads, strict=True):
        param.grad = grad
        groups[g]["params"].append(param)
    return groups


def _bases(optimizer: Optimizer) -> Sequence[type]:
    return type(optimizer).__mro__[: type(optimizer).__mro__.index(Optimizer)]


def _traced_state(optimizer: Optimizer, tensors: StepTensors, groups: list[dict[str, Any]]) -> State:
    inputs = {(at.group, at.position, at.key): value for at, value in tensors.state.items()}
    state: State = defaultdict(dict)
    for (g, p), param, grad in zip(tensors.places, tensors.params, tensors.grads, strict=True):
        for key, value in optimizer.state.get(parameter(optimizer, g, p), {}).items():
            value = inputs.get((g, p, key), value)
            if isinstance(optimizer, _BRANCHING) and key in ("step", "eta", "mu"):
                # the ordinary formula computes with Python numbers: 1 - 0.999**step needs their precision
                value = as_number(value)
            if _dampens(optimizer, groups[g]) and key == "momentum_buffer" and isinstance(value, Tensor):
                value = prime_momentum(value, param, grad, groups[g])
            state[param][key] = value
    return state


def _dampens(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    dampening = group["dampening"] if isinstance(optimizer, torch.optim.SGD) else 0
    return isinstance(dampening, Tensor) or dampening != 0


def _setting(optimizer: Optimizer, at: Setting) -> Any:
    group, key, position = at
    value = vars(optimizer).get(key) if group is None else optimizer.param_groups[group].get(key)
    return value[position] if position is not None and isinstance(value, tuple) else value


def _settings(optimizer: Optimizer, tensors: StepTensors) -> list[tuple[Setting, Tensor, float]]:
    lrs = [((g, "lr", None), tensor) for g, tensor in enumerate(tensors.lr)]
    dynamic = [(at, value) for at, value in tensors.dynamic if isinstance(value, Tensor)]
    known = [(at, tensor, _setting(optimizer, at)) for at, tensor in (*dynamic, *lrs)]
    return [(at, tensor, value) for at, tensor, value in known if isinstance(value, (int, float))]


def _constants(optimizer: Optimizer) -> list[Comparison]:
    """Numbers that a user-written step may read and that Dynamo has no guard on."""
    if is_torchs(optimizer):
        return []
    at: list[Setting] = [(None, name, None) for name in vars(optimizer) if not name.startswith("_")]
    for g, group in enumerate(optimizer.param_groups):
        at += [(g, key, None) for key in group if key not in (*optimizer.defaults, "params", "lr")]
    values = [(setting, _setting(optimizer, setting)) for setting in at]
    return [Comparison(s, "eq", v, True) for s, v in values if isinstance(v, (bool, int, float, str))]


def _new_state(optimizer: Optimizer, tensors: StepTensors, state: State) -> str:
    """What the step did to its state beyond new values for the tensors in it; empty if nothing."""
    by_param = dict(zip(tensors.params, tensors.places, strict=True))
    for owner, entries in state.items():
        if entries and (not isinstance(owner, Tensor) or owner not in by_param):
            return f"keeps state under {owner!r}, not under a parameter"
        real = optimizer.state.get(parameter(optimizer, *by_param[owner]), {}) if entries else {}
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
    olds: list[Tensor],
    first: int,
) -> None:
    by_place = dict(zip(tensors.places, tensors.params, strict=True))
    news: list[tuple[Tensor, Any]] = list(zip(tensors.params, tensors.params, strict=True))
    for at, old in tensors.state.items():
        new = state[by_place[(at.group, at.position)]][at.key]
        if _dampens(optimizer, groups[at.group]) and at.key == "momentum_buffer":
            new = filled_momentum(new)
        news.append((old, new))
    for number, ((old, new), before) in enumerate(zip(news, olds, strict=True), first):
        new = new.to(old.dtype) if isinstance(new, Tensor) else torch.full_like(old, new)
        old.copy_(mark(new, UPDATE, number, before))
    for param in tensors.params:
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


def check_comparisons(optimizer: Optimizer, comparisons: Sequence[Comparison], where: str) -> None:
    """Raise :class:`OptimizerError` if a setting no longer compares as it did when the step was compiled."""
    for comparison in comparisons:
        group, key, _ = comparison.setting
        if not comparison.holds(_setting(optimizer, comparison.setting)):
            hint = "call torch.compiler.reset() (or make a new optimizer) after such a change"
            place = f"self.{key}" if group is None else f"param_groups[{group}][{key!r}]"
            found = f"{place} of {type(optimizer).__name__} changed in a way the compiled step cannot follow"
            raise OptimizerError(found, where=where, hint=hint)
