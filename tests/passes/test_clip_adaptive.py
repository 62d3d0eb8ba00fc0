"""Adaptive clipping against the paper's formula on eager gradients in the same run."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fxpass import MixedPrecision
from fxpass.passes.check_finite import CheckFinite
from fxpass.passes.clip_adaptive import ClipAdaptive
from tests.passes.test_clip import update_of
from tests.support.clipping import compare_with_torch, gradients_behind, parameters
from tests.support.graphs import graph_of, training_step


def unit_norm(x: Tensor) -> Tensor:
    return x.norm(2, dim=tuple(range(1, x.ndim)), keepdim=True) if x.ndim > 1 else x.norm(2)


def clip_adaptively(optimizer: torch.optim.Optimizer, ratio: float) -> None:
    """NFNets' equation 3, written out for eager gradients."""
    for p in parameters(optimizer):
        if p.grad is not None and p.numel():
            limit = ratio * unit_norm(p.detach()).clamp(min=1e-3)
            norm = unit_norm(p.grad)
            p.grad = torch.where(norm > limit, p.grad * (limit / norm.clamp(min=1e-6)), p.grad)


class ConvAndMore(nn.Module):
    """Parameters of zero to four dimensions, one without elements."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv1d(1, 3, 2)
        self.head = nn.Linear(9, 2)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.empty = nn.Parameter(torch.zeros(0, 3))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv(x.unsqueeze(1)).tanh().flatten(1)
        return self.head(hidden) * self.scale + self.empty.sum()


@pytest.mark.breadth("first")
@pytest.mark.parametrize(("ratio", "codegen"), [(0.1, "inductor"), (0.01, "eager"), (0.1, "eager")])
def test_as_the_paper(ratio: float, codegen: str) -> None:
    options = {"adaptive_clip": ratio, "loss_scale": 2.0**12}
    clip = lambda opt: clip_adaptively(opt, ratio)  # noqa: E731
    stats = compare_with_torch(options, clip, model=ConvAndMore, codegen=codegen)
    assert stats.clipped == 5


def test_gradients_below_every_limit_are_left_alone() -> None:
    stats = compare_with_torch({"adaptive_clip": 1e4}, lambda opt: clip_adaptively(opt, 1e4))
    assert stats.clipped == 0


def test_float16_gradients() -> None:
    clip = lambda opt: clip_adaptively(opt, 0.02)  # noqa: E731
    options = {"adaptive_clip": 0.02, "dtype": "float16", "loss_scale": 1024.0}
    assert compare_with_torch(options, clip, rtol=2e-3).clipped == 5


def test_rows_of_zeros_may_move_a_little() -> None:
    ours, _ = update_of([[3.0, 4.0], [0.0]], adaptive_clip=0.5, dtype="float32")
    torch.testing.assert_close(ours[0], torch.tensor([3e-4, 4e-4]))  # 0.5 * 1e-3, along the gradient
    assert not ours[1].any()


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_an_overflow_skips(bad: float) -> None:
    ours, mp = update_of([[1.0, bad], [2.0]], adaptive_clip=0.1, dtype="float32")
    assert not ours[0].any()
    assert (mp.stats().skipped, mp.stats().clipped) == (1, 0)


def test_the_second_update_of_a_step_sees_the_first() -> None:
    """The limit comes from the parameter as the update finds it."""
    weight = nn.Parameter(torch.full((4,), 10.0))
    first, second = torch.optim.SGD([weight], lr=1.0), torch.optim.SGD([weight], lr=1.0)

    def step(x: Tensor) -> None:
        for opt in (first, second):
            (weight * x).sum().backward()
            opt.step()
            opt.zero_grad()

    mp = MixedPrecision(dtype="float32", codegen="eager", adaptive_clip=0.25)
    torch.compile(step, backend=mp)(torch.full((4,), 1000.0))
    torch.testing.assert_close(weight.detach(), torch.full((4,), 10.0 * 0.75 * 0.75))


def test_waits_for_no_other_gradient() -> None:
    step, _ = graph_of(*training_step(), [CheckFinite(), ClipAdaptive(adaptive_clip=0.1)])
    assert gradients_behind(step) == [{0}, {1}, {2}, {3}]


def test_declines_without_a_ratio() -> None:
    _, (_, record) = graph_of(*training_step(), [CheckFinite(), ClipAdaptive()])
    assert record.declined == ("adaptive_clip is None",)
