"""What changes about an optimizer between two calls is followed or refused, never ignored."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import ASGD, SGD, AdamW, Optimizer, Rprop, lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from fxpass import MixedPrecision, OptimizerError
from fxpass.capture.assumptions import Assumptions
from tests.steps.test_optimizers import Net, agree, pair
from tests.support.helpers import same

Edit = Callable[[Optimizer, nn.Module], Any]
Make = Callable[[Any], Optimizer]
OVERFLOW = "overflow"


def settings(**values: Any) -> Edit:
    """Sets them in every param group."""

    def edit(opt: Optimizer, _: nn.Module) -> None:
        for group in opt.param_groups:
            group.update(values)

    return edit


def frozen(value: bool) -> Edit:
    """Freezes the first weight, or thaws it."""
    return lambda _, model: next(model.parameters()).requires_grad_(not value)


def loaded(opt: Optimizer, _: nn.Module) -> None:
    """A checkpoint with settings of its own."""
    state = copy.deepcopy(opt.state_dict())
    state["param_groups"][0].update(lr=0.05, weight_decay=0.2)
    opt.load_state_dict(state)


def dampened(p: Any) -> Optimizer:
    return SGD(p, lr=0.1, momentum=0.9, dampening=0.3)


def adamw(p: Any) -> Optimizer:
    return AdamW(p, lr=1e-2)


def plain(p: Any) -> Optimizer:
    return SGD(p, lr=0.1)


FOLLOWED: dict[str, tuple[Make, dict[int, Edit | str], int, str]] = {
    "lr: number, tensor, number": (
        adamw,
        {2: settings(lr=torch.tensor(0.5)), 4: settings(lr=1e-2), 5: settings(lr=np.float32(0.02))},
        *(1, "inductor"),
    ),
    "asgd, first call skipped": (
        lambda p: ASGD(p, lr=0.1),
        {0: OVERFLOW, 1: settings(lr=0.02)},
        1,
        "inductor",
    ),
    "rprop, first call skipped": (
        lambda p: Rprop(p, lr=0.1),
        {0: OVERFLOW, 1: settings(lr=0.02)},
        1,
        "inductor",
    ),
    "dampening, then no momentum": (
        dampened,
        {
            2: settings(momentum=0.8),
            3: settings(momentum=0.7),
            4: settings(momentum=0.0),
            6: settings(momentum=0.5),
        },
        *(3, "inductor"),
    ),
    "no momentum, then dampening": (plain, {2: settings(momentum=0.9, dampening=0.5)}, 2, "eager"),
    "dampening before the first update": (
        lambda p: SGD(p, lr=0.1, momentum=0.9),
        {0: OVERFLOW, 1: settings(dampening=0.5)},
        *(2, "eager"),
    ),
    "weight decay": (adamw, {2: settings(weight_decay=0.0), 4: settings(weight_decay=0.3)}, 3, "eager"),
    "betas": (
        adamw,
        {2: settings(betas=(0.5, 0.9)), 4: settings(betas=(0.0, 0.8)), 6: settings(betas=(0.0, 0.0))},
        *(4, "eager"),
    ),
    "betas in a list": (
        lambda p: AdamW(p, lr=1e-2, betas=[0.9, 0.99]),  # pyrefly: ignore[bad-argument-type]
        {2: settings(betas=[0.5, 0.9]), 4: settings(betas=[0.6, 0.8]), 6: settings(betas=[0.7, 0.7])},
        *(2, "eager"),
    ),
    "maximize": (adamw, {2: settings(maximize=True)}, 2, "eager"),
    "foreach and capturable": (adamw, {2: settings(foreach=True), 4: settings(foreach=False)}, 3, "eager"),
    "nesterov": (lambda p: SGD(p, lr=0.1, momentum=0.9), {2: settings(nesterov=True)}, 2, "eager"),
    "a checkpoint": (adamw, {3: loaded}, 2, "eager"),
    "frozen and thawed": (adamw, {2: frozen(True), 5: frozen(False)}, 2, "eager"),
    "a scheduler": (adamw, {3: lambda opt, _: lr_scheduler.StepLR(opt, 1)}, 1, "eager"),
}


@pytest.mark.breadth
@pytest.mark.parametrize("name", FOLLOWED)
def test_followed(name: str) -> None:
    make, edits, graphs, codegen = FOLLOWED[name]
    ours, theirs, our_opt, their_opt, step, eager, mp = pair(make, codegen=codegen)
    for call in range(8):
        edit = edits.get(call)
        if edit == OVERFLOW:
            step(torch.full((6, 4), float("inf")))
            continue
        if callable(edit):
            edit(our_opt, ours)
            edit(their_opt, theirs)
        x = torch.randn(6, 4)
        same(step(x), eager(x), f"loss of call {call}")
    agree(ours, theirs, our_opt, their_opt)
    assert mp.stats().steps == 8
    assert len(mp.graphs) <= graphs


def replaced(name: str) -> Edit:
    return lambda opt, _: setattr(opt, name, types.MethodType(lambda self, *_: None, opt))


def replaced_below_a_scheduler(opt: Optimizer, model: nn.Module) -> None:
    replaced("step")(opt, model)
    lr_scheduler.StepLR(opt, 1)


REFUSED: dict[str, tuple[Edit, str]] = {
    "pre-hook": (lambda opt, _: opt.register_step_pre_hook(lambda *_: None), "step hooks"),
    "post-hook": (lambda opt, _: opt.register_step_post_hook(lambda *_: None), "step hooks"),
    "global pre-hook": (lambda *_: register_optimizer_step_pre_hook(lambda *_: None), "step hooks"),
    "global post-hook": (lambda *_: register_optimizer_step_post_hook(lambda *_: None), "step hooks"),
    "step": (replaced("step"), "step method of this Own was replaced"),
    "step below a scheduler": (replaced_below_a_scheduler, "step method of this Own was replaced"),
    "step of the class": (
        lambda opt, _: setattr(type(opt), "step", lambda self, closure=None: None),
        r"Own\.step was replaced on the class",
    ),
    "zero_grad": (replaced("zero_grad"), "zero_grad method of this Own was replaced"),
    "tensor": (settings(betas=(torch.tensor(0.9), 0.99)), "tensor as betas"),
    "numpy, 32 bits": (settings(weight_decay=np.float32(0.1)), "float32 as weight_decay"),
    "numpy, 64 bits": (settings(weight_decay=np.float64(0.1)), "float64 as weight_decay"),
}


@pytest.mark.breadth
@pytest.mark.parametrize("name", REFUSED)
def test_refused_from_the_call_on(name: str) -> None:
    """The call after the change raises and changes nothing."""
    edit, message = REFUSED[name]
    ours, _, opt, _, step, _, mp = pair(lambda p: type("Own", (AdamW,), {})(p, lr=1e-2))
    step(torch.randn(6, 4))
    handle = edit(opt, ours)
    before = copy.deepcopy(ours.state_dict())
    try:
        with pytest.raises(OptimizerError, match=message) as error:
            step(torch.randn(6, 4))
    finally:
        if handle is not None:  # of a hook, for all optimizers maybe
            handle.remove()
    assert "where: " in str(error.value)
    assert "test_optimizers.py:" in str(error.value)
    assert "to do:" in str(error.value)
    same(ours.state_dict(), before, "parameters", exact=True)
    assert mp.stats().steps == 1


def test_the_check_at_every_call_looks_at_no_parameter() -> None:
    opt = AdamW([nn.Parameter(torch.zeros(1)) for _ in range(50)])
    assumed = Assumptions.of(opt, 0, "here", [], ())
    groups, opt.param_groups = opt.param_groups, None  # pyrefly: ignore[bad-assignment]
    assumed.check(opt)
    opt.param_groups = groups


def test_zero_grad_of_a_subclass() -> None:
    class Halving(SGD):
        def zero_grad(self, set_to_none: bool = True) -> None:
            for p in (p for p in self.param_groups[0]["params"] if p.grad is not None):
                p.grad.mul_(0.5)

    *_, step, _, _ = pair(lambda p: Halving(p, lr=0.1))
    with pytest.raises(OptimizerError, match=r"Halving has a zero_grad\(\) of its own"):
        step(torch.randn(6, 4))


class Scaled(SGD):
    """A step that takes more than a closure, and returns what it took."""

    def step(self, closure: Any = None, scale: float = 1.0) -> Any:
        super().step(closure)
        return scale


@pytest.mark.parametrize(
    ("keywords", "message"),
    [({"scale": 2.0}, r"was given arguments"), ({}, r"returns 1\.0, which would be lost")],
)
def test_arguments_and_results_of_step(keywords: dict[str, Any], message: str) -> None:
    model = Net()
    opt = Scaled(model.parameters(), lr=0.1)

    @torch.compile(backend=MixedPrecision(dtype="float32", codegen="eager"))
    def step(x: Tensor) -> Any:
        model(x).square().mean().backward()
        return opt.step(**keywords)

    with pytest.raises(OptimizerError, match=message) as error:
        step(torch.randn(6, 4))
    assert "test_optimizer_settings.py:" in str(error.value)
    assert not opt.state


class Branching(Optimizer):
    """Branches on its step count, as torch.where or as Python."""

    def __init__(self, params: Any, lr: float = 0.1, hinted: bool = True) -> None:
        super().__init__(params, {"lr": lr, "hinted": hinted})

    @torch.no_grad()
    def step(self) -> None:  # pyrefly: ignore[bad-override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["n"] = 0
                state["n"] += 1
                if group["hinted"]:
                    rate = torch.where(torch.as_tensor(state["n"] > 3), 0.1, 1.0)
                else:
                    rate = 0.1 if state["n"] > 3 else 1.0
                p.sub_(group["lr"] * rate * p.grad)


@pytest.mark.parametrize("hinted", [True, False])
def test_a_branch_on_a_step_count(hinted: bool) -> None:
    ours, theirs, _, _, step, eager, mp = pair(lambda p: Branching(p, hinted=hinted))
    for _ in range(6):
        x = torch.randn(6, 4)
        same(step(x), eager(x), "loss")
    same(dict(ours.named_parameters()), dict(theirs.named_parameters()), "parameters")
    assert mp.stats().steps == 6
