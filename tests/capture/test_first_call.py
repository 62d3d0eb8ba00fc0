"""What a program does in its first call alone: hooks it installs, weights it makes, what it caches."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from fxpass import CaptureError, MixedPrecision
from tests.support.helpers import EAGER, FP32, Training, batches, clone, compare, same

_LOCK = threading.Lock()
_done: list[str] = []


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu())


def _install(module: nn.Module) -> None:
    if getattr(module, "installed", False):
        return
    with _LOCK:
        for child in module.children():
            child.register_forward_hook(lambda module, args, out: out * 0.5)
        module.installed = True  # pyrefly: ignore[bad-argument-type]
        _done.append("installed")


class Hooked(Net):
    def forward(self, x: Tensor) -> Tensor:
        _install(self)
        return super().forward(x)


class Cached(Net):
    @functools.cached_property
    def mask(self) -> Tensor:
        return torch.linspace(0, 1, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x) * self.mask)


class Attribute(Net):
    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "mask"):
            self.register_buffer("mask", torch.linspace(0, 1, 8))
        return self.last(self.first(x) * self.mask)


class Lazy(Net):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LazyLinear(8)


@functools.lru_cache
def _once(what: str) -> None:
    print(what)
    _done.append(what)


@functools.lru_cache
def _made(value: float) -> type:
    return type("Made", (), {"value": value})


class Memoized(Net):
    def forward(self, x: Tensor) -> Tensor:
        _once("said")
        return super().forward(x) * _made(0.5).value


@pytest.mark.parametrize(
    ("kind", "graphs", "done"),
    [
        (Hooked, 1, ["installed"]),
        (Cached, 1, []),
        (Attribute, 2, []),
        (Lazy, 1, []),
        (Memoized, 1, ["said"]),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_what_must_run_once_runs_once(kind: type[Net], graphs: int, done: list[str]) -> None:
    def fresh() -> None:
        _done.clear()
        _once.cache_clear()

    compare(_build(kind, fresh), graphs=graphs, handle=MixedPrecision(**EAGER))
    assert _done == done


def _prepare(net: Any) -> None:
    with _LOCK:
        net.ready = True
    _done.append("prepared")


def _prepare_once(net: Any) -> None:
    if not net.ready:
        _prepare(net)


def _flag_inside(net: Any, x: Tensor) -> None:
    _prepare_once(net)


def _flag_outside(net: Any, x: Tensor) -> None:
    if not net.ready:
        _prepare(net)


def _each(net: Any, x: Tensor) -> None:
    for part in [net, net.first]:
        if not getattr(part, "ready", False):
            _prepare(part)


def _and_more(net: Any, x: Tensor) -> None:
    if not net.ready:
        _prepare(net)
        net.factor = 2.0


def _or_else(net: Any, x: Tensor) -> None:
    if net.ready:
        net.factor = 3.0
    else:
        _prepare(net)


def _always(net: Any, x: Tensor) -> None:
    _prepare(net)


def _count(net: Any, x: Tensor) -> None:
    net.calls += 1
    if net.calls == 1:
        _prepare(net)


def _was_first(net: Any) -> bool:
    if net.ready:
        return False
    _prepare(net)
    return True


def _answers(net: Any, x: Tensor) -> None:
    if _was_first(net):
        net.factor = 4.0


def _after_a_change(net: Any, x: Tensor) -> None:
    net.calls += 1
    _prepare_once(net)


class Prepared(Net):
    def __init__(self, prepare: Callable[[Any, Tensor], None]) -> None:
        super().__init__()
        self.prepare, self.ready, self.calls, self.factor = prepare, False, 0, 1.0

    def forward(self, x: Tensor) -> Tensor:
        self.prepare(self, x)
        return super().forward(x) * self.factor


@pytest.mark.parametrize("prepare", [_flag_inside, _flag_outside, _each], ids=lambda f: f.__name__[1:])
def test_set_up_that_is_done_the_second_time(prepare: Callable[[Any, Tensor], None]) -> None:
    compare(_build(lambda: Prepared(prepare), _done.clear), handle=MixedPrecision(**EAGER))
    assert set(_done) == {"prepared"}


@pytest.mark.parametrize(
    "prepare",
    [_and_more, _or_else, _always, _count, _answers, _after_a_change],
    ids=lambda f: f.__name__[1:],
)
def test_what_would_be_done_twice_or_left_out_is_refused(prepare: Callable[[Any, Tensor], None]) -> None:
    training = _build(lambda: Prepared(prepare), _done.clear)()
    net: Any = training.models[0]
    before = clone(dict(net.named_parameters()))
    with pytest.raises(CaptureError) as error:
        training.run(torch.compile(training.step, backend=MixedPrecision(**EAGER)))
    assert "test_first_call.py" in error.value.where
    assert len(_done) <= 1
    same(dict(net.named_parameters()), before, "parameters", exact=True)


def test_a_function_before_the_forward_is_called_once() -> None:
    """Where Dynamo may break the graph and go on, nothing is called ahead."""
    drawn: list[int] = []

    def draw(data: list[Any]) -> Any:
        with _LOCK:
            drawn.append(len(drawn))
        return data[drawn[-1]]

    net = Net()
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    mp = MixedPrecision(**EAGER)

    @torch.compile(backend=mp)
    def step(data: list[Any]) -> None:
        x, y = draw(data)
        opt.zero_grad()
        mse_loss(net(x), y).backward()
        opt.step()

    for _ in range(3):
        step(batches(3))
    assert drawn == [0, 1, 2]
    assert mp.stats().steps == 3


@functools.lru_cache
def _table(rows: int) -> dict[str, Any]:
    _done.append("table")
    return {"mask": torch.linspace(0, 1, rows), "calls": [0]}


class Table(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x) * _table(8)["mask"])


def test_what_is_cached_is_made_once() -> None:
    def fresh() -> None:
        _table.cache_clear()
        _done.clear()

    compare(_build(Table, fresh), handle=MixedPrecision(**EAGER))
    assert _done == ["table"]


def test_under_the_default_options() -> None:
    compare(_build(Hooked, lambda: None), handle=MixedPrecision(**FP32))


def _build(kind: Callable[[], Net], fresh: Callable[[], None]) -> Callable[[], Training]:
    def build() -> Training:
        fresh()
        net = kind()
        opt = torch.optim.SGD(net.parameters(), lr=0.1)

        def step(x: Tensor, y: Tensor) -> Tensor:
            opt.zero_grad()
            loss = mse_loss(net(x), y)
            loss.backward()
            opt.step()
            return loss

        models: list[Any] = [net]
        return Training(step, models, [opt])

    return build
