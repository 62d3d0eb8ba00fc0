"""What a step with a sharded model cannot do: for ``tests.support.sharded_ranks``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import mse_loss

import fxpass
from tests.support.ranks import EAGER, WORLD, Batch, Step, plain, sgd

Options = dict[str, Any]


class Net(nn.Module):
    def __init__(self, sharded: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 6), nn.Linear(6, 4)
        if sharded:
            fxpass.shard_(self, init_device_mesh("cpu", (WORLD,)))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


class Own(torch.optim.SGD):
    @torch.no_grad()
    def step(self) -> None:  # pyrefly: ignore[bad-override]
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad / p.grad.norm(), alpha=-0.1)


def _with(change: Callable[[Any], Any], *, late: bool = False) -> Callable[[], Step]:
    """An ordinary step, and what ``change`` does with the model in it, before or after the update."""

    def make() -> Step:
        net = Net()
        opt = sgd(net)

        def step(batches: Batch, factor: Tensor) -> Any:
            x, y = batches[0]
            opt.zero_grad()
            mse_loss(net(x), y).backward()
            if not late:
                change(net)
            opt.step()
            if late:
                change(net)

        return step

    return make


def _optimizer(kind: Callable[..., Any], **settings: Any) -> Callable[[], Step]:
    def make() -> Step:
        net = Net()
        return plain(net, net, kind(net.parameters(), **settings))[1]

    return make


def _muon(params: Any, **settings: Any) -> torch.optim.Optimizer:
    params = list(params)
    for p in params:
        p.requires_grad_(p.ndim == 2)
    return torch.optim.Muon([p for p in params if p.ndim == 2], **settings)


def _made_before() -> Step:
    net = Net(sharded=False)
    opt = sgd(net)
    fxpass.shard_(net, init_device_mesh("cpu", (WORLD,)))
    return plain(net, net, opt)[1]


def _hooked() -> Step:
    net = Net()
    net.first.weight.register_hook(lambda grad: grad * 2)
    return plain(net, net, sgd(net))[1]


def _by_hand() -> Step:
    net = Net()
    opt = sgd(net)

    def step(batches: Batch, factor: Tensor) -> None:
        params = list(net.parameters())
        grads = torch.autograd.grad(mse_loss(net(batches[0][0]), batches[0][1]), params)
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        opt.step()

    return step


def _half() -> Step:
    net = Net(sharded=False)
    fxpass.shard_(net.first, init_device_mesh("cpu", (WORLD,)))
    return plain(net, net, sgd(net))[1]


def _left_over() -> Step:
    net = Net()
    return plain(net, net, torch.optim.SGD(net.first.parameters(), lr=0.1))[1]


def _other_ways() -> Step:
    net = Net()
    return plain(net, (lambda x: net.first(x)[:, :4]) if dist.get_rank() else net, sgd(net))[1]


def _stale() -> Step:
    net = Net()
    net.first.weight.grad = net.first.weight.detach().clone()
    return plain(net, net, sgd(net))[1]


def _older_view() -> Step:
    net = Net()
    opt = sgd(net)

    def step(batches: Batch, factor: Tensor) -> Tensor:
        view = net.first.weight.detach().view(-1)
        opt.zero_grad()
        mse_loss(net(batches[0][0]), batches[0][1]).backward()
        opt.step()
        return view.sum()

    return step


def _fsdp() -> Step:
    net = Net(sharded=False)
    fully_shard(net, mesh=init_device_mesh("cpu", (WORLD,)))
    return plain(net, net, sgd(net))[1]


def _loaded() -> Step:
    net = Net()
    opt = sgd(net)
    for p in net.parameters():
        opt.state[p]["momentum_buffer"] = torch.zeros(p.shape)
    return plain(net, net, opt)[1]


def _plain() -> Step:
    net = Net()
    return plain(net, net, sgd(net))[1]


@torch.no_grad()
def _decay(net: Any) -> None:
    net.first.weight.mul_(0.99)


def _assign(net: Any) -> None:
    net.first.weight.grad = torch.ones(6, 8)


# name: what makes the step, its options, what the error says
REFUSED: dict[str, tuple[Callable[[], Step], Options, str]] = {
    "skip": (_plain, {"skip": "tensor"}, "option skip='tensor' with parameters of fxpass.shard_"),
    "release": (_plain, {"release": True}, "option release=True with"),
    "memory_budget": (_plain, {"memory_budget": 0.5}, "option memory_budget=0.5 with"),
    "adaptive_clip": (_plain, {"adaptive_clip": 0.1}, "option adaptive_clip=0.1 with"),
    "grads": (_plain, {"grads": "keep"}, "option grads='keep' with"),
    "adafactor": (_optimizer(torch.optim.Adafactor), {}, r"Adafactor keeps state\['row_var'\]"),
    "muon": (_optimizer(_muon), {}, "Muon.step.. computes .* of a whole parameter"),
    "own optimizer": (_optimizer(Own, lr=0.1), {}, "Own is none of torch's"),
    "made before": (_made_before, {}, "SGD was made before fxpass.shard_"),
    "hooked": (_hooked, {}, "a hook on a parameter of fxpass.shard_"),
    "by hand": (_by_hand, {}, "a gradient of first.weight, .*torch.autograd.grad"),
    "assigned": (_with(_assign), {}, "first.weight, .* is given a gradient that is no mean over the ranks"),
    "written": (_with(_decay, late=True), {}, "the step itself writes to first.weight"),
    "older view": (_older_view, {}, "a view of first.weight, .* is read across"),
    "half": (_half, {}, "last.weight is not sharded, and others of the step are"),
    "left over": (_left_over, {}, "the gradient of .*last.weight, .* is left in .grad"),
    "other ways": (_other_ways, {}, "the ranks would train different steps"),
    "stale": (_stale, {}, "a sharded parameter holds a .grad"),
    "fsdp": (_fsdp, {}, "FSDPModule inside the step(?s:.*)fxpass.shard_"),
    "loaded": (_loaded, {}, r"state\[first.weight\]\['momentum_buffer'\] is a tensor of shape"),
}


def refuse(name: str, rank: int) -> dict[str, Any]:
    """Call the step once; what it raised is for the caller."""
    make, options, _ = REFUSED[name]
    torch.compiler.reset()
    step = torch.compile(make(), backend=fxpass.MixedPrecision(**{**EAGER, **options}))  # pyrefly: ignore[bad-argument-type]
    generator = torch.Generator().manual_seed(rank)
    batches = [(torch.randn(6, 8, generator=generator), torch.randn(6, 4, generator=generator))]
    step(batches, torch.tensor(1.0))
    return {}
