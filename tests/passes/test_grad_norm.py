"""The reported norm is eager's, whatever clips afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxpass import MixedPrecision
from fxpass.passes.check_finite import CheckFinite
from fxpass.passes.grad_norm import GradNorm
from tests.support.clipping import small_net
from tests.support.graphs import graph_of


@pytest.mark.breadth
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clip_value": 0.01},
        {"clip_value": 0.01, "max_norm": 0.5},
        {"max_norm": 0.1, "clip_per": "parameter"},
        {"adaptive_clip": 0.01},
        {"norm_type": float("inf")},
    ],
    ids=str,
)
@pytest.mark.parametrize("users_own", [False, True])
def test_before_clipping(options: dict[str, Any], users_own: bool) -> None:
    """``users_own``: the step itself changes a gradient, and the norm is of what it makes of it."""
    model = small_net()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)

    def backward(x: Tensor) -> None:
        model(x).square().sum().backward()
        if users_own:
            opt.param_groups[0]["params"][0].grad.mul_(3.0)

    def step(x: Tensor) -> None:
        backward(x)
        opt.step()
        opt.zero_grad()

    x = torch.randn(6, 4)
    backward(x)
    expected = nn.utils.get_total_norm(
        [p.grad for p in model.parameters() if p.grad is not None], options.get("norm_type", 2.0)
    )
    opt.zero_grad()
    mp = MixedPrecision(dtype="float32", codegen="eager", loss_scale=2.0**10, **options)
    torch.compile(step, backend=mp)(x)
    assert mp.stats().grad_norm == pytest.approx(expected.item(), rel=1e-5)


def test_declines_without_a_gradient() -> None:
    _, (_, record) = graph_of(lambda x: x @ x, (torch.randn(4, 4),), [CheckFinite(), GradNorm()])
    assert record.declined == ("no gradient reaches an optimizer",)
