"""Backwards that are not linear in the gradient see it without the loss scale."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxpass import MixedPrecision
from fxpass.passes.scale_loss import ScaleLoss
from fxpass.passes.unscale_nonlinear import UnscaleNonlinear
from tests.steps.test_models import MODELS, Case
from tests.support.graphs import graph_of
from tests.support.helpers import Mlp

# said when Dynamo looks at a Function in a list
pytestmark = pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")
Backward = Callable[[Tensor, Tensor], Tensor]
Function = Callable[[Tensor], Tensor]


def identity(backward_of: Backward) -> Function:
    """The identity whose backward is ``backward_of(gradient, input)``."""

    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyrefly: ignore[bad-override]
            return backward_of(grad, ctx.saved_tensors[0])

    return Identity.apply


@torch.library.custom_op("fxpass_tests::squash", mutates_args=())
def squash(g: Tensor) -> Tensor:
    return torch.tanh(g * 100) / 100


@squash.register_fake
def _(g: Tensor) -> Tensor:
    return torch.empty_like(g)


NONLINEAR: dict[str, Backward] = {
    "clamp": lambda g, x: g.clamp(-1e-3, 1e-3),
    "sign": lambda g, x: g.sign() * 1e-2,
    "normalise": lambda g, x: g / (g.norm() + 1e-6) * 1e-2,
    "rows": lambda g, x: g * torch.clamp(1e-3 / (g.norm(dim=1, keepdim=True) + 1e-12), max=1.0),
    "threshold": lambda g, x: torch.where(g.abs() > 1e-3, g, torch.zeros_like(g)),
    "spikes": lambda g, x: g.masked_fill(g.abs() > 2e-3, 0.0),
    "mask": lambda g, x: g * (g.abs() > 1e-3),
    "noise": lambda g, x: g + 1e-3 * torch.sin(x * 100),
    "constant added": lambda g, x: g + 1e-3,
    "constant": lambda g, x: torch.ones_like(x) * 1e-2,
    "square": lambda g, x: g * g.abs() * 10,
    "root": lambda g, x: g.sign() * g.abs().sqrt() * 1e-2,
    "tanh": lambda g, x: torch.tanh(g * 100) / 100,
    "grid": lambda g, x: torch.round(g * 1e4) / 1e4,
    "largest": lambda g, x: g / g.abs().max() * 1e-2,
    "unknown operator": lambda g, x: squash(g),
}
LINEAR: dict[str, Backward] = {
    "reversal": lambda g, x: -0.3 * g,
    "relu": lambda g, x: torch.relu(g),
    "of the input": lambda g, x: torch.where(x > 0, g, 0.1 * g) * x.cos(),
    "largest of rows": lambda g, x: g.abs().amax(1, keepdim=True).expand_as(g) + g,
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor, functions: list[Function]) -> Tensor:
        h = torch.tanh(self.first(x))
        h = torch.stack([f(h) for f in functions]).mean(0) * 2
        return self.last(torch.relu(self.middle(h)))


def hooked(backward_of: Backward) -> Function:
    """The same as a hook on an activation."""

    def apply(h: Tensor) -> Tensor:
        out = h * 1.0
        fixed = h.detach()
        out.register_hook(lambda g: backward_of(g, fixed))
        return out

    return apply


def update(functions: list[Function], mp: MixedPrecision | None, *, steps: int = 2) -> Tensor:
    """What ``steps`` steps change of the first layer, eagerly in float32 or compiled with ``mp``."""
    torch.manual_seed(0)
    model, x, y = Net(), torch.randn(16, 8), torch.randn(16, 4)
    before = copy.deepcopy(model.first.weight.detach())
    opt = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(x: Tensor, y: Tensor) -> None:
        F.mse_loss(model(x, functions), y).backward()
        opt.step()
        opt.zero_grad()

    run = step if mp is None else torch.compile(step, backend=mp)
    for _ in range(steps):
        run(x, y)
    if mp is not None:
        assert mp.stats().steps == steps
    return model.first.weight.detach() - before


def inserted(mp: MixedPrecision) -> int:
    (record,) = (r for r in mp.graphs[0].passes if r.name == "unscale_nonlinear")
    return record.inserted


def close(found: Tensor, expected: Tensor, tolerance: float = 0.02) -> bool:
    return bool((found - expected).norm() <= tolerance * expected.norm())


@pytest.mark.breadth
@pytest.mark.parametrize("name", NONLINEAR)
@pytest.mark.parametrize("scale", [1024.0, "dynamic"])
def test_each_follows_float32(name: str, scale: float | str) -> None:
    functions = [identity(NONLINEAR[name])]
    mp = MixedPrecision(loss_scale=scale, codegen="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = update(functions, mp)
    assert mp.stats().skipped == 0
    assert inserted(mp) > 0
    assert close(found, update(functions, None))


@pytest.mark.parametrize("name", ["clamp", "normalise", "threshold"])
def test_hooks_on_activations_compiled_eagerly(name: str) -> None:
    functions = [hooked(NONLINEAR[name])]
    with pytest.warns(UserWarning, match="not linear in the gradient"):
        found = update(functions, MixedPrecision(loss_scale=1024.0, codegen="eager"))
    assert close(found, update(functions, None))


def test_all_at_once_compiled_with_the_default_code_generator() -> None:
    functions = [identity(f) for name, f in NONLINEAR.items() if name != "unknown operator"]
    functions += [hooked(NONLINEAR["clamp"]), *(identity(f) for f in LINEAR.values())]
    mp = MixedPrecision()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = update(functions, mp)
    lines = [str(w.message) for w in said if "not linear in the gradient" in str(w.message)]
    assert any(re.search(r"clamp at test_unscale_nonlinear.py:\d+ in ", line) for line in lines)
    assert len(lines) == len(set(lines))
    assert mp.stats().skipped == 0
    assert close(found, update(functions, None))
    assert "clamp is not linear in the gradient" in mp.graphs[0].after


def test_what_is_linear_is_left_alone() -> None:
    functions = [identity(LINEAR[name]) for name in LINEAR]
    mp = MixedPrecision(loss_scale=1024.0, codegen="eager")
    assert close(update(functions, mp), update(functions, None))
    assert inserted(mp) == 0


@pytest.mark.breadth(9)
@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_nothing_is_inserted_into_ordinary_models(build: Callable[[], Case]) -> None:
    model, loss_of, batch = build()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(*batch: Tensor) -> None:
        loss_of(model, *batch).backward()
        opt.step()

    _, records = graph_of(step, batch, [ScaleLoss(), UnscaleNonlinear()])
    assert records[1].inserted == 0


def operators(h: Tensor) -> Tensor:
    """Operators whose backward is made of several."""
    y = torch.linspace(0.1, 1.0, h.numel()).reshape(h.shape)
    square = h.t() @ h + 9 * torch.eye(h.shape[1])
    return torch.stack(
        [
            h.prod(1).sum(),
            h.cumprod(1).sum(),
            h.std(1).sum(),
            h.norm(3) + h.norm(float("inf")),
            h.sort(1).values[:, :2].sum() + h.topk(2).values.sum() + h.median(1).values.sum(),
            torch.maximum(h, y).sum() + torch.clamp(h, y - 1, y).sum() + h.clamp(-0.1, 0.1).sum(),
            h.abs().add(1).pow(h).sum() + torch.atan2(h, y).sum() + torch.xlogy(h.abs(), y).sum(),
            h.scatter(1, torch.zeros(len(h), 1, dtype=torch.int64), 0.5).pow(2).sum(),
            torch.zeros_like(y)
            .index_put((torch.zeros(len(h), dtype=torch.int64),), h, accumulate=True)
            .sum(),
            torch.fft.rfft(h).abs().sum() + F.pad(h, (1, 2), value=3.0).pow(2).sum(),
            torch.linalg.slogdet(square)[1] + torch.linalg.inv(square).sum(),
            torch.linalg.solve(square, h.t()).sum() + torch.linalg.cholesky(square).sum(),
            torch.cdist(h, y).sum() + F.cosine_similarity(h, y).sum() + F.normalize(h).sum(),
            F.dropout(h, 0.3).pow(2).sum() + F.local_response_norm(h[None], 2).sum(),
            F.interpolate(h[None, None], scale_factor=2, mode="bicubic").pow(2).sum(),
            torch.autograd.grad(h.tanh().sum(), h, create_graph=True)[0].pow(2).sum(),
            F.huber_loss(h, y)
            + F.kl_div(h.log_softmax(-1), y, reduction="sum")
            + F.multi_margin_loss(h, torch.arange(len(h))),
        ]
    ).sum()


def test_nothing_is_inserted_for_the_operators_of_torch() -> None:
    model = Mlp()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(x: Tensor) -> None:
        operators(model.first(x)).backward()
        opt.step()

    _, records = graph_of(step, (torch.randn(6, 4),), [ScaleLoss(), UnscaleNonlinear()])
    assert records[1].inserted == 0


@pytest.mark.parametrize("name", ["clamp", "sign", "threshold", "spikes", "tanh"])
def test_an_overflow_is_not_hidden(name: str) -> None:
    torch.manual_seed(0)
    model = Net()
    model.middle.requires_grad_(False)
    model.last.requires_grad_(False)
    opt = torch.optim.SGD(model.first.parameters(), lr=0.1)
    mp = MixedPrecision(loss_scale=2.0**24, codegen="eager")
    functions = [identity(NONLINEAR[name])]

    @torch.compile(backend=mp)
    def step(x: Tensor) -> None:
        model(x, functions).pow(2).sum().backward()
        opt.step()

    before = model.first.weight.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step(torch.randn(16, 8))
    assert (mp.stats().steps, mp.stats().skipped) == (1, 1)
    assert torch.equal(model.first.weight, before)


def test_without_a_scale_there_is_nothing_to_do() -> None:
    functions = [identity(NONLINEAR["square"])]
    mp = MixedPrecision(dtype="bfloat16", codegen="eager")
    assert close(update(functions, mp), update(functions, None), 0.15)
    assert inserted(mp) == 0
