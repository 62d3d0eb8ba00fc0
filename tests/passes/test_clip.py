"""Clipping against torch.nn.utils in the same run, on unscaled gradients."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from fxpass import MixedPrecision
from fxpass.passes.check_finite import CheckFinite
from fxpass.passes.clip import Clip
from tests.graphs import graph_of, inserted_by, targets, training_step


def compare_with_torch(options: dict[str, Any], clip: Any, scale: float = 1.0) -> Any:
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    theirs = copy.deepcopy(ours)
    mp = MixedPrecision(dtype="float32", codegen="eager", **options)
    steps = []
    for model in (ours, theirs):
        opt = torch.optim.SGD(model.parameters(), lr=0.05)

        def step(x: torch.Tensor, model: nn.Module = model, opt: torch.optim.Optimizer = opt) -> None:
            (model(x).square().sum() * scale).backward()
            if model is theirs:
                clip(model.parameters())
            opt.step()
            opt.zero_grad()

        steps.append(step)
    compiled = torch.compile(steps[0], backend=mp)
    for _ in range(5):
        x = torch.randn(6, 4)
        compiled(x)
        steps[1](x)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    return mp.stats()


@pytest.mark.parametrize("loss_scale", [None, 3.0, 2.0**16])
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_global_norm(norm_type: float, loss_scale: float | None) -> None:
    stats = compare_with_torch(
        {"max_norm": 0.1, "norm_type": norm_type, "loss_scale": loss_scale},
        lambda ps: nn.utils.clip_grad_norm_(ps, 0.1, norm_type),
    )
    assert stats.clipped == 5


def test_a_norm_below_the_threshold_changes_nothing() -> None:
    stats = compare_with_torch({"max_norm": 1e6}, lambda ps: nn.utils.clip_grad_norm_(ps, 1e6))
    assert stats.clipped == 0


def test_by_value() -> None:
    compare_with_torch({"clip_value": 0.01}, lambda ps: nn.utils.clip_grad_value_(ps, 0.01))


def test_by_value_then_by_norm() -> None:
    def both(parameters: Any) -> None:
        parameters = list(parameters)
        nn.utils.clip_grad_value_(parameters, 0.05)
        nn.utils.clip_grad_norm_(parameters, 0.1)

    compare_with_torch({"clip_value": 0.05, "max_norm": 0.1}, both)


def test_zero_gradients_stay_zero() -> None:
    stats = compare_with_torch({"max_norm": 1.0}, lambda ps: nn.utils.clip_grad_norm_(ps, 1.0), scale=0.0)
    assert stats.grad_norm == 0.0


def test_norm_reuses_the_sums_of_squares() -> None:
    step, _ = graph_of(*training_step(), [CheckFinite(), Clip(max_norm=1.0)])
    assert "aten.abs.default" not in targets(inserted_by(step, "clip"))
    assert step.grad_norm is not None


def test_two_optimizers_share_one_norm() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    opts = [torch.optim.SGD(m.parameters(), lr=1.0) for m in (first, second)]
    before = [p.detach().clone() for m in (first, second) for p in m.parameters()]

    def step(x: torch.Tensor) -> None:
        second(first(x)).square().sum().backward()
        for opt in opts:
            opt.step()
            opt.zero_grad()

    mp = MixedPrecision(dtype="float32", codegen="eager", max_norm=0.25)
    torch.compile(step, backend=mp)(torch.randn(8, 4))
    after = [p.detach() for m in (first, second) for p in m.parameters()]
    moved = torch.cat([(a - b).flatten() for a, b in zip(after, before, strict=True)])
    assert moved.norm().item() == pytest.approx(0.25, rel=1e-3)


def test_declines_without_max_norm_but_reports_the_norm() -> None:
    step, (_, record) = graph_of(*training_step(), [CheckFinite(), Clip()])
    assert record.declined == ("max_norm is None: the norm is only reported",)
    assert step.grad_norm is not None
