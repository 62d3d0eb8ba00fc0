"""What libraries put before an optimizer, and state that several objects share."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any, ClassVar

import pytest
import torch
from torch.nn.functional import mse_loss

import fxpass
from tests.support.helpers import EAGER, Mlp, Training, batches, compare


class Front(torch.optim.Optimizer):
    """An optimizer in name: it never initialises its base."""

    def __init__(self, optimizer: torch.optim.Optimizer, state: Any = None) -> None:
        self.optimizer, self.shared = optimizer, state

    @property
    def param_groups(self) -> Any:  # pyrefly: ignore[bad-override]
        return self.optimizer.param_groups

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        if "set_to_none" in inspect.signature(self.optimizer.zero_grad).parameters:
            self.optimizer.zero_grad(set_to_none=True)

    def step(self, closure: Any = None) -> None:  # pyrefly: ignore[bad-override]
        if self.shared is None or self.shared.due:
            self.optimizer.step(closure)


class Shared:
    state: ClassVar[dict[str, Any]] = {}
    due: bool
    count: int
    factor: float

    def __init__(self) -> None:
        self.__dict__ = self.state


def handle() -> fxpass.MixedPrecision:
    return fxpass.MixedPrecision(**EAGER)


def test_a_front_is_what_it_does() -> None:
    def build() -> Training:
        model = Mlp()
        inner = torch.optim.AdamW(model.parameters())
        front = Front(inner)

        def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            loss = mse_loss(model(x), y)
            loss.backward()
            front.step()
            front.zero_grad()
            return loss

        return Training(step, [model], [inner])

    compare(build, handle=handle())


@pytest.mark.parametrize("block", ["none", "stack"])
def test_what_is_written_to_one_object_is_read_from_another(block: str) -> None:
    """Two micro-batches, and an update only when the state says so: once for each call."""

    def build() -> Training:
        model = Mlp()
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        Shared.state.clear()
        mine = Shared()
        mine.due, mine.count = True, 0
        front, other = Front(inner, Shared()), Shared()

        @contextlib.contextmanager
        def accumulate() -> Any:
            mine.count += 1
            mine.due = mine.count % 2 == 0
            with contextlib.ExitStack() as stack:
                stack.enter_context(contextlib.nullcontext())
                yield

        def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            total = torch.zeros(())
            for half in (slice(0, 3), slice(3, 6)):
                if block == "stack":
                    with accumulate():
                        total += micro(x[half], y[half])
                else:
                    mine.due = half.stop == 6
                    with (
                        contextlib.nullcontext()
                        if block == "none"
                        else torch.autograd.profiler.record_function("a")
                    ):
                        total += micro(x[half], y[half])
            return total

        def micro(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            loss = mse_loss(model(x), y)
            loss.backward()
            front.step()
            if other.due:
                front.zero_grad()
            return loss.detach()

        return Training(step, [model], [inner], calls=batches())

    compare(build, handle=handle(), graphs=2 if block == "stack" else 1)


def program(new: bool) -> tuple[Any, Any]:
    """A step that writes shared state; with ``new`` it reads it from an object of its own."""
    model = Mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Shared.state.clear()
    mine, other = Shared(), Shared()
    mine.factor = 1.0

    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        mine.factor = 0.5
        loss = mse_loss(model(x), y) * (Shared().factor if new else other.factor)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step, mse_loss(model(batches()[0][0]), batches()[0][1]).item() / 2


def test_state_that_is_read_from_a_new_object_is_refused_and_the_hint_trains() -> None:
    step, _ = program(new=True)
    with pytest.raises(fxpass.CaptureError, match=r"share.*\n.*self\.__dict__ = .*\n.*before the step"):
        torch.compile(step, backend=handle())(*batches()[0])
    step, expected = program(new=False)
    mp = handle()
    loss = torch.compile(step, backend=mp)(*batches()[0])
    assert loss.item() == pytest.approx(expected)
    assert mp.stats().steps == 1


def test_a_scheduler_in_a_loop_over_micro_batches() -> None:
    def build() -> Training:
        model = Mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

        def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            total = torch.zeros(())
            for number, half in enumerate((slice(0, 3), slice(3, 6))):
                loss = mse_loss(model(x[half]), y[half])
                loss.backward()
                if number == 1:
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                total += loss.detach()
            return total

        return Training(step, [model], [optimizer])

    compare(build, handle=handle())
