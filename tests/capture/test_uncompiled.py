"""Never eager behind the user's back: a backward that would run uncompiled raises, with a way out."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from fxpass import CaptureError, MixedPrecision
from tests.support.helpers import EAGER, FP32, Training, batches, clone, compare, same

Step = Callable[..., Any]


def _net() -> nn.Module:
    """A model of torch's own modules, none of whose frames Dynamo compiles by itself."""
    return nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


@contextlib.contextmanager
def _block() -> Iterator[None]:
    yield


def _break_in_a_loop(net: nn.Module, opt: Any) -> Step:
    def step(x: Tensor, y: Tensor) -> None:
        for a, b in zip(x.chunk(2), y.chunk(2), strict=True):
            opt.zero_grad()
            loss = mse_loss(net(a), b)
            open(os.devnull).close()  # HERE
            loss.backward()
            opt.step()

    return step


def _break_after_the_update(net: nn.Module, opt: Any) -> Step:
    def step(x: Tensor, y: Tensor) -> None:
        for a, b in zip(x.chunk(2), y.chunk(2), strict=True):
            opt.zero_grad()
            mse_loss(net(a), b).backward()
            opt.step()
            open(os.devnull).close()  # HERE

    return step


def _break_before_a_branch(net: nn.Module, opt: Any) -> Step:
    def step(x: Tensor, y: Tensor) -> None:
        for a, b in zip(x.chunk(2), y.chunk(2), strict=True):
            opt.zero_grad()
            loss = mse_loss(net(a), b)
            if loss > 100:  # HERE
                continue
            loss.backward()
            opt.step()

    return step


def _break_in_a_loop_before(net: nn.Module, opt: Any) -> Step:
    def step(x: Tensor, y: Tensor) -> None:
        for _ in range(2):
            open(os.devnull).close()  # HERE
        opt.zero_grad()
        mse_loss(net(x), y).backward()
        opt.step()

    return step


def _break_in_a_try(net: nn.Module, opt: Any) -> Step:
    def step(x: Tensor, y: Tensor) -> None:
        try:
            opt.zero_grad()
            mse_loss(net(x), y).backward()
            open(os.devnull).close()  # HERE
            opt.step()
        finally:
            opt.zero_grad()

    return step


def _break_in_a_block(net: nn.Module, opt: Any) -> Step:
    def step(x: Tensor, y: Tensor) -> None:
        x = x * 1
        with _block():
            open(os.devnull).close()  # HERE
            opt.zero_grad()
            mse_loss(net(x), y).backward()
            opt.step()

    return step


def _disabled(net: nn.Module, opt: Any) -> Step:
    @torch.compiler.disable
    def body(x: Tensor, y: Tensor) -> None:
        opt.zero_grad()
        mse_loss(net(x), y).backward()  # HERE
        opt.step()

    def step(x: Tensor, y: Tensor) -> None:
        body(x, y)

    return step


@pytest.mark.breadth(2)
@pytest.mark.parametrize(
    "form",
    [
        _break_in_a_loop,
        _break_after_the_update,
        _break_before_a_branch,
        _break_in_a_loop_before,
        _break_in_a_try,
        _break_in_a_block,
        _disabled,
    ],
)
def test_it_raises_before_anything_has_run(form: Callable[[nn.Module, Any], Step]) -> None:
    net = _net()
    opt = torch.optim.AdamW(net.parameters(), lr=0.1)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    before = clone([net.state_dict(), [p.grad for p in net.parameters()], torch.get_rng_state()])
    mp = MixedPrecision(**FP32, max_norm=0.01)
    with pytest.raises(CaptureError) as error:
        torch.compile(form(net, opt), backend=mp)(*batches(1)[0])
    assert "test_uncompiled.py" in error.value.where
    line = int(error.value.where.split(":")[1].split()[0])
    with open(__file__) as file:
        assert "# HERE" in file.read().splitlines()[line - 1]
    after = [net.state_dict(), [p.grad for p in net.parameters()], torch.get_rng_state()]
    same(after, before, "state", exact=True)
    assert not opt.state
    assert error.value.hint


def test_what_may_not_train_runs() -> None:
    """A break in a loop of an evaluation, with the training of another call behind a condition."""
    net = _net()
    opt = torch.optim.SGD(net.parameters(), lr=0.1)

    @torch.compile(backend=MixedPrecision(**EAGER))
    def evaluate(x: Tensor, y: Tensor, train: bool = False) -> Tensor:
        loss = x.sum()
        for a, b in zip(x.chunk(2), y.chunk(2), strict=True):
            open(os.devnull).close()
            with torch.set_grad_enabled(train):
                loss = mse_loss(net(a), b)
        if train:
            loss.backward()
            opt.step()
        return loss

    x, y = batches(1)[0]
    net.eval()
    same(evaluate(x, y), mse_loss(net(x.chunk(2)[1]), y.chunk(2)[1]).detach(), "loss")


def _metric(outputs: Any) -> float:
    """Its second line is one that Dynamo's own code fails on; scikit-learn's metrics come to it."""
    open(os.devnull).close()
    inspect.getattr_static(_net(), "training", None)
    return float(outputs.mean())


def test_a_metric_behind_the_update_that_tracing_fails_on() -> None:
    def build() -> Training:
        net = _net()
        opt = torch.optim.SGD(net.parameters(), lr=0.1)

        def step(x: Tensor, y: Tensor) -> float:
            out = net(x)
            opt.zero_grad()
            mse_loss(out, y).backward()
            opt.step()
            return _metric(out.detach().numpy())

        return Training(step, [net], [opt])

    compare(build, graphs=3, handle=MixedPrecision(**EAGER))


def test_a_loop_around_a_step_that_is_a_function() -> None:
    def form(net: nn.Module, opt: Any) -> Step:
        def one(x: Tensor, y: Tensor) -> None:
            opt.zero_grad()
            mse_loss(net(x), y).backward()
            opt.step()

        def step(x: Tensor, y: Tensor) -> None:
            for a, b in zip(x.chunk(2), y.chunk(2), strict=True):
                open(os.devnull).close()
                one(a, b)

        return step

    compare(_training(form, lambda step: step), steps=2, handle=MixedPrecision(**EAGER))


def _training(form: Callable[[nn.Module, Any], Step], make: Callable[[Step], Step]) -> Callable[[], Training]:
    def build() -> Training:
        net = _net()
        opt = torch.optim.AdamW(net.parameters(), lr=0.1)
        return Training(make(form(net, opt)), [net], [opt])

    return build


def test_advice_what_breaks_it_out_of_the_loop() -> None:
    def form(net: nn.Module, opt: Any) -> Step:
        def step(x: Tensor, y: Tensor) -> float:
            losses = []
            for a, b in zip(x.chunk(2), y.chunk(2), strict=True):
                opt.zero_grad()
                loss = mse_loss(net(a), b)
                loss.backward()
                opt.step()
                losses.append(loss.detach())
            return torch.stack(losses).sum().item()

        return step

    compare(_training(form, lambda step: step), handle=MixedPrecision(**EAGER))


def test_advice_what_stands_in_the_loop_as_a_function_of_its_own() -> None:
    mp = MixedPrecision(**EAGER)
    net = _net()
    opt = torch.optim.AdamW(net.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(opt)

    @torch.compile(backend=mp)
    def step(x: Tensor, y: Tensor) -> Tensor:
        opt.zero_grad()
        loss = mse_loss(net(x), y)
        loss.backward()
        opt.step()
        return loss

    for x, y in batches(3):
        print(step(x, y).item(), end="")
        scheduler.step()
    assert mp.stats().steps == 3


def test_a_stance_of_the_users_is_respected() -> None:
    net = _net()
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    mp = MixedPrecision(**EAGER)
    step = torch.compile(_disabled(net, opt), backend=mp)
    with torch.compiler.set_stance("force_eager"):
        step(*batches(1)[0])
    assert mp.stats().steps == 0


def test_training_elsewhere_is_none_of_our_business() -> None:
    net = _net()
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    _disabled(net, opt)(*batches(1)[0])
    model = torch.compile(net, backend="aot_eager")
    mse_loss(model(batches(1)[0][0]), batches(1)[0][1]).backward()
    assert net[0].weight.grad is not None  # pyrefly: ignore[bad-index]


@pytest.mark.parametrize("several", [False, True])
def test_torch_autograd_backward_is_a_backward(several: bool) -> None:
    def form(net: nn.Module, opt: Any) -> Step:
        def step(x: Tensor, y: Tensor) -> Tensor:
            opt.zero_grad()
            out = net(x)
            loss = mse_loss(out, y)
            torch.autograd.backward([loss, out.square().mean()] if several else loss)
            opt.step()
            return loss

        return step

    compare(_training(form, lambda step: step), handle=MixedPrecision(**EAGER))


def test_a_loss_is_returned_after_retain_graph() -> None:
    def form(net: nn.Module, opt: Any) -> Step:
        def step(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            opt.zero_grad()
            out = net(x)
            loss = mse_loss(out, y)
            loss.backward(retain_graph=True)
            opt.step()
            return loss, out

        return step

    compare(_training(form, lambda step: step), handle=MixedPrecision(**EAGER))
