"""The dtype that a real kernel writes is the one the graph says, for mixed inputs too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Interpreter, Node

from fxpass import MixedPrecision
from fxpass.ir.graph import StepGraph
from fxpass.options import Options
from fxpass.passes import passes_for
from tests.support.graphs import graph_of


class Checked(Interpreter):
    """Runs a graph op by op and compares each value with the recorded one, unless only casts read it."""

    def run_node(self, n: Node) -> Any:
        found = super().run_node(n)
        cast = all(user.target is torch.ops.aten._to_copy.default for user in n.users)
        if n.op == "call_function" and not cast:
            recorded = n.meta["val"]
            if isinstance(recorded, Tensor):
                assert (found.dtype, found.shape) == (recorded.dtype, recorded.shape), n.format_node()
        return found


def run(step: StepGraph) -> None:
    values = [n.meta["val"] for n in step.graph.nodes if n.op == "placeholder"]
    real = [
        torch.rand(v.shape, dtype=v.dtype) if v.is_floating_point() else torch.zeros(v.shape, dtype=v.dtype)
        for v in values
    ]
    Checked(step.gm).run(*real)


class Net(nn.Module):
    """A norm between convolutions, which make its input low and its gradient low."""

    def __init__(self, norm: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.first, self.norm, self.act = nn.Conv2d(3, 4, 3, padding=1), norm, act
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.norm(self.first(x))))


class Wide(nn.Module):
    """A norm of a float32 stream whose gradient comes from a product, in low precision."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.last = norm, nn.Conv2d(4, 2, 1)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(x[:, :1] * self.scale))


NORMS = [
    lambda: nn.GroupNorm(2, 4),
    lambda: nn.GroupNorm(2, 4, affine=False),
    lambda: nn.LayerNorm([4, 6, 6]),
    lambda: nn.LayerNorm(6, elementwise_affine=False),
    lambda: nn.LayerNorm(6, bias=False),
    lambda: nn.BatchNorm2d(4),
    lambda: nn.BatchNorm2d(4, affine=False),
    lambda: nn.BatchNorm2d(4, track_running_stats=False),
    lambda: nn.BatchNorm2d(4).eval(),
    lambda: nn.InstanceNorm2d(4),
    lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    lambda: nn.RMSNorm(6),
    lambda: nn.RMSNorm(6, elementwise_affine=False),
    lambda: nn.LocalResponseNorm(2),
    lambda: nn.PReLU(4),
    lambda: nn.RReLU(),
]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_norms(dtype: str) -> None:
    x = torch.randn(2, 3, 6, 6)
    for build in NORMS:
        for model in (Net(build(), nn.SiLU()), Net(build(), nn.PReLU(4)), Wide(build())):
            opt = torch.optim.SGD(model.parameters(), lr=0.1)

            def step(x: Tensor, model: nn.Module = model, opt: torch.optim.Optimizer = opt) -> None:
                model(x).square().mean().backward()
                opt.step()

            options = Options(dtype=dtype)
            run(graph_of(step, (x,), passes_for(options), dtype=dtype)[0])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_products_and_attention(dtype: str) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.mix = nn.Linear(8, 24), nn.Bilinear(8, 8, 2)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            q, k, v = (part.unflatten(2, (2, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
            h = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            h = (h + nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)).transpose(1, 2)
            return self.mix(h.flatten(2), x)

    model = Attention()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(x: Tensor, mask: Tensor) -> None:
        model(x, mask).square().mean().backward()
        opt.step()

    args = (torch.randn(2, 5, 8), torch.randn(5, 5))
    options = Options(dtype=dtype)
    run(graph_of(step, args, passes_for(options), dtype=dtype)[0])


def test_statistics_that_float16_cannot_hold_keep_their_gradient() -> None:
    """1 / sqrt(0 + 1e-10) is 1e5: for a constant row it would be inf in float16, and the gradient nan."""
    torch.manual_seed(0)
    first, last = nn.Linear(4, 8), nn.Linear(8, 2)
    model = nn.Sequential(first, nn.LayerNorm(8, eps=1e-10), last)
    with torch.no_grad():
        first.weight.zero_()
        first.bias.fill_(0.5)
        last.weight.mul_(1e-3)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    mp = MixedPrecision(loss_scale=1.0)

    @torch.compile(backend=mp)
    def step(x: Tensor) -> None:
        model(x).sum().backward()
        opt.step()

    step(torch.randn(3, 4))
    assert (mp.stats().steps, mp.stats().skipped) == (1, 0)
