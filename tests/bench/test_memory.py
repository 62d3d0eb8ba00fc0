"""The memory benchmark: timelines against what torch says, and every contender in its table."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from bench import memory, models
from bench.peers import PEERS
from bench.timeline import plot_roles, plot_timelines, timeline_of_call


def eager_step() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(256, 256, bias=False), nn.Linear(256, 256, bias=False))
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def test_an_eager_step_passes_its_moments() -> None:
    model, opt = eager_step()
    x = torch.randn(8, 256)

    def step() -> None:
        model(x).square().sum().backward()
        opt.step()
        opt.zero_grad()

    timeline = timeline_of_call(step, eager_step=True)
    gradients = sum(p.numel() * 4 for p in model.parameters())
    activations = 8 * 256 * 4
    assert timeline.moments["end of backward"] >= gradients
    assert timeline.moments["end of backward"] < gradients + 3 * activations
    assert activations <= timeline.moments["end of forward"] < gradients
    assert timeline.moments["update"] >= timeline.moments["end of backward"] - activations
    assert timeline.peak >= max(timeline.moments.values())
    assert timeline.points[-1][1] == 0, "a step gives back what it takes"


def test_the_backward_of_others_is_untouched() -> None:
    original = torch.Tensor.backward
    timeline_of_call(lambda: None, eager_step=True)
    assert torch.Tensor.backward is original


@pytest.mark.slow
def test_a_peer_and_fxpass_side_by_side(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(models.GPT_SIZES, "tiny", models.GPTConfig(width=64, layers=1, heads=1))
    makers = memory.contenders(["o2-keep", "fxpass"])
    # code generation is not the point here
    makers["fxpass"].keywords["codegen"] = "eager"  # pyrefly: ignore[missing-attribute]
    results, lines = [], {}
    for name, make in makers.items():
        result, timeline = memory.measured(name, make, "tiny", 32, torch.device("cpu"))
        results.append(result)
        lines[name] = (result.kept, timeline)
    keep, ours = results
    assert round(keep.kept) == 14
    assert round(ours.kept) == 12
    at_update = keep.at("update")
    assert at_update is not None
    assert at_update >= 19.9
    assert set(ours.moments) == set(memory.MOMENTS)
    assert ours.peak <= ours.predicted <= 1.02 * ours.peak
    console = Console(record=True, width=140)
    console.print(memory.table(results))
    assert "o2-keep" in console.export_text()
    plot_roles(
        {r.name: {k: v / r.parameters for k, v in r.roles.items()} for r in results}, "t", tmp_path / "a.png"
    )
    plot_timelines(lines, ours.parameters, "t", tmp_path / "b.png")
    assert (tmp_path / "a.png").stat().st_size > 5000
    assert (tmp_path / "b.png").stat().st_size > 5000


def test_every_peer_of_the_step_benchmark_is_known() -> None:
    assert set(memory.contenders([n for n in PEERS if n != "fxpass"])) == set(PEERS) - {"fxpass"}
