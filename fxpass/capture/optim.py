"""Expands ``optimizer.step()``: the optimizer's own Python, run on traced tensors.

Dynamo left one opaque node per ``step()``. While AOTAutograd traces the graph,
:func:`run_step` runs the optimizer's undecorated ``step`` on a stand-in object
whose parameters, gradients, state and learning rate are the traced tensors. So
any optimizer made of tensor maths works, Dynamo neither traces nor guards its
internals, and the user's optimizer object is never touched by tracing.
"""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import _torch
from ..errors import OptimizerError
from ..ir.marks import UPDATE, mark
from .scalars import Comparison, ScalarTensors, tensor_min_max


@dataclass(frozen=True)
class StateKey:
    """Where a state tensor lives: ``optimizer.state[param_groups[group]["params"][position]][key]``."""

    group: int
    position: int
    key: str


def parameter(optimizer: Optimizer, group: int, position: int) -> Tensor:
    """The parameter at that place of ``param_groups``."""
    return optimizer.param_groups[group]["params"][position]


def check(optimizer: Optimizer, where: str) -> None:
    """Raise :class:`OptimizerError` for an optimizer whose step cannot become graph nodes."""
    name = type(optimizer).__name__

    def refuse(found: str, hint: str) -> OptimizerError:
        return OptimizerError(found, where=where, hint=hint)

    for number, group in enumerate(optimizer.param_groups):
        if group.get("fused"):
            hint = (
                f"build {name} without fused=True; fxpass fuses the update with unscale, clip and skip itself"
            )
            raise refuse(f"{name} was built with fused=True (param group {number})", hint)
        if group.get("differentiable"):
            raise refuse(f"{name} was built with differentiable=True", "build it with differentiable=False")
        for param in group["params"]:
            if param.is_complex():
                hint = "store real and imaginary part as a real parameter (torch.view_as_real)"
                raise refuse(f"a complex parameter of shape {tuple(param.shape)} in {name}", hint)
            if param.dtype in (torch.float16, torch.bfloat16):
                hint = "keep the model in float32 (model.float()); fxpass computes in low precision by itself"
                raise refuse(
                    f"a parameter of dtype {param.dtype} and shape {tuple(param.shape)} in {name}", hint
                )
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        hint = "call what the hook does in the step itself, or before and after the compiled step"
        raise refuse(f"{name} has step hooks registered, which would not run", hint)


def create_state(optimizer: Optimizer, places: Sequence[tuple[int, int]], where: str) -> Callable[[], None]:
    """Create the state of the parameters at ``places`` as eager's first step would; returns an undo.

    torch's optimizers do it in ``_init_group``, which gets a zero-stride zero
    gradient that costs nothing. For a user-written one the step is run on a
    clone of one parameter at a time and each state value is kept as it was when
    first assigned.
    """
    missing = [(g, p) for g, p in places if not optimizer.state.get(parameter(optimizer, g, p))]
    created = [parameter(optimizer, g, p) for g, p in missing]

    def undo() -> None:
        for param in created:
            optimizer.state.pop(param, None)

    try:
        for group, position in missing:
            param = parameter(optimizer, group, position)
            if type(optimizer).__module__.startswith("torch.optim."):
                state = _initial_state_of_torch(optimizer, group, param)
            else:
                state = _initial_state_of_user(optimizer, group, param, where)
            if state:
                optimizer.state[param] = state
        for group, position in places:
            _numbers_to_tensors(
                optimizer.state.get(parameter(optimizer, group, position), {}), optimizer, group, position
            )
    except BaseException:
        undo()
        raise
    return undo


def _stand_in(optimizer: Optimizer, groups: list[dict[str, Any]], state: Any) -> Any:
    stand_in = object.__new__(type(optimizer))
    stand_in.__dict__.update(optimizer.__dict__)
    stand_in.__dict__.pop("step", None)  # an LR scheduler's wrapper
    stand_in.__dict__.update(param_groups=groups, state=state)
    return stand_in


def _initial_state_of_torch(optimizer: Optimizer, group: int, param: Tensor) -> dict[str, Any]:
    init_group = inspect.unwrap(type(optimizer)._init_group)  # type: ignore[attr-defined]
    proxy = param.detach()
    proxy.grad = torch.zeros((), dtype=param.dtype, device=param.device).expand(param.shape)
    settings = {**optimizer.param_groups[group], "params": [proxy]}
    stand_in = _stand_in(optimizer, [settings], defaultdict(dict))
    lists = [[] for name in inspect.signature(init_group).parameters if name not in ("self", "group")]
    with torch.no_grad():
        init_group(stand_in, settings, *lists)
    state = {key: value for key, value in stand_in.state.get(proxy, {}).items() if value is not None}
    if isinstance(optimizer, torch.optim.SGD) and settings["momentum"] != 0:
        # torch keeps no buffer until the first gradient becomes it. From a buffer of zeros that
        # is what the update rule gives, unless it dampens: then NaN stands for "none yet".
        fill = 0.0 if settings["dampening"] == 0 else float("nan")
        state["momentum_buffer"] = torch.full_like(param, fill)
    return state


class _FirstValues(dict[str, Any]):
    """A state dict that remembers each entry as it was when first assigned."""

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[str, Any] = {}

    def __setitem__(self, key: str, value: Any) -> None:
        if key not in self.first:
            self.first[key] = value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)
        super().__setitem__(key, value)

    def setdefault(self, key: str, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def update(self, *args: Any, **kwargs: Any) -> None:
        for key, value in dict(*args, **kwargs).items():
            self[key] = value


def _initial_state_of_user(optimizer: Optimizer, group: int, param: Tensor, where: str) -> dict[str, Any]:
    seen: list[dict[str, Any]] = []
    for fill in (0.0, 1.0):
        proxy = param.detach().clone()
        proxy.grad = torch.full_like(proxy, fill)
        groups = copy.copy(optimizer.param_groups[group])
        groups["params"] = [proxy]
        state: defaultdict[Any, _FirstValues] = defaultdict(_FirstValues)
        with torch.no_grad():
            inspect.unwrap(type(optimizer).step)(_stand_in(optimizer, [groups], state))
        seen.append(state[proxy].first if proxy in state else {})
    for key, value in seen[0].items():
        other = seen[1].get(key)
        same = (
            torch.equal(value, other)
            if isinstance(value, Tensor) and isinstance(other, Tensor)
            else value == other
        )
        if not same:
            hint = f"initialise state[{key!r}] (with zeros, say) before the first gradient enters it"
            found = f"{type(optimizer).__name__} creates state[{key!r}] from the gradient itself"
            raise OptimizerError(found, where=where, hint=hint)
    return seen[0]


def _numbers_to_tensors(state: dict[str, Any], optimizer: Optimizer, group: int, position: int) -> None:
    """Step counts must be tensors on the parameter's device: an exact skip holds them back without a sync."""
    param = parameter(optimizer, group, position)
    for key, value in list(state.items()):
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            dtype = torch.float32 if isinstance(value, float) or key == "step" else torch.int64
            state[key] = torch.tensor(value, dtype=dtype, device=param.device)
        elif isinstance(value, Tensor) and value.ndim == 0 and value.device != param.device:
            state[key] = value.to(param.device)


def state_keys(optimizer: Optimizer, places: Sequence[tuple[int, int]]) -> list[StateKey]:
    """Every tensor of the optimizer's state for the parameters at ``places``, in a fixed order."""
    keys = []
    for group, position in places:
        for key, value in optimizer.state.get(parameter(optimizer, group, position), {}).items():
            if isinstance(value, Tensor):
                keys.append(StateKey(group, position, key))
    return keys


@dataclass
class StepTensors:
    """The traced tensors that stand for one optimizer's during a trace."""

    places: list[tuple[int, int]]  # of the parameters that have a gradient
    params: list[Tensor]
    grads: list[Tensor]
    state: dict[StateKey, Tensor]
    lr: list[Tensor]  # one 0-d float64 per param group
    dynamic: list[tuple[tuple[int, str, int | None], Tensor]]  # settings that are tensors


def run_step(optimizer: Optimizer, tensors: StepTensors, first_update: int, where: str) -> list[Comparison]:
    """Update ``tensors`` in place as ``optimizer.step()`` would; mark every new value with UPDATE.

    The marks are numbered from ``first_update``: parameters first, then state,
    in the order of ``tensors``. Returns the comparisons of settings that the
    trace took for granted.
    """
    groups = _traced_groups(optimizer, tensors)
    with torch.no_grad():
        state = _traced_state(optimizer, tensors, groups)
    before = {
        name: value
        for name, value in optimizer.__dict__.items()
        if name not in ("state", "param_groups", "step")
    }
    settings = [dict(group) for group in groups]
    stand_in = _stand_in(optimizer, groups, state)
    values = [_setting(optimizer, *at) for at, _ in tensors.dynamic]
    mode = ScalarTensors([(t, v) for (_, t), v in zip(tensors.dynamic, values, strict=True)])
    step = inspect.unwrap(type(optimizer).step)
    try:
        with torch.no_grad(), _torch.compiling_flag(), tensor_min_max(step), mode:
            step(stand_in)
    except OptimizerError:
        raise
    except Exception as error:
        name = type(optimizer).__name__
        hint = "its step() must be plain tensor maths: no .item()-like reads, no branches on tensor values"
        raise OptimizerError(f"{name}.step() could not be traced: {error}", where=where, hint=hint) from error
    _refuse_hidden_state(optimizer, stand_in, before, groups, settings, where)
    with torch.no_grad():
        _write_back(tensors, state, first_update, optimizer, where)
    return mode.comparisons


def _traced_groups(optimizer: Optimizer, tensors: StepTensors) -> list[dict[str, Any]]:
    groups = []
    for g, group in enumerate(optimizer.param_groups):
        traced = {**group, "params": []}
        if "lr" in group:
            traced["lr"] = tensors.lr[g]
        # one tensor at a time: a foreach list keeps all of its gradients alive, and capturable maths never asks the host
        traced.update({k: v for k, v in (("foreach", False), ("capturable", True)) if k in group})
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


def _traced_state(
    optimizer: Optimizer, tensors: StepTensors, groups: list[dict[str, Any]]
) -> defaultdict[Any, dict[str, Any]]:
    state: defaultdict[Any, dict[str, Any]] = defaultdict(dict)
    for (g, p), param, grad in zip(tensors.places, tensors.params, tensors.grads, strict=True):
        real = optimizer.state.get(parameter(optimizer, g, p), {})
        state[param] = {key: tensors.state.get(StateKey(g, p, key), value) for key, value in real.items()}
        for key, value in state[param].items():
            # eager computes with step counts as Python floats: 1 - 0.999 ** step needs their precision
            if isinstance(value, Tensor) and value.ndim == 0:
                state[param][key] = value.double()
        if isinstance(optimizer, torch.optim.SGD) and groups[g]["dampening"] != 0 and state[param]:
            state[param]["momentum_buffer"] = _primed(state[param]["momentum_buffer"], param, grad, groups[g])
    return state


def _primed(buffer: Tensor, param: Tensor, grad: Tensor, group: dict[str, Any]) -> Tensor:
    """SGD's buffer, where it is NaN (none yet) such that m * buffer + (1 - d) * grad is the gradient itself."""
    grad = (-grad if group["maximize"] else grad) + group["weight_decay"] * param
    return torch.where(torch.isnan(buffer), grad * (group["dampening"] / group["momentum"]), buffer)


def _setting(optimizer: Optimizer, group: int, key: str, position: int | None) -> float:
    value = optimizer.param_groups[group][key]
    return value if position is None else value[position]


def _write_back(
    tensors: StepTensors,
    state: defaultdict[Any, dict[str, Any]],
    first: int,
    optimizer: Optimizer,
    where: str,
) -> None:
    by_place = dict(zip(tensors.places, tensors.params, strict=True))
    news = list(zip(tensors.params, tensors.params, strict=True))
    for at, old in tensors.state.items():
        news.append((old, state[by_place[(at.group, at.position)]][at.key]))
    for at, param in by_place.items():
        known = {k.key for k in tensors.state if (k.group, k.position) == at}
        for key, value in state[param].items():
            if isinstance(value, Tensor) and key not in known:
                hint = "create all state of a parameter at its first step"
                found = f"{type(optimizer).__name__} creates state[{key!r}] after the first step"
                raise OptimizerError(found, where=where, hint=hint)
    for number, (old, new) in enumerate(news):
        old.copy_(
            mark(
                new.to(old.dtype) if isinstance(new, Tensor) else torch.full_like(old, new),
                UPDATE,
                first + number,
            )
        )
    for param in tensors.params:
        param.grad = None


def _refuse_hidden_state(
    optimizer: Optimizer,
    stand_in: Any,
    before: dict[str, Any],
    groups: list[dict[str, Any]],
    settings: list[dict[str, Any]],
    where: str,
) -> None:
    hint = "keep what changes from step to step in optimizer.state[parameter], as tensors"
    for name, value in stand_in.__dict__.items():
        if name not in ("state", "param_groups") and before.get(name, stand_in) is not value:
            found = (
                f"{type(optimizer).__name__}.step() changes self.{name}, which a compiled step cannot follow"
            )
            raise OptimizerError(found, where=where, hint=hint)
    for now, then in zip(groups, settings, strict=True):
        for key, value in now.items():
            if then.get(key, now) is not value:
                found = f"{type(optimizer).__name__}.step() changes param_groups[...][{key!r}]"
                raise OptimizerError(found, where=where, hint=hint)


def check_comparisons(
    optimizer: Optimizer,
    dynamic: Sequence[tuple[int, str, int | None]],
    comparisons: Sequence[Comparison],
    where: str,
) -> None:
    """Raise :class:`OptimizerError` if a setting no longer compares as it did when the step was compiled."""
    for comparison in comparisons:
        at = dynamic[comparison.setting]
        if not comparison.holds(_setting(optimizer, *at)):
            hint = "call torch.compiler.reset() (or make a new optimizer) after such a change"
            found = f"param_groups[{at[0]}][{at[1]!r}] changed so that the optimizer takes another branch"
            raise OptimizerError(found, where=where, hint=hint)
