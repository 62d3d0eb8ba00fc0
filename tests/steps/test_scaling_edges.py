"""The corners of loss scaling, each against torch.amp.GradScaler in the same run."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fxpass import DynamicLossScale, MixedPrecision, OptimizerError, StaticLossScale
from tests.support.helpers import same
from tests.support.scaling import INF, Build, against_grad_scaler, slopes, trajectory

NAN = float("nan")


def linear_in(weight: Tensor, optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD) -> Build:
    """A loss whose gradient is its input, broadcast over the weight."""

    def build():
        param = nn.Parameter(weight.clone(memory_format=torch.preserve_format))
        return [param], optimizer([param], lr=0.5), lambda slope: (param * slope).sum()

    return build


@pytest.mark.parametrize("bad", [INF, -INF, NAN])
@pytest.mark.parametrize("position", [0, 3])
def test_a_single_bad_element(bad: float, position: int) -> None:
    inputs = [torch.ones(4), torch.ones(4), torch.ones(4)]
    inputs[1][position] = bad
    assert against_grad_scaler(linear_in(torch.zeros(4)), inputs).stats().skipped == 1


def test_inf_and_minus_inf_in_one_tensor() -> None:
    inputs = [torch.ones(4), torch.tensor([INF, 1.0, -INF, 1.0])]
    assert against_grad_scaler(linear_in(torch.zeros(4)), inputs).stats().skipped == 1


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_an_overflow_in_the_first_step(optimizer: type[torch.optim.Optimizer]) -> None:
    mp = against_grad_scaler(linear_in(torch.zeros(2), optimizer), slopes("x.x."), growth_interval=1)
    assert mp.stats().skipped == 2


def test_a_parameter_without_a_gradient_and_an_empty_group() -> None:
    def build():
        used, unused = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.ones(2))
        opt = torch.optim.SGD([{"params": [used, unused]}, {"params": []}], lr=0.5)
        return [used, unused], opt, lambda slope: (used * slope).sum()

    assert against_grad_scaler(build, slopes(".x.")).stats().skipped == 1


def test_a_parameter_of_size_zero() -> None:
    def build():
        params = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(0, 3))]
        return params, torch.optim.SGD(params, lr=0.5), lambda s: (params[0] * s).sum() + params[1].sum()

    mp = against_grad_scaler(build, slopes(".x."))
    assert len(mp.diagnosis()) == 1, "nothing to check in a gradient without elements"


@pytest.mark.parametrize("bad", [1.0, INF])
def test_expanded_and_non_contiguous_gradients(bad: float) -> None:
    def build():
        flat = nn.Parameter(torch.zeros(4))  # its gradient is one number, expanded
        turned = nn.Parameter(torch.zeros(3, 2).t())
        opt = torch.optim.SGD([flat, turned], lr=0.5)
        return [flat, turned], opt, lambda s: flat.sum() * s[0] + (turned.t() * s[1]).sum()

    inputs = [torch.ones(2), torch.tensor([bad, 1.0]), torch.tensor([1.0, bad]), torch.ones(2)]
    mp = against_grad_scaler(build, inputs)
    assert mp.stats().skipped == (2 if bad == INF else 0)


def test_float64_gradients_beyond_float32_are_finite() -> None:
    weight = torch.zeros(2, dtype=torch.float64)
    values = ([1e200, 1.0], [INF, 1.0], [1.0, NAN], [2.0, 3.0])
    inputs = [torch.tensor(v, dtype=torch.float64) for v in values]
    assert against_grad_scaler(linear_in(weight), inputs).stats().skipped == 2


def test_float16_parameters_are_refused_beside_float32_ones() -> None:
    """By GradScaler when it unscales, by fxpass when it captures; nothing has changed then."""
    params = [nn.Parameter(torch.zeros(2, dtype=torch.float16)), nn.Parameter(torch.zeros(2))]
    opt = torch.optim.SGD(params, lr=0.5)

    def loss() -> Tensor:
        return params[0].float().sum() + params[1].sum()

    @torch.compile(backend=MixedPrecision(codegen="eager"))
    def step() -> None:
        loss().backward()
        opt.step()
        opt.zero_grad()

    with pytest.raises(OptimizerError, match="float16"):
        step()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss()).backward()
    with pytest.raises(ValueError, match="FP16"):
        scaler.step(opt)
    assert not any(p.any() for p in params)


@pytest.mark.parametrize("scale", [3.0, 1.0, 2.0**-3, 1e5])
def test_scales_that_are_no_power_of_two_or_no_scale(scale: float) -> None:
    settings = {"init_scale": scale, "growth_interval": 2}
    mp = against_grad_scaler(linear_in(torch.zeros(2)), slopes("..x..x."), **settings)
    assert mp.stats().skipped == 2


def test_at_the_bottom_the_scale_stays_a_number_where_grad_scaler_reaches_zero() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-148)
    weight = nn.Parameter(torch.zeros(2))
    opt = torch.optim.SGD([weight], lr=0.5)
    for slope in slopes("xx."):
        scaler.scale((weight * slope).sum()).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
    assert scaler.get_scale() == 0.0
    assert not weight.isfinite().all(), "a finite gradient divided by a scale of zero"
    policy = DynamicLossScale.like("torch", init_scale=2.0**-125)
    scales, mp = trajectory(policy, "xxx.", dtype="float32")
    assert scales == [2.0**-126] * 4
    assert mp.stats().steps - mp.stats().skipped == 1


def test_at_the_top_growth_that_would_overflow_is_refused() -> None:
    inputs = [torch.full((2,), 2.0**-30)] * 3
    mp = against_grad_scaler(linear_in(torch.zeros(2)), inputs, init_scale=2.0**126, growth_interval=1)
    assert mp.scale.item() == 2.0**127


def test_static_scale_checks_and_skips() -> None:
    """Apex applies the update of an overflow with a static scale; DeepSpeed skips, and so does fxpass."""
    scales, mp = trajectory(StaticLossScale("2**7"), ".x.n")  # pyrefly: ignore[bad-argument-type]
    assert scales == [128.0] * 4
    assert mp.stats().skipped == 2


def test_an_overflow_in_one_of_two_optimizers_skips_the_whole_step() -> None:
    """GradScaler steps the other optimizer (checked here); both back the scale off once."""
    params = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    expected = copy.deepcopy(params)
    opts = [torch.optim.SGD([p], lr=0.5) for p in params]
    eager = [torch.optim.SGD([p], lr=0.5) for p in expected]
    scaler = torch.amp.GradScaler("cpu")
    mp = MixedPrecision(dtype="float32", codegen="eager", loss_scale=DynamicLossScale())

    def loss(a: Tensor, b: Tensor, slope: Tensor) -> Tensor:
        return a.sum() + (b * slope).sum()

    @torch.compile(backend=mp)
    def step(slope: Tensor) -> None:
        loss(params[0], params[1], slope).backward()
        for opt in opts:
            opt.step()
            opt.zero_grad()

    (bad,) = slopes("x")
    step(bad)
    scaler.scale(loss(expected[0], expected[1], bad)).backward()
    for opt in eager:
        scaler.step(opt)
    scaler.update()
    assert mp.scale.item() == scaler.get_scale() == 2.0**15
    assert not torch.equal(expected[0], torch.zeros(2))
    assert torch.equal(params[0], torch.zeros(2))
    assert torch.equal(params[1], torch.zeros(2))


def test_nan_written_after_backward() -> None:
    """GradScaler looks at what the optimizer reads, the user's edits included: both skip."""
    ours, theirs = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    opt, eager = torch.optim.SGD([ours], lr=0.5), torch.optim.SGD([theirs], lr=0.5)
    mp = MixedPrecision(dtype="float32", codegen="eager", loss_scale=DynamicLossScale())
    scaler = torch.amp.GradScaler("cpu")

    @torch.compile(backend=mp)
    def step() -> None:
        ours.sum().backward()
        ours.grad = ours.grad * NAN  # pyrefly: ignore[bad-assignment, unsupported-operation]
        opt.step()
        opt.zero_grad()

    step()
    scaler.scale(theirs.sum()).backward()
    assert theirs.grad is not None
    theirs.grad.mul_(NAN)
    scaler.step(eager)
    scaler.update()
    assert torch.equal(theirs, torch.zeros(2))
    assert torch.equal(ours, torch.zeros(2))
    assert (mp.stats().steps, mp.stats().skipped) == (1, 1)
    assert mp.scale.item() == scaler.get_scale()


@pytest.mark.parametrize("order", ["x.", ".x", "..", "xx"])
def test_one_bad_micro_batch_discards_the_accumulated_step(order: str) -> None:
    ours, theirs = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    opt, eager = torch.optim.SGD([ours], lr=0.5), torch.optim.SGD([theirs], lr=0.5)
    mp = MixedPrecision(dtype="float32", codegen="eager", loss_scale=DynamicLossScale())
    scaler = torch.amp.GradScaler("cpu")
    first, second = slopes(order)

    @torch.compile(backend=mp)
    def step(first: Tensor, second: Tensor) -> None:
        (ours * first).sum().backward()
        (ours * second).sum().backward()
        opt.step()
        opt.zero_grad()

    step(first, second)
    for slope in (first, second):
        scaler.scale((theirs * slope).sum()).backward()
    scaler.step(eager)
    scaler.update()
    same(ours, theirs, "parameter", exact=True)
    assert mp.scale.item() == scaler.get_scale()
    assert len(mp.diagnosis()) == 1
    assert mp.diagnosis()[0].times == (1 if "x" in order else 0)
