"""``fxpass.step``: a compiled step for loops that are not functions."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import fxpass
from tests.support.helpers import Mlp, same


def loss_fn(model: nn.Module, x: Tensor, y: Tensor, weight: float = 1.0) -> Tensor:
    return weight * mse_loss(model(x), y)


def pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = Mlp()
    return model, copy.deepcopy(model)


@pytest.mark.parametrize("options", [{}, {"codegen": "eager"}])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_as_the_loop_in_eager(accumulate: int, options: dict[str, Any]) -> None:
    ours, theirs = pair()
    opt, their_opt = (torch.optim.AdamW(m.parameters(), lr=0.01) for m in (ours, theirs))
    train = fxpass.step(
        ours, opt, loss_fn, accumulate=accumulate, dtype="float32", loss_scale=None, **options
    )
    batches = [(torch.randn(6, 4), torch.randn(6, 2)) for _ in range(2 * accumulate)]
    updates, total = 0, 0.0
    for number, (x, y) in enumerate(batches, 1):
        loss = train(x, y=y, weight=0.5)
        part = loss_fn(theirs, x, y, weight=0.5) / accumulate
        part.backward()
        total = total + part.detach()
        if number % accumulate:
            assert loss is None
            assert train.waiting == number % accumulate
            continue
        their_opt.step()
        their_opt.zero_grad()
        same(loss, total, "loss")
        updates, total = updates + 1, 0.0
    same(dict(ours.named_parameters()), dict(theirs.named_parameters()), "parameters")
    assert fxpass.of(train).stats().steps == updates == 2
    assert len(fxpass.of(train).graphs) == 1


def test_the_rest_of_an_epoch() -> None:
    ours, theirs = pair()
    opt, their_opt = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (ours, theirs))
    train = fxpass.step(ours, opt, loss_fn, accumulate=4, dtype="float32", loss_scale=None, codegen="eager")
    x, y = torch.randn(6, 4), torch.randn(6, 2)
    assert train(x, y) is None
    assert train(x, y) is None
    same(train.flush(), loss_fn(theirs, x, y).detach(), "loss")
    loss_fn(theirs, x, y).backward()
    their_opt.step()
    same(dict(ours.named_parameters()), dict(theirs.named_parameters()), "parameters")
    assert train.flush() is None
    assert train.handle.stats().steps == 1


def test_several_optimizers_and_the_default_options() -> None:
    ours, _ = pair()
    weights, biases = ([p for p in ours.parameters() if p.ndim == n] for n in (2, 1))
    both = [torch.optim.SGD(weights, lr=0.1), torch.optim.Adam(biases, lr=0.01)]
    train = fxpass.step(ours, both, loss_fn, max_norm=1.0, loss_scale=256.0)
    x, y = torch.randn(6, 4), torch.randn(6, 2)
    losses = [float(loss) for _ in range(8) if (loss := train(x, y)) is not None]
    assert losses[-1] < losses[0]
    assert (train.handle.stats().steps, train.handle.stats().skipped) == (8, 0)


@pytest.mark.parametrize("accumulate", [0, 1.5])
def test_refused(accumulate: Any) -> None:
    model, _ = pair()
    with pytest.raises(fxpass.OptionError, match="accumulate="):
        fxpass.step(model, torch.optim.SGD(model.parameters()), loss_fn, accumulate=accumulate)
    with pytest.raises(fxpass.OptionError, match="max_norm"):
        fxpass.step(model, torch.optim.SGD(model.parameters()), loss_fn, max_nrm=1.0)
