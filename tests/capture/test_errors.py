"""What cannot be captured says what was found, where and what to do, and leaves everything as it was."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import fxpass
from fxpass import CaptureError, FxpassError, MixedPrecision, OptimizerError
from tests.steps.test_forms import _first, train
from tests.support.helpers import FP32, Mlp, batches, clone, compare, dynamo_settings, same

Step = Callable[..., Any]


def _break_between(net: Mlp, opt: Any) -> Step:
    def step(x: Tensor, y: Tensor) -> None:
        opt.zero_grad()
        mse_loss(net(x), y).backward()
        open(os.devnull).close()  # HERE
        opt.step()

    return step


def _branch_in_forward(net: Mlp, opt: Any) -> Step:
    def step(x: Tensor, y: Tensor) -> None:
        loss = mse_loss(net(x), y)
        if loss.item() > 0:  # HERE
            loss.backward()
        opt.step()

    return step


def _break_in_a_loop(net: Mlp, opt: Any) -> Step:
    def step(x: Tensor, y: Tensor) -> None:
        for _ in net.first.parameters():
            open(os.devnull).close()  # HERE
        mse_loss(net(x), y).backward()
        opt.step()

    return step


def _no_step(net: Mlp, opt: Any) -> Step:
    def step(x: Tensor, y: Tensor) -> None:
        mse_loss(net(x), y).backward()  # HERE

    return step


def _no_backward(net: Mlp, opt: Any) -> Step:
    def step(x: Tensor, y: Tensor) -> None:
        opt.step()  # HERE

    return step


def _other_loss_kept(net: Mlp, opt: Any) -> Step:
    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = mse_loss(net(x), y)
        loss.backward()  # HERE
        opt.step()
        return net(x).mean()

    return step


def _scaler(net: Mlp, opt: Any) -> Step:
    scaler = torch.amp.GradScaler("cpu")

    def step(x: Tensor, y: Tensor) -> None:
        loss = mse_loss(net(x), y)
        scaler.scale(loss).backward()  # HERE
        scaler.step(opt)
        scaler.update()

    return step


def _closure(net: Mlp, opt: Any) -> Step:
    def step(x: Tensor, y: Tensor) -> None:
        loss = mse_loss(net(x), y)
        loss.backward()
        opt.step(lambda: loss)  # HERE

    return step


ERRORS = [
    (_break_between, CaptureError, "without an optimizer step"),
    (_branch_in_forward, CaptureError, "still need a backward"),
    (_break_in_a_loop, CaptureError, "the graph breaks before"),
    (_no_step, CaptureError, "without an optimizer step"),
    (_no_backward, CaptureError, "no gradient"),
    (_other_loss_kept, CaptureError, "no backward"),
    (_scaler, OptimizerError, "GradScaler"),
    (_closure, OptimizerError, "closure"),
]
BREAKS = (_break_between, _branch_in_forward, _break_in_a_loop)


@pytest.mark.parametrize(("form", "kind", "message"), ERRORS, ids=lambda v: getattr(v, "__name__", "")[1:])
@pytest.mark.parametrize("fullgraph", [False, True], ids=["", "fullgraph"])
def test_error(form: Any, kind: type[FxpassError], message: str, fullgraph: bool) -> None:
    net = Mlp()
    opt = torch.optim.AdamW(net.parameters(), lr=0.01)
    if form is not _no_backward:
        for p in net.last.parameters():
            p.grad = torch.ones_like(p)
    before, config = _state(net), dynamo_settings()
    step = torch.compile(form(net, opt), backend=MixedPrecision(codegen="eager"), fullgraph=fullgraph)
    # what breaks a full graph is Dynamo's own error, which names the line
    expected = Exception if fullgraph and form in BREAKS else kind
    with pytest.raises(expected) as error:
        step(*batches(1)[0])
    assert "HERE" in str(error.value)
    if expected is kind:
        assert message in str(error.value)
        assert "test_errors.py:" in str(error.value)
        assert "to do:" in str(error.value)
    net.requires_grad_(True)
    same(_state(net), before, "parameters and gradients", exact=True)
    assert not opt.state
    assert dynamo_settings() == config


def _state(net: nn.Module) -> Any:
    return clone([dict(net.named_parameters()), {n: p.grad for n, p in net.named_parameters()}])


def test_a_loss_that_reaches_no_parameter() -> None:
    net = Mlp().requires_grad_(False)
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    step = torch.compile(_first(net, opt), backend=MixedPrecision(codegen="eager"))
    with pytest.raises(CaptureError, match="reached no parameter"):
        step(*batches(1)[0])
    weight = nn.Parameter(torch.ones(4))

    @torch.compile(backend=MixedPrecision(codegen="eager"))
    def other(x: Tensor) -> None:
        (x * weight).sum().backward()
        opt.step()

    with pytest.raises(CaptureError, match="no gradient"):
        other(torch.ones(4))
    assert weight.grad is None


def test_only_the_model_is_compiled() -> None:
    net = torch.compile(Mlp(), backend=MixedPrecision(codegen="eager"))
    with pytest.raises(CaptureError, match="compile the whole step"):
        net(torch.randn(6, 4))
    with torch.no_grad():
        net(torch.randn(6, 4))


def test_sparse_gradients() -> None:
    table = nn.Embedding(10, 4, sparse=True)
    opt = torch.optim.SGD(table.parameters(), lr=0.1)

    @torch.compile(backend=MixedPrecision(codegen="eager"))
    def step(ids: Tensor) -> None:
        table(ids).sum().backward()
        opt.step()

    with pytest.raises(CaptureError, match="sparse=True") as error:
        step(torch.tensor([1, 2]))
    assert "table(ids)" in str(error.value)


def test_a_step_works_after_another_one_failed() -> None:
    net = Mlp()
    opt = torch.optim.AdamW(net.parameters(), lr=0.01)
    with pytest.raises(CaptureError):
        torch.compile(_no_step(net, opt), backend=MixedPrecision(codegen="eager"))(*batches(1)[0])
    compare(train(_first))


# ---------------------------------------------------------------- handles and neighbours


@pytest.mark.parametrize("fullgraph", [False, True])
def test_the_string_backend_has_a_handle_per_compilation(fullgraph: bool) -> None:
    function = _first(net := Mlp(), torch.optim.SGD(net.parameters(), lr=0.1))
    options: Any = {"codegen": "eager"}
    one = torch.compile(function, backend="mixedprec", options=options, fullgraph=fullgraph)
    two = torch.compile(function, backend="mixedprec", options={**options, "loss_scale": 8.0})  # pyrefly: ignore[no-matching-overload]
    three = torch.compile(function, backend="mixedprec", options=options)
    for step, runs in ((one, 3), (two, 2), (three, 1)):
        for batch in batches(runs):
            step(*batch)
    handles = [fxpass.of(step) for step in (one, two, three)]
    assert [mp.stats().steps for mp in handles] == [3, 2, 1]
    assert [len(mp.graphs) for mp in handles] == [1, 1, 1]
    assert float(handles[1].scale) == 8.0
    assert fxpass.of(one) is handles[0]


def test_a_handle_before_the_first_call_and_of_a_method() -> None:
    class Trainer:
        def __init__(self) -> None:
            self.net = Mlp()
            self.opt = torch.optim.SGD(self.net.parameters(), lr=0.1)

        @torch.compile(backend="mixedprec", options={"codegen": "eager"})
        def step(self, x: Tensor, y: Tensor) -> None:
            mse_loss(self.net(x), y).backward()
            self.opt.step()

    mp = fxpass.of(Trainer.step)
    trainer = Trainer()
    trainer.step(*batches(1)[0])
    assert fxpass.of(trainer.step) is mp
    assert mp.stats().steps == 1


def test_other_compilations_do_not_notice() -> None:
    net = Mlp()
    opt = torch.optim.AdamW(net.parameters(), lr=0.01)
    mp = MixedPrecision(codegen="eager")
    config = dynamo_settings()
    step = torch.compile(_first(net, opt), backend=mp)
    step(*batches(1)[0])
    with pytest.raises(CaptureError):
        torch.compile(net, backend=MixedPrecision(codegen="eager"))(torch.randn(6, 4))
    assert dynamo_settings() == config

    for backend in ("eager", "aot_eager"):
        other = torch.compile(net, backend=backend)
        opt.zero_grad()
        x, y = batches(1)[0]
        mse_loss(other(x), y).backward()
        compiled = {n: p.grad for n, p in net.named_parameters()}
        opt.zero_grad()
        mse_loss(net(x), y).backward()
        same(compiled, {n: p.grad for n, p in net.named_parameters()}, "gradients")
        torch.compile(opt.step, backend=backend)()
    opt.zero_grad()
    step(*batches(1)[0])  # the optimizer compiled alone marked parameters as static
    assert all(p.grad is None for p in net.parameters())
    assert mp.stats().steps == 2


@pytest.mark.slow
def test_parameters_marked_static_before_the_first_compilation() -> None:
    net = Mlp()
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    x, y = batches(1)[0]
    mse_loss(net(x), y).backward()
    torch.compile(opt.step, backend="eager")()
    before = clone(dict(net.named_parameters()))
    opt.zero_grad()
    mp = MixedPrecision(**FP32)
    torch.compile(_first(net, opt), backend=mp)(x, y)
    assert not mp.graphs[0].unreached
    assert all(not torch.equal(p, before[n]) for n, p in net.named_parameters() if n != "first.bias")


@pytest.mark.parametrize("late", [False, True])
def test_mistakes_in_the_step_are_named(late: bool) -> None:
    net = Mlp()
    opt = torch.optim.SGD(net.parameters(), lr=0.1)

    def step(x: Tensor, y: Tensor) -> None:
        loss = mse_loss(net(x), y)
        if not late:
            net.frist(x)  # pyrefly: ignore[not-callable]
        loss.backward()
        if late:
            undefined(loss)  # noqa: F821  # pyrefly: ignore[unknown-name]
        opt.step()

    before = clone(dict(net.named_parameters()))
    name = "NameError: undefined" if late else "no attribute 'frist'"
    with pytest.raises(
        CaptureError, match=rf"(?s)this line fails.*{name}.*test_errors.py.*without torch.compile"
    ):
        torch.compile(step, backend=MixedPrecision(codegen="eager"))(*batches(1)[0])
    same(dict(net.named_parameters()), before, "parameters", exact=True)
