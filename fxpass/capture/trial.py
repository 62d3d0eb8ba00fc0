"""An optimizer's ``step()``, tried on one parameter: what it keeps and counts is seen only by running it.

Nothing of the user's changes: parameter, groups, state and attributes are copies.
"""

from __future__ import annotations

import contextlib
import copy
import traceback
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.compiler import set_stance
from torch.optim import Optimizer

from .. import _torch
from ..errors import OptimizerError
from ..ir.slots import Slot
from .standin import stand_in, undecorated


class OwnTensor(Exception):
    """A state that is a tensor of a class of its own (quantized, say), which knows few operators."""


class Assigned(dict[str, Any]):
    """A dict that remembers each entry as it was when first assigned."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.first: dict[str, Any] = {}

    def __setitem__(self, key: str, value: Any) -> None:
        if isinstance(value, Tensor) and type(value) not in (Tensor, torch.nn.Parameter):
            kind = type(value).__name__
            raise OwnTensor(f"keeps state[{key!r}] in a {kind}, a tensor of a class of its own")
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


@dataclass
class Trial:
    """A parameter, its state, the groups and attributes after some steps on copies."""

    param: Tensor
    state: Assigned = field(default_factory=Assigned)
    groups: list[Assigned] = field(default_factory=list)
    attributes: dict[str, Any] = field(default_factory=dict)


def try_step(
    optimizer: Optimizer,
    slot: Slot,
    fills: Sequence[float],
    where: str,
    *,
    state: Mapping[str, Any] | None = None,
    settings: Mapping[Slot, Any] | None = None,
    random: bool = False,
) -> Trial:
    """Steps of a copy of one parameter, each with a gradient full of one of ``fills``.

    From ``state`` of the parameter, ``settings`` in the place of the optimizer's own. ``random``: the
    random numbers that it draws are gone, as in eager's first step.

    Raises:
        OptimizerError: the step fails.
    """
    param = slot.read(optimizer).detach().clone()
    grads = [{slot: torch.full_like(param, fill)} for fill in fills]
    try:
        with contextlib.nullcontext() if random else _forked_random(param):
            return _steps(optimizer, {slot: param}, grads, {slot: state or {}}, settings or {})[slot]
    except OwnTensor as error:
        found = f"{type(optimizer).__name__} {error}, which a compiled step cannot follow"
        hint = "use an optimizer that keeps plain tensors, as torch.optim.AdamW does"
        raise OptimizerError(found, where=where, hint=hint) from error
    except Exception as error:
        name = type(optimizer).__name__
        found = f"{name}.step() failed where it was tried on one parameter alone, to see its state: {error}"
        hint = (
            "let step() take each parameter for itself, or fill optimizer.state for all parameters "
            "before the first call"
        )
        raise OptimizerError(f"{found}{line_of(error)}", where=where, hint=hint) from error


def steps_alone(optimizer: Optimizer, slots: Sequence[Slot]) -> bool:
    """Whether the step does the same to two parameters together as to each alone, in three steps."""
    two = sorted(slots, key=lambda slot: slot.read(optimizer).numel())[:2]
    random = torch.Generator().manual_seed(0)
    params = {slot: slot.read(optimizer).detach() for slot in two}
    grads = [
        {s: (torch.randn(p.shape, generator=random) * size).to(p) for s, p in params.items()}
        for size in (1.0, 100.0, 0.01)
    ]
    try:
        with _forked_random(params[two[0]]):
            both = _steps(optimizer, {s: p.clone() for s, p in params.items()}, grads, {}, {})
            for slot, param in params.items():
                alone = _steps(optimizer, {slot: param.clone()}, [{slot: g[slot]} for g in grads], {}, {})[
                    slot
                ]
                kept = all(equal(value, both[slot].state.get(key)) for key, value in alone.state.items())
                if not kept or not equal(alone.param, both[slot].param):
                    return False
    except Exception:
        return False
    return True


def _steps(
    optimizer: Optimizer,
    params: Mapping[Slot, Tensor],
    grads: Sequence[Mapping[Slot, Tensor]],
    start: Mapping[Slot, Mapping[str, Any]],
    settings: Mapping[Slot, Any],
) -> dict[Slot, Trial]:
    """One step of ``params``, which are copies, for each entry of ``grads``."""
    groups = [Assigned({**group, "params": []}) for group in optimizer.param_groups]
    states: defaultdict[Any, Assigned] = defaultdict(Assigned)
    for slot, param in params.items():
        slot.of_group(groups)["params"].append(param)
        if start.get(slot):
            states[param].update(copy.deepcopy(dict(start[slot])))
    other = stand_in(optimizer, groups, states)
    for setting, value in settings.items():
        setting.write(other, value)
    for group in groups:  # tensors that count are written in place
        group.update({k: v.clone() for k, v in group.items() if isinstance(v, Tensor)})
        group.first.clear()
    with torch.no_grad(), set_stance("force_eager"):
        for step in grads:
            for slot, param in params.items():
                param.grad = step[slot].clone()
            undecorated(type(optimizer).step)(other)
    trials = {
        slot: Trial(param, states.get(param, Assigned()), groups, vars(other))
        for slot, param in params.items()
    }
    for trial in trials.values():
        trial.state.first = {key: value for key, value in trial.state.first.items() if key in trial.state}
    return trials


def _forked_random(param: Tensor) -> contextlib.AbstractContextManager[None]:
    return torch.random.fork_rng([param.device] if param.is_cuda else [])


def equal(a: Any, b: Any) -> bool:
    """Whether two values of a state are the same, NaN included."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=0, atol=0, equal_nan=True)
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        one = [float(v) for v in (a, b) if not isinstance(v, Tensor) or v.numel() == 1]
        return len(one) == 2 and one[0] == one[1]
    return bool(a == b or (a != a and b != b))


def line_of(error: Exception) -> str:
    """Where in the optimizer's own code ``error`` arose."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if _torch.is_users(f.filename)]
    return f" ({frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line})" if frames else ""
