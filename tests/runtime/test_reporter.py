"""What the host hears of a step: log lines, the error at the minimum scale; and it never waits."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxpass import DynamicLossScale, LossScaleError, MixedPrecision
from fxpass.runtime.reporter import SLOTS, Reporter, host_values
from fxpass.runtime.watch import Column, Report
from tests.support.scaling import slopes, trajectory

INF = float("inf")


def report(steps: int, *, skipped: int = 0, stuck: int = 0, scale: float = 8.0, bad: bool = False) -> Tensor:
    values = Report(steps, skipped, stuck, scale, 1.0 if bad else -1.0, INF if bad else 0.0)
    return torch.tensor(values, dtype=torch.float64)


class Device:
    """A device whose copies arrive when the test says so."""

    def __init__(self) -> None:
        self.started: list[LateCopy] = []

    def __call__(self, device: torch.device) -> LateCopy:
        return LateCopy(self)

    def arrive(self, count: int) -> None:
        for copy in [c for c in self.started if not c.arrived][:count]:
            copy.arrived = True


class LateCopy:
    """One copy; reading it before it has arrived is the mistake that the tests are about."""

    def __init__(self, device: Device) -> None:
        self.device = device

    def start(self, source: Tensor) -> None:
        self.arrived, self.values = False, Report(*host_values(source))
        self.device.started.append(self)

    def done(self) -> bool:
        return self.arrived

    def read(self) -> Report:
        assert self.arrived, "read before it arrived"
        self.device.started.remove(self)
        return self.values


def reporter(patience: int = 3) -> tuple[Reporter, Device]:
    device = Device()
    return Reporter(DynamicLossScale(init_scale=8.0, patience=patience), device), device


COLUMNS = [Column(name, 0, lambda: None) for name in ("a", "b")]


def test_a_late_report_is_told_once_when_it_has_arrived(caplog: pytest.LogCaptureFixture) -> None:
    told, device = reporter()
    told.step(report(1), COLUMNS)
    told.step(report(2, skipped=1, scale=4.0, bad=True), COLUMNS)
    device.arrive(1)
    told.step(report(3, skipped=1, scale=4.0), COLUMNS)
    assert not caplog.records
    device.arrive(2)
    told.step(report(4, skipped=1, scale=4.0), COLUMNS)
    (record,) = caplog.records
    assert record.name == "fxpass"
    assert record.getMessage() == "step 2 skipped, first non-finite gradient b: inf; loss scale 8 -> 4"


def test_stuck_at_the_minimum_is_raised_some_steps_late() -> None:
    told, device = reporter(patience=2)
    for step in range(1, 4):
        told.step(report(step, skipped=step, stuck=step, scale=1.0, bad=True), COLUMNS)
    device.arrive(1)
    told.step(report(4, skipped=4, stuck=4, scale=1.0, bad=True), COLUMNS)
    device.arrive(1)
    with pytest.raises(LossScaleError, match=r"2 steps in a row(.|\n)*b: inf"):
        told.step(report(5, skipped=5, stuck=5, scale=1.0, bad=True), COLUMNS)


def test_more_reports_than_slots_wait_for_nothing_and_lose_no_skip(caplog: pytest.LogCaptureFixture) -> None:
    told, device = reporter(patience=99)
    for step in range(1, SLOTS + 6):
        told.step(report(step, skipped=step, bad=True), COLUMNS)
    assert len(device.started) == SLOTS
    device.arrive(SLOTS)
    told.step(report(SLOTS + 6, skipped=SLOTS + 5), COLUMNS)  # finds all slots taken, and frees them
    told.step(report(SLOTS + 7, skipped=SLOTS + 5), COLUMNS)
    device.arrive(1)
    told.step(report(SLOTS + 8, skipped=SLOTS + 5), COLUMNS)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == SLOTS + 1
    assert messages[-1].startswith(f"5 steps skipped up to step {SLOTS + 7}")


def test_reports_on_their_way_are_dropped_when_a_checkpoint_is_loaded(
    caplog: pytest.LogCaptureFixture,
) -> None:
    told, device = reporter(patience=1)
    told.step(report(1, skipped=1, stuck=1, scale=1.0, bad=True), COLUMNS)
    told.restart(skipped=0, scale=8.0)
    device.arrive(1)
    told.step(report(1), COLUMNS)
    assert not caplog.records


def test_each_skipped_step_is_logged_once_and_scale_changes_for_debugging(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, logger="fxpass")
    trajectory(DynamicLossScale(init_scale=8.0, growth_interval=3), ".x....n")
    records = [(r.levelname, r.getMessage()) for r in caplog.records if r.name == "fxpass"]
    warnings = [text for level, text in records if level == "WARNING"]
    assert [text[:14] for text in warnings] == ["step 2 skipped", "step 7 skipped"]
    assert "weight: inf" in warnings[0]
    assert "weight: nan" in warnings[1]
    assert [text for level, text in records if level == "DEBUG"] == [
        "loss scale 8 -> 4 after step 2",
        "loss scale 4 -> 8 after step 5",
        "loss scale 8 -> 4 after step 7",
    ]


@pytest.mark.parametrize("scale", [None, 4.0])
def test_skips_are_logged_whatever_the_policy(scale: float | None, caplog: pytest.LogCaptureFixture) -> None:
    trajectory(scale, ".x.", dtype="float32")
    assert len([r for r in caplog.records if r.name == "fxpass"]) == 1


SYNCHRONISING = ("aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal")


@pytest.mark.parametrize(
    ("policy", "codegen"),
    [("dynamic", "eager"), ("headroom", "eager"), (8.0, "eager"), (None, "eager")],
)
def test_a_step_reads_nothing_back(policy: Any, codegen: str) -> None:
    """No operator that a GPU would have to be waited for, in the graph or around it."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    opt = torch.optim.AdamW(model.parameters())
    mp = MixedPrecision(codegen=codegen, loss_scale=policy, max_norm=1.0)

    @torch.compile(backend=mp)
    def step(x: Tensor) -> Tensor:
        loss = model(x).mean() / 4
        loss.backward()
        opt.step()
        opt.zero_grad()
        return loss

    inputs = [slope.reshape(1, 2) for slope in slopes(".x.")]
    step(inputs[0])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        for x in inputs:
            step(x)
    called = {event.key for event in recorded.key_averages()}
    assert "Torch-Compiled Region: 0/0" in called or "aten::amax" in called, "the step was recorded"
    assert not called & set(SYNCHRONISING)
    assert mp.stats().skipped == 1
    assert not any("item" in record.after or "_local_scalar" in record.after for record in mp.graphs)
