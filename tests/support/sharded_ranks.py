"""Two processes on gloo that share the rows of a model: ``python -m tests.support.sharded_ranks``.

Each program trains beside eager DistributedDataParallel.

Prints one JSON object: what each program gave on rank 0, or the error it raised there.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint

import fxpass
from tests.support.ranks import EAGER, WORLD, Batch, Step, batches_of, distance, main, plain, sgd
from tests.support.sharded_refused import REFUSED, refuse

CALLS = 4


class Net(nn.Module):
    """Rows that no two ranks share evenly, a frozen bias, a parameter of one element."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(8, 17), nn.BatchNorm1d(17), nn.Linear(17, 4)
        self.scale = nn.Parameter(torch.tensor(0.9))
        self.last.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.norm(self.first(x)))) * self.scale


class Words(nn.Module):
    """A table that is also the last layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.norm, self.last = nn.Embedding(13, 8), nn.LayerNorm(8), nn.Linear(8, 13, bias=False)
        self.last.weight = self.table.weight
        self.out = nn.Linear(13, 4)

    def forward(self, x: Tensor) -> Tensor:
        ids = (x * 4).long().remainder(13)
        return self.out(self.last(self.norm(self.table(ids).mean(1) + x)))


Model = Callable[..., Tensor]
Make = Callable[[nn.Module, Model], Step]  # of the parameters' owner, and of what is called


def simple(net: nn.Module, model: Model) -> Step:
    return plain(net, model, sgd(net))[1]


def clipped(net: nn.Module, model: Model) -> Step:
    opt = sgd(net)

    def step(batches: Batch, factor: Tensor) -> None:
        opt.zero_grad()
        mse_loss(model(batches[0][0]), batches[0][1]).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        opt.step()

    return step


def edited(net: nn.Module, model: Model) -> Step:
    opt = sgd(net)

    def step(batches: Batch, factor: Tensor) -> None:
        opt.zero_grad()
        (mse_loss(model(batches[0][0]), batches[0][1]) * factor).backward()
        for p in net.parameters():
            if p.grad is not None:
                p.grad.mul_(0.5)
        opt.step()

    return step


def accumulated(net: nn.Module, model: Model) -> Step:
    opt = sgd(net)

    def step(batches: Batch, factor: Tensor) -> None:
        opt.zero_grad()
        for x, y in batches:
            mse_loss(model(x), y).backward()
        opt.step()

    return step


def two_optimizers(net: Any, model: Model) -> Step:
    one = torch.optim.SGD(net.first.parameters(), lr=0.1)
    two = torch.optim.AdamW([*net.norm.parameters(), net.last.weight, net.scale], lr=0.01)

    def step(batches: Batch, factor: Tensor) -> None:
        one.zero_grad()
        two.zero_grad()
        (mse_loss(model(batches[0][0]), batches[0][1]) * factor).backward()
        one.step()
        two.step()

    return step


def in_turn(net: Any, model: Model) -> Step:
    """An update between two forwards, which the second reads."""
    one = torch.optim.SGD(net.first.parameters(), lr=0.1)
    two = torch.optim.SGD([*net.norm.parameters(), net.last.weight, net.scale], lr=0.1)

    def step(batches: Batch, factor: Tensor) -> None:
        for opt, (x, y) in zip((one, two), batches, strict=False):
            one.zero_grad()
            two.zero_grad()
            (mse_loss(model(x), y) * factor).backward()
            opt.step()
        one.zero_grad()
        two.zero_grad()

    return step


def followed(net: Any, model: Model) -> Step:
    """A penalty on the weights, part of it recomputed; an average of the weights, evaluation in the step."""
    opt = sgd(net)
    average = [torch.zeros(p.shape) for p in net.parameters()]
    seen = torch.zeros(())
    net.norm.eval()  # what checkpoint runs again counts twice
    net.register_buffer("seen", seen)
    net.register_buffer("average", average[1])

    def step(batches: Batch, factor: Tensor) -> None:
        x, y = batches[0]
        opt.zero_grad()
        out = checkpoint(lambda x: torch.tanh(model(x)), x, use_reentrant=False)
        loss = mse_loss(out, y) + sum(0.1 * p.square().sum() for p in net.parameters())
        loss.backward()
        opt.step()
        with torch.no_grad():
            for a, p in zip(average, net.parameters(), strict=True):
                a.lerp_(p, 0.5)
            net.eval()
            seen.copy_(model(batches[1][0]).mean())
            net.train()
            net.norm.eval()

    return step


# name: the model, what is trained, options, what eager trains beside it
F32 = {"dtype": "float32", "loss_scale": 8.0}
F16 = {"loss_scale": 8.0}
TRAINED: dict[str, tuple[Callable[[], Any], Make, dict[str, Any], Make]] = {
    "plain": (Net, simple, EAGER, simple),
    "by default": (Net, simple, F32, simple),
    "small buckets": (Net, simple, {**EAGER, "bucket_mb": 0.0003}, simple),
    "float16": (Net, simple, F16, simple),
    "float16, eager": (Net, simple, {**F16, "codegen": "eager"}, simple),
    "bfloat16": (Net, simple, {"dtype": "bfloat16", "codegen": "eager"}, simple),
    "max_norm": (Net, simple, {**EAGER, "max_norm": 0.1}, clipped),
    "max_norm, inf": (Net, simple, {**EAGER, "max_norm": 1e3, "norm_type": float("inf")}, simple),
    "clip_per": (Net, simple, {**EAGER, "max_norm": 1e3, "clip_per": "parameter"}, simple),
    "headroom": (Net, simple, {"loss_scale": "headroom", "codegen": "eager"}, simple),
    "clipped": (Net, clipped, EAGER, clipped),
    "edited": (Net, edited, EAGER, edited),
    "edited, float16": (Net, edited, {**F16, "codegen": "eager"}, edited),
    "accumulated": (Net, accumulated, EAGER, accumulated),
    "two optimizers": (Net, two_optimizers, EAGER, two_optimizers),
    "in turn": (Net, in_turn, EAGER, in_turn),
    "tied": (Words, simple, EAGER, simple),
    "tied, float16": (Words, simple, {**F16, "codegen": "eager"}, simple),
    "followed": (Net, followed, EAGER, followed),
}
OVERFLOWS = (
    "plain",
    "by default",
    "edited",
    "max_norm",
    "float16",
    "two optimizers",
    "in turn",
    "max_norm, inf",
)


def _train(name: str, rank: int) -> dict[str, Any]:
    if name.startswith("refused: "):
        return refuse(name.removeprefix("refused: "), rank)
    if name == "resumed":
        return _resume(rank)
    model, make, options, reference = TRAINED[name]
    torch.compiler.reset()
    mesh = init_device_mesh("cpu", (WORLD,))
    mp = fxpass.MixedPrecision(**options)
    net = model()
    if rank == 1:
        with torch.no_grad():
            next(net.parameters()).zero_()  # those of rank 0 count
    fxpass.shard_(net, mesh)
    compiled = torch.compile(make(net, net), backend=mp)
    skipped = (1, CALLS) if name in OVERFLOWS else ()  # an overflow on one rank, then on the other
    before: list[Tensor] = []
    kept = True
    for call in range(CALLS + 1):
        bad = call in skipped and rank == (0 if call == 1 else 1)
        if call in skipped:
            before = [copy.deepcopy(_part(p)) for p in net.parameters()]
        compiled(batches_of(rank, call), torch.tensor(float("nan") if bad else 1.0))
        if call in skipped:
            kept = kept and all(
                torch.equal(a, _part(p)) for a, p in zip(before, net.parameters(), strict=True)
            )
    other = model()
    eager = reference(other, DDP(other, broadcast_buffers=False))
    for call in range(CALLS + 1):
        if call not in skipped:
            eager(batches_of(rank, call), torch.tensor(1.0))
    stats = mp.stats()
    ours = [_whole(p) for p in net.parameters()]
    if not skipped:
        ours += [b.double() for b in net.buffers()]
    theirs = [*other.parameters(), *(b.double() for b in other.buffers() if not skipped)]
    return {
        "difference": distance(ours, theirs),
        "steps": stats.steps,
        "skipped": stats.skipped,
        "kept": kept,
        "scales": _scales(mp),
    }


CHECKPOINT = "FXPASS_TEST_CHECKPOINT"  # environment variable: where `_resume` leaves one


def words(**options: Any) -> tuple[nn.Module, Any, fxpass.MixedPrecision, Any]:
    """A sharded model, its optimizer, the handle and the compiled step."""
    torch.compiler.reset()
    net = fxpass.shard_(Words(), init_device_mesh("cpu", (WORLD,)))
    opt, mp = torch.optim.AdamW(net.parameters(), lr=0.01), fxpass.MixedPrecision(**options)
    return net, opt, mp, torch.compile(plain(net, net, opt)[1], backend=mp)


def _resume(rank: int) -> dict[str, Any]:
    """Three steps, a checkpoint, two more; then those two again from the checkpoint, in another model."""
    after: list[list[Tensor]] = []
    skipped = []
    for loads in (False, True):
        net, opt, mp, step = words(codegen="eager")
        if loads:
            model, optim = get_state_dict(net, opt)
            state = {"model": model, "optim": optim, "scaler": mp.state_dict()}
            dcp.load(state, checkpoint_id=os.environ[CHECKPOINT])
            set_state_dict(net, opt, model_state_dict=model, optim_state_dict=optim)
            mp.load_state_dict(state["scaler"])
        for call in range(3 if loads else 0, 5):
            if call == 3 and not loads:
                model, optim = get_state_dict(net, opt)
                state = {"model": model, "optim": optim, "scaler": mp.state_dict()}
                dcp.save(state, checkpoint_id=os.environ[CHECKPOINT])
            step(batches_of(rank, call), torch.tensor(1.0))
        after.append([_whole(p) for p in net.parameters()])
        skipped.append(mp.stats().skipped)
    return {"difference": distance(*after), "skipped": skipped, "scales": _scales(mp)}


def _part(p: Any) -> Tensor:
    return p.to_local().detach()


def _whole(p: Any) -> Tensor:
    return p.full_tensor().detach()


def _scales(mp: fxpass.MixedPrecision) -> int:
    """How many different states the ranks have."""
    states: list[Any] = [None] * WORLD
    dist.all_gather_object(states, str(mp.state_dict()) + str(mp.stats()))
    return len(set(states))


NAMES = (*TRAINED, "resumed", *(f"refused: {name}" for name in REFUSED))


if __name__ == "__main__":
    main(_train, NAMES)
