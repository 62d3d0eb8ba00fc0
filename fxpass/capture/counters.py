"""Numbers that an optimizer's step keeps in ``param_groups`` or in its attributes: counted like state.

``group["step"]``, ``lr_max``, ``weight_sum``, ``d``. Dynamo would guard on them and compile every
step anew. They are found by trying the step on one parameter, become 0-d tensors, and
are threaded through the graph like ``state["step"]``: a skipped step holds them back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..errors import OptimizerError
from ..ir.slots import Slot
from .standin import as_tensor, is_torchs
from .trial import Trial, equal, try_step

Counters = Mapping[Slot, Any]  # each with the value it starts from


def counters_of(optimizer: Optimizer, number: int) -> dict[Slot, Any]:
    """The counters of an optimizer; ``number``: its own, in slots."""
    if is_torchs(optimizer):
        return {}
    counters: dict[Slot, Any] = {}
    for slot in _smallest(optimizer, number):
        try:
            trial = try_step(optimizer, slot, [1.0, 0.5, 1.0], "")
            counters |= dict(_counted(optimizer, slot, trial))
            missing = {at: counters.pop(at) for at in list(counters) if at.read(optimizer) is None}
            counters |= _started(optimizer, slot, missing)
        except OptimizerError:  # said where its state is made
            continue
    return counters


def start(optimizer: Optimizer, counters: Counters) -> Callable[[], None]:
    """Make tensors of the counters; returns an undo."""
    before = {slot: (slot.present(optimizer), slot.read(optimizer)) for slot in counters}

    def undo() -> None:
        for slot, (present, value) in before.items():
            slot.write(optimizer, value) if present else slot.remove(optimizer)

    fit(optimizer, counters)
    return undo


def fit(optimizer: Optimizer, counters: Counters) -> None:
    """Bring counters that were replaced (``load_state_dict``) or removed into the form the graph reads."""
    device = optimizer.param_groups[0]["params"][0].device
    for slot, first in counters.items():
        value = slot.read(optimizer)
        value = as_tensor(first if value is None else value, device)
        if isinstance(first, Tensor):
            value = value.reshape(first.shape)
        slot.write(optimizer, value.detach().clone() if value is first else value)


def _smallest(optimizer: Optimizer, number: int) -> Iterator[Slot]:
    """The smallest parameter of each group."""
    for g, group in enumerate(optimizer.param_groups):
        sizes = [param.numel() for param in group["params"]]
        if sizes:
            yield Slot(number, g, sizes.index(min(filter(None, sizes), default=0)))


def _counted(optimizer: Optimizer, slot: Slot, trial: Trial) -> Iterator[tuple[Slot, Any]]:
    """What the trial has assigned, each with its present value, or the first one."""
    for g, group in enumerate(trial.groups):
        for key, value in group.first.items():
            if _is_number(value) and _is_number(group[key]):
                yield (at := Slot(slot.optimizer, g, key=key)), _or(at.read(optimizer), value)
    for key, value in trial.attributes.items():
        before = getattr(optimizer, key, None)  # of the class, maybe
        if _is_number(value) and _is_number(before) and not equal(before, value):
            yield Slot(slot.optimizer, None, key=key), before


def _started(optimizer: Optimizer, slot: Slot, missing: Mapping[Slot, Any]) -> dict[Slot, Any]:
    """From what counters start that the first step makes: the first value it assigns, or zero."""
    if not missing:
        return {}
    fresh = try_step(optimizer, slot, [1.0], "")
    zeros = {at: value * 0 for at, value in missing.items()}
    for values in (missing, zeros):
        again = try_step(optimizer, slot, [1.0], "", settings=values)
        ends = [[_after(trial, at) for at in missing] for trial in (fresh, again)]
        if all(map(equal, *ends)) and equal(fresh.param, again.param):
            return dict(values)
    return {}


def _after(trial: Trial, slot: Slot) -> Any:
    return (trial.attributes if slot.group is None else trial.groups[slot.group]).get(slot.key or "")


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _or(value: Any, other: Any) -> Any:
    return other if value is None else value
