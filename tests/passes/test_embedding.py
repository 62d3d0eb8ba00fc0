"""The row-wise gradient of embeddings against eager, with repeated tokens and tied heads."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fxpass import MixedPrecision


class Tied(nn.Module):
    def __init__(self, tied: bool, padding: int | None) -> None:
        super().__init__()
        self.table = nn.Embedding(64, 8, padding_idx=padding)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 64, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.table(ids))))


@pytest.mark.breadth
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("padding", [None, 3])
@pytest.mark.parametrize("codegen", ["inductor", "eager"])
def test_follows_eager(tied: bool, padding: int | None, codegen: str) -> None:
    ours = Tied(tied, padding)
    theirs = copy.deepcopy(ours)
    mp = MixedPrecision(codegen=codegen, loss_scale=1024.0)
    ids = torch.tensor([[3, 5, 5, 7], [5, 3, 9, 9]])

    def make(model: nn.Module):
        opt = torch.optim.SGD(model.parameters(), lr=0.1)

        def step(ids: Tensor) -> Tensor:
            loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
            loss.backward()
            opt.step()
            opt.zero_grad()
            return loss

        return step

    compiled, eager = torch.compile(make(ours), backend=mp), make(theirs)
    for _ in range(3):
        compiled(ids)
        eager(ids)
    assert mp.graphs[0].inserted()["embedding"] > 0
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=5e-3, atol=5e-4)


def test_declines_when_the_table_is_small() -> None:
    table = nn.Embedding(4, 8)
    opt = torch.optim.SGD(table.parameters(), lr=1.0)
    mp = MixedPrecision(codegen="eager")

    @torch.compile(backend=mp)
    def step(ids: Tensor) -> None:
        table(ids).square().sum().backward()
        opt.step()
        opt.zero_grad()

    step(torch.tensor([0, 1, 2, 3]))
    record = next(r for r in mp.graphs[0].passes if r.name == "embedding")
    assert record.inserted == 0
    assert "4 positions for 4 rows" in record.declined[0]


def test_a_small_table_is_summed_in_float32() -> None:
    """Each gradient that is added fits into float16, the sum does not: torch.amp does not overflow there."""
    torch.manual_seed(0)
    table, body = nn.Embedding(4, 8), nn.Linear(8, 8).requires_grad_(False)
    opt = torch.optim.SGD(table.parameters(), lr=0.01)
    mp = MixedPrecision(codegen="eager", loss_scale=2.0**13)

    @torch.compile(backend=mp)
    def step(ids: Tensor) -> None:
        body(table(ids)).sum().backward()
        opt.step()
        opt.zero_grad()

    step(torch.zeros(64, dtype=torch.int64))
    assert mp.stats().skipped == 0
    assert table.weight.isfinite().all()
