"""The scale's state machine, step for step against torch.amp.GradScaler in the same run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.fx import Node

from fxpass import DynamicLossScale, LossScale, LossScaleError, MixedPrecision, StaticLossScale
from fxpass.scaling.writer import Writer
from tests.support.scaling import slopes, trajectory


def grad_scaler(overflows: str, **settings: Any) -> tuple[list[float], list[int]]:
    scaler = torch.amp.GradScaler("cpu", **settings)
    weight = nn.Parameter(torch.zeros(2))
    opt = torch.optim.SGD([weight], lr=0.1)
    scales, trackers = [], []
    for slope in slopes(overflows):
        scaler.scale((weight * slope).sum()).backward()
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


# Scales after each step, from running DeepSpeed's DynamicLossScaler and reading Apex amp's LossScaler.
WINDOW_2 = {"init_scale": 256, "loss_scale_window": 2}
PUBLISHED = [
    ("deepspeed", {**WINDOW_2, "hysteresis": 1}, ".......", "256 256 512 512 1024 1024 2048"),
    ("deepspeed", {**WINDOW_2, "hysteresis": 1}, "x.....", "128 128 128 256 256 512"),
    ("deepspeed", {"initial_scale_power": 8, "loss_scale_window": 2}, "xxx", "256 128 64"),
    ("deepspeed", WINDOW_2, "x.x.x", "256 256 128 128 64"),
    ("deepspeed", {**WINDOW_2, "consecutive_hysteresis": True}, "x.x.x", "256 256 256 256 256"),
    ("deepspeed", WINDOW_2, "xx...xx", "256 128 128 128 256 256 128"),  # the growth refilled the hysteresis
    ("deepspeed", {"init_scale": 4, "hysteresis": 1}, "xx", "2 1"),
    ("deepspeed", {"init_scale": 5, "hysteresis": 1}, "xxx", "2.5 1.25 1"),
    ("apex", {"init_scale": 3, "scale_window": 1, "max_loss_scale": 16}, "....", "6 12 16 16"),
    ("apex", {"init_scale": 8, "scale_window": 2, "min_loss_scale": 3}, "..x.x..", "8 16 8 8 4 4 8"),
    ("apex", {"init_scale": 8, "min_loss_scale": 3}, "xxx", "4 3 3"),
    ("apex", {"init_scale": 16, "hysteresis": 3}, "xx.xxxx.x", "16 16 16 16 16 8 4 4 4"),
]


@pytest.mark.parametrize(("library", "settings", "overflows", "scales"), PUBLISHED)
def test_sequences_of_other_libraries(
    library: str, settings: dict[str, float], overflows: str, scales: str
) -> None:
    policy = DynamicLossScale.like(library, **settings)
    assert trajectory(policy, overflows)[0] == [float(s) for s in scales.split()]


def test_deepspeed_raises_at_the_minimum_at_once() -> None:
    policy = DynamicLossScale.like("deepspeed", init_scale=4, hysteresis=1)
    with pytest.raises(LossScaleError, match="1 steps in a row overflowed at the minimum scale 1"):
        trajectory(policy, "xxx")


@pytest.mark.parametrize("library", ["torch", "apex"])
def test_endless_overflows_never_reach_zero(library: str) -> None:
    policy = DynamicLossScale.like(library, init_scale=2.0**-120, backoff_factor=0.25, patience=99)
    assert trajectory(policy, "xxxxxx", dtype="float32")[0][-1] == 2.0**-126


def test_a_tracker_beyond_a_shorter_new_interval_grows_at_once() -> None:
    """GradScaler compares for equality, and would never grow again."""
    mp = MixedPrecision(loss_scale=DynamicLossScale(init_scale=8.0))
    mp.load_state_dict({**mp.state_dict(), "_growth_tracker": 1500})
    fresh, handle = trajectory(DynamicLossScale(init_scale=8.0, growth_interval=1000), "")
    assert fresh == []
    handle.load_state_dict(mp.state_dict())
    weight = nn.Parameter(torch.zeros(2))
    opt = torch.optim.SGD([weight], lr=0.1)

    @torch.compile(backend=handle)
    def step() -> None:
        weight.sum().backward()
        opt.step()
        opt.zero_grad()

    step()
    assert handle.scale.item() == 16.0
    assert handle.stats().growth_tracker == 0


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


class Halving(LossScale):
    """Half the scale every step, whatever happens."""

    keeps: ClassVar = {"scale": 1.0, "halvings": 0}

    @property
    def init(self) -> float:
        return 16.0

    def resumed(self, scale: float, growth_tracker: int) -> dict[str, float]:
        return {"scale": scale}

    def move(self, out: Writer, overflow: Node, magnitudes: Sequence[Node], limit: float) -> None:
        out.write("scale", out.op(torch.ops.aten.mul.Tensor, out.read["scale"], 0.5))
        out.write("halvings", out.op(torch.ops.aten.add.Tensor, out.read["halvings"], 1))


def test_a_policy_of_the_users() -> None:
    scales, mp = trajectory(Halving(), "..x")
    assert scales == [8.0, 4.0, 2.0]
    saved = mp.state_dict()
    assert saved["halvings"] == 3
    again = MixedPrecision(loss_scale=Halving())
    again.load_state_dict(saved)
    assert (float(again.scale), again.state_dict()["halvings"]) == (2.0, 3)
    other = MixedPrecision()
    other.load_state_dict(saved)
    assert float(other.scale) == 2.0
