"""Gradients that stay in ``.grad`` for others: unscaled, finite, as they were where the step is skipped."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from fxpass import MixedPrecision
from fxpass.passes.check_finite import CheckFinite
from fxpass.passes.hand_over import HandOver
from tests.support.graphs import graph_of, inserted_by, training_step
from tests.support.helpers import Mlp, batches


@pytest.mark.breadth(4)
@pytest.mark.parametrize("kept", [False, True], ids=["none before", "accumulated"])
def test_an_optimizer_outside_of_the_step_never_sees_inf(kept: bool) -> None:
    net, expected = Mlp(), Mlp()
    expected.load_state_dict(net.state_dict())
    inside = torch.optim.SGD(net.first.parameters(), lr=0.1)
    outside = torch.optim.SGD(net.last.parameters(), lr=0.1)
    theirs = torch.optim.SGD(expected.parameters(), lr=0.1)
    mp = MixedPrecision(loss_scale=1024.0)

    @torch.compile(backend=mp)
    def step(x: Tensor, y: Tensor) -> None:
        inside.zero_grad()
        mse_loss(net(x), y).backward()
        inside.step()

    for call, (x, y) in enumerate(batches(3)):
        if not kept or call == 0:
            outside.zero_grad()
        before = None if net.last.weight.grad is None else net.last.weight.grad.clone()
        step(x * math.inf if call == 1 else x, y)
        assert net.last.weight.grad is not None
        if call == 1:
            left = torch.zeros_like(net.last.weight) if before is None else before
            assert torch.equal(net.last.weight.grad, left)
        elif call == 0:
            theirs.zero_grad()
            mse_loss(expected(x), y).backward()
            torch.testing.assert_close(net.last.weight.grad, expected.last.weight.grad, rtol=0.02, atol=1e-3)
    assert mp.stats().steps == 3
    assert mp.stats().skipped == 1


def test_it_leaves_other_graphs_alone() -> None:
    step, args = training_step()
    graph, records = graph_of(step, args, [CheckFinite(), HandOver()])
    assert not inserted_by(graph, "hand_over")
    assert records[-1].declined == ("no gradient leaves the step",)


def test_one_guard_for_each_gradient_that_leaves() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    opt = torch.optim.SGD(net[0].parameters(), lr=0.1)

    def step(x: Tensor) -> None:
        opt.zero_grad()
        net(x).square().mean().backward()
        opt.step()

    graph, _ = graph_of(step, (torch.randn(3, 4),), [CheckFinite(), HandOver()])
    assert len([n for n in inserted_by(graph, "hand_over") if "where" in str(n.target)]) == 2
