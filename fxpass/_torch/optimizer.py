"""What torch.optim keeps to itself: step hooks, LR schedulers' marks. Written for torch 2.11 to 2.13."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import (
    _get_value,
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
)

get_value = _get_value  # the number in a step count, for the ordinary formulas


def has_step_hooks(optimizer: Optimizer) -> bool:
    """Whether hooks would run around ``optimizer.step()``: its own, or those of all optimizers."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
    )


def is_front(optimizer: Optimizer) -> bool:
    """Whether it is an optimizer in name alone, in front of another one, as accelerate's is.

    Its class inherits from Optimizer but never initialises it: it has no hooks and no state to
    trace, and what its ``step()`` and ``zero_grad()`` do is ordinary Python.
    """
    return "_optimizer_step_pre_hooks" not in vars(optimizer)


def has_own_step(optimizer: Optimizer) -> bool:
    """Whether ``step`` was replaced on the object; an LR scheduler's wrapper only notes that it ran."""
    step = vars(optimizer).get("step")
    if step is None:
        return False
    if not hasattr(step, "_wrapped_by_lr_sched"):
        return True
    return getattr(step, "__wrapped__", None) is not type(optimizer).step


def has_own_zero_grad(optimizer: Optimizer) -> bool:
    """Whether ``zero_grad`` is not torch's: overridden in a subclass, or replaced on the object."""
    return "zero_grad" in vars(optimizer) or type(optimizer).zero_grad is not Optimizer.zero_grad


def init_group(optimizer: Optimizer) -> Callable[..., Any]:
    """The method with which one of torch's optimizers makes the state of its parameters, undecorated."""
    return inspect.unwrap(type(optimizer)._init_group)  # pyrefly: ignore[missing-attribute] # all have


def note_step(optimizer: Optimizer) -> None:
    """An LR scheduler warns about the order of calls unless ``step()`` was seen."""
    vars(optimizer)["_opt_called"] = True
