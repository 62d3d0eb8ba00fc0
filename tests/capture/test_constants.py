"""Tensors that the step writes down: literals, masks, items that are set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from fxpass import MixedPrecision
from tests.support.helpers import EAGER, FP32, Mlp, Training, batches, compare


def _written(net: Mlp, x: Tensor, y: Tensor) -> Tensor:
    """Every way of writing a number or a list of them into the graph."""
    x = x.clone()
    x[..., 0] = 0
    out = net(x) * torch.tensor(1.5) + torch.tensor([1.0, 2.0])
    out = out.clone()
    out[out > 1.0] = 0.5
    weight = torch.zeros(2)
    weight[1] = 2.0
    table = torch.tensor([0.25, 0.5], dtype=torch.float64).float()
    table[0] += 1
    return mse_loss(out * weight + torch.as_tensor(0.3), y * table)


def _build() -> Training:
    net = Mlp()
    opt = torch.optim.AdamW(net.parameters(), lr=0.01)

    def step(x: Tensor, y: Tensor) -> Tensor:
        opt.zero_grad()
        loss = _written(net, x, y)
        loss.backward()
        opt.step()
        return loss

    return Training(step, [net], [opt], [*batches(2), *batches(1, rows=9)])


@pytest.mark.breadth(2)
@pytest.mark.parametrize("options", [FP32, EAGER], ids=["inductor", "eager"])
def test_literals_and_items_that_are_set(options: dict[str, object]) -> None:
    compare(_build, handle=MixedPrecision(**options), graphs=2)  # pyrefly: ignore[bad-argument-type]


@pytest.mark.slow
def test_in_float16_too() -> None:
    torch.manual_seed(0)
    training, mp = _build(), MixedPrecision(loss_scale=128.0)
    losses = training.run(torch.compile(training.step, backend=mp))
    torch.manual_seed(0)
    eager = _build()
    torch.testing.assert_close(losses, eager.run(eager.step), rtol=0.02, atol=0.01)
    assert mp.stats().steps == len(training.calls)
