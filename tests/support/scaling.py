"""One step with a loss scale, run by torch.amp.GradScaler and by fxpass, for tests that compare the two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxpass import DynamicLossScale, MixedPrecision
from tests.support.helpers import same

INF = float("inf")
Build = Callable[[], tuple[Sequence[nn.Parameter], torch.optim.Optimizer, Callable[[Tensor], Tensor]]]


def slopes(overflows: str) -> list[Tensor]:
    """One step's input per character: ``x`` makes the first element of the gradient inf, ``n`` nan."""
    return [torch.tensor([{"x": INF, "n": float("nan")}.get(kind, 1.0), 1.0]) for kind in overflows]


def trajectory(policy: object, overflows: str, **options: Any) -> tuple[list[float], MixedPrecision]:
    """The scale after each step of a tiny model whose gradient is the step's input."""
    weight = nn.Parameter(torch.zeros(2))
    opt = torch.optim.SGD([weight], lr=0.1)
    mp = MixedPrecision(codegen="eager", loss_scale=policy, **options)  # pyrefly: ignore[bad-argument-type]

    @torch.compile(backend=mp)
    def step(slope: Tensor) -> None:
        (weight * slope).sum().backward()
        opt.step()
        opt.zero_grad()

    scales = []
    for slope in slopes(overflows):
        step(slope)
        scales.append(mp.scale.item())
    return scales, mp


def against_grad_scaler(build: Build, inputs: Sequence[Tensor], **settings: Any) -> MixedPrecision:
    """Run ``build``'s step in float32 both ways: parameters, scale and tracker must agree after each step."""
    scaler = torch.amp.GradScaler("cpu", **settings)
    theirs, their_opt, their_loss = build()
    ours, opt, loss = build()
    policy = DynamicLossScale.like("torch", **settings)
    mp = MixedPrecision(dtype="float32", codegen="eager", loss_scale=policy)

    @torch.compile(backend=mp)
    def step(x: Tensor) -> None:
        loss(x).backward()
        opt.step()
        opt.zero_grad()

    for number, x in enumerate(inputs):
        scaler.scale(their_loss(x)).backward()
        scaler.step(their_opt)
        scaler.update()
        their_opt.zero_grad()
        step(x)
        assert mp.scale.item() == scaler.get_scale(), f"step {number}"
        assert mp.stats().growth_tracker == scaler.state_dict()["_growth_tracker"], f"step {number}"
        for a, b in zip(ours, theirs, strict=True):
            same(a, b, f"parameter after step {number}")
    return mp
