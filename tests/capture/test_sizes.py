"""Sizes that change: at most two more graphs, whatever the sizes, and a profile never stands in the way."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from fxpass import MixedPrecision
from fxpass.lower import callable as lowering
from tests.support.helpers import FP32, Mlp, Training, batches, compare


def test_batches_of_many_sizes_the_last_of_one() -> None:
    calls = [batches(1, rows)[0] for rows in (8, 8, 12, 5, 30, 1)]

    def build() -> Training:
        net = Mlp()
        opt = torch.optim.AdamW(net.parameters(), lr=0.01)

        def step(x: Tensor, y: Tensor) -> Tensor:
            opt.zero_grad()
            loss = mse_loss(net(x), y)
            loss.backward()
            opt.step()
            return loss

        return Training(step, [net], [opt], calls)

    mp = compare(build, graphs=3)  # 8 rows, any number of rows, 1 row
    assert [g.why for g in mp.graphs] == [
        "the first call",
        "x.shape[0] was 8, is 12",
        "x.shape[0] was at least 2, is 1",
    ]
    assert mp.graphs[1].memory.at(batch=100).peak.bytes > mp.graphs[1].memory.peak.bytes


class Tokens(nn.Module):
    """Attention over embedded tokens: two symbolic sizes, and their products."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.head = nn.Linear(8, 11)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return self.head(x + (x @ x.transpose(1, 2)).softmax(-1) @ x)


@pytest.mark.slow
def test_sequences_of_many_lengths() -> None:
    shapes = [(2, 5), (2, 5), (2, 7), (3, 4), (4, 9)]

    def build() -> Training:
        net = Tokens()
        opt = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)

        def step(ids: Tensor) -> Tensor:
            opt.zero_grad()
            loss = cross_entropy(net(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            opt.step()
            return loss

        calls = [(torch.randint(0, 11, shape),) for shape in shapes]
        return Training(step, [net], [opt], calls)

    assert len(compare(build, graphs=3).graphs) == 3


@pytest.mark.parametrize("fails", ["facts_of", "program_profile"])
def test_a_profile_that_fails_says_so_and_the_step_runs(fails: str) -> None:
    net = nn.Linear(4, 2)
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    mp = MixedPrecision(**FP32)

    @torch.compile(backend=mp)
    def step(x: Tensor) -> Tensor:
        loss = net(x).square().mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
        return loss

    where: Any = lowering if fails == "program_profile" else lowering.facts_of.__globals__
    broken = mock.Mock(side_effect=KeyError("s77"))
    patched = (
        mock.patch.object(where, fails, broken)
        if fails == "program_profile"
        else mock.patch.dict(where, _facts_of=broken)
    )
    with patched:
        step(torch.ones(3, 4))
    assert mp.stats().steps == 1
    assert "s77" in mp.graphs[0].memory.missing
    assert "no memory profile" in mp.graphs[0].memory_summary()
