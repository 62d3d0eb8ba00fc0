"""Recomputation changes no bit of a step; only what is kept from forward to backward."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import fxpass.hallway.frame
from fxpass import MixedPrecision
from fxpass.ir.graph import Phase, phase, tensor
from fxpass.passes import PASSES, passes_for
from fxpass.passes.cast import Cast
from fxpass.passes.decompose import Decompose
from fxpass.passes.recompute import Recompute
from fxpass.passes.scale_loss import ScaleLoss
from tests.support.graphs import graph_of, inserted_by, targets


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.up = nn.Linear(32, 128)
        self.down = nn.Linear(128, 64)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.down(nn.functional.gelu(self.up(self.norm(x))))
        return nn.functional.cross_entropy(h, y)


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(64, 32), torch.randint(0, 64, (64,))


def step_of(model: nn.Module):
    opt = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = model(x, y)
        loss.backward()
        opt.step()
        opt.zero_grad()
        return loss

    return step


def kept_bytes(step: Any) -> int:
    """Bytes of forward's values that backward reads."""
    kept = {n for node in step.nodes() if phase(node) is Phase.BACKWARD for n in node.all_input_nodes}
    values = [tensor(n) for n in kept if n.op == "call_function" and phase(n) is Phase.FORWARD]
    return sum(v.numel() * v.element_size() for v in values)


def test_keeps_the_inputs_of_gelu_and_log_softmax_instead_of_their_results() -> None:
    before, _ = graph_of(step_of(Net()), batch(), [ScaleLoss(), Cast()])
    after, records = graph_of(step_of(Net()), batch(), [ScaleLoss(), Cast(), Decompose(), Recompute()])
    made = targets(inserted_by(after, "recompute"))
    assert "aten.gelu.default" in made
    assert "aten.exp.default" not in made, "the sum over a row is kept, not its terms"
    assert records[-1].inserted == len(made)
    assert kept_bytes(after) < kept_bytes(before) * 0.7


def deep() -> nn.Module:
    layers = [
        nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(4)
    ]
    return nn.Sequential(*layers)


@pytest.mark.slow
def test_a_smaller_budget_keeps_less_and_repeats_all_that_a_larger_one_does() -> None:
    def step_of_deep() -> Any:
        model = deep()
        opt = torch.optim.SGD(model.parameters(), lr=0.1)

        def step(x: Tensor) -> None:
            model(x).square().mean().backward()
            opt.step()
            opt.zero_grad()

        return step

    kept, made = [], []
    for budget in (None, 1.0, 0.7, 0.5, 0.3, 0.1, 0.0):
        passes = [ScaleLoss(), Cast(), Decompose(), Recompute(memory_budget=budget)]
        after, _ = graph_of(step_of_deep(), (torch.randn(64, 32),), passes)
        kept.append(kept_bytes(after))
        made.append(targets(inserted_by(after, "recompute")))
    assert kept[0] == kept[1]
    assert all(a >= b for a, b in pairwise(kept))
    assert kept[-1] < kept[0] * 0.6
    assert all(len(a) <= len(b) for a, b in pairwise(made))
    assert any("mm" in name for name in made[-1])
    assert not any("mm" in name for name in made[0])


def test_never_repeats_a_product_or_a_random_number() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Dropout(0.5), nn.Linear(64, 1))
    opt = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(x: Tensor) -> None:
        model(x).sum().backward()
        opt.step()
        opt.zero_grad()

    after, _ = graph_of(step, (torch.randn(64, 32),), [ScaleLoss(), Cast(), Recompute()])
    made = targets(inserted_by(after, "recompute"))
    assert not [t for t in made if "mm" in t or "rand" in t or "dropout" in t or "bernoulli" in t]


def test_each_of_several_backwards_repeats_for_itself() -> None:
    model = Net()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(x: Tensor, y: Tensor) -> None:
        for a, b in zip(x.chunk(2), y.chunk(2), strict=True):
            model(a, b).backward()
        opt.step()
        opt.zero_grad()

    after, _ = graph_of(step, batch(), [ScaleLoss(), Cast(), Decompose(), Recompute()])
    assert targets(inserted_by(after, "recompute")).count("aten.gelu.default") == 2


def test_declines_what_keeps_nothing() -> None:
    weight = nn.Parameter(torch.ones(4))
    opt = torch.optim.SGD([weight], lr=0.1)

    def step(x: Tensor) -> None:
        (weight * x).sum().backward()
        opt.step()
        opt.zero_grad()

    _, (record,) = graph_of(step, (torch.randn(4),), [Recompute()])
    assert record.declined == ("backward reads nothing large of forward",)


@pytest.mark.parametrize("budget", [None, 0.5, 0.0])
def test_bitwise_the_same_step(budget: float | None) -> None:
    model = Net()
    without = tuple(cls for cls in PASSES if cls is not Recompute)
    results = []
    for passes in (PASSES, without):
        mine = copy.deepcopy(model)
        chosen = [p for p in passes_for(MixedPrecision(memory_budget=budget)) if type(p) in passes]
        with mock.patch.object(fxpass.hallway.frame, "passes_for", lambda options, chosen=chosen: chosen):
            step = torch.compile(step_of(mine), backend=MixedPrecision(codegen="eager"))
            torch.manual_seed(1)
            losses = [step(*batch()).item() for _ in range(3)]
        results.append((losses, [p.detach() for p in mine.parameters()]))
    assert results[0][0] == results[1][0]
    for a, b in zip(results[0][1], results[1][1], strict=True):
        assert torch.equal(a, b)
