"""Optimizers of torch and of others on one small model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.programs.blocks import mlp
from bench.programs.program import CALLS, Program, Training, add

Make = Callable[[Iterable[Tensor]], Any]


def _register(name: str, source: str, make: Make, quick: bool = False) -> None:
    add(Program(name, "optimizers", source, lambda: _training(make), quick))


def _training(make: Make) -> Training:
    model = mlp(8, 16, 4)
    optimizer = make(model.parameters())
    if hasattr(optimizer, "train"):
        optimizer.train()

    def step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    return Training(step, [(torch.randn(16, 8), torch.randint(4, (16,))) for _ in range(CALLS)])


def _torch(name: str, **settings: Any) -> Make:
    return lambda params: getattr(torch.optim, name)(params, **settings)


def _lion(params: Any) -> Any:
    from lion_pytorch import Lion

    return Lion(params, lr=1e-3, weight_decay=1e-2)


def _schedule_free(params: Any) -> Any:
    from schedulefree import AdamWScheduleFree

    return AdamWScheduleFree(params, lr=1e-2, warmup_steps=3)


def _prodigy(params: Any) -> Any:
    from prodigyopt import Prodigy

    return Prodigy(params, lr=1.0)


def _timm(name: str) -> Make:
    def make(params: Any) -> Any:
        from timm.optim import create_optimizer_v2

        return create_optimizer_v2(list(params), opt=name, lr=1e-3)

    return make


def _collected(name: str, **settings: Any) -> Make:
    def make(params: Any) -> Any:
        import pytorch_optimizer

        return getattr(pytorch_optimizer, name)(params, **settings)

    return make


_register("radam", "torch", _torch("RAdam", lr=1e-2), quick=True)
_register("adafactor", "torch", _torch("Adafactor", lr=1e-2))
_register("lion", "lion-pytorch", _lion)
_register("schedule_free", "schedulefree", _schedule_free)
_register("prodigy", "prodigyopt", _prodigy)
_register("timm_lamb", "timm", _timm("lamb"))
_register("timm_adopt", "timm", _timm("adopt"))
_register("timm_nadamw", "timm", _timm("nadamw"))
_register("adabelief", "pytorch_optimizer", _collected("AdaBelief", lr=1e-2))
_register("ranger", "pytorch_optimizer", _collected("Ranger", lr=1e-2))

_register(
    "muon", "own, Muon for matrices and AdamW for the rest", lambda params: _Both(list(params)), quick=True
)


class _Both:
    """Two optimizers behind one name, as Muon is used."""

    def __init__(self, params: list[Tensor]) -> None:
        self.parts = [
            torch.optim.Muon([p for p in params if p.dim() == 2], lr=1e-2),
            torch.optim.AdamW([p for p in params if p.dim() != 2], lr=1e-2),
        ]

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()

    def step(self) -> None:
        for part in self.parts:
            part.step()
