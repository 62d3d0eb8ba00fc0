"""A critic frozen for the generator's half: one step, one graph, one verdict; the flags end as in eager."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxpass import MixedPrecision
from tests.support.helpers import clone, same

Toggle = Callable[[nn.Module, bool], None]
INF = float("inf")


def by_module(module: nn.Module, flag: bool) -> None:
    module.requires_grad_(flag)


def by_parameter(module: nn.Module, flag: bool) -> None:
    for p in module.parameters():
        p.requires_grad_(flag)


def by_assignment(module: nn.Module, flag: bool) -> None:
    for p in module.parameters():
        p.requires_grad = flag


class Gan(nn.Module):
    def __init__(self, toggle: Toggle) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.make = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        self.judge = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        self.toggle = toggle
        self.opt_make = torch.optim.SGD(self.make.parameters(), lr=0.1, momentum=0.9)
        self.opt_judge = torch.optim.AdamW(self.judge.parameters(), lr=0.01)

    def step(self, z: Tensor, x: Tensor, factor: Tensor) -> None:
        self.toggle(self.judge, True)
        self.opt_judge.zero_grad()
        fake = self.judge(self.make(z).detach())
        (F.softplus(fake).mean() + F.softplus(-self.judge(x)).mean()).backward()
        self.opt_judge.step()
        self.toggle(self.judge, False)
        self.opt_make.zero_grad()
        (F.softplus(-self.judge(self.make(z))).mean() * factor).backward()
        self.opt_make.step()


def train(gan: Gan, step: Callable[..., None], bad: int = -1, calls: int = 3) -> list[dict[str, Tensor]]:
    states = []
    for index in range(calls):
        torch.manual_seed(index)
        states.append(clone(dict(gan.state_dict())))
        step(torch.randn(6, 4), torch.randn(6, 4), torch.tensor(INF if index == bad else 1.0))
    return [*states, clone(dict(gan.state_dict()))]


@pytest.mark.breadth
@pytest.mark.parametrize(
    ("toggle", "codegen"),
    [(by_module, "inductor"), (by_module, "eager"), (by_parameter, "eager"), (by_assignment, "eager")],
)
def test_as_eager(toggle: Toggle, codegen: str) -> None:
    eager, compiled = Gan(toggle), Gan(toggle)
    expected = train(eager, eager.step)
    mp = MixedPrecision(dtype="float32", codegen=codegen)
    actual = train(compiled, torch.compile(compiled.step, backend=mp))
    same(actual[-1], expected[-1], "state")
    assert [p.requires_grad for p in compiled.parameters()] == [p.requires_grad for p in eager.parameters()]
    assert all(p.grad is None for p in compiled.parameters()), "frozen or not"
    assert mp.stats().steps == 3
    assert len(mp.graphs) == 2, "the critic is frozen when the second call begins, and from then on"


@pytest.mark.slow
def test_an_overflow_in_one_half_undoes_the_other() -> None:
    gan, mp = Gan(by_module), MixedPrecision()
    states = train(gan, torch.compile(gan.step, backend=mp), bad=1)
    same(states[2], states[1], "both halves", exact=True)
    assert not torch.equal(states[3]["judge.0.weight"], states[2]["judge.0.weight"])
    stats = mp.stats()
    assert (stats.steps, stats.skipped, stats.scale) == (3, 1, 2.0**15)


def penalty(net: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """WGAN-GP's, in a helper."""
    share = torch.linspace(0, 1, real.shape[0])[:, None]
    between = (share * real + (1 - share) * fake).detach().requires_grad_(True)
    judged = net(between)
    (grad,) = torch.autograd.grad(judged.sum(), between, create_graph=True)
    return (grad.norm(dim=1) - 1).pow(2).mean()


def wgan_gp(net: nn.Module, x: Tensor) -> Tensor:
    return net(x).mean() + penalty(net, x, x.flip(0))


def r1(net: nn.Module, x: Tensor) -> Tensor:
    x = torch.autograd.Variable(x, requires_grad=True)
    judged = net(x)
    (grad,) = torch.autograd.grad(judged.sum(), [x], create_graph=True)
    return F.softplus(-judged).mean() + grad.pow(2).sum(1).mean() / 2


def frozen_extractor(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        hidden = torch.tanh(2 * x)
    hidden.requires_grad = True  # nobody asks its gradient
    return net(hidden).pow(2).mean()


def selected(net: nn.Module, x: Tensor) -> Tensor:
    some = x[x[:, 0] > 0].requires_grad_()
    (grad,) = torch.autograd.grad(net(some).sum(), some, create_graph=True)
    return grad.pow(2).sum() / 6


LOSSES = [wgan_gp, r1, frozen_extractor, selected]


@pytest.mark.breadth
@pytest.mark.parametrize("loss", [*LOSSES, "all"], ids=lambda loss: getattr(loss, "__name__", loss))
def test_a_tensor_of_the_step(loss: Callable[[nn.Module, Tensor], Tensor] | str) -> None:
    def run(compiled: bool) -> tuple[list[Tensor], dict[str, Tensor]]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        opt = torch.optim.SGD(net.parameters(), lr=0.1)

        def step(x: Tensor) -> Tensor:
            value = loss(net, x) if callable(loss) else torch.stack([f(net, x) for f in LOSSES]).sum()
            value.backward()
            opt.step()
            opt.zero_grad()
            return value

        call = torch.compile(step, backend=handle) if compiled else step
        losses = [call(torch.randn(6, 4, generator=torch.Generator().manual_seed(i))) for i in range(3)]
        return losses, clone(dict(net.state_dict()))

    torch.compiler.reset()
    handle = MixedPrecision(dtype="float32", codegen="eager" if callable(loss) else "inductor")
    expected = run(compiled=False)
    same(run(compiled=True), expected, "losses and weights")
    assert handle.stats().steps == 3
    assert len(handle.graphs) == 1
