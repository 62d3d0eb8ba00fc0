"""Weights spread over ranks that are not there: what each keeps, what is sent, and when."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fxpass
from fxpass._torch import fake_ranks
from fxpass.analysis.policy import op_name
from fxpass.hallway.dry_run import DryRun, dry_run
from fxpass.ir.graph import Phase, phase

LAYERS, WIDTH, RANKS = 8, 512, 8
ELEMENTS = LAYERS * WIDTH * WIDTH
GATHER, SCATTER = "all_gather_into_tensor_coalesced", "reduce_scatter_tensor_coalesced"


def deep(rows: int = WIDTH) -> Any:
    sizes = [WIDTH] * LAYERS + [rows]
    model = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in pairwise(sizes)))
    fxpass.shard_(model, dist.group.WORLD)
    optimizer = torch.optim.AdamW(model.parameters())

    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return step, (torch.randn(4, WIDTH),), {}


def table() -> Any:
    table, last = nn.Embedding(4096, 64), nn.Linear(64, 8)
    fxpass.shard_(nn.ModuleList([table, last]), dist.group.WORLD)
    optimizer = torch.optim.SGD([*table.parameters(), *last.parameters()], lr=0.1)

    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        last(table(x)).square().mean().backward()
        optimizer.step()

    return step, (torch.arange(6),), {}


def run(make: Any = deep, **options: Any) -> DryRun:
    torch.compiler.reset()
    with fake_ranks(RANKS):
        return dry_run(make, options)


def test_what_is_kept_and_the_peak() -> None:
    found = run()
    assert (found.parameters, found.ranks) == (ELEMENTS, RANKS)
    assert found.memory.persistent < (12 / RANKS + 0.02) * ELEMENTS
    bucket = 2**20
    activations = 4 * LAYERS * 4 * WIDTH * 4
    assert found.memory.peak.bytes < (2 + 14 / RANKS) * ELEMENTS + 2 * bucket + activations


@pytest.mark.slow
def test_what_is_sent() -> None:
    found = run().transfers
    whole = 2 * ELEMENTS * (RANKS - 1) // RANKS
    forward = [t for t in found if (t.operator, t.phase) == (GATHER, "forward")]
    backward = [t for t in found if (t.operator, t.phase) == (GATHER, "backward")]
    scattered = [t for t in found if t.operator == SCATTER]
    assert {t.dtype for t in (*forward, *backward, *scattered)} == {"float16"}
    assert sum(t.sent for t in forward) == sum(t.sent for t in scattered) == whole
    # the first layer's input needs no gradient
    assert sum(t.sent for t in backward) == whole * (LAYERS - 1) // LAYERS
    verdict = [t for t in found if t.operator == "all_gather_into_tensor"]
    assert [t.bytes for t in verdict] == [8 * 2 * LAYERS * RANKS], "two numbers of each parameter"


@pytest.mark.slow
def test_in_other_dtypes() -> None:
    sent = {t.dtype: t.operator for t in run(dtype="float32").transfers}
    assert set(sent) == {"float32", "float64"}
    of = {t.operator: t.dtype for t in run(reduce_dtype="float32").transfers}
    assert (of[GATHER], of[SCATTER]) == ("float16", "float32")


@pytest.mark.slow
def test_one_bucket_ahead() -> None:
    found = run()
    names = [op_name(n.target) for n in found.step.nodes() if phase(n) is Phase.FORWARD]
    starts = [i for i, name in enumerate(names) if name == GATHER]
    products = [i for i, name in enumerate(names) if name == "mm"]
    assert len(starts) == LAYERS // 2, "two layers a bucket"
    assert starts[1] < products[0] < starts[2] < products[2] < starts[3] < products[4]
    scattered = [t for t in found.transfers if t.operator == SCATTER]
    early = sum(t.sent for t in scattered if t.early)
    assert early > 0.7 * sum(t.sent for t in scattered)


def test_no_gather_lives_from_forward_to_backward() -> None:
    for dtype in ("float16", "float32"):
        step = run(dtype=dtype).step
        for node in step.nodes():
            if op_name(node.target) == "wait_tensor" and phase(node) is Phase.FORWARD:
                assert all(phase(user) is Phase.FORWARD for user in node.users), dtype


def test_a_table_is_sent_in_low_precision() -> None:
    sent = {t.bytes for t in run(table).transfers if t.phase == "forward" and t.dtype == "float16"}
    assert sent == {2 * (4096 * 64 + 8 * 64 + 8)}


@pytest.mark.slow
def test_rows_that_are_not_shared_evenly() -> None:
    step = run(lambda: deep(rows=15)).step
    parts = [n.meta["val"].shape[0] for n, shard in step.shards.items()]
    assert sorted(parts) == [2] + [WIDTH // RANKS] * (LAYERS - 1)
    step = run(lambda: deep(rows=5)).step
    assert [shard.whole for shard in step.shards.values()].count(True) == 1, "too few rows for every rank"
