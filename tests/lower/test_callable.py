"""What Inductor is given lies as it was traced; what it cannot compile is an error that says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxpass
from fxpass.lower import callable as lowering
from tests.support.helpers import Training, compare


def with_nothing(h: Tensor) -> Tensor:
    """A concatenation with nothing is its other part, as it lies: eager's is contiguous."""
    return torch.cat([torch.tensor([]), h.view(-1, 2, 4).transpose(0, 1)], dim=-2).reshape(2, -1)


def strided(h: Tensor) -> Tensor:
    mixed = torch.cat([torch.tensor([]), h.view(-1, 2, 4).transpose(0, 1)], dim=-2)
    return mixed.as_strided((4, 2), (2, 1))


@pytest.mark.breadth(2)
@pytest.mark.parametrize("body", [with_nothing, strided])
def test_views_see_the_layout_they_were_traced_for(body: Callable[[Tensor], Tensor]) -> None:
    def build() -> Training:
        model = nn.Linear(4, 8)
        opt = torch.optim.SGD(model.parameters(), lr=1e-4)
        scheduler = torch.optim.lr_scheduler.StepLR(opt, 1)

        def step(x: Tensor, y: Tensor) -> Tensor:
            opt.zero_grad()
            mixed = body(model(x)).flatten()
            loss = (mixed * torch.arange(len(mixed))).square().mean()
            loss.backward()
            opt.step()
            scheduler.step()
            return loss

        return Training(step, [model], [opt])

    compare(build)


def test_what_inductor_cannot_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Said as such, also where the graph ends in a break; the weights keep their bits, the hint trains."""
    model = nn.Linear(4, 2)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1)

    def step(x: Tensor) -> None:
        opt.zero_grad()
        model(x).sum().backward()
        opt.step()
        scheduler.step()

    def fail(*_: Any, **__: Any) -> Any:
        raise ValueError("\nno such kernel\nwhile lowering")

    monkeypatch.setattr(lowering._torch, "compile_graph", fail)
    before = model.weight.detach().clone()
    x = torch.randn(3, 4)
    with pytest.raises(fxpass.LoweringError, match="compile the step: ValueError: no such kernel"):
        torch.compile(step, backend=fxpass.MixedPrecision())(x)
    assert torch.equal(model.weight, before)
    mp = fxpass.MixedPrecision(codegen="eager")
    torch.compile(step, backend=mp)(x)
    assert mp.stats().steps == 1
