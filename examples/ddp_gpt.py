"""Train a small GPT on several processes, with DistributedDataParallel in the step as ever.

    torchrun --nproc-per-node 2 examples/ddp_gpt.py

On CPUs the processes talk over gloo. Each rank draws batches of its own; gradients are averaged inside the
compiled step, and what one rank cannot represent skips the step on all.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import fxpass
from gpt_stdlib import CONTEXT, LEARNING_RATE, MAX_NORM, VOCABULARY, batches, stdlib_text
from models import GPT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=2, help="windows of 128 characters per rank and step")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    rank = dist.get_rank()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    torch.manual_seed(0)
    model = DistributedDataParallel(
        GPT(len(VOCABULARY), CONTEXT, width=96, heads=3, layers=2).to(device),
        device_ids=[device] if cuda else None,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)

    def train_step(x: Tensor, y: Tensor) -> Tensor:
        loss = model(x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    mp = fxpass.MixedPrecision(max_norm=MAX_NORM)
    step = torch.compile(train_step, backend=mp)
    data = batches(stdlib_text(), args.batch, seed=rank, device=device)
    for number in range(1, args.steps + 1):
        loss = step(*next(data)).detach()
        dist.all_reduce(loss)
        if rank == 0 and number in (1, args.steps):
            print(f"step {number}: loss {loss.item() / dist.get_world_size():.3f} (mean of the ranks)")
    print(f"rank {rank}: {_report(model, mp)}", flush=True)
    dist.destroy_process_group()


def _report(model: DistributedDataParallel, mp: fxpass.MixedPrecision) -> str:
    """Whether this rank's weights are those of rank 0, and what its scaler has counted."""
    ours = torch.cat([p.detach().flatten() for p in model.parameters()])
    first = ours.clone()
    dist.broadcast(first, 0)
    stats = mp.stats()
    return (
        f"{stats.steps} steps, {stats.skipped} skipped, weights equal to rank 0's: {torch.equal(ours, first)}"
    )


if __name__ == "__main__":
    main()
