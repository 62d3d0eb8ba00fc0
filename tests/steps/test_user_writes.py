"""What the user's code writes in a step, beside the optimizer: right on good steps and on skipped ones.

All with the default code generation, compared with eager PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxpass import MixedPrecision
from tests.support.helpers import clone, same

INF = float("inf")
Step = Callable[[Tensor, Tensor, Tensor], Any]


class Net(nn.Module):
    """Three square layers, whose updates are outlined, and statistics that a step may keep."""

    running: Tensor
    fisher: Tensor
    count: Tensor
    average: Tensor
    trace: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.norm = nn.BatchNorm1d(16)
        self.target = nn.Linear(16, 16)
        self.target.requires_grad_(False)
        self.register_buffer("running", torch.ones(()))
        self.register_buffer("fisher", torch.zeros(16, 16))
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("average", torch.zeros(16, 16))
        self.register_buffer("trace", torch.zeros(2, 16))
        self.rotation = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(3)))[0]

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x

    @property
    def weights(self) -> list[Any]:
        return [layer.weight for layer in self.layers]


def loss_of(net: Net, x: Tensor, y: Tensor, factor: Tensor) -> Tensor:
    return F.mse_loss(net(x), y) * factor


def run(
    make: Callable[[Net], Step], bad: int, calls: int = 3, **options: Any
) -> tuple[list[dict[str, Tensor]], MixedPrecision | None]:
    """The model's state after every call; with ``options`` compiled, call ``bad`` with an overflow."""
    torch.compiler.reset()
    torch.manual_seed(0)
    net = Net()
    step, mp = make(net), None
    if options:
        mp = MixedPrecision(**options)
        step = torch.compile(step, backend=mp)
    states = [clone(dict(net.state_dict()))]
    for index in range(calls):
        step(torch.randn(8, 16), torch.randn(8, 16), torch.tensor(INF if index == bad else 1.0))
        states.append(clone(dict(net.state_dict())))
    assert mp is None or mp.stats().steps == calls
    return states, mp


def as_eager(make: Callable[[Net], Step], **options: Any) -> MixedPrecision:
    """Good steps give what eager gives."""
    expected, _ = run(make, -1)
    actual, mp = run(make, -1, dtype="float32", **options)
    same(actual[-1], expected[-1], "state")
    assert mp is not None
    return mp


def adamw(net: Net) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)


def statistics(net: Net) -> Step:
    opt = adamw(net)

    def step(x: Tensor, y: Tensor, factor: Tensor) -> None:
        loss_of(net, x, y, factor).backward()
        with torch.no_grad():
            norm = torch.stack([w.grad.norm() for w in net.weights]).norm()
            net.running.mul_(0.9).add_(norm, alpha=0.1)
            net.fisher.lerp_(net.weights[0].grad.square(), 0.1)
            net.count.add_(1)
            for w in net.weights:
                w.grad.mul_((net.running / (norm + 1e-6)).clamp(max=1))
        opt.step()
        opt.zero_grad()
        with torch.no_grad():
            net.average.lerp_(net.weights[0], 0.1)

    return step


@pytest.mark.breadth("first")
@pytest.mark.parametrize("skip", ["step", "tensor"])
def test_statistics_of_gradients_keep_their_bits_on_a_skipped_step(skip: str) -> None:
    states, mp = run(statistics, 1, dtype="float16", skip=skip)
    assert mp is not None
    assert mp.stats().skipped == 1
    before, after = states[1], states[2]
    kept = ["running", "fisher", *(f"layers.{i}.weight" for i in range(3))]
    same({k: after[k] for k in kept}, {k: before[k] for k in kept}, "kept", exact=True)
    assert after["count"] == 2, "a counter follows eager"
    assert not torch.equal(after["norm.running_mean"], before["norm.running_mean"])
    same(after["average"], torch.lerp(before["average"], before["layers.0.weight"], 0.1), "average")
    assert all(bool(torch.isfinite(v).all()) for v in states[-1].values())
    as_eager(statistics, skip=skip)


def writes_before_the_update(net: Net) -> Step:
    opt = adamw(net)

    def step(x: Tensor, y: Tensor, factor: Tensor) -> None:
        loss_of(net, x, y, factor).backward()
        net.weights[0].data.mul_(0.5)
        with torch.no_grad():
            net.weights[1].clamp_(-0.1, 0.1)
            net.weights[2].copy_(net.weights[1].t())
        opt.step()
        opt.zero_grad()

    return step


def test_a_write_before_the_update_is_kept_on_a_skipped_step() -> None:
    states, mp = run(writes_before_the_update, 1, calls=2, dtype="float16")
    assert mp is not None
    assert mp.stats().skipped == 1
    before, after = states[1], states[2]
    clamped = before["layers.1.weight"].clamp(-0.1, 0.1)
    same(after["layers.0.weight"], before["layers.0.weight"] * 0.5, "scaled", exact=True)
    same(after["layers.1.weight"], clamped, "clamped", exact=True)
    same(after["layers.2.weight"], clamped.t(), "copied", exact=True)
    same(after["layers.0.bias"], before["layers.0.bias"], "bias", exact=True)
    as_eager(writes_before_the_update)


def edit_that_divides(net: Net) -> Step:
    opt = adamw(net)

    def step(x: Tensor, y: Tensor, factor: Tensor) -> None:
        loss_of(net, x, y, torch.ones(())).backward()
        net.weights[1].grad.div_(1 / factor)
        opt.step()
        opt.zero_grad()

    return step


@pytest.mark.breadth("first")
@pytest.mark.parametrize("skip", ["step", "tensor"])
def test_what_the_users_edit_makes_of_a_gradient_is_checked(skip: str) -> None:
    states, mp = run(edit_that_divides, 1, dtype="float16", skip=skip)
    assert mp is not None
    assert mp.stats().skipped == 1
    kept = ["layers.1.weight"] + (["layers.0.weight", "layers.2.bias"] if skip == "step" else [])
    same({k: states[2][k] for k in kept}, {k: states[1][k] for k in kept}, "kept", exact=True)
    assert all(bool(torch.isfinite(v).all()) for v in states[-1].values())
    if skip == "tensor":
        assert not torch.equal(states[2]["layers.0.weight"], states[1]["layers.0.weight"])


def reads_of_old_weights(net: Net) -> Step:
    opt = adamw(net)

    def step(x: Tensor, y: Tensor, factor: Tensor) -> Tensor:
        first, second, third = net.weights
        diagonal, rows = first.detach().diagonal(), second.detach().unfold(0, 2, 2)
        with torch.no_grad():
            net.target.weight.copy_(first)
            old = third.clone()
        loss = loss_of(net, x, y, factor)
        loss.backward()
        with torch.no_grad():
            first.grad.add_(second.t(), alpha=0.1)
            second.grad.add_(third * diagonal.sum(), alpha=0.1)
            third.grad.add_(first, alpha=0.1)
        opt.step()
        opt.zero_grad()
        with torch.no_grad():
            net.trace[0].copy_(diagonal)
            net.trace[1].copy_(rows.sum((0, 2)))
            net.average.copy_(old - third)
        return loss

    return step


@pytest.mark.breadth("first")
@pytest.mark.filterwarnings("ignore:.*check. is deprecated:FutureWarning")  # torch's own, in diagonal
@pytest.mark.parametrize("skip", ["step", "tensor"])
def test_early_updates_wait_for_every_read_of_the_old_weight(skip: str) -> None:
    as_eager(reads_of_old_weights, skip=skip)


class Neighbours(torch.optim.Optimizer):
    """Each parameter's update reads the old value of the one before."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1e-2})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            olds = [p.clone() for p in group["params"]]
            for index, p in enumerate(group["params"]):
                pull = olds[index - 1] if olds[index - 1].shape == p.shape else olds[index]
                p.sub_(p.grad + 0.5 * pull, alpha=group["lr"])


def neighbours(net: Net) -> Step:
    opt = Neighbours([*net.weights, *(layer.bias for layer in net.layers)])

    def step(x: Tensor, y: Tensor, factor: Tensor) -> None:
        loss_of(net, x, y, factor).backward()
        opt.step()
        opt.zero_grad()

    return step


def test_an_outlined_update_reads_the_old_value_of_a_neighbour() -> None:
    as_eager(neighbours)


def products_of_masters(net: Net) -> Step:
    opt = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1e-6)

    def step(x: Tensor, y: Tensor, factor: Tensor) -> None:
        with torch.no_grad():
            first, second, third = net.weights
            first.copy_(net.rotation @ first)
            net.fisher.copy_(second @ net.rotation)
        loss_of(net, x, y, factor).backward()
        with torch.no_grad():
            second.copy_(second @ net.rotation)
        opt.step()
        opt.zero_grad()
        with torch.no_grad():
            third.copy_(net.rotation @ third)
            net.average.copy_(net.rotation @ third @ third.t())

    return step


def test_products_that_write_masters_or_buffers_run_in_the_users_precision() -> None:
    expected, _ = run(products_of_masters, -1)
    actual, _ = run(products_of_masters, -1, dtype="float16")
    for name in ("layers.0.weight", "layers.1.weight", "layers.2.weight", "fisher", "average"):
        torch.testing.assert_close(actual[-1][name], expected[-1][name], rtol=0, atol=2e-6, msg=name)
