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

from fxpass import MixedPrecision
from tests.helpers import EAGER, FP32, Training, compare

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
        module.installed = True  # pyright: ignore
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
        return super().forward(x) * _made(0.5).value  # pyright: ignore


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


def test_under_the_default_options() -> None:
    compare(_build(Hooked, lambda: None), handle=MixedPrecision(**FP32))


def _build(kind: type[Net], fresh: Callable[[], None]) -> Callable[[], Training]:
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
