"""``torch.use_deterministic_algorithms(True)``: gradients of tables are summed in one order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

import fxpass


@pytest.mark.parametrize("deterministic", [False, True], ids=["as it comes", "deterministic"])
def test_gradients_of_tables(deterministic: bool) -> None:
    model = nn.Sequential(nn.Embedding(3000, 32), nn.Linear(32, 8)).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mp = fxpass.MixedPrecision()

    @torch.compile(backend=mp)
    def step(x: Tensor) -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    torch.use_deterministic_algorithms(deterministic)
    try:
        _, programs = run_and_get_code(step, torch.randint(0, 3000, (4, 64), device="cuda"))
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(mp.graphs) == 1
    # many threads that add to one place do so in the order in which they come
    assert ("tl.atomic_add" in "".join(programs)) is not deterministic
