"""The scale's state machine, step for step against torch.amp.GradScaler in the same run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxpass import DynamicLossScale, LossScaleError, MixedPrecision, StaticLossScale

INF = float("inf")


def trajectory(policy: object, overflows: str) -> tuple[list[float], MixedPrecision]:
    """Scale after each step; ``x`` in ``overflows`` is a step whose gradient is inf."""
    weight = nn.Parameter(torch.zeros(2))
    opt = torch.optim.SGD([weight], lr=0.1)
    mp = MixedPrecision(codegen="eager", loss_scale=policy)

    @torch.compile(backend=mp)
    def step(slope: Tensor) -> None:
        (weight * slope).sum().backward()
        opt.step()
        opt.zero_grad()

    scales = []
    for kind in overflows:
        step(torch.tensor([INF if kind == "x" else 1.0, 1.0]))
        scales.append(mp.scale.item())
    return scales, mp


def grad_scaler(overflows: str, **settings: float) -> tuple[list[float], list[int]]:
    scaler = torch.amp.GradScaler("cpu", **settings)
    weight = nn.Parameter(torch.zeros(2))
    opt = torch.optim.SGD([weight], lr=0.1)
    scales, trackers = [], []
    for kind in overflows:
        scaler.scale((weight * torch.tensor([INF if kind == "x" else 1.0, 1.0])).sum()).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        scales.append(scaler.get_scale())
        trackers.append(scaler.state_dict()["_growth_tracker"])
    return scales, trackers


@pytest.mark.parametrize("overflows", ["......", "x..x....", "..xx.....", "xxxx", "...x...x..."])
@pytest.mark.parametrize("interval", [1, 2, 3])
def test_follows_grad_scaler(overflows: str, interval: int) -> None:
    expected, trackers = grad_scaler(overflows, init_scale=8.0, growth_interval=interval)
    policy = DynamicLossScale(init_scale=8.0, growth_interval=interval, min_scale=2.0**-9)
    scales, mp = trajectory(policy, overflows)
    assert scales == expected
    stats = mp.stats()
    assert stats.growth_tracker == trackers[-1]
    assert stats.steps == len(overflows)
    assert stats.skipped == overflows.count("x")


def test_the_update_of_a_growth_step_uses_that_steps_scale() -> None:
    """DeepSpeed divides by the new scale: the gradient is half as large on every growth step."""
    weight = nn.Parameter(torch.zeros(2))
    opt = torch.optim.SGD([weight], lr=1.0)
    mp = MixedPrecision(codegen="eager", loss_scale=DynamicLossScale(init_scale=4.0, growth_interval=1))

    @torch.compile(backend=mp)
    def step() -> None:
        weight.sum().backward()
        opt.step()
        opt.zero_grad()

    for n in range(1, 5):
        step()
        assert torch.equal(weight, torch.full((2,), -float(n)))
    assert mp.scale.item() == 64.0


def test_never_below_the_minimum_nor_above_the_maximum() -> None:
    assert trajectory(DynamicLossScale(init_scale=4.0, min_scale=1.5), "xxx")[0] == [2.0, 1.5, 1.5]
    policy = DynamicLossScale(init_scale=4.0, growth_interval=1, max_scale=10.0)
    assert trajectory(policy, "...")[0] == [8.0, 8.0, 8.0]


def test_hysteresis_tolerates_consecutive_overflows() -> None:
    """Apex's kernel: h - 1 overflows in a row keep the scale, each further one backs off."""
    policy = DynamicLossScale(init_scale=16.0, hysteresis=3)
    assert trajectory(policy, "xx.xxxx.x")[0] == [16.0, 16.0, 16.0, 16.0, 16.0, 8.0, 4.0, 4.0, 4.0]


def test_static_scale_skips_and_stays() -> None:
    scales, mp = trajectory(StaticLossScale(128.0), ".x.")
    assert scales == [128.0] * 3
    assert mp.stats().skipped == 1


def test_stuck_at_the_minimum_is_an_error_that_names_the_parameter() -> None:
    with pytest.raises(LossScaleError, match=r"3 steps in a row.*weight: inf"):
        trajectory(DynamicLossScale(init_scale=2.0, min_scale=1.0, patience=3), "xxxxxx")


def test_consecutive_skips_are_counted() -> None:
    _, mp = trajectory("dynamic", ".xx")
    assert mp.stats().consecutive_skipped == 2
    _, mp = trajectory("dynamic", "xx.")
    assert mp.stats().consecutive_skipped == 0
