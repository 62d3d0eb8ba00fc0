"""States of other libraries and of earlier runs; what is wrong in one; going on in a new process."""

from __future__ import annotations

import io
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from fxpass import (
    DynamicLossScale,
    HeadroomLossScale,
    LossScale,
    MixedPrecision,
    OptionError,
    StaticLossScale,
)
from tests.support.scaling import trajectory

GOOD = DynamicLossScale(init_scale=8.0)
GRAD_SCALER = torch.amp.GradScaler("cpu", init_scale=32.0).state_dict()


def loaded(state: Any, policy: LossScale | str | float | None = GOOD) -> MixedPrecision:
    mp = MixedPrecision(loss_scale=policy)
    mp.load_state_dict(state)
    return mp


def test_apex_amp() -> None:
    mp = loaded({"loss_scaler0": {"loss_scale": 4096.0, "unskipped": 7}})
    assert (mp.scale.item(), mp.stats().growth_tracker) == (4096.0, 7)
    several = {f"loss_scaler{i}": {"loss_scale": s, "unskipped": i} for i, s in enumerate([64.0, 16.0])}
    assert (loaded(several).scale.item(), loaded(several).stats().growth_tracker) == (16.0, 1)


FUSED = {
    "dynamic_loss_scale": True,
    "cur_scale": 256.0,
    "cur_iter": 0,
    "last_overflow_iter": -1,
    "scale_window": 2,
}


def test_deepspeed_goes_on_where_it_stopped() -> None:
    """Its published sequence for window 2, cut at every point: the rest is the same."""
    published = [256.0, 256.0, 512.0, 512.0, 1024.0, 1024.0, 2048.0]
    settings = {"init_scale": 256, "loss_scale_window": 2, "hysteresis": 1}
    for done in range(1, len(published)):
        state = {**FUSED, "cur_scale": published[done - 1], "cur_iter": done}
        _, mp = trajectory(DynamicLossScale.like("deepspeed", **settings), "")
        mp.load_state_dict(state)
        assert _rest(mp, len(published) - done) == published[done:], f"cut after {done} steps"


def _rest(mp: MixedPrecision, steps: int) -> list[float]:
    torch.compiler.reset()
    weight = torch.nn.Parameter(torch.zeros(2))
    opt = torch.optim.SGD([weight], lr=0.1)

    @torch.compile(backend=mp)
    def step() -> None:
        weight.sum().backward()
        opt.step()
        opt.zero_grad()

    scales = []
    for _ in range(steps):
        step()
        scales.append(mp.scale.item())
    return scales


def test_zero_keeps_its_scaler_as_an_object() -> None:
    scaler = types.SimpleNamespace(cur_scale=64.0, cur_iter=10, last_overflow_iter=6, scale_window=1000)
    vars(scaler).update(delayed_shift=2, cur_hysteresis=1)
    mp = loaded({"loss_scaler": scaler, "overflow": False}, DynamicLossScale.like("deepspeed"))
    assert (mp.scale.item(), mp.stats().growth_tracker) == (64.0, 2)
    assert mp.state_dict()["overflows"] == 1
    assert loaded({"dynamic_loss_scale": False, "cur_scale": 128.0}).scale.item() == 128.0


WRONG: list[Any] = [
    {},
    [],
    None,
    {"scale": 1.0},
    {"loss": 1.0},
    {k: v for k, v in GRAD_SCALER.items() if k != "growth_interval"},
    {**GRAD_SCALER, "scale": "x"},
    {**GRAD_SCALER, "scale": 0.0},
    {**GRAD_SCALER, "scale": float("inf")},
    {**GRAD_SCALER, "scale": float("nan")},
    {**GRAD_SCALER, "scale": True},
    {**GRAD_SCALER, "_growth_tracker": 1.5},
    {**GRAD_SCALER, "_growth_tracker": float("nan")},
    {**GRAD_SCALER, "steps": 3},  # ours, but for the other counters
    {k: v for k, v in MixedPrecision().state_dict().items() if k != "skipped"},
    {**MixedPrecision().state_dict(), "skipped": -1},
    {"loss_scaler0": {"loss_scale": 4.0}},
    {"loss_scaler0": 4.0},
    {"cur_scale": 4.0, "cur_iter": 3},
    {"cur_scale": 4.0, "dynamic_loss_scale": True},
    {"cur_scale": 4.0, "cur_iter": 3, "last_overflow_iter": 5},
    {"loss_scaler": object()},
]


@pytest.mark.parametrize("wrong", WRONG, ids=range(len(WRONG)))
def test_a_wrong_or_partial_state_is_an_error_that_changes_nothing(wrong: Any) -> None:
    _, mp = trajectory(DynamicLossScale(init_scale=64.0), "..x.")
    before = (mp.state_dict(), mp.stats(), mp.diagnosis())
    with pytest.raises(OptionError, match="not a loss scale state"):
        mp.load_state_dict(wrong)
    assert (mp.state_dict(), mp.stats(), mp.diagnosis()) == before


def test_new_settings_win_and_saved_scale_and_counters_stay() -> None:
    _, mp = trajectory(DynamicLossScale(init_scale=64.0, growth_interval=100, min_scale=2.0), "..x.xx..")
    saved = mp.state_dict()
    other = loaded(saved, DynamicLossScale(init_scale=64.0, growth_interval=5, min_scale=1.0))
    assert other.state_dict() == {**saved, "growth_interval": 5}
    assert other.stats()[:5] == mp.stats()[:5]


def test_a_saved_scale_outside_of_the_new_limits_moves_to_the_nearer() -> None:
    state = {**GRAD_SCALER, "scale": 4.0}
    assert loaded(state, DynamicLossScale(min_scale=128.0)).scale.item() == 128.0
    assert loaded({**state, "scale": 2.0**30}, GOOD).scale.item() == 2.0**24
    assert loaded(state, HeadroomLossScale(min_scale=16.0)).scale.item() == 16.0


@pytest.mark.parametrize("policy", [StaticLossScale(128.0), None])
def test_a_scale_that_is_a_setting_stays(policy: LossScale | None) -> None:
    mp = loaded(GRAD_SCALER, policy)
    assert mp.scale.item() == (1.0 if policy is None else 128.0)
    scaler = torch.amp.GradScaler("cpu")
    scaler.load_state_dict(mp.state_dict())
    assert (scaler.get_growth_factor(), scaler.get_backoff_factor()) == (1.0, 1.0)


@pytest.mark.parametrize("policy", ["dynamic", "headroom", 8.0, None])
def test_every_policys_state_survives_torch_save(policy: LossScale | str | float | None) -> None:
    _, mp = trajectory(policy, ".x...x..")
    file = io.BytesIO()
    torch.save(mp.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = loaded(state, policy)
    assert other.state_dict() == state == mp.state_dict()
    torch.amp.GradScaler("cpu").load_state_dict(state)


RUN = """
import sys, torch
from torch import nn
from fxpass import MixedPrecision
first, last, policy, source, target = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
opt = torch.optim.AdamW(model.parameters(), lr=0.1)
mp = MixedPrecision(codegen="eager", max_norm=0.5, loss_scale=policy)
if source != "-":
    saved = torch.load(source, weights_only=True)
    for part, state in zip((model, opt, mp), saved):
        part.load_state_dict(state)

@torch.compile(backend=mp)
def step(x):
    model(x).square().mean().backward()
    opt.step()
    opt.zero_grad()

for number in range(first, last):
    torch.manual_seed(number)
    step(torch.randn(5, 4) * (float("inf") if number in (1, 5) else 1.0))
torch.save([model.state_dict(), opt.state_dict(), mp.state_dict()], target)
"""


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["dynamic", "headroom"])
def test_stopped_and_resumed_in_a_new_process_is_bitwise_the_same(policy: str, tmp_path: Path) -> None:
    def run(first: int, last: int, source: str, target: str) -> list[dict[str, Any]]:
        arguments = [str(first), str(last), policy, source and str(tmp_path / source), str(tmp_path / target)]
        arguments[3] = arguments[3] or "-"
        subprocess.run([sys.executable, "-c", RUN, *arguments], check=True, capture_output=True)
        return torch.load(tmp_path / target, weights_only=True)

    straight = run(0, 8, "", "straight.pt")
    run(0, 4, "", "half.pt")
    resumed = run(4, 8, "half.pt", "resumed.pt")
    for mine, theirs in zip(resumed[0].values(), straight[0].values(), strict=True):
        assert torch.equal(mine, theirs)
    for state, other in zip(resumed[1]["state"].values(), straight[1]["state"].values(), strict=True):
        assert all(torch.equal(state[key], other[key]) for key in other)
    assert resumed[2] == straight[2]
    assert straight[2]["skipped"] == 2
