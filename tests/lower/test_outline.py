"""Updates compiled once and called in turn give what one graph gives, bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fxpass import MixedPrecision
from fxpass.lower.outline import find_units
from fxpass.passes import passes_for
from tests.support.graphs import graph_of, training_step


class Repeated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.last = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.last(x)


def test_equal_updates_have_equal_keys() -> None:
    step, _ = graph_of(*training_step(Repeated(), torch.optim.AdamW), passes_for(MixedPrecision()))
    units = find_units(step)
    counts = sorted(sum(u.key == key for u in units) for key in {u.key for u in units})
    assert counts == [3, 4]  # three 8x8 weights; four biases of 8, the first layer's among them


def test_an_update_that_something_else_reads_stays_in_the_graph() -> None:
    model = Repeated()
    average = [p.detach().clone() for p in model.parameters()]
    opt = torch.optim.AdamW(model.parameters())

    def step(x: Tensor, y: Tensor) -> None:
        nn.functional.mse_loss(model(x), y).backward()
        opt.step()
        opt.zero_grad()
        with torch.no_grad():
            for a, p in zip(average, model.parameters(), strict=True):
                a.lerp_(p, 0.1)

    graph, _ = graph_of(step, (torch.randn(6, 4), torch.randn(6, 2)), passes_for(MixedPrecision()))
    assert find_units(graph) == []


@pytest.mark.slow
def test_same_result_with_and_without() -> None:
    model = Repeated()
    results = []
    for outline in ("auto", "off"):
        mine = copy.deepcopy(model)
        opt = torch.optim.AdamW(mine.parameters(), lr=0.01)
        mp = MixedPrecision(outline=outline, max_norm=0.5)

        @torch.compile(backend=mp)
        def step(x: Tensor, mine: nn.Module = mine, opt: torch.optim.Optimizer = opt) -> Tensor:
            loss = mine(x).square().mean()
            loss.backward()
            opt.step()
            opt.zero_grad()
            return loss

        torch.manual_seed(1)
        for index in range(4):
            step(torch.randn(6, 4) if index != 2 else torch.full((6, 4), float("inf")))
        results.append([p.detach() for p in mine.parameters()])
        assert mp.stats().skipped == 1
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
