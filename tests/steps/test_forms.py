"""Steps as people write them: each is one graph and equals eager, parameters, buffers and outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from fxpass import MixedPrecision
from tests.support.helpers import EAGER, FP32, Mlp, Training, batches, compare

Step = Callable[..., Any]


@dataclass
class Metrics:
    loss: Tensor
    count: int


def _first(net: nn.Module, opt: Any) -> Step:
    def step(x: Tensor, y: Tensor) -> Tensor:
        opt.zero_grad()
        loss = mse_loss(net(x), y)
        loss.backward()
        opt.step()
        return loss

    return step


def _last(net: Mlp, opt: Any) -> Step:
    def step(x: Tensor, y: Tensor) -> dict[str, Any]:
        loss = mse_loss(net(x), y)
        loss.backward()
        opt.step()
        opt.zero_grad()
        return {"loss": loss, "rows": x.shape[0]}

    return step


def _model_zero_grad(net: Mlp, opt: Any) -> Step:
    def step(x: Tensor, y: Tensor) -> Metrics:
        net.zero_grad()
        loss = mse_loss(net(x), y)
        loss.backward()
        opt.step()
        return Metrics(loss, 1)

    return step


def _nothing(net: Mlp, opt: Any) -> Step:
    def step(x: Tensor, y: Tensor) -> None:
        opt.zero_grad(set_to_none=True)
        mse_loss(net(x), y).backward()
        opt.step()

    return step


def _tuple(net: Mlp, opt: Any) -> Step:
    def step(x: Tensor, y: Tensor) -> tuple[Any, ...]:
        for p in net.parameters():
            p.grad = None
        out = net(x)
        loss = mse_loss(out, y)
        loss.backward()
        opt.step()
        return loss, out, 3, [out.mean()]

    return step


def _accumulate(net: Mlp, opt: Any) -> Step:
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


def _two_losses(net: Mlp, opt: Any) -> Step:
    def step(x: Tensor, y: Tensor) -> Tensor:
        opt.zero_grad()
        out = net(x)
        loss = mse_loss(out, y)
        loss.backward(retain_graph=True)
        (2 * loss).backward(retain_graph=True)
        out.abs().backward(gradient=torch.full_like(out, 0.1))
        opt.step()
        return out

    return step


def _user_clip(net: Mlp, opt: Any) -> Step:
    def step(x: Tensor, y: Tensor) -> Tensor:
        opt.zero_grad()
        mse_loss(net(x), y).backward()
        norm = nn.utils.clip_grad_norm_(net.parameters(), 0.05)
        nn.utils.clip_grad_value_(net.parameters(), 0.01)
        opt.step()
        return norm

    return step


def _gradients_out(net: Mlp, opt: Any) -> Step:
    def step(x: Tensor, y: Tensor) -> list[Tensor | None]:
        opt.zero_grad()
        mse_loss(net(x), y).backward()
        for p in net.last.parameters():
            assert p.grad is not None
            p.grad.mul_(0.5)
        for p in net.norm.parameters():
            p.grad = p.grad * 0.5 if p.grad is not None else None
        opt.step()
        return [p.grad for p in net.parameters()]

    return step


def _item_after(net: Mlp, opt: Any) -> Step:
    schedule = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)

    def step(x: Tensor, y: Tensor) -> float:
        opt.zero_grad()
        loss = mse_loss(net(x), y)
        loss.backward()
        opt.step()
        schedule.step()
        return loss.item()

    return step


def _print_after(net: Mlp, opt: Any) -> Step:
    def step(x: Tensor, y: Tensor) -> Tensor:
        opt.zero_grad()
        loss = mse_loss(net(x), y)
        loss.backward()
        opt.step()
        print("loss", loss.item())
        return loss.detach()

    return step


def _no_grad_block(net: Mlp, opt: Any) -> Step:
    def step(x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            target = net(x).tanh() + y
        opt.zero_grad()
        loss = mse_loss(net(x), target)
        loss.backward()
        opt.step()
        return loss

    return step


def _autocast_off(net: Mlp, opt: Any) -> Step:
    def step(x: Tensor, y: Tensor) -> Tensor:
        opt.zero_grad()
        with torch.autocast("cpu", enabled=False):
            loss = mse_loss(net(x), y)
        loss.backward()
        opt.step()
        return loss

    return step


def _two_updates(net: Mlp, opt: Any) -> Step:
    def step(x: Tensor, y: Tensor) -> list[Tensor]:
        losses = []
        for a, b in zip(x.chunk(2), y.chunk(2), strict=True):
            opt.zero_grad()
            loss = mse_loss(net(a), b)
            loss.backward()
            opt.step()
            losses.append(loss)
        return losses

    return step


@dataclass
class Smoothed:
    """What can be called, compared and not hashed: criteria and metrics are often dataclasses."""

    by: float = 0.1

    def __call__(self, out: Tensor, y: Tensor) -> Tensor:
        return mse_loss(out, y) * (1 - self.by)

    def __len__(self) -> int:
        raise TypeError("nobody has to know")


def _objects_that_are_called(net: Mlp, opt: Any) -> Step:
    criterion = Smoothed()

    def step(x: Tensor, y: Tensor) -> Tensor:
        opt.zero_grad()
        loss = criterion(net(x), y)
        loss.backward()
        opt.step()
        return loss

    return step


def _scaler_switched_off(net: Mlp, opt: Any) -> Step:
    scaler = torch.amp.GradScaler("cpu", enabled=False)

    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = mse_loss(net(x), y)
        scaler.scale(loss).backward()
        if scaler.is_enabled():
            scaler.unscale_(opt)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        return loss * scaler.get_scale()

    return step


FORMS = [
    _first,
    _last,
    _model_zero_grad,
    _nothing,
    _tuple,
    _accumulate,
    _two_losses,
    _user_clip,
    _gradients_out,
    _item_after,
    _print_after,
    _no_grad_block,
    _autocast_off,
    _two_updates,
    _objects_that_are_called,
    _scaler_switched_off,
]


def train(step_of: Callable[[Mlp, Any], Step]) -> Callable[[], Training]:
    def build() -> Training:
        net = Mlp()
        opt = torch.optim.AdamW(net.parameters(), lr=0.01)
        return Training(step_of(net, opt), [net], [opt])

    return build


@pytest.mark.breadth(8)
@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.__name__[1:])
@pytest.mark.parametrize("keep", [False, True], ids=["drop", "keep"])
def test_form(form: Any, keep: bool) -> None:
    # a scale without casts: were anything scaled and not unscaled again, it would show
    options = {**EAGER, "grads": "keep"} if keep else FP32
    mp = MixedPrecision(**options, loss_scale=1024.0)  # pyrefly: ignore[bad-argument-type]
    compare(train(form), grads=keep, handle=mp)


@pytest.mark.breadth(5)
@pytest.mark.parametrize("zero", ["never", "first", "last", "model"])
def test_gradients_that_stay_are_read_by_the_next_call(zero: str) -> None:
    def form(net: Mlp, opt: Any) -> Step:
        def step(x: Tensor, y: Tensor) -> Tensor:
            if zero == "first":
                opt.zero_grad(set_to_none=False)
            if zero == "model":
                net.zero_grad(set_to_none=False)
            loss = mse_loss(net(x), y)
            loss.backward()
            opt.step()
            if zero == "last":
                opt.zero_grad(set_to_none=False)
            return loss

        return step

    kept = MixedPrecision(**FP32, grads="keep", loss_scale=1024.0)
    compare(train(form), grads=True, handle=kept, graphs=2)  # .grad None, then a tensor
    if zero != "never":  # dropped gradients do not accumulate from call to call
        compare(train(form))


class Trainer:
    def __init__(self) -> None:
        self.net = Mlp()
        self.opt = torch.optim.AdamW(self.net.parameters(), lr=0.01)
        self.parts = {"net": self.net, "optimizers": [self.opt]}
        self.calls = 0

    def step(self, batch: dict[str, Any], *, scale: float = 1.0) -> Tensor:
        self.parts["optimizers"][0].zero_grad()
        loss = mse_loss(self.net(batch["x"]), batch["pair"][1]) * scale
        loss.backward()
        self.opt.step()
        return loss


@pytest.mark.slow
def test_bound_method_keywords_and_nested_batches() -> None:
    def build() -> Training:
        trainer = Trainer()
        calls = [({"x": x, "pair": (0, y)},) for x, y in batches()]
        return Training(trainer.step, [trainer.net], [trainer.opt], calls, {"scale": 2.0})

    compare(build)


def test_model_optimizer_and_loss_as_arguments() -> None:
    def step(model: nn.Module, optimizer: Any, criterion: nn.Module, *batch: Tensor, **tags: Any) -> Any:
        model.train()
        optimizer.zero_grad()
        loss = criterion(model(batch[0]), batch[1])
        loss.backward()
        optimizer.step()
        return {"loss": loss, **tags}

    def build() -> Training:
        net = Mlp()
        opt = torch.optim.AdamW(net.parameters(), lr=0.01)
        calls = [(net, opt, nn.MSELoss(), *batch) for batch in batches()]
        return Training(step, [net], [opt], calls, {"tag": "a"})

    compare(build)


NET = Mlp()
OPT = torch.optim.SGD(NET.parameters(), lr=0.1)


def _global_step(x: Tensor, y: Tensor) -> Tensor:
    OPT.zero_grad()
    loss = mse_loss(NET(x), y)
    loss.backward()
    OPT.step()
    return loss


def test_globals() -> None:
    start = {n: p.detach().clone() for n, p in NET.named_parameters()}

    def build() -> Training:
        net = Mlp()
        net.load_state_dict(start)
        NET.load_state_dict(start)
        opt = torch.optim.SGD(net.parameters(), lr=0.1)
        eager = not built
        built.append(net)
        return Training(_first(net, opt), [net], [opt]) if eager else Training(_global_step, [NET], [OPT])

    built: list[nn.Module] = []
    compare(build)
    mp = MixedPrecision(**FP32)
    torch.compile(_global_step, backend=mp)(*batches(1)[0])
    assert "first.weight" in mp.graphs[0].before
