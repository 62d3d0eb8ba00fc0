"""Steps beside the forms of tests/capture/test_forms.py: models, objects, averages, evaluations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from fxpass import CaptureError, MixedPrecision
from tests.support.helpers import Mlp, Training, clone, compare, same


def train(step_of: Callable[..., Any], model: nn.Module | None = None) -> Callable[[], Training]:
    def build() -> Training:
        net = Mlp() if model is None else model
        opt = torch.optim.AdamW(net.parameters(), lr=0.01)
        return Training(step_of(net, opt), [net], [opt])

    return build


def _edits_grad(net: Any, opt: Any) -> Any:
    def step(x: Tensor, y: Tensor) -> Tensor:
        opt.zero_grad()
        mse_loss(net(x), y).backward()
        for p in net.parameters():
            if p.grad is not None:
                p.grad.mul_(0.5)
        opt.step()
        return net.first.weight.grad.norm()

    return step


def test_edits_of_gradients() -> None:
    compare(train(_edits_grad))


def test_batchnorm_dropout_free_frozen_tied_and_unreached() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4, bias=False)  # before a norm its gradient is rounding noise
            self.norm = nn.BatchNorm1d(4)
            self.tied = nn.Linear(4, 4)
            self.tied.weight = self.first.weight
            self.frozen = nn.Linear(4, 2)
            self.frozen.weight.requires_grad_(False)
            self.unused = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.frozen(self.tied(torch.relu(self.norm(self.first(x)))))

    def build() -> Training:
        net = Odd()
        net.frozen.weight.grad = torch.ones_like(net.frozen.weight)  # stale: must neither move it nor leak
        opt = torch.optim.AdamW(net.parameters(), lr=0.01)

        def step(x: Tensor, y: Tensor) -> Tensor:
            opt.zero_grad()
            loss = mse_loss(net(x), y)
            loss.backward()
            opt.step()
            return loss

        return Training(step, [net], [opt])

    mp = compare(build)
    assert mp.graphs[0].unreached == {
        "frozen.weight": "requires_grad is False",
        "unused.weight": "the loss does not depend on it",
        "unused.bias": "the loss does not depend on it",
    }


@pytest.mark.slow
def test_trainer_object_and_kwargs() -> None:
    class Trainer:
        def __init__(self) -> None:
            self.net = Mlp()
            self.opt = torch.optim.AdamW(self.net.parameters(), lr=0.01)

        def step(self, batch: dict[str, Any], *, scale: float = 1.0) -> Tensor:
            self.opt.zero_grad()
            loss = mse_loss(self.net(batch["x"]), batch["pair"][1]) * scale
            loss.backward()
            self.opt.step()
            return loss

    def build() -> Training:
        trainer = Trainer()
        calls = [({"x": torch.randn(6, 4), "pair": (0, torch.randn(6, 2))},) for _ in range(3)]
        return Training(trainer.step, [trainer.net], [trainer.opt], calls, {"scale": 2.0})

    compare(build)


def test_model_and_optimizer_as_arguments() -> None:
    def build() -> Training:
        net = Mlp()
        opt = torch.optim.AdamW(net.parameters(), lr=0.01)

        def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss = mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            return loss

        calls = [(net, opt, torch.randn(6, 4), torch.randn(6, 2)) for _ in range(3)]
        return Training(step, [net], [opt], calls)

    compare(build)


def test_an_ema_follows_eager_and_sees_old_parameters_on_a_skip() -> None:
    net = Mlp()
    average = Mlp()
    average.load_state_dict(net.state_dict())
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    mp = MixedPrecision(codegen="eager")

    @torch.compile(backend=mp)
    def step(x: Tensor) -> None:
        opt.zero_grad()
        net(x).square().mean().backward()
        opt.step()
        with torch.no_grad():
            for a, p in zip(average.parameters(), net.parameters(), strict=True):
                a.lerp_(p, 0.5)

    step(torch.randn(6, 4))
    before = clone(dict(net.named_parameters()))
    expected = {n: a.detach().lerp(before[n], 0.5) for n, a in average.named_parameters()}
    step(torch.full((6, 4), float("inf")))
    same(dict(net.named_parameters()), before, "parameters", exact=True)
    same(dict(average.named_parameters()), expected, "average")


def test_evaluation_is_compiled_and_needs_no_grad() -> None:
    net = Mlp()
    mp = MixedPrecision(codegen="eager")
    evaluate = torch.compile(lambda x: net(x).argmax(1), backend=mp)
    with torch.no_grad():
        assert torch.equal(evaluate(x := torch.randn(6, 4)), net(x).argmax(1))
    assert "f16" in mp.graphs[0].after
    forward = torch.compile(net, backend=MixedPrecision(codegen="eager"))
    with pytest.raises(CaptureError, match="compile the whole step"):
        forward(torch.randn(6, 4))
