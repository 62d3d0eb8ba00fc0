"""What the user's code does to gradients between backward and step decides with them about the skip.

An inf that an edit removes is none, as in eager; but not one of the loss scale's own making.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxpass
from fxpass import MixedPrecision
from tests.support.helpers import same

Edit = Callable[[nn.Parameter], Any]
INF, NAN = float("inf"), float("nan")
SCALE = fxpass.DynamicLossScale(init_scale=8.0)


def zeroed(p: nn.Parameter) -> None:
    assert p.grad is not None
    p.grad.nan_to_num_(0.0, 0.0, 0.0)


def clamped(p: nn.Parameter) -> None:
    assert p.grad is not None
    p.grad.clamp_(-0.5, 0.5)


def masked(p: nn.Parameter) -> None:
    assert p.grad is not None
    p.grad.masked_fill_(~p.grad.isfinite(), 0.0)


def replaced(p: nn.Parameter) -> None:
    assert p.grad is not None
    p.grad = torch.where(p.grad.isfinite(), p.grad, 0.1)


def clipped(p: nn.Parameter) -> None:
    nn.utils.clip_grad_value_([p], 0.5)


class Slopes(nn.Module):
    """Its loss has the sums of ``slope``'s columns as one parameter's gradient, 0.25 as the other's."""

    def __init__(self) -> None:
        super().__init__()
        self.steep = nn.Parameter(torch.ones(3, 3))
        self.other = nn.Parameter(torch.ones(3, 3))

    def forward(self, slope: Tensor) -> Tensor:
        return (slope @ self.steep).sum() + (self.other * 0.25).sum()


def train(
    edit: Edit, slopes: list[Tensor], compiled: MixedPrecision | None, hook: bool = False
) -> list[dict[str, Tensor]]:
    """The parameters and the state after every call."""
    torch.compiler.reset()
    model = Slopes()
    opt = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)

    def step(slope: Tensor) -> None:
        model(slope).backward()
        for p in model.parameters():
            edit(p)
        opt.step()
        opt.zero_grad()

    run = step if compiled is None else torch.compile(step, backend=compiled)
    states = []
    for slope in slopes:
        run(slope)
        buffers = {f"buffer {i}": opt.state[p]["momentum_buffer"] for i, p in enumerate(model.parameters())}
        states.append({k: v.detach().clone() for k, v in (dict(model.named_parameters()) | buffers).items()})
    return states


def slopes(value: float) -> list[Tensor]:
    bad = torch.ones(3, 3)
    bad[1, 2] = value
    return [torch.ones(3, 3), bad, torch.ones(3, 3)]


@pytest.mark.breadth
@pytest.mark.parametrize(("edit", "skip"), [(zeroed, "tensor"), (clamped, "step")])
@pytest.mark.parametrize("loss_scale", [None, SCALE, 4.0], ids=["none", "dynamic", "static"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_an_inf_that_an_edit_removes_is_none(edit: Edit, dtype: str, loss_scale: Any, skip: str) -> None:
    calls = slopes(INF if edit is clamped else NAN)
    mp = MixedPrecision(codegen="eager", dtype=dtype, loss_scale=loss_scale, skip=skip)
    actual = train(edit, calls, mp)
    assert mp.stats().skipped == 0
    same(actual, train(edit, calls, None), "state")


@pytest.mark.breadth
@pytest.mark.parametrize(("edit", "skip"), [(replaced, "step"), (masked, "step"), (clipped, "tensor")])
def test_by_default_too(edit: Edit, skip: str) -> None:
    calls = slopes(-INF)
    mp = MixedPrecision(loss_scale=SCALE, skip=skip)
    actual = train(edit, calls, mp)
    assert mp.stats().skipped == 0
    assert mp.stats().steps == 3
    same(actual, train(edit, calls, None), "state")


@pytest.mark.parametrize("skip", ["step", "tensor"])
def test_an_edit_that_leaves_a_nan_skips(skip: str) -> None:
    mp = MixedPrecision(codegen="eager", loss_scale=SCALE, skip=skip)
    first, second, _ = train(clamped, slopes(NAN), mp)
    assert mp.stats().skipped == 1
    same(second["steep"], first["steep"], "steep", exact=True)
    assert torch.equal(second["other"], first["other"]) == (skip == "step")


@pytest.mark.parametrize(("edit", "skip"), [(zeroed, "step"), (clipped, "tensor")])
def test_no_edit_hides_an_overflow_of_the_scales_own_making(edit: Edit, skip: str) -> None:
    """Eager has a gradient of 12288 here. A scale of 8 makes it inf, and one of 4 does not."""
    calls = [torch.full((3, 3), 4096.0)] * 3
    mp = MixedPrecision(loss_scale=SCALE, skip=skip)
    states = train(edit, calls, mp)
    assert mp.stats().skipped == 1
    assert float(mp.scale) == 4.0
    assert torch.equal(states[0]["steep"], torch.ones(3, 3))
    expected = train(edit, calls[1:], None)
    same([s["steep"] for s in states[1:]], [s["steep"] for s in expected], "steep")


class Root(nn.Module):
    """A finite loss with an infinite gradient, whatever the scale."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.0, 1.0]))

    def forward(self) -> Tensor:
        return (torch.ones(1, 2) @ self.weight.abs().sqrt().unsqueeze(1)).sum()


@pytest.mark.parametrize(("dtype", "skipped"), [("float16", 3), ("bfloat16", 0), ("float32", 0)])
def test_at_a_scale_of_one_an_overflow_is_the_models(dtype: str, skipped: int) -> None:
    """Only float16 overflows by a scale: its steps are skipped until the scale is above suspicion."""
    model, mp = Root(), MixedPrecision(dtype=dtype, loss_scale=SCALE)
    opt = torch.optim.SGD(model.parameters(), lr=0.01)

    @torch.compile(backend=mp)
    def step() -> None:
        model().backward()
        zeroed(model.weight)
        opt.step()
        opt.zero_grad()

    for _ in range(6):
        step()
    assert mp.stats().skipped == skipped
    expected = torch.tensor(1.0)
    for _ in range(6 - skipped):
        expected -= 0.01 * 0.5 / expected.sqrt()
    torch.testing.assert_close(
        model.weight.detach(), torch.stack([torch.tensor(0.0), expected]), rtol=2e-3, atol=0.0
    )


def test_headroom_learns_nothing_of_an_inf_that_an_edit_removes() -> None:
    mp = MixedPrecision(codegen="eager", loss_scale=fxpass.HeadroomLossScale(init_scale=256.0))
    calls = slopes(INF)
    actual = train(zeroed, [*calls, *calls], mp)
    assert mp.stats().skipped == 0
    assert 0 < float(mp.scale) < INF
    same(actual, train(zeroed, [*calls, *calls], None), "state")


def test_a_hook_that_removes_an_inf() -> None:
    states = []
    for handle in (None, MixedPrecision(codegen="eager", loss_scale=SCALE)):
        torch.compiler.reset()
        model = Slopes()
        model.steep.register_hook(lambda g: torch.nan_to_num(g, 0.0, 1.0, -1.0))
        opt = torch.optim.SGD(model.parameters(), lr=0.5)

        def step(slope: Tensor, model: Slopes = model, opt: Any = opt) -> None:
            model(slope).backward()
            opt.step()
            opt.zero_grad()

        run = step if handle is None else torch.compile(step, backend=handle)
        for slope in slopes(INF):
            run(slope)
        states.append(dict(model.named_parameters()))
        assert handle is None or handle.stats().skipped == 0
    same(states[1], states[0], "parameters")


def test_statistics_of_what_an_edit_left_follow_eager() -> None:
    """With skip='tensor' too: no update is skipped, so nothing is kept."""
    states = []
    for handle in (None, MixedPrecision(codegen="eager", loss_scale=SCALE, skip="tensor")):
        torch.compiler.reset()
        model, fisher = Slopes(), torch.zeros(3, 3)
        opt = torch.optim.SGD(model.parameters(), lr=0.5)

        def step(slope: Tensor, model: Slopes = model, opt: Any = opt, fisher: Tensor = fisher) -> None:
            model(slope).backward()
            zeroed(model.steep)
            with torch.no_grad():
                assert model.steep.grad is not None
                fisher.add_(model.steep.grad.square())
            opt.step()
            opt.zero_grad()

        run = step if handle is None else torch.compile(step, backend=handle)
        for slope in slopes(INF):
            run(slope)
        states.append(fisher)
    same(states[1], states[0], "fisher")
