"""Every hint is true: the program that fails trains like eager once it is done as the hint says."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.checkpoint import checkpoint

from fxpass import FxpassError, MixedPrecision
from tests.support.helpers import EAGER, Mlp, Training, batches, compare

Step = Callable[..., Any]
_LOCK = threading.Lock()
_notes: list[Any] = []


def _untraced() -> float:
    """Something that Dynamo cannot trace."""
    with open(os.devnull) as file:
        return 1.0 + len(file.read())


@contextlib.contextmanager
def _block() -> Iterator[None]:
    yield


def _between(net: Any, opt: Any, hinted: bool) -> Step:
    def step(x: Tensor, y: Tensor) -> None:
        opt.zero_grad()
        mse_loss(net(x), y).backward()
        if not hinted:
            open(os.devnull).close()
        opt.step()
        if hinted:
            open(os.devnull).close()

    return step


def _in_a_loop(net: Any, opt: Any, hinted: bool) -> Step:
    def step(x: Tensor, y: Tensor) -> None:
        for a, b in zip(x.chunk(2), y.chunk(2), strict=True):
            opt.zero_grad()
            mse_loss(net(a), b).backward()
            opt.step()
            if not hinted:
                open(os.devnull).close()
        open(os.devnull).close()

    return step


def _in_a_function(net: Any, opt: Any, hinted: bool) -> Step:
    def loss_of(x: Tensor, y: Tensor, factor: float | None) -> Tensor:
        return mse_loss(net(x), y) * (_untraced() if factor is None else factor)

    def step(x: Tensor, y: Tensor, factor: float | None) -> None:
        opt.zero_grad()
        loss_of(x, y, factor).backward()
        opt.step()

    step.calls = [(*b, _untraced() if hinted else None) for b in batches()]  # pyrefly: ignore[missing-attribute]
    return step


def _branch(net: Any, opt: Any, hinted: bool) -> Step:
    def step(x: Tensor, y: Tensor) -> None:
        opt.zero_grad()
        loss = mse_loss(net(x), y)
        if hinted:
            loss = torch.where(loss > 1.5, loss * 0.5, loss)
        elif loss > 1.5:
            loss *= 0.5
        loss.backward()
        opt.step()

    return step


def _branch_afterwards(net: Any, opt: Any, hinted: bool) -> Step:
    def step(x: Tensor, y: Tensor) -> str:
        opt.zero_grad()
        loss = mse_loss(net(x), y)
        loss.backward()
        if not hinted and loss.item() > 1.5:
            return "high"
        opt.step()
        return "high" if loss.item() > 1.5 else "low"

    return step


def _branch_inside(net: Any, opt: Any, hinted: bool) -> Step:
    def half(out: Tensor) -> Tensor:
        if hinted:
            return torch.where(out.mean() > 0, out * 0.5, out)
        if out.mean() > 0:
            out *= 0.5
        return out

    def step(x: Tensor, y: Tensor) -> None:
        opt.zero_grad()
        mse_loss(half(net(x)), y).backward()
        opt.step()

    return step


def _disabled(net: Any, opt: Any, hinted: bool) -> Step:
    def update(x: Tensor, y: Tensor) -> None:
        opt.zero_grad()
        mse_loss(net(x), y).backward()
        opt.step()

    disabled = update if hinted else torch.compiler.disable(update)

    def step(x: Tensor, y: Tensor) -> None:
        disabled(x, y)

    return step


def _disabled_loss(net: Any, opt: Any, hinted: bool) -> Step:
    loss_of = mse_loss if hinted else torch.compiler.disable(lambda a, b: mse_loss(a, b))

    def step(x: Tensor, y: Tensor) -> None:
        opt.zero_grad()
        loss_of(net(x), y).backward()
        opt.step()

    return step


def _anomaly(net: Any, opt: Any, hinted: bool) -> Step:
    def step(x: Tensor, y: Tensor) -> None:
        with contextlib.nullcontext() if hinted else torch.autograd.detect_anomaly(check_nan=False):
            opt.zero_grad()
            mse_loss(net(x), y).backward()
            opt.step()

    return step


def _checkpointed(net: Any, opt: Any, hinted: bool) -> Step:
    def body(x: Tensor) -> tuple[Tensor, Tensor]:
        if not hinted:
            print(x.mean())
        return net(x), x.mean()

    def step(x: Tensor, y: Tensor) -> None:
        opt.zero_grad()
        out, mean = checkpoint(body, x, use_reentrant=False)
        if hinted:
            print(mean)
        mse_loss(out, y).backward()
        opt.step()

    return step


def _set_up(net: Any, opt: Any, hinted: bool) -> Step:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def prepare(self) -> None:
            with _LOCK:
                _notes.append("prepared")

        def forward(self, x: Tensor) -> Tensor:
            if not hinted:
                self.prepare()
            return self.net(x)

    model = Model()
    if hinted:
        model.prepare()

    def step(x: Tensor, y: Tensor) -> None:
        opt.zero_grad()
        mse_loss(model(x), y).backward()
        opt.step()

    return step


def _unseen(net: Any, opt: Any, hinted: bool) -> Step:
    seen = []

    def step(x: Tensor, y: Tensor) -> None:
        seen.append(len(x))
        with _block():
            opt.zero_grad()
            mse_loss(net(x), y).backward()
            opt.step()
            if not hinted:
                open(os.devnull)
        open(os.devnull).close()

    return step


def _no_step(net: Any, opt: Any, hinted: bool) -> Step:
    def step(x: Tensor, y: Tensor) -> None:
        for a, b in zip(x.chunk(2), y.chunk(2), strict=True):
            mse_loss(net(a), b).backward()
        if hinted:
            opt.step()
            opt.zero_grad()

    return step


def _other_loss(net: Any, opt: Any, hinted: bool) -> Step:
    def step(x: Tensor, y: Tensor) -> Tensor:
        opt.zero_grad()
        mse_loss(net(x), y).backward()
        opt.step()
        return net(x).mean().detach() if hinted else net(x).mean()

    return step


def _scheduled(net: Any, opt: Any, hinted: bool) -> Step:
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)

    def step(x: Tensor, y: Tensor) -> None:
        with _block():
            opt.zero_grad()
            mse_loss(net(x), y).backward()
            opt.step()
            if not hinted:
                scheduler.step()
            print(opt.param_groups[0]["lr"])
            if hinted:
                scheduler.step()

    return step


def _profiled(net: Any, opt: Any, hinted: bool) -> Step:
    def step(x: Tensor, y: Tensor) -> None:
        with contextlib.nullcontext() if hinted else torch.profiler.profile():
            opt.zero_grad()
            mse_loss(net(x), y).backward()
            opt.step()

    return step


def _row_in_place(net: Any, opt: Any, hinted: bool) -> Step:
    def step(x: Tensor, y: Tensor) -> None:
        opt.zero_grad()
        h, i = net(x).clone(), x.sum(1).argmax()
        if hinted:
            h = torch.where((torch.arange(len(h)) == i)[:, None], h * 2, h)
        else:
            h[i].mul_(2)
        mse_loss(h, y).backward()
        opt.step()

    return step


def _hook_that_saves(net: Any, opt: Any, hinted: bool) -> Step:
    def step(x: Tensor, y: Tensor) -> Tensor:
        opt.zero_grad()
        saved: list[Tensor] = []
        h = net.first(x)
        loss = mse_loss(net.last(net.norm(torch.relu(h))), y)
        if hinted:
            saved += torch.autograd.grad(loss, h, retain_graph=True)
        else:
            h.register_hook(lambda g: saved.append(g))
        loss.backward()
        opt.step()
        return saved[0]

    return step


def _hook_of_a_module(net: Any, opt: Any, hinted: bool) -> Step:
    seen: list[Tensor] = []
    keep = lambda module, args, out: seen.append(out)  # noqa: E731
    if hinted:
        net.first.register_forward_hook(keep)

    def step(x: Tensor, y: Tensor) -> None:
        opt.zero_grad()
        seen.clear()
        handle = None if hinted else net.first.register_forward_hook(keep)
        out = net(x)
        if handle is not None:
            handle.remove()
        (mse_loss(out, y) + seen[0].square().mean()).backward()
        opt.step()
        seen.clear()

    return step


def _removed_too_early(net: Any, opt: Any, hinted: bool) -> Step:
    def step(x: Tensor, y: Tensor) -> None:
        opt.zero_grad()
        out = net(x)
        handle = out.register_hook(lambda g: g * 2)
        loss = mse_loss(out, y)
        loss.backward(retain_graph=True)
        if not hinted:
            handle.remove()
        loss.backward()
        if hinted:
            handle.remove()
        opt.step()

    return step


class _Unreadable:
    def __getattribute__(self, name: str) -> Any:
        raise KeyError(name)


def _no_attributes(net: Any, opt: Any, hinted: bool) -> Step:
    odd = _Unreadable()

    def step(x: Tensor, y: Tensor) -> None:
        opt.zero_grad()
        mse_loss(net(x), y).backward()
        opt.step()

    def reading(x: Tensor, y: Tensor) -> None:
        odd.read()
        opt.zero_grad()
        mse_loss(net(x), y).backward()
        opt.step()

    return step if hinted else reading


CASES = [
    (_between, "br(oke|eaks) before", "after optimizer.step"),
    (_in_a_loop, "breaks inside a with, a try or a loop", "behind any with, try or loop"),
    (_in_a_function, "br(oke|eaks) before", "as an argument"),
    (_branch, "depends on a value", "torch.where"),
    (_branch_afterwards, "depends on a value", "decide after optimizer.step"),
    (_branch_inside, "depends on a value", "torch.where"),
    (_disabled, "would run uncompiled", "out of torch.compiler.disable"),
    (_disabled_loss, "told not to trace", "out of torch.compiler.disable"),
    (_anomaly, "detect_anomaly", "leave it out"),
    (_checkpointed, "checkpointed", "outside of the region"),
    (_set_up, "set-up", "once before the compiled step"),
    (_unseen, "inside a block", "after the block"),
    (_scheduled, "after scheduler.step", "scheduler.step() last"),
    (_profiled, "a profiler is started", "around the calls"),
    (_no_step, "without an optimizer step", "call optimizer.step"),
    (_other_loss, "no backward", "detach it"),
    (_hook_that_saves, "changes other objects", "torch.autograd.grad"),
    (_hook_of_a_module, "registered on a module inside", "once, before"),
    (_removed_too_early, "removal of a hook", "after the last backward"),
    (_row_in_place, "written in place", "choose by a mask"),
    (_no_attributes, "tracing fails with KeyError", "outside of the compiled function"),
]


@pytest.mark.breadth
@pytest.mark.parametrize(("form", "found", "hint"), CASES, ids=lambda v: getattr(v, "__name__", "")[1:])
def test_the_hint_works(form: Any, found: str, hint: str) -> None:
    def build(hinted: bool) -> Training:
        net = Mlp()
        opt = torch.optim.SGD(net.parameters(), lr=0.1)
        step = form(net, opt, hinted)
        return Training(step, [net], [opt], getattr(step, "calls", batches()))

    torch.compiler.reset()
    failing = build(hinted=False)
    with pytest.raises(FxpassError, match=found) as error:
        failing.run(torch.compile(failing.step, backend=MixedPrecision(**EAGER)))
    assert hint in (error.value.hint or "")
    assert "test_hints.py:" in (error.value.where or "")
    around = torch.profiler.profile() if form is _profiled else contextlib.nullcontext()
    with around:
        compare(lambda: build(hinted=True), handle=MixedPrecision(**EAGER))
