"""Two processes on gloo that train beside eager DistributedDataParallel: ``python -m tests.support.ranks``.

Prints one JSON object: what each program gave on rank 0, or the error it raised there.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.multiprocessing.spawn import spawn
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint

from fxpass import MixedPrecision

WORLD, CALLS = 2, 4
Batch = list[tuple[Tensor, Tensor]]
Step = Callable[[Batch, Tensor], Any]
EAGER = {"dtype": "float32", "loss_scale": 8.0, "codegen": "eager"}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)
        self.last.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.norm(self.first(x))))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


def plain(net: nn.Module, model: Callable[..., Tensor], opt: Any) -> tuple[nn.Module, Step]:
    def step(batches: Batch, factor: Tensor) -> Tensor:
        x, y = batches[0]
        opt.zero_grad()
        loss = mse_loss(model(x), y) * factor
        loss.backward()
        opt.step()
        return loss

    return net, step


def replicated() -> tuple[nn.Module, Step]:
    net = Net()
    return plain(net, DDP(net), sgd(net))


def clipped() -> tuple[nn.Module, Step]:
    net = Net()
    model, opt = DDP(net), sgd(net)

    def step(batches: Batch, factor: Tensor) -> None:
        opt.zero_grad()
        mse_loss(model(batches[0][0]), batches[0][1]).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        opt.step()

    return net, step


def accumulated() -> tuple[nn.Module, Step]:
    net = Net()
    model, opt = DDP(net), sgd(net)

    def step(batches: Batch, factor: Tensor) -> None:
        opt.zero_grad()
        with model.no_sync():
            for x, y in batches[:2]:
                mse_loss(model(x), y).backward()
        mse_loss(model(batches[2][0]), batches[2][1]).backward()
        opt.step()

    return net, step


def hooked() -> tuple[nn.Module, Step]:
    net = Net()
    net.first.weight.register_hook(lambda grad: grad.clamp(-0.01, 0.01))
    return plain(net, DDP(net), sgd(net))


def unused() -> tuple[nn.Module, Step]:
    net = Net()
    net.extra = nn.Linear(3, 3)
    return plain(net, DDP(net, find_unused_parameters=True), sgd(net))


def two_models() -> tuple[nn.Module, Step]:
    nets = nn.ModuleList([Net(), Net()])
    first, second = DDP(nets[0]), DDP(nets[1])
    one, two = sgd(nets[0]), sgd(nets[1])

    def step(batches: Batch, factor: Tensor) -> None:
        x, y = batches[0]
        one.zero_grad()
        mse_loss(first(x), y).backward()
        one.step()
        two.zero_grad()
        mse_loss(second(x), first(x).detach()).backward()
        two.step()

    return nets, step


def logged() -> tuple[nn.Module, Step]:
    """A loss that is averaged for the log, and evaluation on another batch."""
    net = Net()
    model, opt = DDP(net), sgd(net)

    def step(batches: Batch, factor: Tensor) -> Tensor:
        opt.zero_grad()
        loss = mse_loss(model(batches[0][0]), batches[0][1])
        loss.backward()
        opt.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        net.eval()
        with torch.no_grad():
            other = mse_loss(net(batches[1][0]), batches[1][1])
        net.train()
        return mean / WORLD + other

    return net, step


def branching() -> tuple[nn.Module, Step]:
    """A branch that goes one way on one rank and the other way on the other; part of it is recomputed."""
    net = Net()
    net.norm.eval()
    model, opt = DDP(net), sgd(net)

    def step(batches: Batch, factor: Tensor) -> None:
        x, y = batches[0]
        opt.zero_grad()
        out = model(x)
        if x.sum() > 0:
            out = out * 2
        mse_loss(checkpoint(torch.tanh, out, use_reentrant=False), y).backward()
        opt.step()

    return net, step


def two_optimizers() -> tuple[nn.Module, Step]:
    net = Net()
    model, one = DDP(net), torch.optim.SGD(net.first.parameters(), lr=0.1)
    two = torch.optim.AdamW([*net.norm.parameters(), net.last.weight], lr=0.01)

    def step(batches: Batch, factor: Tensor) -> None:
        one.zero_grad()
        two.zero_grad()
        with model.no_sync():
            (mse_loss(model(batches[0][0]), batches[0][1]) / 2).backward()
        (mse_loss(model(batches[1][0]), batches[1][1]) / 2).backward()
        one.step()
        two.step()

    return net, step


def by_hand() -> tuple[nn.Module, Step]:
    """The user's own all-reduce, between backward and step."""
    net = Net()
    opt = sgd(net)
    net.norm.eval()

    def step(batches: Batch, factor: Tensor) -> None:
        opt.zero_grad()
        (mse_loss(net(batches[0][0]), batches[0][1]) * factor).backward()
        for p in net.parameters():
            if p.grad is not None:
                dist.all_reduce(p.grad)
                p.grad /= WORLD
        opt.step()

    return net, step


def option() -> tuple[nn.Module, Step]:
    """No wrapper; ranks that start from different weights."""
    net = Net()
    if dist.get_rank() == 1:
        with torch.no_grad():
            net.first.weight.zero_()
    return plain(net, net, sgd(net))


def without_buffers() -> tuple[nn.Module, Step]:
    net = Net()
    return plain(net, DDP(net, broadcast_buffers=False), sgd(net))


def other_ways() -> tuple[nn.Module, Step]:
    """One rank uses a layer that the other does not."""
    net = Net()
    net.extra = nn.Linear(8, 8)
    model = DDP(net, find_unused_parameters=True)
    through = net.extra if dist.get_rank() == 0 else nn.Identity()
    return plain(net, lambda x: model(through(x)), sgd(net))  # pyrefly: ignore[not-callable]


def alone() -> tuple[nn.Module, Step]:
    """A step that one rank can compile and the other can't."""
    net = Net()
    opt, scaler = sgd(net), torch.amp.GradScaler("cpu", enabled=dist.get_rank() == 1)
    net, step = plain(net, DDP(net), opt)
    return net, lambda batches, factor: step(batches, scaler.scale(factor))


def comm_hook() -> tuple[nn.Module, Step]:
    net = Net()
    model = DDP(net)
    model.register_comm_hook(None, fp16_compress_hook)
    return plain(net, model, sgd(net))


def sharded() -> tuple[nn.Module, Step]:
    net = Net()
    fully_shard(net, mesh=init_device_mesh("cpu", (WORLD,)))
    return plain(net, net, sgd(net))


def tensor_parallel() -> tuple[nn.Module, Step]:
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    parallelize_module(net, init_device_mesh("cpu", (WORLD,)), plan)  # pyrefly: ignore[bad-argument-type]
    return plain(net, net, sgd(net))


def zero() -> tuple[nn.Module, Step]:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns of its own imports

    net = Net()
    return plain(net, DDP(net), ZeroRedundancyOptimizer(net.parameters(), torch.optim.SGD, lr=0.1))


Build = Callable[[], tuple[nn.Module, Step]]
# name: what is compiled, its options, and what eager trains beside it
PROGRAMS: dict[str, tuple[Build, dict[str, Any], Build]] = {
    "replicated": (replicated, EAGER, replicated),
    "by default": (replicated, {"dtype": "float32", "loss_scale": 8.0}, replicated),
    "small buckets": (replicated, {**EAGER, "bucket_mb": 0.0004}, replicated),
    "in float32": (
        replicated,
        {"loss_scale": 8.0, "codegen": "eager", "reduce_dtype": "float32"},
        replicated,
    ),
    "float16": (replicated, {"loss_scale": 8.0}, replicated),
    "per tensor": (replicated, {**EAGER, "skip": "tensor"}, replicated),
    "released": (replicated, {**EAGER, "release": True}, replicated),
    "clipped": (clipped, EAGER, clipped),
    "accumulated": (accumulated, EAGER, accumulated),
    "hooked": (hooked, EAGER, hooked),
    "unused": (unused, EAGER, unused),
    "two models": (two_models, EAGER, two_models),
    "logged": (logged, {**EAGER, "memory_budget": 0.5}, logged),
    "branching": (branching, EAGER, branching),
    "two optimizers": (two_optimizers, EAGER, two_optimizers),
    "by hand": (by_hand, EAGER, by_hand),
    "option": (option, EAGER, without_buffers),
    "other ways": (other_ways, EAGER, replicated),
    "alone": (alone, EAGER, replicated),
    "comm hook": (comm_hook, EAGER, replicated),
    "sharded": (sharded, EAGER, replicated),
    "tensor parallel": (tensor_parallel, EAGER, replicated),
    "zero": (zero, EAGER, replicated),
}
OVERFLOWS = ("replicated", "by default", "small buckets", "per tensor", "released", "by hand", "float16")


def _train(name: str, rank: int) -> dict[str, Any]:
    build, options, reference = PROGRAMS[name]
    if build is option:
        options = {**options, "data_parallel": dist.group.WORLD}
    torch.compiler.reset()
    mp = MixedPrecision(**options)  # pyrefly: ignore[bad-argument-type]
    net, step = build()
    compiled = torch.compile(step, backend=mp)
    skipped = (1, CALLS) if name in OVERFLOWS else ()  # an overflow on one rank, then on the other
    for call in range(CALLS + 1):
        bad = call in skipped and rank == (0 if call == 1 else 1)
        compiled(batches_of(rank, call), torch.tensor(float("inf") if bad else 1.0))
    other, eager = reference()
    for call in range(CALLS + 1):
        if call not in skipped:
            eager(batches_of(rank, call), torch.tensor(1.0))
    stats = mp.stats()
    return {
        "difference": distance(_state(net, skipped), _state(other, skipped)),
        "ranks": _between_ranks(net),
        "steps": stats.steps,
        "skipped": stats.skipped,
        "reductions": mp.graphs[0].after.count("all_reduce.default("),
    }


def batches_of(rank: int, call: int) -> Batch:
    made = torch.Generator().manual_seed(1000 * rank + call)
    return [(torch.randn(6, 8, generator=made), torch.randn(6, 4, generator=made)) for _ in range(3)]


def _state(net: nn.Module, skipped: tuple[int, ...]) -> list[Tensor]:
    """Parameters, and buffers unless an overflow has passed through them."""
    buffers = [] if skipped else [b for b in net.buffers() if b.is_floating_point()]
    return [*net.parameters(), *buffers]


def distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return max((a.detach() - b.detach()).abs().max().item() for a, b in zip(ours, theirs, strict=True))


def _between_ranks(net: nn.Module) -> float:
    mine = torch.cat([p.detach().flatten() for p in net.parameters()])
    all_of_them = [torch.empty_like(mine) for _ in range(WORLD)]
    dist.all_gather(all_of_them, mine)
    return distance([all_of_them[0]], [all_of_them[1]])


Train = Callable[[str, int], dict[str, Any]]  # a program on one rank, by name


def _work(rank: int, port: int, names: list[str], train: Train) -> None:
    warnings.filterwarnings("ignore")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    torch.set_num_threads(1)
    found = {}
    for name in names:
        try:
            found[name] = train(name, rank)
        except Exception as error:  # of one program, the others go on
            found[name] = {"error": f"{type(error).__name__}: {error}"}
    if rank == 0:
        print(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def asked_for(request: pytest.FixtureRequest, programs: Iterable[str]) -> list[str]:
    """The programs that the selected tests of a module look at: those that their parameter ``name`` names."""
    tests = [test for test in request.session.items if test.path == request.path]
    rows = [getattr(test, "callspec", None) for test in tests]  # None: it has no parameters
    names = {row.params.get("name") for row in rows if row}
    return [name for name in programs if name in names]


def results_of(
    module: str, names: Sequence[str], environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What ``python -m module``, one with a ``main`` of this file's, finds of these programs, by name."""
    root = Path(__file__).parents[2]
    ours = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), **(environment or {})}
    command = [sys.executable, "-m", module, *names]
    run = subprocess.run(command, cwd=root, env=ours, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.strip().splitlines()[-1])


def main(train: Train, names: Iterable[str]) -> None:
    """Run the programs of the command line, or all of ``names``, on every rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(_work, (port, sys.argv[1:] or list(names), train), nprocs=WORLD)


if __name__ == "__main__":
    main(_train, PROGRAMS)
