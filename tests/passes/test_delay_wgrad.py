"""Input gradients before weight gradients, unless the weight gradient frees more than it makes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxpass.ir.graph import StepGraph
from fxpass.passes.delay_wgrad import DelayWgrad
from tests.support.graphs import graph_of


def products(step: StepGraph, shape: tuple[int, ...]) -> list[int]:
    """Positions, among the products of the graph, of those with this result."""
    found = [n for n in step.nodes() if n.target is torch.ops.aten.mm.default]
    return [i for i, n in enumerate(found) if tuple(n.meta["val"].shape) == shape]


def head(rows: int) -> tuple[StepGraph, StepGraph, int]:
    """A product whose weight gradient autograd makes first: as captured, as rewritten, nodes inserted."""
    weight = nn.Parameter(torch.randn(64, 96))
    first = nn.Linear(32, 64)
    opt = torch.optim.SGD([weight, *first.parameters()], lr=0.1)

    def step(x: Tensor) -> None:
        torch.mm(first(x), weight).square().sum().backward()
        opt.step()
        opt.zero_grad()

    x = torch.randn(rows, 32)
    before, _ = graph_of(step, (x,))
    after, (record,) = graph_of(step, (x,), [DelayWgrad()])
    return before, after, record.inserted


def test_the_input_gradient_comes_first() -> None:
    before, after, inserted = head(rows=8)
    (weight, *_), (inputs, *_) = products(before, (64, 96)), products(before, (8, 64))[-1:]
    assert weight < inputs, "autograd changed its order: this pass has nothing to do"
    assert products(after, (64, 96)) > products(after, (8, 64))[-1:]
    assert inserted == 0


def test_not_when_the_activations_it_frees_are_larger() -> None:
    before, after, _ = head(rows=4096)
    assert products(after, (64, 96)) == products(before, (64, 96))
