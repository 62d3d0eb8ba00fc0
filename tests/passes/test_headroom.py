"""The headroom policy of update_scale: how fast it moves, and how often it overflows."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

from fxpass import DynamicLossScale, HeadroomLossScale, LossScale, MixedPrecision, OptionError

F16_MAX = torch.finfo(torch.float16).max


def train(
    policy: LossScale | str, magnitudes: Iterable[float]
) -> tuple[list[float], list[bool], MixedPrecision]:
    """Scale of each step and whether it overflowed; ``magnitudes`` are those of its float16 gradient."""
    weight = nn.Parameter(torch.zeros(1, 2))
    opt = torch.optim.SGD([weight], lr=0.0)
    mp = MixedPrecision(codegen="eager", loss_scale=policy)
    x = torch.tensor([[1.0, 0.25]])

    @torch.compile(backend=mp)
    def step(slope: Tensor) -> None:
        (nn.functional.linear(x, weight).float() * slope).sum().backward()
        opt.step()
        opt.zero_grad()

    scales, overflows = [], []
    for magnitude in magnitudes:
        scales.append(mp.scale.item())
        step(torch.tensor(magnitude))
        overflows.append(not _fits(magnitude * scales[-1]))
    assert mp.stats().skipped == sum(overflows)
    return scales, overflows, mp


def _fits(value: float) -> bool:
    return bool(torch.tensor(value).half().isfinite())


def lognormal(steps: int, mean: float, deviation: float, seed: int = 0) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    return (2.0 ** (mean + deviation * torch.randn(steps, generator=generator))).tolist()


@pytest.mark.parametrize("magnitude", [2.0**-20, 1e-3, 1.0, 2.0**10])
def test_uses_the_range_after_a_few_steps(magnitude: float) -> None:
    """GradScaler needs 2000 good steps per doubling; here ten steps do, up and down."""
    scales, _, mp = train("headroom", [magnitude] * 30)
    assert all(math.log2(s).is_integer() for s in scales)
    free = math.log2(F16_MAX / (magnitude * mp.scale.item()))
    assert 0 < free < 4
    assert (
        mp.stats().skipped <= 12
    )  # 2**10 with the first scale of 2**16 overflows until it has halved enough


def test_follows_gradients_that_shrink() -> None:
    shrinking = [2.0 ** (-n / 20) for n in range(400)]
    scales, skipped, _ = train("headroom", shrinking)
    assert scales[-1] >= 2.0**10 * scales[20]
    assert not any(skipped[20:])
    dynamic, _, _ = train(DynamicLossScale(), shrinking)
    assert dynamic[-1] == dynamic[20]


@pytest.mark.breadth("first")
@pytest.mark.parametrize("deviation", [0.3, 1.0, 2.0])
def test_overflows_as_rarely_as_asked(deviation: float) -> None:
    rate, steps = 0.01, 2500
    policy = HeadroomLossScale(overflow_rate=rate)
    scales, skipped, _ = train(policy, lognormal(steps, -5.0, deviation))
    overflows = sum(skipped[100:])
    assert overflows <= 2 * rate * steps
    assert scales[-1] * 2.0**-5.0 * 2.0 ** (4.5 * deviation) > F16_MAX / 16  # and not by a scale of nothing


def test_an_overflow_that_the_gradients_do_not_show_is_learnt() -> None:
    """The backward of the inner value overflows, although every parameter's gradient is small."""
    weight = nn.Parameter(torch.zeros(2))
    opt = torch.optim.SGD([weight], lr=0.0)
    rate = 0.02
    mp = MixedPrecision(codegen="eager", loss_scale=HeadroomLossScale(overflow_rate=rate))

    @torch.compile(backend=mp)
    def step() -> None:
        inner = (weight * 1e-3).half() * 1.0  # its gradient, 1000 times the weight's, is kept in float16
        (inner.float() * 1.0).sum().backward()
        opt.step()
        opt.zero_grad()

    for _ in range(300):
        step()
    stats = mp.stats()
    assert stats.skipped <= 3 * rate * 300 + 15
    assert stats.scale <= F16_MAX


def test_zero_gradients_double_the_scale_up_to_the_maximum() -> None:
    scales, _, mp = train(HeadroomLossScale(init_scale=4.0, max_scale=32.0), [0.0] * 5)
    assert scales == [4.0, 8.0, 16.0, 32.0, 32.0]
    assert mp.state_dict()["headroom_count"] == 0


def test_batches_that_are_never_finite_cost_a_bounded_number_of_doublings() -> None:
    """Every 25th batch is inf whatever the scale: GradScaler would go down for good."""
    magnitudes = [math.inf if n % 25 == 24 else 1.0 for n in range(800)]
    _, _, mp = train("headroom", magnitudes)
    assert mp.scale.item() >= F16_MAX / 2.0**22
    _, _, dynamic = train(DynamicLossScale(), magnitudes)
    assert dynamic.scale.item() == 1.0


def test_stays_within_its_limits() -> None:
    scales, _, _ = train(HeadroomLossScale(init_scale=16.0, min_scale=3.0, max_scale=100.0), [1e-8] * 5)
    assert scales[-1] == 64.0
    scales, _, _ = train(HeadroomLossScale(init_scale=16.0, min_scale=3.0, max_scale=100.0), [1e9] * 6)
    assert scales[-1] == 4.0


@pytest.mark.parametrize(
    "settings",
    [
        {"overflow_rate": 0.0},
        {"overflow_rate": 1},
        {"window": 1},
        {"patience": 0},
        {"min_scale": 2.0**20},
        {"init_scale": 3.0, "min_scale": 2.5, "max_scale": 3.5},
    ],
)
def test_wrong_settings(settings: dict[str, float]) -> None:
    with pytest.raises(OptionError, match="HeadroomLossScale"):
        HeadroomLossScale(**settings)  # pyrefly: ignore[bad-argument-type]
