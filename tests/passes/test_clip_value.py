"""Clipping by value against torch.nn.utils.clip_grad_value_ in the same run."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fxpass.passes.check_finite import CheckFinite
from fxpass.passes.clip_value import ClipValue
from tests.passes.test_clip import update_of
from tests.support.clipping import compare_with_torch, gradients_behind, parameters
from tests.support.graphs import graph_of, training_step


@pytest.mark.parametrize(
    ("loss_scale", "codegen"), [(None, "eager"), (2.0**16, "eager"), (2.0**16, "inductor")]
)
def test_as_torch(loss_scale: float | None, codegen: str) -> None:
    options = {"clip_value": 0.01, "loss_scale": loss_scale}
    clip = lambda opt: nn.utils.clip_grad_value_(parameters(opt), 0.01)  # noqa: E731
    assert compare_with_torch(options, clip, codegen=codegen).clipped == 5


@pytest.mark.parametrize("clip_per", ["global", "parameter"])
def test_comes_before_the_norm(clip_per: str) -> None:
    def both(opt: torch.optim.Optimizer) -> None:
        nn.utils.clip_grad_value_(parameters(opt), 0.05)
        for some in [parameters(opt)] if clip_per == "global" else [[p] for p in parameters(opt)]:
            nn.utils.clip_grad_norm_(some, 0.1)

    compare_with_torch({"clip_value": 0.05, "max_norm": 0.1, "clip_per": clip_per}, both)


@pytest.mark.parametrize("clip_value", [1.0, 4.0, 5.0])
def test_below_at_and_above_the_threshold(clip_value: float) -> None:
    gradients = [[-4.0, 2.0], [], [0.0, 3.0]]
    ours, mp = update_of(gradients, clip_value=clip_value, dtype="float32")
    for mine, its in zip(ours, gradients, strict=True):
        assert torch.equal(mine, torch.tensor(its).clamp(-clip_value, clip_value))
    assert mp.stats().clipped == (clip_value < 4.0)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_an_overflow_skips_before_it_is_clamped(bad: float) -> None:
    ours, mp = update_of([[1.0, bad], [2.0]], clip_value=1.0, dtype="float32")
    assert not any(update.any() for update in ours)
    assert (mp.stats().skipped, mp.stats().clipped) == (1, 0)


def test_waits_for_no_other_gradient() -> None:
    step, _ = graph_of(*training_step(), [CheckFinite(), ClipValue(clip_value=0.1)])
    assert gradients_behind(step) == [{0}, {1}, {2}, {3}]


def test_declines_without_a_value() -> None:
    _, (_, record) = graph_of(*training_step(), [CheckFinite(), ClipValue()])
    assert record.declined == ("clip_value is None",)
