"""What Inductor generates for a step never asks the host for a value of the device."""

from __future__ import annotations

import torch
import torch._inductor.config as inductor_config
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

from fxpass import MixedPrecision


def test_no_item_in_the_generated_programs() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2)

    @torch.compile(backend=MixedPrecision(max_norm=1.0, loss_scale="headroom"))
    def step(x: Tensor) -> Tensor:
        loss = model(x).square().mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
        return loss

    with inductor_config.patch(fx_graph_cache=False):
        _, programs = run_and_get_code(step, torch.randn(4, 8))
    assert len(programs) > 1, "the main graph and the updates"
    assert any("fxpass.update" in text for text in programs)
    for text in programs:
        assert "def call" in text
        assert ".item()" not in text
        assert "_local_scalar_dense" not in text
