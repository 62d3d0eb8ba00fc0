"""The numbers of a step on CUDA: those of eager PyTorch on the CPU.

Without a GPU the kernels that were written for one run in Triton's interpreter.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cuda.models import Training

CLIP = {"max_norm": 0.5}
# The interpreter computes the lanes that a kernel masks, too, with whatever is in them.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


def train(training: Training, step: Any, steps: int = 3) -> list[float]:
    """The losses of some steps on one batch."""
    return [step(*training.batch).item() for _ in range(steps)]


def eager(training: Training, max_norm: float) -> Any:
    """The step without fxpass, in float32, with torch's own clipping."""

    def step(*batch: Tensor) -> Tensor:
        loss = training.model(*batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(training.model.parameters(), max_norm)
        training.optimizer.step()
        training.optimizer.zero_grad()
        return loss

    return step


def worst(ours: Training, theirs: Training) -> float:
    """The largest difference of a parameter."""
    pairs = zip(ours.model.parameters(), theirs.model.parameters(), strict=True)
    return max((a.detach().cpu() - b.detach()).abs().max().item() for a, b in pairs)


@pytest.mark.breadth("first")
@pytest.mark.parametrize("model", ["mlp", "tiny gpt"])
def test_float32_is_exact(model: str) -> None:
    ours, theirs = Training(model), Training(model, "cpu")
    step, handle = ours.compiled({"dtype": "float32", **CLIP})
    assert train(ours, step) == pytest.approx(train(theirs, eager(theirs, 0.5)), rel=1e-6, abs=1e-6)
    assert worst(ours, theirs) < 1e-5
    assert handle.stats().steps == 3


@pytest.mark.breadth("first")
@pytest.mark.parametrize("options", [CLIP, {**CLIP, "release": True}], ids=str)
def test_float16_is_within_rounding(options: dict[str, Any]) -> None:
    ours, theirs = Training("mlp"), Training("mlp", "cpu")
    step, handle = ours.compiled(options)
    assert train(ours, step) == pytest.approx(train(theirs, eager(theirs, 0.5)), rel=2e-3, abs=2e-3)
    stats = handle.stats()
    assert (stats.steps, stats.skipped) == (3, 0)
    assert stats.clipped == 3


@pytest.mark.breadth("first")
@pytest.mark.parametrize("options", [CLIP, {"skip": "tensor"}], ids=str)
def test_an_overflow_changes_no_bit(options: dict[str, Any]) -> None:
    training = Training("mlp")
    step, handle = training.compiled(options)
    step(*training.batch)
    before = [t.detach().cpu().clone() for t in _state(training)]
    scale = float(handle.scale)
    x, y = training.batch
    step(x * float("inf"), y)
    after = [t.detach().cpu() for t in _state(training)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert float(handle.scale) == scale / 2
    assert (handle.stats().skipped, handle.stats().steps) == (1, 2)
    step(x, y)
    assert not all(torch.equal(a, b.cpu()) for a, b in zip(before, _state(training), strict=True))


def _state(training: Training) -> list[Tensor]:
    states = training.optimizer.state.values()
    return [*training.model.parameters(), *(t for state in states for t in state.values())]
