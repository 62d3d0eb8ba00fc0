"""Operators without a result, with an effect, or with operands nobody expects, against eager PyTorch.

PYTEST_DONT_REWRITE: a rewritten assertion on a tensor is a branch, not an assertion.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxpass import MixedPrecision
from fxpass.passes.cast import Cast
from tests.support.graphs import graph_of

# said by Inductor's own lowering of diagonal
pytestmark = pytest.mark.filterwarnings("ignore:`torch._prims_common.check` is deprecated:FutureWarning")
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)
        self.tokens = nn.Embedding(400, 4)
        self.bounded = nn.Embedding(40, 4, padding_idx=3, max_norm=0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)))


def gram(m: nn.Module, x: Tensor) -> Tensor:
    h = m.first(x)  # pyrefly: ignore[not-callable]
    return h.t() @ h + 8 * torch.eye(8)


def one_hot(m: nn.Module, x: Tensor, ids: Tensor) -> Tensor:
    return (m(x) * F.one_hot(ids % 2, 2)).pow(2).mean()


def asserted(m: nn.Module, x: Tensor, ids: Tensor) -> Tensor:
    h = m(x)
    assert torch.isfinite(x).all(), "the data is not finite"
    assert (x < 100).all(), f"too large for {ids.shape}"
    torch._assert_async(torch.isfinite(h).all())
    return h.pow(2).mean()


def int32_tokens(m: nn.Module, x: Tensor, ids: Tensor) -> Tensor:
    return m(m.tokens(ids.int().view(2, 3))).pow(2).mean()  # pyrefly: ignore[not-callable]


def with_max_norm(m: nn.Module, x: Tensor, ids: Tensor) -> Tensor:
    again = F.embedding(ids, m.tokens.weight, max_norm=1.0, norm_type=1.0)  # pyrefly: ignore[missing-attribute]
    return m(m.bounded(ids) + again).pow(2).mean()  # pyrefly: ignore[not-callable]


def factorised(m: nn.Module, x: Tensor, ids: Tensor) -> Tensor:
    a, h = gram(m, x), m(x)
    lower = torch.linalg.cholesky(a)
    return (torch.cholesky_solve(x.new_ones(8, 1), lower).sum() + lower.diagonal().log().sum()) / 8 + h.mean()


def inverted(m: nn.Module, x: Tensor, ids: Tensor) -> Tensor:
    a = gram(m, x)
    return torch.linalg.inv(a).sum() / 8 + torch.linalg.solve(a, x.new_ones(8)).sum() + m(x).mean()


def second_order(m: nn.Module, x: Tensor, ids: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    u = m(x).tanh()
    return torch.autograd.grad(u, x, torch.ones_like(u), create_graph=True)[0].pow(2).mean() + u.mean()


def laid_out_otherwise(m: nn.Module, x: Tensor, ids: Tensor) -> Tensor:
    h = m(x.view(3, 2, 4)).transpose(1, 2)  # mse_loss_backward's fake keeps this layout, its kernel does not
    return F.mse_loss(h, torch.ones(3, 2, 2))


def many_views(m: nn.Module, x: Tensor, ids: Tensor) -> Tensor:
    h = x
    for _ in range(400):
        h = h.t().reshape(6, 4).t()
    return m(h.reshape(6, 4)).pow(2).mean()


LOSSES: list[Loss] = [
    one_hot, asserted, int32_tokens, with_max_norm, factorised, inverted, second_order, laid_out_otherwise,
    many_views,
]  # fmt: skip


def all_but_views(m: nn.Module, x: Tensor, ids: Tensor) -> Tensor:
    return torch.stack([loss(m, x, ids) for loss in LOSSES[:-1]]).mean()


@pytest.mark.breadth
@pytest.mark.parametrize(
    ("loss", "codegen"),
    [*((loss, "eager") for loss in LOSSES), (all_but_views, "inductor")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_follows_eager(loss: Loss, codegen: str) -> None:
    torch.manual_seed(0)
    ours = Net()
    theirs, before = copy.deepcopy(ours), copy.deepcopy(ours)
    x, ids = torch.randn(6, 4), torch.tensor([0, 1, 3, 1, 4, 39])
    mp = MixedPrecision(loss_scale=256.0, codegen=codegen)

    def stepper(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
        opt = torch.optim.SGD(model.parameters(), lr=0.1)

        def step(x: Tensor, ids: Tensor) -> Tensor:
            value = loss(model, x, ids)
            value.backward()
            opt.step()
            opt.zero_grad()
            return value.detach()

        return step

    eager, compiled = stepper(theirs), torch.compile(stepper(ours), backend=mp)
    for _ in range(3):
        expected, found = eager(x, ids), compiled(x, ids)
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3, check_dtype=False)
    assert (mp.stats().steps, mp.stats().skipped) == (3, 0)
    for a, b, old in zip(ours.parameters(), theirs.parameters(), before.parameters(), strict=True):
        assert (a - b).norm() <= 0.01 * (b - old).norm() + 1e-6


def test_an_assertion_that_fails_raises_and_nothing_changes() -> None:
    torch.manual_seed(0)
    model = Net()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    mp = MixedPrecision(codegen="eager")

    @torch.compile(backend=mp)
    def step(x: Tensor) -> None:
        assert (x < 100).all(), "too large"
        model(x).pow(2).mean().backward()
        opt.step()

    step(torch.ones(6, 4))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="too large"):
        step(torch.full((6, 4), 200.0))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_cast_to_float32_keeps_its_device_and_memory_format() -> None:
    conv = nn.Conv2d(3, 4, 3)

    def forward(x: Tensor) -> list[Tensor]:
        h = conv(x)
        last = torch.channels_last
        return [
            h.to("cpu", torch.float32) + 1,
            h.to(torch.float32, memory_format=last),
            h.float(memory_format=last),
            h.to(torch.device("cpu"), torch.float32, True, True, memory_format=last),
            h.type(torch.float32).type_as(x).to(x),
        ]

    x = torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        expected = forward(x)
        found = torch.compile(forward, backend=MixedPrecision(codegen="eager"))(x)
        assert [(t.dtype, t.stride()) for t in found] == [(t.dtype, t.stride()) for t in expected]
        elsewhere, _ = graph_of(lambda x: (x * 2).to("meta", torch.float32), (x,), [Cast()])
    moves = [n for n in elsewhere.nodes() if n.kwargs.get("device") is not None]
    assert [n.meta["val"].device.type for n in moves] == ["meta"]
