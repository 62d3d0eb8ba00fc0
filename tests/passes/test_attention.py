"""What the attention pass leaves alone; tests/cuda/test_attention.py has what it does."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxpass import MixedPrecision


def test_attention_of_the_cpu_is_left_alone() -> None:
    model = nn.Linear(8, 24)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mp = MixedPrecision(codegen="eager")

    @torch.compile(backend=mp)
    def step(x: Tensor) -> None:
        q, k, v = model(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        F.scaled_dot_product_attention(q, k, v, is_causal=True).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step(torch.randn(2, 4, 8))
    assert mp.stats().steps == 1
    (record,) = [record for record in mp.graphs[0].passes if record.name == "attention"]
    assert (record.inserted, record.removed) == (0, 0)
    assert record.declined == ("no attention whose kernel depends on the dtype",)
