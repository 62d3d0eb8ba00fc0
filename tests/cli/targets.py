"""Targets for the command line's tests: a good one, and one of every kind that goes wrong."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.support.graphs import training_step


def mlp() -> Any:
    """A linear layer with a norm and a softmax, one parameter without gradient."""
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Softmax(-1), nn.Linear(8, 2))
    unused = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([*model.parameters(), unused], lr=0.1)

    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step, (torch.randn(6, 4), torch.randn(6, 2))


def tiny() -> Any:
    """One weight and SGD: the least there is to compile."""
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.5)

    def step() -> None:
        weight.sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, ()


def mlp_48() -> Any:
    return mlp()[0], (torch.randn(48, 4), torch.randn(48, 2))


def keywords() -> Any:
    step, (x, y) = training_step()
    return step, (x,), {"y": y}


def breaks() -> Any:
    """A step that branches on its loss before the update."""
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(x: Tensor) -> Tensor:
        loss = model(x).sum()
        loss.backward()
        if loss.item() < 1e6:
            optimizer.step()
        return loss

    return step, (torch.randn(6, 4),)


def wrong_shape() -> Any:
    step, _ = training_step()
    return step, (torch.randn(6, 5), torch.randn(6, 2))


def trains_nothing() -> Any:
    return (lambda: None), ()


def needs_values() -> Any:
    """A model that reads a value while it is built, as drop path rates often are."""
    rates = [x.item() for x in torch.linspace(0, 0.1, 3)]
    step, args = training_step(nn.Sequential(nn.Linear(4, 2), nn.Dropout(rates[1])))
    return step, args


def on_cuda() -> Any:
    model = nn.Linear(4, 2).to("cuda")
    step, _ = training_step(model)
    return step, (torch.randn(6, 4, device="cuda"), torch.randn(6, 2).cuda())


def raises() -> Any:
    raise FileNotFoundError("data.csv is not here")


def returns_one() -> Any:
    return training_step()[0]


def returns_bad_step() -> Any:
    return 3, ()


def returns_bad_args() -> Any:
    step, (x, _) = training_step()
    return step, x


def returns_bad_kwargs() -> Any:
    step, args = training_step()
    return step, args, 3


not_a_function = 3
