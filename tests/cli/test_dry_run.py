"""A dry run sees what a compilation makes, executes nothing and changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxpass import CaptureError, MixedPrecision
from fxpass.hallway.dry_run import dry_run
from tests.support.graphs import training_step

from . import targets
from .helpers import fx


def _make(name: str) -> Any:
    return lambda: (*getattr(targets, name)(), {})[:3]


@pytest.mark.parametrize("tensors", ["fake", "real"])
def test_the_graph_is_that_of_a_compilation(tensors: str) -> None:
    options = {"max_norm": 1.0, "codegen": "eager"}
    looked = dry_run(_make("mlp"), options, tensors=tensors)
    torch.compiler.reset()
    step, args = targets.mlp()
    backend = MixedPrecision(**options)
    torch.compile(step, backend=backend)(*args)
    assert looked.record.after == backend.graphs[0].after
    assert looked.tensors == tensors


def test_real_tensors_are_not_touched() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def step(x: Tensor, y: Tensor) -> None:
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()

    looked = dry_run(lambda: (step, (torch.randn(6, 4), torch.randn(6, 2)), {}), {}, tensors="real")
    assert looked.parameters == sum(p.numel() for p in model.parameters())
    assert not optimizer.state
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_same_step_compiles_afterwards() -> None:
    step, args = training_step()
    dry_run(lambda: (step, args, {}), {}, tensors="real")
    assert torch.isfinite(torch.compile(step, backend=MixedPrecision(codegen="eager"))(*args))


def test_large_models_take_no_memory() -> None:
    width = 100_000

    def make() -> Any:
        step, _ = training_step(nn.Linear(width, width))  # 40 GB
        return step, (torch.randn(2, width), torch.randn(2, width)), {}

    assert dry_run(make, {}).parameters == width * width + width


@pytest.mark.slow
def test_falls_back_to_real_tensors_and_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    found = fx(capsys, "inspect", "@needs_values")
    assert found.code == 0
    assert "real tensors" in found.out
    assert "note: not with fake tensors:" in found.out
    assert fx(capsys, "inspect", "@needs_values", "--tensors", "fake").code == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_needs_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (("inspect", "@on_cuda"), ("inspect", "@mlp", "--device", "cuda")):
        found = fx(capsys, *command)
        assert found.code == 0, found.err
        assert "traced with the CPU's operators" in found.out


def test_launches_are_those_of_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    found = fx(capsys, "inspect", "@mlp", "--launches", "--of", "graph", "--json").json()
    launches = found["launches"]
    assert found["memory"]["of"] == "program"
    assert launches["total"] == sum(p["kernels"] + p["calls"] for p in launches["phases"])
    assert {"forward", "backward", "check", "update", "scale"} == {p["phase"] for p in launches["phases"]}
    assert {"cast", "check_finite", "skip"} <= {p["name"] for p in launches["passes"]}
    refused = fx(capsys, "inspect", "@mlp", "--launches", "--codegen", "eager")
    assert refused.code == 2
    assert "leave out --codegen or --launches" in refused.err


def test_a_break_is_not_tried_twice() -> None:
    calls = []

    def make() -> Any:
        calls.append(1)
        return *targets.breaks(), {}

    with pytest.raises(CaptureError, match="broke before"):
        dry_run(make, {})
    assert len(calls) == 1


def test_what_comes_before_the_training_part_is_run_on_the_way() -> None:
    step, args = training_step()

    def two_parts(x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            mean = x.mean()
        print("breaks the graph")
        return step(x - mean, y)

    looked = dry_run(lambda: (two_parts, args, {}), {})
    assert looked.step.trains


def test_keywords_reach_the_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert fx(capsys, "inspect", "@keywords").code == 0
