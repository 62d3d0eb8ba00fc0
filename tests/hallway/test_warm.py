"""A second process takes the compiled step from the cache on disk, and only if it would be the same."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch._functorch.config as functorch_config  # noqa: TID251
from torch import Tensor, nn
from torch._dynamo import mark_dynamic  # noqa: TID251

import fxpass.hallway.frame
from fxpass import MixedPrecision
from fxpass.capture import key
from tests.support.helpers import Mlp, Training, batches, parameters, same, snapshot

SCRIPT = """
import torch, fxpass
torch.manual_seed(0)
weight = torch.nn.Parameter(torch.randn(4))
optimizer = torch.optim.{optimizer}([weight], lr={lr})
def step(x):
    (weight * x).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
compiled = torch.compile(step, backend="mixedprec", options={{"max_norm": {max_norm}}})
compiled(torch.arange(4.0))
compiled(torch.arange(4.0))
print(fxpass.of(compiled).graphs[0].cache, fxpass.of(compiled).stats().steps, weight.tolist())
"""


@pytest.fixture(autouse=True)
def _caching() -> Iterator[None]:
    with functorch_config.patch(enable_autograd_cache=True):
        yield


NEW = 1 + random.Random().random()  # in no cache of an earlier run; a directory of its own costs more


def _run(**settings: Any) -> tuple[str, str]:
    values = {"optimizer": "AdamW", "lr": 0.1, "max_norm": NEW, **settings}
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", SCRIPT.format(**values)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    state, _, rest = found.stdout.partition(" ")
    return state, rest


@pytest.mark.slow
def test_a_second_process_takes_it_from_disk() -> None:
    first, second = _run(), _run()
    assert (first[0], second[0]) == ("miss", "hit")
    assert first[1] == second[1]


# ---------------------------------------------------------------- what the key holds


class _Found(BaseException):
    """Ends a compilation once the text is known."""


def _text(
    build: Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]], mode: str | None = None, **options: Any
) -> str:
    """What decides the program of a step, or why it is not kept."""

    def trace(*_: Any, warm: Any, **named: Any) -> Any:
        raise _Found(warm.text) if warm else _Found("")

    torch.compiler.reset()
    torch.manual_seed(0)
    step, args = build()
    mp = MixedPrecision(**options)
    reasons: list[str] = []
    original = fxpass.hallway.frame.keep.warm

    def warm(*given: Any, **named: Any) -> Any:
        found = original(*given, **named)
        reasons.append(found[1])
        return found

    with (
        mock.patch.object(fxpass.hallway.frame._torch, "trace", trace),
        mock.patch.object(fxpass.hallway.frame.keep, "warm", warm),
        pytest.raises(_Found) as found,
    ):
        torch.compile(step, backend=mp, mode=mode)(*args)
    return str(found.value) or reasons[0]


def _step(
    model: Callable[[], nn.Module] = Mlp,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    rows: int = 6,
    factor: float = 1.0,
    **settings: Any,
) -> Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]]:
    def build() -> tuple[Callable[..., Any], tuple[Any, ...]]:
        net = model()
        opt = optimizer(net.parameters(), **{"lr": 0.1, **settings})

        def step(x: Tensor, y: Tensor) -> Tensor:
            loss = nn.functional.mse_loss(net(x), y) * factor
            loss.backward()
            opt.step()
            opt.zero_grad()
            return loss

        return step, batches(1, rows)[0]

    return build


def test_equal_steps_have_equal_texts() -> None:
    text = _text(_step(), max_norm=1.0)
    assert "AdamW" in text
    assert _text(_step(), max_norm=1.0) == text
    assert _text(_step(lr=0.3), max_norm=1.0) == text  # an input of the graph


def test_the_step_of_a_script_is_that_of_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """``fxpass compile train.py:example`` imports what ``python train.py`` runs as ``__main__``."""
    text = _text(_step())
    monkeypatch.setattr(Mlp, "__module__", "__main__")
    assert _text(_step()) == text


DIFFERENT: dict[str, dict[str, Any]] = {
    "option": {"max_norm": 2.0},
    "no option": {},
    "dtype": {"max_norm": 1.0, "dtype": "bfloat16"},
    "loss scale": {"max_norm": 1.0, "loss_scale": 128.0},
    "scale's settings": {"max_norm": 1.0, "loss_scale": fxpass.DynamicLossScale(growth_interval=7)},
    "keep_fp32": {"max_norm": 1.0, "keep_fp32": ("last",)},
    "inductor": {"max_norm": 1.0, "inductor": {"max_fusion_size": 8}},
    "mode": {"max_norm": 1.0, "mode": "max-autotune-no-cudagraphs"},
    "hyperparameter": {"max_norm": 1.0, "build": _step(betas=(0.8, 0.99))},
    "weight decay": {"max_norm": 1.0, "build": _step(weight_decay=0.5)},
    "optimizer": {"max_norm": 1.0, "build": _step(optimizer=torch.optim.Adam)},
    "tensor lr": {"max_norm": 1.0, "build": _step(lr=torch.tensor(0.1))},
    "sizes": {"max_norm": 1.0, "build": _step(rows=7)},
    "width": {"max_norm": 1.0, "build": _step(model=lambda: Mlp(9))},
    "number in the code": {"max_norm": 1.0, "build": _step(factor=2.0)},
}


@pytest.mark.breadth
@pytest.mark.parametrize("name", DIFFERENT)
def test_what_decides_the_program_is_in_the_key(name: str) -> None:
    options = dict(DIFFERENT[name])
    build = options.pop("build", _step())
    text = _text(build, **options)
    assert "\n" in text, text  # no reason not to keep it
    assert text != _text(_step(), max_norm=1.0)


def test_versions_machine_and_code_are_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    text = _text(_step())
    monkeypatch.setattr(torch, "__version__", "2.99")
    other = _text(_step())
    monkeypatch.setattr(key, "code_hash", lambda: "another fxpass")
    third = _text(_step())
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another CPU")
    assert len({text, other, third, _text(_step())}) == 4


def test_a_function_of_torchs_that_was_replaced_is_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    text = _text(_step(optimizer=torch.optim.SGD))
    module = sys.modules["torch.optim.sgd"]
    original = vars(module)["_single_tensor_sgd"]
    monkeypatch.setattr(module, "_single_tensor_sgd", lambda *a, **k: original(*a, **k))
    key._code.cache_clear()
    try:
        assert _text(_step(optimizer=torch.optim.SGD)) != text
    finally:
        key._code.cache_clear()


@torch.library.custom_op("fxpass_test_warm::twice", mutates_args=())
def _twice(x: Tensor) -> Tensor:
    return x * 2


@_twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


_twice.register_autograd(lambda ctx, grad: grad * 2)


class _Own(torch.optim.SGD):
    """An optimizer of the user's."""


class _Custom(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return _twice(super().forward(x))


REFUSED = {
    "_Own is no optimizer of torch's": _step(optimizer=_Own),
    "operator fxpass_test_warm.twice": _step(model=_Custom),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_the_key_cannot_hold_is_compiled_anew(reason: str) -> None:
    assert reason in _text(REFUSED[reason])


def test_a_size_that_is_a_symbol_is_compiled_anew() -> None:
    def build() -> tuple[Callable[..., Any], tuple[Any, ...]]:
        step, (x, y) = _step()()
        mark_dynamic(x, 0)
        mark_dynamic(y, 0)
        return step, (x, y)

    assert "symbol" in _text(build) or "SymInt" in _text(build)


def test_the_record_says_that_torchs_cache_is_off() -> None:
    with functorch_config.patch(enable_autograd_cache=False):
        assert _text(_step()) == "torch's caches are switched off"


# ---------------------------------------------------------------- a hit


def _train() -> tuple[MixedPrecision, Training, list[Any]]:
    torch.compiler.reset()
    torch.manual_seed(0)
    model = Mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

    def step(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        return {"loss": loss}

    training = Training(step, [model], [optimizer])
    mp = MixedPrecision(max_norm=NEW)
    return mp, training, training.run(torch.compile(step, backend=mp))


def test_a_hit_is_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    first, one, expected = _train()
    for name in ("lower", "run_pipeline"):
        monkeypatch.setattr(fxpass.hallway.frame, name, None)  # neither passes nor lowering
    second, two, found = _train()
    assert [g.cache for g in (*first.graphs, *second.graphs)] == ["miss", "hit"]
    same(found, expected, "output")
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(parameters(one), parameters(two), strict=True))
    same(snapshot(two), snapshot(one), "state")
    assert second.stats() == first.stats()
    assert str(second.diagnosis()) == str(first.diagnosis())
    ours, theirs = second.graphs[0], first.graphs[0]
    assert (ours.before, ours.after, ours.memory) == (theirs.before, theirs.after, theirs.memory)
    assert ours.inserted() == theirs.inserted()
    _, artifacts = torch.compiler.save_cache_artifacts() or (b"", None)
    assert artifacts is not None
    assert artifacts.artifacts["aot_autograd"]  # what a cluster ships
    assert "load" in ours.seconds
    assert "passes" not in ours.seconds
