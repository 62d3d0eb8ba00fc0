"""What a compiled update takes for granted of its optimizer: refused at capture, or checked at every call.

Dynamo guards on the structure of ``param_groups``, on their settings and on the parameters. The rest
is here: what runs around ``step()``, and numbers that the optimizer's Python read while it was traced.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import _torch
from ..errors import OptimizerError
from ..ir.slots import Slot
from .scalars import Comparison
from .standin import holds_tensor, is_torchs, is_wrapped

Refusal = tuple[str, str] | None  # what was found, and a hint
_PLAIN = (bool, int, float, str, type(None))  # settings that Dynamo guards on by value


@dataclass(frozen=True)
class Assumptions:
    """Of one optimizer, made when its update was captured."""

    where: str
    step: Any  # the function of the class that was traced
    comparisons: tuple[Comparison, ...]

    @classmethod
    def of(
        cls,
        optimizer: Optimizer,
        number: int,
        where: str,
        comparisons: Sequence[Comparison],
        counters: Collection[Slot],
    ) -> Assumptions:
        """Of optimizer ``number``; ``comparisons``: how settings compared while the step was traced."""
        constants = [c for c in _constants(optimizer, number) if c.setting not in counters]
        return cls(where, type(optimizer).step, tuple(dict.fromkeys((*comparisons, *constants))))

    @classmethod
    def again(cls, optimizer: Optimizer, where: str, comparisons: Sequence[Comparison]) -> Assumptions:
        """What an earlier process took for granted of an equal optimizer; they must hold of this one."""
        assumed = cls(where, type(optimizer).step, tuple(comparisons))
        assumed.check(optimizer)
        return assumed

    def check(self, optimizer: Optimizer) -> None:
        """Raise ``OptimizerError`` if one of them no longer holds; runs at every call."""
        for rule in EVERY_CALL:
            _refuse(rule(optimizer), self.where)
        if type(optimizer).step is not self.step:
            name = type(optimizer).__name__
            found = f"{name}.step was replaced on the class after the step was compiled"
            _refuse((found, "replace it before the first call, or call torch.compiler.reset()"), self.where)
        for comparison in self.comparisons:
            if not comparison.holds(comparison.setting.read(optimizer)):
                hint = "call torch.compiler.reset() (or make a new optimizer) after such a change"
                place = f"{comparison.setting.path} of {type(optimizer).__name__}"
                found = f"{place} changed in a way the compiled step cannot follow"
                _refuse((found, hint), self.where)


def check(optimizer: Optimizer, where: str, counters: Collection[Slot]) -> None:
    """Raise ``OptimizerError`` for an optimizer whose step cannot become graph nodes.

    ``counters``: numbers that it keeps in its groups, which may be tensors.
    """
    for rule in (*EVERY_CALL, *ONCE):
        _refuse(rule(optimizer), where)
    _refuse(_groups(optimizer, {(slot.group, slot.key) for slot in counters}), where)


def _refuse(refusal: Refusal, where: str) -> None:
    if refusal is not None:
        raise OptimizerError(refusal[0], where=where, hint=refusal[1])


def _constants(optimizer: Optimizer, number: int) -> list[Comparison]:
    """Numbers that a user-written step may read and that Dynamo has no guard on."""
    if is_torchs(optimizer):
        return []
    slots = [Slot(number, None, key=name) for name in vars(optimizer) if not name.startswith("_")]
    for g, group in enumerate(optimizer.param_groups):
        known = (*optimizer.defaults, "params", "lr")
        slots += [Slot(number, g, key=key) for key in group if key not in known]
    values = [(slot, slot.read(optimizer)) for slot in slots]
    return [Comparison(s, "eq", v, True) for s, v in values if isinstance(v, (bool, int, float, str))]


# ---------------------------------------------------------------- rules


def _groups(optimizer: Optimizer, counted: Collection[tuple[Any, Any]]) -> Refusal:
    groups = (
        (number, {key: value for key, value in group.items() if (number, key) not in counted})
        for number, group in enumerate(optimizer.param_groups)
    )
    refusals = (_group(optimizer, number, group) for number, group in groups)
    return next(filter(None, refusals), None)


def _group(optimizer: Optimizer, number: int, group: dict[str, Any]) -> Refusal:
    name = type(optimizer).__name__
    if group.get("differentiable"):
        return f"{name} was built with differentiable=True", "build it with differentiable=False"
    for key, value in group.items():
        values = value if isinstance(value, (tuple, list)) else (value,)
        if key in ("params", "lr", "initial_lr"):
            continue
        if any(isinstance(v, Tensor) for v in values):
            found = f"{name} was built with a tensor as {key} (param group {number})"
            return found, "give a Python number; one that changes from step to step is followed all the same"
        if is_torchs(optimizer) and key in optimizer.defaults and not all(type(v) in _PLAIN for v in values):
            kind = next(type(v) for v in values if type(v) not in _PLAIN)
            found = (
                f"{name} was built with a {kind.__module__}.{kind.__name__} as {key} (param group {number})"
            )
            return found, f"give a Python number, as in {key}=float(...), which is followed when it changes"
    return None


def _parameters(optimizer: Optimizer) -> Refusal:
    params = (param for group in optimizer.param_groups for param in group["params"])
    return next(filter(None, (_refused_parameter(type(optimizer).__name__, p) for p in params)), None)


def _refused_parameter(name: str, param: Tensor) -> Refusal:
    if param.is_complex():
        hint = "store real and imaginary part as a real parameter (torch.view_as_real)"
        return f"a complex parameter of shape {tuple(param.shape)} in {name}", hint
    if param.dtype in (torch.float16, torch.bfloat16):
        hint = "keep the model in float32 (model.float()); fxpass computes in low precision by itself"
        return f"a parameter of dtype {param.dtype} and shape {tuple(param.shape)} in {name}", hint
    return None


def _attributes(optimizer: Optimizer) -> Refusal:
    if any(c.__name__ == "ZeroRedundancyOptimizer" for c in type(optimizer).__mro__):
        hint = "use the optimizer_class that it was given, on every rank, under DistributedDataParallel"
        return "ZeroRedundancyOptimizer, which sends parameters between ranks inside step()", hint
    own = {} if is_torchs(optimizer) else vars(optimizer)
    for key, value in own.items():
        if key in ("defaults", "param_groups", "state") or is_wrapped(optimizer, value):
            continue
        if holds_tensor(value):
            found = f"{type(optimizer).__name__} keeps tensors in self.{key}"
            hint = "keep them in optimizer.state[parameter], and parameters in param_groups alone"
            return f"{found}, which a compiled step cannot see", hint
        if isinstance(value, (Optimizer, torch.nn.Module)):
            found = f"{type(optimizer).__name__} holds another {type(value).__name__} in self.{key}"
            hint = "step that one in the compiled function, and subclass it rather than wrap it"
            return f"{found}, whose tensors a compiled step cannot see", hint
    return None


def _shared_state(optimizer: Optimizer) -> Refusal:
    shared = [key for key in optimizer.state if not isinstance(key, Tensor)]
    if not shared:
        return None
    found = f"{type(optimizer).__name__} keeps state[{shared[0]!r}], which belongs to no parameter"
    return found, "keep a number that all parameters share in param_groups, or in an attribute"


def _hooks(optimizer: Optimizer) -> Refusal:
    if not _torch.has_step_hooks(optimizer):
        return None
    hint = "call what the hook does in the step itself, or before and after the compiled step"
    return f"{type(optimizer).__name__} has step hooks registered, which would not run", hint


def _own_methods(optimizer: Optimizer) -> Refusal:
    name = type(optimizer).__name__
    if _torch.has_own_step(optimizer):
        return f"the step method of this {name} was replaced on the object", "override step in a subclass"
    if "zero_grad" in vars(optimizer):
        hint = "call what it does in the step itself, and delete it from the object"
        return f"the zero_grad method of this {name} was replaced on the object", hint
    return None


EVERY_CALL: tuple[Callable[[Optimizer], Refusal], ...] = (_hooks, _own_methods)
ONCE: tuple[Callable[[Optimizer], Refusal], ...] = (
    _attributes,
    _shared_state,
    _parameters,
)  # Dynamo guards on these
