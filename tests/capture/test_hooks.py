"""Hooks, registered before the first call or later: run as eager runs them, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from fxpass import CaptureError, MixedPrecision
from tests.support.helpers import EAGER, FP32, Mlp, Training, batches, clone, compare, parameters, same


def _training(prepare: Callable[[Mlp], object] = lambda net: None) -> Training:
    net = Mlp()
    opt = torch.optim.AdamW(net.parameters(), lr=0.01)
    prepare(net)

    def step(x: Tensor, y: Tensor) -> Tensor:
        opt.zero_grad()
        loss = mse_loss(net(x), y)
        loss.backward()
        opt.step()
        return loss

    return Training(step, [net], [opt])


def _every_kind(net: Mlp) -> None:
    """A frozen row, a clamp behind a scale, one that only looks, one that edits ``.grad``, one in forward."""
    mask = torch.ones_like(net.first.weight)
    mask[0] = 0.0
    net.first.weight.register_hook(lambda g: g * mask)
    net.last.weight.register_hook(lambda g: g * 3.0)
    net.last.weight.register_hook(lambda g: g.clamp(-0.01, 0.01))
    seen: list[Tensor] = []
    net.first.bias.register_hook(lambda g: seen.append(g.norm()))

    def halve(p: Tensor) -> None:
        assert p.grad is not None
        p.grad.mul_(0.5)

    net.last.bias.register_post_accumulate_grad_hook(halve)
    net.norm.register_forward_hook(lambda module, args, out: out * 1.5)


@pytest.mark.parametrize("options", [FP32, {**EAGER, "loss_scale": 1024.0}], ids=["inductor", "scaled"])
def test_hooks_on_parameters_see_unscaled_gradients(options: dict[str, Any]) -> None:
    compare(lambda: _training(_every_kind), handle=MixedPrecision(**options))


def _replace(p: Tensor) -> None:
    assert p.grad is not None
    p.grad = p.grad * 0.5


LATER: dict[str, Callable[[Mlp], Any]] = {
    "on a gradient": lambda net: net.first.weight.register_hook(lambda g: g * 0.0),
    "after accumulation": lambda net: net.first.weight.register_post_accumulate_grad_hook(_replace),
    "forward": lambda net: net.norm.register_forward_hook(lambda module, args, out: out * 2.0),
    "before forward": lambda net: net.norm.register_forward_pre_hook(lambda module, args: (args[0] * 2.0,)),
}


@pytest.mark.breadth(4)
@pytest.mark.parametrize("name", LATER)
def test_hooks_that_come_and_go_between_calls(name: str) -> None:
    calls = batches(4)
    mp = MixedPrecision(**EAGER)
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        training = _training()
        step = torch.compile(training.step, backend=mp) if compiled else training.step
        handle = None
        for call, batch in enumerate(calls):
            if call == 1:
                handle = LATER[name](training.models[0])  # pyrefly: ignore[bad-argument-type]
            elif call == 3 and handle is not None:
                handle.remove()
            step(*batch)
        results.append(clone(dict(parameters(training))))
    same(results[1], results[0], "parameter")
    assert mp.stats().steps == len(calls)


REFUSED: dict[str, Callable[[Mlp], Any]] = {
    "of a module": lambda net: net.last.register_full_backward_hook(lambda *_: None),
    "before that": lambda net: net.last.register_full_backward_pre_hook(lambda *_: None),
}


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_backward_hooks_of_modules_are_refused(name: str, later: bool) -> None:
    register = REFUSED[name]
    training = _training((lambda net: None) if later else register)
    step = torch.compile(training.step, backend=MixedPrecision(**EAGER))
    if later:
        step(*batches(1)[0])
        register(training.models[0])  # pyrefly: ignore[bad-argument-type]
    with pytest.raises(CaptureError, match="has a backward hook") as error:
        step(*batches(1)[0])
    assert "helpers.py" in error.value.where  # the line of the model that calls the module
    assert "register_hook" in error.value.hint


@pytest.mark.slow
def test_a_global_module_hook_that_comes_later_is_refused() -> None:
    training = _training()
    step = torch.compile(training.step, backend=MixedPrecision(**EAGER))
    step(*batches(1)[0])
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: None)
    try:
        with pytest.raises(CaptureError, match="hook for all modules"):
            step(*batches(1)[0])
        torch.compiler.reset()
        step(*batches(1)[0])
    finally:
        handle.remove()


def _with(body: Callable[[Mlp, Tensor, Tensor], Tensor]) -> Callable[[], Training]:
    def build() -> Training:
        net = Mlp()
        opt = torch.optim.SGD(net.parameters(), lr=0.1)

        def step(x: Tensor, y: Tensor) -> Tensor:
            opt.zero_grad()
            result = body(net, x, y)
            opt.step()
            return result

        return Training(step, [net], [opt])

    return build


def _retain_grad(net: Mlp, x: Tensor, y: Tensor) -> Tensor:
    h = net.first(x)
    h.retain_grad()
    mse_loss(net.last(h), y).backward()
    assert h.grad is not None
    return h.grad.norm()


def _registered_inside(net: Mlp, x: Tensor, y: Tensor) -> Tensor:
    net.first.weight.register_hook(lambda g: g * 0.5)
    loss = mse_loss(net(x), y)
    loss.backward()
    return loss


@pytest.mark.parametrize("body", [_retain_grad, _registered_inside])
def test_what_cannot_be_followed_is_refused(body: Any) -> None:
    training = _with(body)()
    with pytest.raises(CaptureError) as error:
        torch.compile(training.step, backend=MixedPrecision(**EAGER))(*batches(1)[0])
    assert "test_hooks.py" in error.value.where


def test_the_advice_works_a_hook_on_a_tensor() -> None:
    def body(net: Mlp, x: Tensor, y: Tensor) -> Tensor:
        h = net.first(x)
        h.register_hook(lambda g: g * 0.5)
        loss = mse_loss(net.last(h), y)
        loss.backward()
        return loss

    compare(_with(body), handle=MixedPrecision(**EAGER, loss_scale=64.0))


def test_the_advice_works_a_gradient_of_the_users() -> None:
    def body(net: Mlp, x: Tensor, y: Tensor) -> Tensor:
        h = net.first(x)
        loss = mse_loss(net.last(h), y)
        (grad,) = torch.autograd.grad(loss, h, retain_graph=True)
        loss.backward()
        return grad.norm()

    compare(_with(body), handle=MixedPrecision(**EAGER, loss_scale=64.0))


@pytest.mark.breadth(2)
@pytest.mark.parametrize("codegen", ["inductor", "eager"])
def test_an_optimizer_per_parameter_in_backward(codegen: str) -> None:
    def build() -> Training:
        net = Mlp()
        opts = {p: torch.optim.SGD([p], lr=0.1, momentum=0.9) for p in net.parameters()}

        def update(p: Tensor) -> None:
            opts[p].step()  # pyrefly: ignore[bad-index]
            opts[p].zero_grad()  # pyrefly: ignore[bad-index]

        for p in net.parameters():
            p.register_post_accumulate_grad_hook(update)

        def step(x: Tensor, y: Tensor) -> Tensor:
            loss = mse_loss(net(x), y)
            loss.backward()
            return loss

        return Training(step, [net], list(opts.values()))

    compare(build, handle=MixedPrecision(dtype="float32", codegen=codegen))
