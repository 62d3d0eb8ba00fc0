"""Checkpoints: both ways with GradScaler, and training that goes on bit for bit."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxpass import DynamicLossScale, MixedPrecision, OptionError


def run(model: nn.Module, opt: torch.optim.Optimizer, mp: MixedPrecision, batches: list[Tensor]) -> None:
    def step(x: Tensor) -> None:
        model(x).square().mean().backward()
        opt.step()
        opt.zero_grad()

    compiled = torch.compile(step, backend=mp)
    for x in batches:
        compiled(x)


def test_grad_scaler_reads_ours_and_we_read_its() -> None:
    mp = MixedPrecision(codegen="eager", loss_scale=DynamicLossScale(init_scale=8.0, growth_interval=3))
    model = nn.Linear(4, 2)
    run(model, torch.optim.SGD(model.parameters(), lr=0.1), mp, [torch.randn(3, 4) for _ in range(4)])
    scaler = torch.amp.GradScaler("cpu")
    scaler.load_state_dict(mp.state_dict())
    assert scaler.get_scale() == mp.scale.item() == 16.0
    assert scaler.state_dict()["_growth_tracker"] == mp.stats().growth_tracker == 1
    assert scaler.get_growth_interval() == 3

    other = MixedPrecision(codegen="eager")
    state = scaler.state_dict()
    state["scale"] = 4.0
    other.load_state_dict(state)
    assert other.scale.item() == 4.0
    assert other.stats().growth_tracker == 1


@pytest.mark.parametrize("wrong", [{}, {"scale": 1.0}, {"scale": "x", "_growth_tracker": 0}])
def test_a_wrong_state_is_an_error_that_changes_nothing(wrong: dict[str, Any]) -> None:
    mp = MixedPrecision()
    with pytest.raises(OptionError, match="not a loss scale state"):
        mp.load_state_dict(wrong)
    assert mp.scale.item() == 2.0**16


def test_save_load_and_go_on_is_bitwise_the_same() -> None:
    torch.manual_seed(0)
    batches = [torch.randn(3, 4) for _ in range(8)]
    batches[2] = torch.full((3, 4), float("inf"))
    policy = DynamicLossScale(init_scale=64.0, growth_interval=3)
    model = nn.Linear(4, 2)
    straight, resumed = copy.deepcopy(model), copy.deepcopy(model)
    opt = torch.optim.AdamW(straight.parameters())
    run(straight, opt, mp := MixedPrecision(codegen="eager", loss_scale=policy), batches)

    opt2 = torch.optim.AdamW(resumed.parameters())
    run(resumed, opt2, mp2 := MixedPrecision(codegen="eager", loss_scale=policy), batches[:4])
    file = io.BytesIO()
    torch.save([resumed.state_dict(), opt2.state_dict(), mp2.state_dict()], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    torch.compiler.reset()
    fresh = nn.Linear(4, 2)
    opt3 = torch.optim.AdamW(fresh.parameters())
    mp3 = MixedPrecision(codegen="eager", loss_scale=policy)
    fresh.load_state_dict(saved[0])
    opt3.load_state_dict(saved[1])
    mp3.load_state_dict(saved[2])
    run(fresh, opt3, mp3, batches[4:])
    for a, b in zip(fresh.parameters(), straight.parameters(), strict=True):
        assert torch.equal(a, b)
    assert mp3.state_dict() == mp.state_dict()
