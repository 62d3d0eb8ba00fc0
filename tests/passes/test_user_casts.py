"""What the user says about precision is kept: casts, autocast regions, masks, a float16 loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from fxpass import MixedPrecision
from fxpass.ir.graph import Phase, StepGraph, phase, tensor
from fxpass.passes.cast import Cast
from fxpass.passes.scale_loss import ScaleLoss
from tests.support.graphs import graph_of, training_step

aten = torch.ops.aten


class With(nn.Module):
    """``body`` between two linear layers."""

    def __init__(self, body: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.body = nn.Linear(4, 4), nn.Linear(4, 2), body

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(self.first(x)))


def cast(model: nn.Module, dtype: torch.dtype = torch.float16) -> StepGraph:
    step, args = training_step(model)
    return graph_of(step, args, [ScaleLoss(), Cast(dtype)])[0]


def products(step: StepGraph) -> list[Node]:
    return [n for n in step.nodes() if n.target in (aten.mm.default, aten.addmm.default)]


def losses(model: nn.Module, steps: int = 3, **options: Any) -> tuple[list[float], MixedPrecision]:
    mp = MixedPrecision(codegen="eager", **options)
    step, args = training_step(model)
    compiled = torch.compile(step, backend=mp)
    return [float(compiled(*args).detach()) for _ in range(steps)], mp


@pytest.mark.parametrize(
    "up", [lambda h: h.float(), lambda h: h.to(torch.float32), lambda h: h.to(dtype=torch.float32)]
)
def test_a_cast_up_that_the_float32_program_does_not_need(up: Callable[[Tensor], Tensor]) -> None:
    body = lambda h: up(h).mul(1e6).mul(1e-6)  # noqa: E731 - float16 would overflow between the two
    step = cast(With(body))
    scaled = [n for n in step.nodes() if n.target is aten.mul.Tensor and n.args[1] in (1e6, 1e-6)]
    assert {tensor(n).dtype for n in scaled} == {torch.float32}
    found, mp = losses(With(body))
    assert all(loss == loss for loss in found)
    assert mp.stats().skipped == 0


def test_an_idle_cast_leaves_nothing_behind() -> None:
    for dtype in (torch.float16, torch.float32):
        step = cast(With(lambda h: torch.exp(h).float()), dtype)
        kept = [n for n in step.nodes() if n.target is aten._to_copy.default]
        assert not [n for n in kept if tensor(n.args[0]).dtype == tensor(n).dtype]


def test_a_cast_whose_result_is_changed_in_place_stays_an_alias() -> None:
    weight = nn.Linear(4, 2)
    opt = torch.optim.SGD(weight.parameters(), lr=0.1)

    def step(x: Tensor) -> tuple[Tensor, Tensor]:
        h = x + 1
        h.float().add_(1)
        loss = weight(h).sum()
        loss.backward()
        opt.step()
        opt.zero_grad()
        return loss.detach(), h

    x = torch.zeros(3, 4)
    _, h = torch.compile(step, backend=MixedPrecision(codegen="eager"))(x)
    assert h.eq(2).all()


def test_a_bfloat16_region_stays_bfloat16() -> None:
    def region(h: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.linear(h, torch.ones(4, 4)).float()

    found = [tensor(n).dtype for n in products(cast(With(region))) if phase(n) is Phase.FORWARD]
    assert found == [torch.float16, torch.bfloat16, torch.float16]


def test_a_region_with_autocast_off_computes_in_float32_and_so_does_its_backward() -> None:
    weight = nn.Parameter(torch.ones(4, 4))

    def region(h: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return F.linear(h, weight)

    step = cast(With(region))
    wide = [phase(n) for n in products(step) if tensor(n).dtype is torch.float32]
    assert wide == [Phase.FORWARD, Phase.BACKWARD, Phase.BACKWARD]


def test_a_weight_that_the_user_casts_is_cast_again_in_backward() -> None:
    class Autocast(With):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.float16):
                return super().forward(x).float()

    step = cast(Autocast(torch.relu))
    weights = {n for n in step.roles if n.op == "placeholder" and tensor(n).ndim == 2}
    copies = [n for n in step.nodes() if n.target is aten._to_copy.default and n.args[0] in weights]
    order = {n: i for i, n in enumerate(step.graph.nodes)}
    backward = min(i for n, i in order.items() if n.op == "call_function" and phase(n) is Phase.BACKWARD)

    def last_use(node: Node) -> int:
        return max((last_use(u) if u.target is aten.t.default else order[u] for u in node.users), default=0)

    assert copies
    assert all(last_use(n) < backward or order[n] > backward for n in copies)


def test_a_float16_loss_does_not_overflow_the_scale() -> None:
    model = nn.Linear(4, 2)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(x: Tensor) -> Tensor:
        loss = model(x).half().square().mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
        return loss

    mp = MixedPrecision(codegen="eager", loss_scale=2.0**16)
    loss = torch.compile(step, backend=mp)(torch.randn(3, 4))
    assert loss.dtype is torch.float16
    assert mp.stats().skipped == 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("lowest", [torch.finfo(torch.float32).min, -1e9])
def test_a_row_of_an_additive_mask_does_not_become_infinite(lowest: float, dtype: str) -> None:
    mask = torch.zeros(6, 6)
    mask[0], mask[1, 2:] = lowest, float("-inf")

    def attend(h: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(h[None], h[None], h[None], attn_mask=mask)[0]

    torch.manual_seed(1)
    model = With(attend)
    twin = With(attend)
    twin.load_state_dict(model.state_dict())
    torch.manual_seed(2)
    found, _ = losses(model, 2, dtype=dtype, loss_scale=None)
    torch.manual_seed(2)
    expected, _ = losses(twin, 2, dtype="float32")
    assert found == pytest.approx(expected, rel=0.03)


def test_an_evaluated_lstm_runs_in_every_dtype() -> None:
    lstm, x = nn.LSTM(4, 4, batch_first=True), torch.randn(2, 3, 4)
    with torch.no_grad():
        expected = lstm(x)[0]
        for dtype in ("float16", "bfloat16"):
            torch.compiler.reset()
            run = torch.compile(lambda x: lstm(x)[0], backend=MixedPrecision(dtype=dtype, codegen="eager"))
            torch.testing.assert_close(run(x), expected, rtol=2e-2, atol=2e-2)


def test_a_branch_runs_as_written() -> None:
    def step(x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda h: h.sin(), lambda h: h.cos(), (x @ x,))

    x = torch.eye(4)
    with torch.no_grad():
        out = torch.compile(step, backend=MixedPrecision(codegen="eager"))(x)
    torch.testing.assert_close(out, x.sin(), rtol=1e-3, atol=1e-3)
