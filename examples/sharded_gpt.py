"""Train a small GPT of which each process keeps a share: weights, optimizer state and gradients.

    torchrun --nproc-per-node 2 examples/sharded_gpt.py --checkpoint /tmp/gpt

On CPUs the processes talk over gloo. `fxpass.shard_` is the one line beside those of a single process. With
`--checkpoint` a second run goes on where the first has ended, on as many processes or another number.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import fxpass
from gpt_stdlib import CONTEXT, LEARNING_RATE, MAX_NORM, VOCABULARY, batches, stdlib_text
from models import GPT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=2, help="windows of 128 characters per rank and step")
    parser.add_argument("--checkpoint", type=Path, help="read from and written to this folder")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    rank = dist.get_rank()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    torch.manual_seed(0)
    model = GPT(len(VOCABULARY), CONTEXT, width=96, heads=3, layers=2).to(device)
    fxpass.shard_(model, dist.group.WORLD)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)

    def train_step(x: Tensor, y: Tensor) -> Tensor:
        loss = model(x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    mp = fxpass.MixedPrecision(max_norm=MAX_NORM)
    step = torch.compile(train_step, backend=mp)
    if args.checkpoint is not None and (args.checkpoint / ".metadata").exists():
        state = _state(model, optimizer, mp)
        dcp.load(state, checkpoint_id=args.checkpoint)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        mp.load_state_dict(state["precision"])
    done = mp.stats().steps
    data = batches(stdlib_text(), args.batch, seed=1000 * done + rank, device=device)
    for number in range(1, args.steps + 1):
        loss = step(*next(data)).detach()
        dist.all_reduce(loss)
        if rank == 0 and number in (1, args.steps):
            mean = loss.item() / dist.get_world_size()
            print(f"step {done + number}: loss {mean:.3f} (mean of the ranks)")
    if args.checkpoint is not None:
        dcp.save(_state(model, optimizer, mp), checkpoint_id=args.checkpoint)
    own = sum(p.to_local().numel() for p in model.parameters())  # pyrefly: ignore[missing-attribute]
    whole, stats = sum(p.numel() for p in model.parameters()), mp.stats()
    print(
        f"rank {rank}: {stats.steps} steps, {stats.skipped} skipped, keeps {own:,} of {whole:,} parameters",
        flush=True,
    )
    dist.destroy_process_group()


def _state(model: nn.Module, optimizer: torch.optim.Optimizer, mp: fxpass.MixedPrecision) -> dict[str, Any]:
    """What a checkpoint holds: DTensors of each rank's rows, and the scaler's numbers."""
    weights, state = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": state, "precision": mp.state_dict()}


if __name__ == "__main__":
    main()
