from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxpass import MixedPrecision
from fxpass.ir.graph import tensor
from fxpass.passes.cast import Cast
from fxpass.passes.check_finite import CheckFinite
from fxpass.passes.results import Checked
from tests.support.graphs import graph_of, training_step


def test_one_verdict_and_one_sum_of_squares_per_gradient() -> None:
    step, _ = graph_of(*training_step(), [Cast(), CheckFinite()])
    checked = step.result(Checked)
    assert len(checked.square_sums) == len(checked.gradients) == 4
    assert len(set(checked.found_inf.values())) == 1


def test_float16_is_summed_in_float32_and_float32_in_float64() -> None:
    step, _ = graph_of(*training_step(), [Cast(), CheckFinite()])
    for mark, total in step.result(Checked).square_sums.items():
        summed = total.args[0] if "_to_copy" in str(total.target) else total
        wanted = torch.float32 if tensor(mark).dtype is torch.float16 else torch.float64
        assert tensor(summed).dtype is wanted


class Shift(nn.Module):
    """A loss whose gradient is exactly ``slope`` for every element of the parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 3))

    def forward(self, slope: Tensor) -> Tensor:
        return (self.weight * slope).sum()


def run(slope: Tensor, **options: Any) -> tuple[Shift, MixedPrecision]:
    model = Shift()
    opt = torch.optim.SGD(model.parameters(), lr=1.0)

    def step(slope: Tensor) -> None:
        model(slope).backward()
        opt.step()
        opt.zero_grad()

    mp = MixedPrecision(codegen="eager", **options)
    torch.compile(step, backend=mp)(slope)
    return model, mp


@pytest.mark.breadth
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_single_bad_element_is_found(value: float, dtype: str) -> None:
    slope = torch.ones(3, 3)
    slope[1, 2] = value
    model, mp = run(slope, dtype=dtype)
    assert mp.stats().skipped == 1
    assert torch.equal(model.weight, torch.zeros(3, 3))


def test_inf_and_minus_inf_do_not_cancel() -> None:
    slope = torch.ones(3, 3)
    slope[0, 0], slope[2, 2] = float("inf"), float("-inf")
    assert run(slope)[1].stats().skipped == 1


def test_finite_float32_gradients_whose_square_overflows_are_finite() -> None:
    model, mp = run(torch.full((3, 3), 1e30), dtype="float32")
    assert mp.stats().skipped == 0
    assert torch.equal(model.weight, torch.full((3, 3), -1e30))


def test_two_finite_float16_gradients_of_60000_are_finite_and_clipped() -> None:
    model, mp = run(torch.full((3, 3), 60000.0), loss_scale=1.0, max_norm=1.0)
    stats = mp.stats()
    assert stats.skipped == 0
    assert stats.clipped == 1
    assert stats.grad_norm == pytest.approx(180000.0, rel=1e-3)
    assert torch.allclose(model.weight, torch.full((3, 3), -1 / 3), rtol=1e-3)


def test_the_parameter_is_named() -> None:
    slope = torch.ones(3, 3)
    slope[0, 0] = float("nan")
    (entry,) = run(slope)[1].stats().nonfinite
    assert "weight" in entry
    assert entry.endswith(": nan")


@pytest.mark.parametrize("loss_scale", ["dynamic", "headroom"])
@pytest.mark.parametrize("others", [True, False])
def test_gradients_without_elements_are_finite(others: bool, loss_scale: str) -> None:
    """Also where an optimizer has no others, before the first gradient that has elements."""
    empty, weight = nn.Parameter(torch.zeros(0, 4)), nn.Parameter(torch.ones(4))
    opts = [torch.optim.SGD([p], lr=0.5) for p in (empty, weight)]
    mp = MixedPrecision(codegen="eager", loss_scale=loss_scale)

    @torch.compile(backend=mp)
    def step() -> None:
        for param, opt in list(zip((empty, weight), opts, strict=True))[: 1 + others]:
            param.sum().backward()
            opt.step()
            opt.zero_grad()

    for _ in range(2):
        step()
    assert mp.stats()[:2] == (2, 0)
    assert torch.equal(weight, torch.full((4,), 0.0 if others else 1.0))
