"""Schedulers outside the step: right values, at most two compilations, no warning (pytest raises them)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import SGD, AdamW, Optimizer
from torch.optim import lr_scheduler as lr

from fxpass import MixedPrecision
from tests.steps.test_optimizers import Net, agree, make_step, pair
from tests.support.helpers import same

CASES: dict[str, tuple[Callable[[Any], Optimizer], Callable[[Any], Any]]] = {
    "lambda": (lambda p: AdamW(p, lr=1e-2), lambda o: lr.LambdaLR(o, lambda n: 1 / (1 + n))),
    "warmup from zero": (lambda p: AdamW(p, lr=1e-2), lambda o: lr.LambdaLR(o, lambda n: min(1, n / 10))),
    "cosine": (lambda p: SGD(p, lr=0.1, momentum=0.9), lambda o: lr.CosineAnnealingLR(o, 12)),
    "one cycle, betas": (lambda p: AdamW(p), lambda o: lr.OneCycleLR(o, 1e-2, total_steps=13)),
    "one cycle, momentum": (
        lambda p: SGD(p, lr=0.1, momentum=0.9),
        lambda o: lr.OneCycleLR(o, 0.1, total_steps=13),
    ),
    "one cycle, dampening": (
        lambda p: SGD(p, lr=0.1, momentum=0.9, dampening=0.2),
        lambda o: lr.OneCycleLR(o, 0.1, total_steps=13),
    ),
    "cyclic": (lambda p: SGD(p, lr=0.1, momentum=0.9), lambda o: lr.CyclicLR(o, 0.01, 0.1, step_size_up=3)),
    "step": (lambda p: AdamW(p, lr=1e-2), lambda o: lr.StepLR(o, 3)),
    "step, tensor": (lambda p: AdamW(p, lr=torch.tensor(1e-2), foreach=False), lambda o: lr.StepLR(o, 3)),
}


@pytest.mark.breadth(4)
@pytest.mark.parametrize("codegen", ["inductor", "eager"])
@pytest.mark.parametrize("name", CASES)
def test_follows_eager(name: str, codegen: str) -> None:
    if codegen == "inductor" and name not in ("warmup from zero", "one cycle, betas"):
        pytest.skip("the generated code of these two covers the others")
    optimizer, scheduler = CASES[name]
    torch.manual_seed(0)
    theirs = Net()
    ours = copy.deepcopy(theirs)
    runs = []
    for model in (ours, theirs):
        opt = optimizer(model.parameters())
        runs.append((make_step(model, opt), scheduler(opt)))
    mp = MixedPrecision(dtype="float32", codegen=codegen)
    compiled = torch.compile(runs[0][0], backend=mp)
    for _ in range(12):
        x = torch.randn(6, 4)
        same(compiled(x), runs[1][0](x), "loss")
        for _, schedule in runs:
            schedule.step()
    same(dict(ours.named_parameters()), dict(theirs.named_parameters()), "parameters")
    assert len(mp.graphs) <= (2 if "cycl" in name else 1)
    assert mp.stats().steps == 12


def test_reduce_on_plateau() -> None:
    torch.manual_seed(0)
    theirs = Net()
    ours = copy.deepcopy(theirs)
    runs = []
    for model in (ours, theirs):
        opt = AdamW(model.parameters(), lr=1e-2)
        runs.append((make_step(model, opt), lr.ReduceLROnPlateau(opt, factor=0.5, patience=0, threshold=0.5)))
    mp = MixedPrecision(dtype="float32", codegen="eager")
    compiled = torch.compile(runs[0][0], backend=mp)
    for _ in range(8):
        x = torch.randn(6, 4)
        losses = compiled(x), runs[1][0](x)
        same(*losses, "loss")
        for loss, (_, schedule) in zip(losses, runs, strict=True):
            schedule.step(loss.item())
    assert runs[0][1].get_last_lr() == runs[1][1].get_last_lr()
    assert runs[0][1].get_last_lr()[0] < 1e-2
    same(dict(ours.named_parameters()), dict(theirs.named_parameters()), "parameters")
    assert len(mp.graphs) == 1


@pytest.mark.parametrize("key", ["momentum", "weight_decay"])
def test_a_setting_that_reaches_zero(key: str) -> None:
    """The optimizer takes another branch: one more graph."""
    ours, theirs, our_opt, their_opt, step, eager, mp = pair(
        lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.9)
    )
    for value in (0.9, 0.8, 0.7, 0.0, 0.0, 0.6):
        for opt in (our_opt, their_opt):
            opt.param_groups[0][key] = value
        x = torch.randn(6, 4)
        same(step(x), eager(x), "loss")
    agree(ours, theirs, our_opt, their_opt)
    assert len(mp.graphs) == 3


def test_a_scheduler_inside_the_step() -> None:
    torch.manual_seed(0)
    theirs = Net()
    ours = copy.deepcopy(theirs)
    steps = [_scheduled_step(model) for model in (ours, theirs)]
    compiled = torch.compile(steps[0], backend=MixedPrecision(dtype="float32", codegen="eager"))
    for _ in range(6):
        x = torch.randn(6, 4)
        same(compiled(x), steps[1](x), "loss")
    same(dict(ours.named_parameters()), dict(theirs.named_parameters()), "parameters")


def _scheduled_step(model: Net) -> Callable[[torch.Tensor], torch.Tensor]:
    opt = SGD(model.parameters(), lr=0.1)
    schedule, inner = lr.StepLR(opt, 2, gamma=0.5), make_step(model, opt)

    def step(x: torch.Tensor) -> torch.Tensor:
        loss = inner(x)
        schedule.step()
        return loss

    return step
