"""No way of clipping keeps a float32 copy of a gradient, nor anything of its size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.measure import peak_of_call
from fxpass import MixedPrecision


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"max_norm": 1e-5, "norm_type": float("inf")},
        {"max_norm": 1e-3, "clip_per": "parameter"},
        {"clip_value": 1e-5, "max_norm": 1e-3},
        {"adaptive_clip": 1e-4},
    ],
    ids=str,
)
def test_two_bytes_per_parameter(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(512, 512) for _ in range(6)])
    opt = torch.optim.AdamW(model.parameters())
    mp = MixedPrecision(**options)

    @torch.compile(backend=mp)
    def step(x: Tensor) -> None:
        model(x).square().mean().backward()
        opt.step()
        opt.zero_grad()

    x = torch.randn(4, 512)
    step(x)
    parameters = sum(p.numel() for p in model.parameters())
    peak = peak_of_call(lambda: step(x), torch.device("cpu"))
    assert mp.stats().clipped == mp.stats().steps
    assert 2.0 < peak.bytes / parameters < 2.9  # one layer is 0.67 in float32, 0.33 in float16
