"""Steps as people write them: each is one graph and equals eager, parameters, buffers and outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from fxpass import CaptureError, FxpassError, MixedPrecision, OptimizerError
from tests.helpers import Mlp, Training, clone, compare, same


def train(step_of: Callable[..., Any], model: nn.Module | None = None) -> Callable[[], Training]:
    def build() -> Training:
        net = Mlp() if model is None else model
        opt = torch.optim.AdamW(net.parameters(), lr=0.01)
        return Training(step_of(net, opt), [net], [opt])

    return build


@dataclass
class Metrics:
    loss: Tensor
    count: int


def _first(net: nn.Module, opt: Any) -> Any:
    def step(x: Tensor, y: Tensor) -> Tensor:
        opt.zero_grad()
        loss = mse_loss(net(x), y)
        loss.backward()
        opt.step()
        return loss

    return step


def _last(net: nn.Module, opt: Any) -> Any:
    def step(x: Tensor, y: Tensor) -> dict[str, Any]:
        loss = mse_loss(net(x), y)
        loss.backward()
        opt.step()
        opt.zero_grad(set_to_none=False)
        return {"loss": loss, "rows": x.shape[0]}

    return step


def _model_zero_grad(net: nn.Module, opt: Any) -> Any:
    def step(x: Tensor, y: Tensor) -> Metrics:
        net.zero_grad()
        out = net(x)
        loss = mse_loss(out, y)
        loss.backward()
        opt.step()
        return Metrics(loss, 1)

    return step


def _nothing(net: nn.Module, opt: Any) -> Any:
    def step(x: Tensor, y: Tensor) -> None:
        opt.zero_grad(set_to_none=True)
        mse_loss(net(x), y).backward()
        opt.step()

    return step


def _accumulate(net: nn.Module, opt: Any) -> Any:
    def step(x: Tensor, y: Tensor) -> Tensor:
        opt.zero_grad()
        total = torch.zeros(())
        for a, b in zip(x.chunk(3), y.chunk(3), strict=True):
            loss = mse_loss(net(a), b) / 3
            loss.backward()
            total = total + loss.detach()
        opt.step()
        return total

    return step


def _two_losses(net: nn.Module, opt: Any) -> Any:
    def step(x: Tensor, y: Tensor) -> Tensor:
        opt.zero_grad()
        out = net(x)
        mse_loss(out, y).backward(retain_graph=True)
        out.abs().backward(gradient=torch.full_like(out, 0.1))
        opt.step()
        return out

    return step


def _user_clip(net: nn.Module, opt: Any) -> Any:
    def step(x: Tensor, y: Tensor) -> Tensor:
        opt.zero_grad()
        mse_loss(net(x), y).backward()
        norm = nn.utils.clip_grad_norm_(net.parameters(), 0.05)
        nn.utils.clip_grad_value_(net.parameters(), 0.01)
        opt.step()
        return norm

    return step


def _edits_grad(net: nn.Module, opt: Any) -> Any:
    def step(x: Tensor, y: Tensor) -> Tensor:
        opt.zero_grad()
        mse_loss(net(x), y).backward()
        for p in net.parameters():
            if p.grad is not None:
                p.grad.mul_(0.5)
        opt.step()
        return net.first.weight.grad.norm()

    return step


def _item_after(net: nn.Module, opt: Any) -> Any:
    def step(x: Tensor, y: Tensor) -> float:
        opt.zero_grad()
        loss = mse_loss(net(x), y)
        loss.backward()
        opt.step()
        return loss.item()

    return step


def _no_grad_block(net: nn.Module, opt: Any) -> Any:
    def step(x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            target = net(x).tanh() + y
        opt.zero_grad()
        loss = mse_loss(net(x), target)
        loss.backward()
        opt.step()
        return loss

    return step


FORMS = [
    _first,
    _last,
    _model_zero_grad,
    _nothing,
    _accumulate,
    _two_losses,
    _user_clip,
    _item_after,
    _no_grad_block,
]


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.__name__[1:])
@pytest.mark.parametrize("keep", [False, True], ids=["drop", "keep"])
def test_form(form: Any, keep: bool) -> None:
    # a gradient that zero_grad(set_to_none=False) left is read by the next call: another graph
    compare(train(form), grads=keep, graphs=2 if keep and form is _last else 1)


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
        return Training(_first(net, opt), [net], [opt])

    mp = compare(build)
    assert mp.graphs[0].unreached == {
        "frozen.weight": "requires_grad is False",
        "unused.weight": "the loss does not depend on it",
        "unused.bias": "the loss does not depend on it",
    }


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


# ---------------------------------------------------------------- what cannot be captured


def _item_between(net: nn.Module, opt: Any) -> Any:
    def step(x: Tensor, y: Tensor) -> None:
        loss = mse_loss(net(x), y)
        loss.backward()
        print(loss.item())  # HERE
        opt.step()

    return step


def _item_in_forward(net: nn.Module, opt: Any) -> Any:
    def step(x: Tensor, y: Tensor) -> None:
        loss = mse_loss(net(x), y)
        if loss.item() > 0:  # HERE
            loss.backward()
        opt.step()

    return step


def _no_step(net: nn.Module, opt: Any) -> Any:
    def step(x: Tensor, y: Tensor) -> None:
        mse_loss(net(x), y).backward()  # HERE

    return step


def _no_backward(net: nn.Module, opt: Any) -> Any:
    def step(x: Tensor, y: Tensor) -> None:
        opt.step()  # HERE

    return step


def _scaler(net: nn.Module, opt: Any) -> Any:
    scaler = torch.amp.GradScaler("cpu")

    def step(x: Tensor, y: Tensor) -> None:
        loss = mse_loss(net(x), y)
        scaler.scale(loss).backward()  # HERE
        scaler.step(opt)
        scaler.update()

    return step


def _create_graph(net: nn.Module, opt: Any) -> Any:
    def step(x: Tensor, y: Tensor) -> None:
        mse_loss(net(x), y).backward(create_graph=True)  # HERE
        opt.step()

    return step


ERRORS = [
    (_item_between, CaptureError, "without an optimizer step"),
    (_item_in_forward, CaptureError, "still need a backward"),
    (_no_step, CaptureError, "without an optimizer step"),
    (_no_backward, CaptureError, "no gradient"),
    (_scaler, OptimizerError, "GradScaler"),
    (_create_graph, OptimizerError, "create_graph"),
]


@pytest.mark.parametrize(("form", "kind", "message"), ERRORS, ids=lambda v: getattr(v, "__name__", "")[1:])
@pytest.mark.parametrize("fullgraph", [False, True])
def test_error(form: Any, kind: type[FxpassError], message: str, fullgraph: bool) -> None:
    net = Mlp()
    opt = torch.optim.AdamW(net.parameters(), lr=0.01)
    for p in net.parameters():
        p.grad = torch.ones_like(p) if form is _no_step else None
    before = clone([dict(net.named_parameters()), {n: p.grad for n, p in net.named_parameters()}])
    step = torch.compile(form(net, opt), backend=MixedPrecision(codegen="eager"), fullgraph=fullgraph)
    if fullgraph and form in (_item_between, _item_in_forward):
        with pytest.raises(Exception, match="item"):  # Dynamo's own message names the line
            step(torch.randn(6, 4), torch.randn(6, 2))
        return
    with pytest.raises(kind, match=message) as error:
        step(torch.randn(6, 4), torch.randn(6, 2))
    assert "test_steps.py:" in str(error.value)
    assert "HERE" in str(error.value)
    assert "to do:" in str(error.value)
    after = clone([dict(net.named_parameters()), {n: p.grad for n, p in net.named_parameters()}])
    same(after, before, "parameters and gradients", exact=True)
    assert not opt.state


def test_sparse_gradients() -> None:
    table = nn.Embedding(10, 4, sparse=True)
    opt = torch.optim.SGD(table.parameters(), lr=0.1)

    @torch.compile(backend=MixedPrecision(codegen="eager"))
    def step(ids: Tensor) -> None:
        table(ids).sum().backward()
        opt.step()

    with pytest.raises(CaptureError, match="sparse=True"):
        step(torch.tensor([1, 2]))


# ---------------------------------------------------------------- neighbours


def test_other_compilations_do_not_notice() -> None:
    net = Mlp()
    opt = torch.optim.AdamW(net.parameters(), lr=0.01)
    step = torch.compile(_first(net, opt), backend=MixedPrecision(codegen="eager"))
    step(torch.randn(6, 4), torch.randn(6, 2))
    with pytest.raises(CaptureError):
        torch.compile(net, backend=MixedPrecision(codegen="eager"))(torch.randn(6, 4))

    other = torch.compile(net, backend="aot_eager")
    loss = mse_loss(other(x := torch.randn(6, 4)), y := torch.randn(6, 2))
    loss.backward()
    torch.compile(opt.step, backend="eager")()
    opt.zero_grad()
    step(x, y)  # the optimizer compiled alone marked parameters as static
    assert all(p.grad is None for p in net.parameters())
