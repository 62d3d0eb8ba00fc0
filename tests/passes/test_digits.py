"""Small numbers that float16 or bfloat16 would lose: epsilons, bounds next to 1, logarithms."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxpass import DynamicLossScale, MixedPrecision
from fxpass.analysis.policy import has_number_lost
from fxpass.ir.graph import Phase, is_float, phase, tensor
from fxpass.passes.cast import Cast
from tests.support.graphs import graph_of, training_step

aten = torch.ops.aten
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
GAIN = 40.0  # of the last layer: sigmoids are 0 and 1 in float16


class Net(nn.Module):
    def __init__(self, gain: float) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)
        self.register_buffer("eps", torch.tensor(1e-8))
        with torch.no_grad():
            self.last.weight.mul_(gain)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)))


def cross_entropy(p: Tensor, q: Tensor, y: Tensor) -> Tensor:
    return -(y * torch.log(p) + (1 - y) * torch.log(q)).mean()


def added(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    p = torch.sigmoid(m(x))
    return cross_entropy(p + 1e-8, 1 - p + 1e-8, y)


def added_tensor(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    p = torch.sigmoid(m(x))
    return cross_entropy(p + m.eps, 1 - p + torch.tensor(1e-8), y)  # pyrefly: ignore[unsupported-operation]


def clamped(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    p = torch.sigmoid(m(x)).clamp(1e-7, 1 - 1e-7)
    return cross_entropy(p, 1 - p, y)


def bounded(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    p = torch.sigmoid(m(x))
    return cross_entropy(torch.maximum(p, torch.full_like(p, 1e-8)), (1 - p).clamp_min(1e-8), y)


def mixed(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    p = torch.sigmoid(m(x))
    return -torch.log(y * p + (1 - y) * (1 - p) + 1e-8).mean()


def tanh_density(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return -torch.log(1 - torch.tanh(m(x)).pow(2) + 1e-6).mean()


def atanh(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return torch.atanh(torch.tanh(m(x)).clamp(-1 + 1e-6, 1 - 1e-6)).pow(2).mean() / 10


def of_sigmoid(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy(torch.sigmoid(m(x)), y)


def root(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    z = m(x) * 2e-5
    return torch.sqrt(z * z + 1e-8).mean() * 1000


def ratio(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    z = m(x) * 2e-5
    return (z / (z.abs() + 1e-4) - y).pow(2).mean()


def rms_norm(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    z = m(x) * 2e-5
    return (z * torch.rsqrt((z * z).mean(-1, keepdim=True) + 1e-8) - y).pow(2).mean()


LOSSES: list[Loss] = [
    added, added_tensor, clamped, bounded, mixed, tanh_density, atanh, of_sigmoid, root, ratio, rms_norm
]  # fmt: skip


def several(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return torch.stack([loss(m, x, y) for loss in (added_tensor, clamped, bounded, root, ratio)]).mean()


def update(loss: Loss, mp: MixedPrecision | None, steps: int = 3) -> Tensor:
    """What ``steps`` steps change of the first layer: compiled with ``mp``, or eagerly in float32."""
    torch.manual_seed(0)
    model, x, y = Net(GAIN), torch.randn(32, 8), (torch.rand(32, 4) > 0.5).float()
    before = copy.deepcopy(model.first.weight.detach())
    opt = torch.optim.SGD(model.parameters(), lr=0.01)

    def step(x: Tensor, y: Tensor) -> Tensor:
        value = loss(model, x, y)
        value.backward()
        opt.step()
        opt.zero_grad()
        return value

    run = step if mp is None else torch.compile(step, backend=mp)
    for _ in range(steps):
        run(x, y)
    if mp is not None:
        assert (mp.stats().steps, mp.stats().skipped) == (steps, 0)
    return model.first.weight.detach() - before


def settings(dtype: torch.dtype, codegen: str) -> MixedPrecision:
    scale = DynamicLossScale(init_scale=256.0) if dtype is torch.float16 else None
    return MixedPrecision(dtype=dtype, loss_scale=scale, codegen=codegen)


@pytest.mark.breadth
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_each_form_trains_as_in_float32(loss: Loss) -> None:
    expected = update(loss, None)
    assert (update(loss, settings(torch.float16, "eager")) - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize(
    ("dtype", "codegen"),
    [(torch.float16, "inductor"), (torch.bfloat16, "eager")],
    ids=["float16 compiled", "bfloat16"],
)
def test_several_forms_at_once(dtype: torch.dtype, codegen: str) -> None:
    expected = update(several, None)
    found = update(several, settings(dtype, codegen))
    assert (found - expected).norm() < (0.02 if dtype is torch.float16 else 0.1) * expected.norm()


@pytest.mark.breadth
@pytest.mark.parametrize(
    ("code", "lost"),
    [
        (lambda x: x + 1e-8, (True, True)),
        (lambda x: x + 2e-3, (False, True)),
        (lambda x: x + 0.1, (False, False)),
        (lambda x: 1.0000001 - x, (True, True)),
        (lambda x: x * 0.99999, (False, False)),
        (lambda x: x * 1e-6, (True, False)),
        (lambda x: x.clamp(min=1e-6), (True, False)),
        (lambda x: x.clamp(max=1 - 1e-6), (True, True)),
        (lambda x: torch.maximum(x, torch.full_like(x, 1e-7)), (True, False)),
        (lambda x: x + torch.tensor(0.5), (True, True)),  # a value that cannot be read
        (lambda x: x.add(x, alpha=1e-7), (True, True)),
        (lambda x: x + 0.0, (False, False)),
    ],
)
def test_which_numbers_are_lost(code: Callable[[Tensor], Tensor], lost: tuple[bool, bool]) -> None:
    graph, _ = graph_of(code, (torch.randn(3),))
    found = [any(has_number_lost(n, low) for n in graph.nodes()) for low in (torch.float16, torch.bfloat16)]
    assert tuple(found) == lost


def test_what_reads_no_such_number_stays_low() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 16), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            value, gate = self.up(x).chunk(2, -1)
            return self.down(torch.sigmoid(gate) * value / (1 + value.abs()) + 0.5)

    step, args = training_step(Gated())
    graph, _ = graph_of(step, args, [Cast()])
    found = [n for n in graph.nodes() if phase(n) is Phase.FORWARD and is_float(n)]
    computed = [n for n in found if n.target in (aten.sigmoid.default, aten.mul.Tensor, aten.div.Tensor)]
    assert {tensor(n).dtype for n in computed} == {torch.float16}
