"""Gradients averaged over ranks that are not there: what is sent, in which dtype, and when."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxpass._torch import fake_ranks
from fxpass.analysis.policy import op_name
from fxpass.hallway.dry_run import DryRun, dry_run

LAYERS, WIDTH, RANKS = 12, 64, 8
ELEMENTS = LAYERS * WIDTH * WIDTH


def deep() -> Any:
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=i % 2 == 0) for i in range(LAYERS)))
    optimizer = torch.optim.AdamW(model.parameters())

    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return step, (torch.randn(4, WIDTH),), {}


def words() -> Any:
    """A table that the policy computes the gradient of in float32."""
    table, last = nn.Embedding(5000, WIDTH), nn.Linear(WIDTH, 2)
    optimizer = torch.optim.SGD([*table.parameters(), *last.parameters()], lr=0.1)

    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        last(table(x)).square().mean().backward()
        optimizer.step()

    return step, (torch.arange(6),), {}


def run(make: Any = deep, **options: Any) -> DryRun:
    torch.compiler.reset()
    with fake_ranks(RANKS) as group:
        return dry_run(make, {"data_parallel": group, **options})


@pytest.mark.slow
def test_weights_are_sent_as_they_are_stored() -> None:
    found = run()
    weights = [t for t in found.transfers if t.dtype == "float16"]
    biases = [t for t in found.transfers if t.dtype == "float32"]
    assert sum(t.bytes for t in weights) == 2 * ELEMENTS
    assert sum(t.bytes for t in biases) == 4 * WIDTH * LAYERS // 2
    assert len(weights) == len(biases) == 1, "one bucket of each dtype"
    assert weights[0].sent == 2 * (RANKS - 1) * weights[0].bytes // RANKS
    assert weights[0].formula == f"{4 * ELEMENTS}*(N - 1)/N"


def test_the_gradient_of_a_table_is_sent_as_it_is_stored() -> None:
    assert {(t.dtype, t.bytes) for t in run(words).transfers} >= {("float16", 2 * 5000 * WIDTH + 4 * WIDTH)}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_sent_in_other_dtypes(dtype: str) -> None:
    sent = {t.dtype: t.bytes for t in run(dtype=dtype).transfers}
    assert sent[dtype] >= (4 if dtype == "float32" else 2) * ELEMENTS


@pytest.mark.slow
def test_reduce_dtype() -> None:
    assert {t.dtype for t in run(reduce_dtype="float32").transfers} == {"float32"}


def test_most_is_on_its_way_before_the_backward_ends() -> None:
    found = run(bucket_mb=0.01)
    sent = sum(t.sent for t in found.transfers)
    assert sum(t.sent for t in found.transfers if t.early) > 0.8 * sent
    meanwhile = [t.products for t in found.transfers if t.dtype == "float16"]
    assert meanwhile == sorted(meanwhile, reverse=True)
    assert meanwhile[0] > LAYERS


def test_an_update_waits_for_the_mean() -> None:
    names = [op_name(node.target) for node in run().step.graph.nodes if node.op == "call_function"]
    assert names.count("all_reduce") == names.count("wait_tensor") == 2
    assert "average" not in names
    assert names.index("wait_tensor") < names.index("copy_")


@pytest.mark.slow
def test_one_process_sends_nothing() -> None:
    torch.compiler.reset()
    assert dry_run(deep, {}).transfers == ()
