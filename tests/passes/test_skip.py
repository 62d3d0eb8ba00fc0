"""An overflow leaves parameters, optimizer state and step counts bit for bit as they were."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxpass import MixedPrecision
from fxpass.passes.check_finite import CheckFinite
from fxpass.passes.skip import Skip
from tests.support.graphs import graph_of, inserted_by, targets, training_step
from tests.support.helpers import clone, same

INF = float("inf")


def test_one_select_per_written_value() -> None:
    step, (_, record) = graph_of(*training_step(optimizer=torch.optim.AdamW), [CheckFinite(), Skip()])
    made = inserted_by(step, "skip")
    assert set(targets(made)) == {"aten.where.self"}
    assert record.inserted == len(step.updates) == 4 * 4  # weight, step, exp_avg, exp_avg_sq


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@pytest.mark.breadth
@pytest.mark.parametrize("codegen", ["inductor", "eager"])
@pytest.mark.parametrize("bad_steps", [{0}, {2}, {1, 2}])
def test_exact(bad_steps: set[int], codegen: str) -> None:
    model = Net()
    opt = torch.optim.AdamW(model.parameters(), lr=0.01)
    mp = MixedPrecision(codegen=codegen, max_norm=1.0)

    @torch.compile(backend=mp)
    def step(x: Tensor, factor: Tensor) -> Tensor:
        loss = (model(x) * factor).square().mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
        return loss

    scale = 2.0**16
    for index in range(5):
        before = clone([dict(model.named_parameters()), opt.state_dict()["state"]])
        statistics = model.body[1].running_mean.clone()  # pyrefly: ignore[not-callable]
        step(torch.randn(6, 4), torch.tensor(INF if index in bad_steps else 1.0))
        after = clone([dict(model.named_parameters()), opt.state_dict()["state"]])
        if index in bad_steps:
            scale /= 2
            if index == 0:
                assert all(float(s["step"]) == 0 for s in opt.state.values())
                assert all(not s["exp_avg"].any() for s in opt.state.values())
                same(after[0], before[0], "parameters", exact=True)
            else:
                same(after, before, "parameters and state", exact=True)
        else:
            assert not torch.equal(after[0]["body.0.weight"], before[0]["body.0.weight"])
        assert not torch.equal(model.body[1].running_mean, statistics), "BatchNorm follows eager"  # pyrefly: ignore[bad-argument-type]
        assert mp.scale.item() == scale
    assert mp.stats().skipped == len(bad_steps)
    assert {float(s["step"]) for s in opt.state.values()} == {5.0 - len(bad_steps)}


def test_one_bad_parameter_skips_all_of_them() -> None:
    good, bad = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    opt = torch.optim.Adam([good, bad], lr=0.1)
    mp = MixedPrecision(codegen="eager")

    @torch.compile(backend=mp)
    def step(slope: Tensor) -> None:
        (good.sum() + (bad * slope).sum()).backward()
        opt.step()
        opt.zero_grad()

    step(torch.tensor([1.0, INF, 1.0]))
    assert torch.equal(good, torch.ones(3))
    step(torch.ones(3))
    assert torch.allclose(good, torch.full((3,), 0.9))


def test_an_overflow_of_the_second_optimizer_undoes_the_first() -> None:
    """Interleaved as in a GAN: backward, step, backward, step. The step is skipped whole."""
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    opts = [torch.optim.SGD([p], lr=0.5) for p in (first, second)]

    @torch.compile(backend=MixedPrecision(codegen="eager"))
    def step(slope: Tensor) -> None:
        first.sum().backward()
        opts[0].step()
        (second * first.detach() * slope).sum().backward()
        opts[1].step()
        for opt in opts:
            opt.zero_grad()

    step(torch.tensor([1.0, INF, 1.0]))
    assert torch.equal(first, torch.ones(3))
    assert torch.equal(second, torch.ones(3))
    step(torch.ones(3))
    assert torch.equal(first, torch.full((3,), 0.5))
    assert torch.equal(second, torch.full((3,), 0.75))


@pytest.mark.breadth(2)
@pytest.mark.parametrize("codegen", ["inductor", "eager"])
def test_per_tensor_the_others_go_on_as_eager_without_it(codegen: str) -> None:
    """The parameter with the overflow keeps its bits, state and step count; the scale backs off."""
    good, bad = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    alone = nn.Parameter(torch.ones(3))
    opt = torch.optim.AdamW([good, bad], lr=0.1)
    eager = torch.optim.AdamW([alone], lr=0.1)
    mp = MixedPrecision(skip="tensor", codegen=codegen)

    @torch.compile(backend=mp)
    def step(slope: Tensor) -> None:
        (good.square().sum() + (bad * slope).sum()).backward()
        opt.step()
        opt.zero_grad()

    for slope in (torch.ones(3), torch.tensor([1.0, INF, 1.0]), torch.ones(3)):
        before = [clone(t) for t in (bad, *opt.state[bad].values())]
        step(slope)
        alone.square().sum().backward()
        eager.step()
        eager.zero_grad()
        if slope.isinf().any():
            for old, now in zip(before, (bad, *opt.state[bad].values()), strict=True):
                assert torch.equal(old, now)
    torch.testing.assert_close(good, alone, rtol=1e-6, atol=1e-7)
    assert opt.state[good]["step"] == 3
    assert opt.state[bad]["step"] == 2
    assert mp.stats().skipped == 1
    assert float(mp.scale) == 2.0**15


def test_per_tensor_a_tied_parameter_is_one() -> None:
    """One parameter with two uses has one gradient and one verdict."""
    model = nn.Linear(4, 4, bias=False)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)

    @torch.compile(backend=MixedPrecision(skip="tensor", codegen="eager"))
    def step(x: Tensor, slope: Tensor) -> None:
        (model(model(x)) * slope).sum().backward()
        opt.step()
        opt.zero_grad()

    before = model.weight.detach().clone()
    step(torch.randn(2, 4), torch.tensor(INF))
    assert torch.equal(model.weight, before)
    step(torch.randn(2, 4), torch.tensor(1.0))
    assert not torch.equal(model.weight, before)


@pytest.mark.breadth(2)
@pytest.mark.parametrize("codegen", ["inductor", "eager"])
def test_per_tensor_an_optimizer_that_steps_twice_has_two_verdicts(codegen: str) -> None:
    """Each update is kept by the gradient it reads: eager, told which of them to leave out, is the same."""
    ours, theirs = ([nn.Parameter(torch.ones(3)) for _ in range(2)] for _ in range(2))
    opts = [torch.optim.SGD(params, lr=0.1, momentum=0.5) for params in (ours, theirs)]
    mp = MixedPrecision(skip="tensor", codegen=codegen, loss_scale=8.0)

    @torch.compile(backend=mp)
    def step(slopes: Tensor) -> None:
        for slope in slopes:
            (ours[0].sum() + (ours[1] * slope).sum()).backward()
            opts[0].step()
            opts[0].zero_grad()

    for slopes in ((1.0, 1.0), (INF, 1.0), (1.0, INF), (INF, INF)):
        step(torch.tensor(slopes))
        for slope in slopes:
            theirs[0].grad = torch.ones(3)
            theirs[1].grad = None if slope == INF else torch.full((3,), slope)
            opts[1].step()
    same(ours, theirs, "parameters")
    assert mp.stats().steps == 4
    assert mp.stats().skipped == 3
