"""The ways to clip beside skip="tensor" and release=True: the numbers are those of the plain step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fxpass import MixedPrecision, OptionError
from tests.support.clipping import small_net

ALONE: list[dict[str, Any]] = [
    {"max_norm": 0.2, "clip_per": "parameter"},
    {"max_norm": 0.1, "clip_per": "parameter", "norm_type": float("inf")},
    {"clip_value": 0.02},
    {"clip_value": 0.05, "max_norm": 0.1, "clip_per": "parameter"},
    {"adaptive_clip": 0.05},
]


def train(**options: Any) -> tuple[list[Tensor], MixedPrecision]:
    """Three steps of AdamW; the parameters they end in."""
    torch.compiler.reset()
    model = small_net()
    opt = torch.optim.AdamW(model.parameters(), lr=0.1)
    mp = MixedPrecision(codegen="eager", loss_scale=256.0, **options)

    @torch.compile(backend=mp)
    def step(x: Tensor) -> None:
        model(x).square().sum().backward()
        opt.step()
        opt.zero_grad()

    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        step(torch.randn(6, 4, generator=generator))
    return [p.detach().clone() for p in model.parameters()], mp


@pytest.mark.breadth
@pytest.mark.parametrize("mode", [{"skip": "tensor"}, {"release": True}], ids=str)
@pytest.mark.parametrize("clip", [*ALONE, {"max_norm": 0.2}, {"max_norm": 0.2, "clip_value": 0.05}], ids=str)
def test_same_as_the_plain_step(clip: dict[str, Any], mode: dict[str, Any]) -> None:
    if "skip" in mode and "max_norm" in clip and "clip_per" not in clip:
        with pytest.raises(OptionError, match="clip_per='parameter', clip_value or adaptive_clip"):
            train(**clip, **mode)
        return
    expected, plain = train(**clip)
    actual, mp = train(**clip, **mode)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)
    assert mp.stats().clipped == plain.stats().clipped == 3
    assert mp.stats().grad_norm == plain.stats().grad_norm


@pytest.mark.parametrize("clip", ALONE, ids=str)
def test_an_overflow_elsewhere_changes_no_coefficient(clip: dict[str, Any]) -> None:
    """With skip="tensor" the parameters without the overflow are clipped and updated as if it were alone."""
    good, bad = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    opt = torch.optim.SGD([bad, good], lr=1.0)
    mp = MixedPrecision(dtype="float32", loss_scale=4.0, codegen="eager", skip="tensor", **clip)

    @torch.compile(backend=mp)
    def step(x: Tensor, y: Tensor) -> None:
        ((good * x).sum() + (bad * y).sum()).backward()
        opt.step()
        opt.zero_grad()

    x = torch.tensor([3.0, 4.0, 0.0])
    step(x, torch.tensor([1.0, float("inf"), 0.0]))
    assert torch.equal(bad.detach(), torch.ones(3))
    alone = good.detach().clone()
    with torch.no_grad():
        good.fill_(1.0)
    step(x, torch.zeros(3))
    assert torch.equal(alone, good.detach())
    assert not torch.equal(alone, torch.ones(3))
    assert not torch.equal(alone, 1 - x)
