"""Module names, ``keep_fp32`` and regions with autocast off, however the step reaches its model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from fxpass.analysis.modules import module_names
from fxpass.ir.graph import StepGraph, tensor
from fxpass.ir.marks import GRAD
from fxpass.passes.cast import Cast
from tests.support.graphs import graph_of, training_step

LOW = torch.float16


def _of(step: StepGraph, name: str) -> list[Node]:
    return [n for n in step.nodes() if str(n.target) == f"aten.{name}.default"]


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Trainer:
    def __init__(self, model: Nested) -> None:
        self.model, self.loss = model, nn.MSELoss()
        self.opt = torch.optim.SGD(model.parameters(), lr=0.1)

    def whole(self, x: Tensor, y: Tensor) -> None:
        self.loss(self.model(x), y).backward()
        self.opt.step()
        self.opt.zero_grad()

    def parts(self, x: Tensor, y: Tensor) -> None:
        x = self.model.blocks[1](self.model.blocks[0](x))
        self.loss(self.model.head(x), y).backward()
        self.opt.step()
        self.opt.zero_grad()

    def given(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        F.mse_loss(model(x), y).backward()
        self.opt.step()
        self.opt.zero_grad()


ALIVE = Nested()


def _steps() -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    model, batch = ALIVE, (torch.randn(6, 4), torch.randn(6, 2))
    trainer = Trainer(model)

    def of_a_global(x: Tensor, y: Tensor) -> None:
        trainer.given(ALIVE, x, y)

    return {
        "closure": (training_step(model)[0], batch),
        "global": (of_a_global, batch),
        "attribute": (trainer.whole, batch),
        "argument": (trainer.given, (model, *batch)),
        "parts": (trainer.parts, batch),
    }


@pytest.mark.breadth
@pytest.mark.parametrize("name", ["closure", "global", "attribute", "argument", "parts"])
@pytest.mark.parametrize("pattern", ["blocks.1", "blocks.1.*", "*.1.0"])
def test_keep_fp32_names_modules_as_named_modules_does(name: str, pattern: str) -> None:
    function, args = _steps()[name]
    step, _ = graph_of(function, args, [Cast(keep_fp32=(pattern,))])
    assert [tensor(n).dtype for n in _of(step, "addmm")] == [LOW, torch.float32, LOW]
    assert [tensor(n).dtype for n in _of(step, "mm")] == [LOW] * 2 + [torch.float32] * 2 + [LOW]
    stored = [tensor(n).dtype for n in step.marks(GRAD) if tensor(n).ndim == 2]
    assert sorted(map(str, stored)) == ["torch.float16", "torch.float16", "torch.float32"]


def test_regions_with_autocast_off_stay_in_float32_in_both_directions() -> None:
    class Region(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            with torch.autocast("cpu", enabled=False):
                return self.second(x.float())

    function, args = training_step(Region())
    step, _ = graph_of(function, args, [Cast()])
    assert [tensor(n).dtype for n in _of(step, "addmm")] == [LOW, torch.float32]
    assert [tensor(n).dtype for n in _of(step, "mm")] == [torch.float32, torch.float32, LOW]


def test_names_are_those_of_named_modules() -> None:
    model = Nested()
    known = dict(model.named_modules())
    for function, args in (
        training_step(model),
        (Trainer(model).whole, (torch.randn(6, 4), torch.randn(6, 2))),
    ):
        step, _ = graph_of(function, args)
        names = module_names(step)
        found = [names[n][-1] for n in _of(step, "addmm")]
        assert [name.split("model.")[-1] for name in found] == ["blocks.0.0", "blocks.1.0", "head"]
        assert known.keys() >= {name.split("model.")[-1] for name in found}
