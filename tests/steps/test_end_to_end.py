"""The user's line of code, through Inductor: losses, memory, dynamic shapes, caches, modes."""

from __future__ import annotations

import copy
import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxpass
from bench.measure import peak_of_call
from bench.models import GPT, GPTConfig

INIT_SCALE = 2.0**10  # no overflow on either side: a skipped step would set the losses one step apart
SMALL = GPTConfig(width=64, layers=2, heads=2, vocab=512, context=64)


def make_step(model: nn.Module, lr: float = 1e-3) -> Callable[[Tensor, Tensor], Tensor]:
    opt = torch.optim.AdamW(model.parameters(), lr=lr)

    def step(x: Tensor, y: Tensor) -> Tensor:
        opt.zero_grad()
        loss = model(x, y)
        loss.backward()
        opt.step()
        return loss

    return step


def amp_step(model: nn.Module, lr: float = 1e-3, max_norm: float = 1.0) -> Callable[[Tensor, Tensor], Tensor]:
    opt = torch.optim.AdamW(model.parameters(), lr=lr)
    scaler = torch.amp.GradScaler("cpu", init_scale=INIT_SCALE)

    def step(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(x, y)
        scaler.scale(loss).backward()
        scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()  # last, so that a step's own gradients count as its memory
        return loss

    return step


def batch(rows: int = 2, length: int = 16) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 512, (rows, length + 1))
    return ids[:, :-1], ids[:, 1:]


def test_losses_follow_torch_amp_with_less_transient_memory() -> None:
    theirs = GPT(GPTConfig(width=128, layers=2, heads=2, vocab=512, context=64))
    ours = copy.deepcopy(theirs)
    scale = fxpass.DynamicLossScale(init_scale=INIT_SCALE)
    options: dict[str, Any] = {"max_norm": 1.0, "loss_scale": scale}
    step = torch.compile(make_step(ours), backend="mixedprec", options=options)
    eager = amp_step(theirs)
    data = [batch() for _ in range(4)]
    for index in range(30):
        a, b = step(*data[index % 4]).item(), eager(*data[index % 4]).item()
        assert a == pytest.approx(b, rel=0.02)
    mp = fxpass.of(step)
    assert len(mp.graphs) == 1
    assert not mp.graphs[0].unreached
    cpu = torch.device("cpu")
    ours_peak = peak_of_call(lambda: step(*data[0]), cpu).bytes
    theirs_peak = peak_of_call(lambda: eager(*data[0]), cpu).bytes
    assert ours_peak < theirs_peak * 0.75


def test_a_second_batch_size_compiles_once_more_then_no_more() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    mp = fxpass.MixedPrecision()

    @torch.compile(backend=mp)
    def step(x: Tensor) -> Tensor:
        loss = model(x).square().mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
        return loss

    for rows in (4, 4, 7, 9, 12, 4):
        step(torch.randn(rows, 4))
    assert len(mp.graphs) == 2
    assert mp.stats().steps == 6


def test_mode_and_inductor_settings_are_passed_on() -> None:
    settings: list[dict[str, Any]] = [
        {"mode": "max-autotune-no-cudagraphs"},
        {"options": {"inductor": {"epilogue_fusion": False}}},
    ]
    for kwargs in settings:
        model = nn.Linear(4, 2)
        step = torch.compile(_one, backend="mixedprec", **kwargs)
        step(model, torch.optim.SGD(model.parameters()), torch.randn(3, 4))
        assert fxpass.of(step).stats().steps == 1


def _one(model: nn.Module, opt: torch.optim.Optimizer, x: Tensor) -> None:
    model(x).sum().backward()
    opt.step()
    opt.zero_grad()


SCRIPT = """
import sys, torch
weight = torch.nn.Parameter(torch.ones(4))
opt = torch.optim.SGD([weight], lr=1.0)
def step():
    (weight * 3 * float(sys.argv[2])).sum().backward()
    opt.step()
    opt.zero_grad()
torch.compile(step, backend="mixedprec", options={"max_norm": float(sys.argv[1])})()
print(round(1 - weight[0].item(), 4))
"""


@pytest.mark.slow
def test_caches_tell_options_apart_across_processes() -> None:
    """A changed max_norm must not run yesterday's code from the cache on disk."""
    new = str(1 + random.Random().random())  # in no cache of an earlier run
    moved = []
    for max_norm in ("1.0", "2.0", "1.0"):
        command = [sys.executable, "-c", SCRIPT, max_norm, new]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        moved.append(float(out.strip().splitlines()[-1]))
    assert moved == pytest.approx([0.5, 1.0, 0.5], abs=1e-3)


def test_nothing_in_a_step_asks_the_host() -> None:
    """No ``.item()`` or other read of a tensor's value in the generated code."""
    model = nn.Linear(4, 2)
    opt = torch.optim.AdamW(model.parameters())
    mp = fxpass.MixedPrecision(max_norm=1.0, codegen="eager")

    @torch.compile(backend=mp)
    def step(x: Tensor) -> None:
        _one(model, opt, x)

    step(torch.randn(3, 4))
    assert "_local_scalar_dense" not in mp.graphs[0].after
    assert ".item" not in mp.graphs[0].after


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_on_cuda(dtype: str, mode: str | None) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    theirs = GPT(SMALL).cuda()
    ours = copy.deepcopy(theirs)
    extra: dict[str, Any] = {"mode": mode} if mode else {"options": {"dtype": dtype}}
    step, eager = torch.compile(make_step(ours), backend="mixedprec", **extra), make_step(theirs)
    x, y = (t.cuda() for t in batch())
    step(x, y), eager(x, y)
    torch.cuda.set_sync_debug_mode("error")
    losses = [(step(x, y).detach().clone(), eager(x, y).detach().clone()) for _ in range(20)]
    torch.cuda.set_sync_debug_mode("default")
    for a, b in losses:
        assert a.item() == pytest.approx(b.item(), rel=0.03)
