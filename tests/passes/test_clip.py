"""Clipping by norm against torch.nn.utils.clip_grad_norm_ in the same run, on unscaled gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxpass import MixedPrecision
from fxpass.passes.check_finite import CheckFinite
from fxpass.passes.clip import Clip
from fxpass.passes.grad_norm import GradNorm
from tests.support.clipping import compare_with_torch, gradients_behind, parameters
from tests.support.graphs import graph_of, inserted_by, targets, training_step

INF = math.inf


@pytest.mark.breadth(2)
@pytest.mark.parametrize("loss_scale", [None, 3.0, 2.0**16])
@pytest.mark.parametrize("norm_type", [2.0, INF])
def test_global_norm(norm_type: float, loss_scale: float | None) -> None:
    stats = compare_with_torch(
        {"max_norm": 0.1, "norm_type": norm_type, "loss_scale": loss_scale},
        lambda opt: nn.utils.clip_grad_norm_(parameters(opt), 0.1, norm_type),
    )
    assert stats.clipped == 5


@pytest.mark.parametrize("norm_type", [2.0, INF])
def test_each_parameter_by_its_own_norm(norm_type: float) -> None:
    def clip(opt: torch.optim.Optimizer) -> None:
        for p in parameters(opt):
            nn.utils.clip_grad_norm_([p], 0.2, norm_type)

    options = {"max_norm": 0.2, "norm_type": norm_type, "clip_per": "parameter", "loss_scale": 8.0}
    assert compare_with_torch(options, clip).clipped == 5


@pytest.mark.parametrize("clip_per", ["group", "optimizer", "global"])
def test_param_groups_share_a_norm_or_have_their_own(clip_per: str) -> None:
    def groups(model: nn.Module) -> list[dict[str, Any]]:
        return [{"params": [p]} for p in model.parameters()]

    def clip(opt: torch.optim.Optimizer) -> None:
        for group in opt.param_groups if clip_per == "group" else [{"params": parameters(opt)}]:
            nn.utils.clip_grad_norm_(group["params"], 0.2)

    compare_with_torch({"max_norm": 0.2, "clip_per": clip_per}, clip, groups=groups)


@pytest.mark.breadth
@pytest.mark.parametrize("clip_per", ["global", "parameter"])
def test_generated_code(clip_per: str) -> None:
    def clip(opt: torch.optim.Optimizer) -> None:
        for some in [parameters(opt)] if clip_per == "global" else [[p] for p in parameters(opt)]:
            nn.utils.clip_grad_norm_(some, 0.2)

    options = {"max_norm": 0.2, "clip_per": clip_per, "loss_scale": 1024.0}
    assert compare_with_torch(options, clip, codegen="inductor").clipped == 5


def test_a_norm_below_the_threshold_changes_nothing() -> None:
    clip = lambda opt: nn.utils.clip_grad_norm_(parameters(opt), 1e6)  # noqa: E731
    assert compare_with_torch({"max_norm": 1e6}, clip).clipped == 0


def test_zero_gradients_stay_zero() -> None:
    clip = lambda opt: nn.utils.clip_grad_norm_(parameters(opt), 1.0)  # noqa: E731
    stats = compare_with_torch({"max_norm": 1.0}, clip, factor=0.0)
    assert (stats.grad_norm, stats.clipped) == (0.0, 0)


@pytest.mark.parametrize("norm_type", [2.0, INF])
def test_float64_gradients_are_clipped_in_float64(norm_type: float) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.narrow = nn.Parameter(torch.ones(4))
            self.wide = nn.Parameter(torch.ones(4, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.narrow).double() * self.wide

    clip = lambda opt: nn.utils.clip_grad_norm_(parameters(opt), 0.1, norm_type)  # noqa: E731
    options = {"max_norm": 0.1, "norm_type": norm_type}
    assert compare_with_torch(options, clip, model=Mixed).clipped == 5


def update_of(
    gradients: list[list[float]], scale: float | None = None, **options: Any
) -> tuple[list[Tensor], MixedPrecision]:
    """The step (lr 1) that parameters of these gradients take, and the handle."""
    weights = [nn.Parameter(torch.zeros(len(g))) for g in gradients]
    idle = nn.Parameter(torch.zeros(2))  # gets no gradient
    opt = torch.optim.SGD([*weights, idle], lr=1.0)

    def step(*factors: Tensor) -> None:
        sum((w * f).sum() for w, f in zip(weights, factors, strict=True)).backward()  # pyrefly: ignore[missing-attribute]
        opt.step()
        opt.zero_grad()

    mp = MixedPrecision(**{"codegen": "eager", "loss_scale": scale, **options})  # pyrefly: ignore[bad-argument-type]
    torch.compile(step, backend=mp)(*[torch.tensor(g) for g in gradients])
    assert not idle.any()
    return [-w.detach() for w in weights], mp


def torchs(gradients: list[list[float]], max_norm: float) -> tuple[list[Tensor], Tensor]:
    weights = [nn.Parameter(torch.zeros(len(g))) for g in gradients]
    for weight, grad in zip(weights, gradients, strict=True):
        weight.grad = torch.tensor(grad)
    norm = nn.utils.clip_grad_norm_([*weights, nn.Parameter(torch.zeros(2))], max_norm)
    return [w.grad for w in weights if w.grad is not None], norm


@pytest.mark.breadth
@pytest.mark.parametrize("max_norm", [1.0, 5.0, 7.0])
@pytest.mark.parametrize("gradients", [[[3.0, 0.0], [0.0, 4.0]], [[3.0, 4.0], []], [[0.0], [0.0]]])
def test_below_at_and_above_the_threshold(gradients: list[list[float]], max_norm: float) -> None:
    ours, mp = update_of(gradients, max_norm=max_norm, dtype="float32")
    theirs, norm = torchs(gradients, max_norm)
    for mine, its in zip(ours, theirs, strict=True):
        assert torch.equal(mine, its)  # at the threshold too, where torch multiplies by 0.9999998
    assert mp.stats().grad_norm == norm
    assert mp.stats().clipped == (norm.item() > max_norm)


def test_a_norm_beyond_float32_makes_zeros_as_in_torch() -> None:
    gradients = [[3e38, 3e38], [1.0]]
    ours, mp = update_of(gradients, max_norm=1.0, dtype="float32")
    theirs, norm = torchs(gradients, 1.0)
    for mine, its in zip(ours, theirs, strict=True):
        assert torch.equal(mine, its)
    assert (mp.stats().grad_norm, norm.item(), mp.stats().skipped) == (INF, INF, 0)


@pytest.mark.parametrize("clip_per", ["global", "parameter"])
def test_two_large_float16_gradients_give_a_small_update(clip_per: str) -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return (self.first(x) + self.second(x)).float().sum()

    model = Halves()
    opt = torch.optim.SGD(model.parameters(), lr=1.0)
    before = [p.detach().clone() for p in model.parameters()]

    def step(x: Tensor) -> None:
        model(x).backward()
        opt.step()
        opt.zero_grad()

    mp = MixedPrecision(codegen="eager", loss_scale=None, max_norm=1.0, clip_per=clip_per)
    torch.compile(step, backend=mp)(torch.tensor([[60000.0]]))
    moved = [(b - p.detach()).item() for b, p in zip(before, model.parameters(), strict=True)]
    assert mp.stats().grad_norm == pytest.approx(60000 * math.sqrt(2), rel=1e-3)
    assert mp.stats().skipped == 0
    assert moved == pytest.approx([1 / math.sqrt(2)] * 2 if clip_per == "global" else [1.0, 1.0], rel=1e-5)


@pytest.mark.parametrize("bad", [INF, -INF, math.nan])
@pytest.mark.parametrize("norm_type", [2.0, INF])
def test_a_norm_that_is_not_finite_is_reported_and_nothing_moves(bad: float, norm_type: float) -> None:
    gradients = [[1.0, bad], [2.0]]
    ours, mp = update_of(gradients, max_norm=1.0, dtype="float32", norm_type=norm_type)
    norm = torchs(gradients, 1.0)[1]
    assert not any(update.any() for update in ours)
    torch.testing.assert_close(torch.tensor(mp.stats().grad_norm), norm, equal_nan=True)
    assert (mp.stats().skipped, mp.stats().clipped) == (1, 0)


@pytest.mark.parametrize("clip_per", ["global", "optimizer"])
@pytest.mark.parametrize("doubled", [False, True])
def test_two_optimizers(clip_per: str, doubled: bool) -> None:
    """``doubled``: the step changes a gradient of the second after the first has stepped."""
    models = [nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    opts = [[torch.optim.SGD(half.parameters(), lr=1.0) for half in model] for model in models]

    def finish(opts: list[torch.optim.SGD]) -> None:
        opts[0].step()
        if doubled:
            opts[1].param_groups[0]["params"][0].grad.mul_(2.0)
        opts[1].step()
        for opt in opts:
            opt.zero_grad()

    def step(x: Tensor) -> None:
        models[0](x).square().sum().backward()
        finish(opts[0])

    x = torch.randn(8, 4)
    mp = MixedPrecision(dtype="float32", codegen="eager", max_norm=0.25, clip_per=clip_per)
    torch.compile(step, backend=mp)(x)
    models[1](x).square().sum().backward()
    if doubled:
        parameters(opts[1][1])[0].grad.mul_(2.0)  # pyrefly: ignore[missing-attribute]
    together = [[p for opt in opts[1] for p in parameters(opt)]]
    for some in together if clip_per == "global" else [parameters(opt) for opt in opts[1]]:
        nn.utils.clip_grad_norm_(some, 0.25)
    for opt in opts[1]:
        opt.step()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert mp.stats().clipped == 1


def test_norm_reuses_the_sums_of_squares() -> None:
    step, _ = graph_of(*training_step(), [CheckFinite(), GradNorm(), Clip(max_norm=1.0)], loss_scale=None)
    made = targets(inserted_by(step, "grad_norm"))
    assert made == ["aten.stack.default", "aten.sum.default", "aten.sqrt.default", "aten._to_copy.default"]
    made = targets(inserted_by(step, "clip"))
    assert made.count("aten.mul.Tensor") == 1 + 4  # of the coefficient, and of each gradient
    assert "aten.sqrt.default" not in made


def test_per_parameter_waits_for_no_other_gradient() -> None:
    for clip_per, behind in (("parameter", [{0}, {1}, {2}, {3}]), ("group", [{0, 1, 2, 3}] * 4)):
        passes = [CheckFinite(), GradNorm(), Clip(max_norm=1.0, clip_per=clip_per)]
        step, _ = graph_of(*training_step(), passes)
        assert gradients_behind(step) == behind


def test_declines_without_max_norm() -> None:
    _, (_, record) = graph_of(*training_step(), [CheckFinite(), Clip()])
    assert record.declined == ("max_norm is None",)
