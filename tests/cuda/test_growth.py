"""What a step launches beyond forward and backward grows by less than one launch a parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.models import GPT, GPTConfig, token_batches
from fxpass.hallway.dry_run import dry_run
from tests.cuda.budgets import CLIP, GROWTH


def beyond(layers: int) -> tuple[int, int]:
    """Parameters of a GPT, and launches for its update, its loss scale and what passes alone asked for."""
    batch = token_batches(1, 16, vocab=32, context=8)[0]
    count = 0

    def make() -> Any:
        nonlocal count
        model = GPT(GPTConfig(width=16, layers=layers, heads=2, vocab=32, context=8))
        optimizer = torch.optim.AdamW(model.parameters())
        count = len(list(model.parameters()))

        def step(x: torch.Tensor, y: torch.Tensor) -> None:
            model(x, y).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step, tuple(t.cuda() for t in batch), {}

    torch.compiler.reset()
    run = dry_run(make, CLIP, device="cuda", tensors="real", of="program")
    assert (run.device, run.memory_of) == ("cuda", "program")
    # "" stands for the step's own: forward, backward and the optimizer
    launched = [m for m in run.memory.moments if m.phase in ("update", "scale") or "" not in m.made_by]
    return count, len(launched)


@pytest.mark.slow
def test_growth() -> None:
    (few, before), (many, after) = beyond(1), beyond(2)
    assert many == few + 12
    assert 0 < after - before < GROWTH * (many - few)
