"""Accelerate's loop, with gradient accumulation, as one compiled step; beside the same loop in float32."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fxpass
from _show import print_table

Batches = list[tuple[Tensor, Tensor]]


@dataclass
class Result:
    losses: list[float] = field(default_factory=list)
    rate: float = 0.0  # of the scheduler, at the end
    handle: fxpass.MixedPrecision | None = None


def digits(rows: int) -> TensorDataset:
    images, labels = load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(images[:rows] / 16, dtype=torch.float32), torch.tensor(labels[:rows]))


def train(
    compiler: Callable[[Any], Any] = lambda step: step,
    rows: int = 768,
    accumulate: int = 2,
    clip: float = 1.0,
) -> Result:
    """Train for one epoch; ``compiler`` makes of the step what is called."""
    torch.manual_seed(0)
    # the micro-batches of a step are drawn before it runs, so the end of the data says nothing about it
    plugin = GradientAccumulationPlugin(num_steps=accumulate, sync_with_dataloader=False)
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), gradient_accumulation_plugin=plugin)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, rows // 64)
    loader = DataLoader(digits(rows), batch_size=64, drop_last=True)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

    def step(batches: Batches) -> Tensor:
        total = torch.zeros((), device=accelerator.device)
        for images, labels in batches:
            with accelerator.accumulate(model) if accumulate > 1 else nullcontext():
                loss = F.cross_entropy(model(images), labels)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            total += loss.detach() / len(batches)
        return total

    call, held, result = compiler(step), [], Result()
    for batch in loader:
        held.append(tuple(batch))
        if len(held) == accumulate:
            result.losses.append(call(held).item())
            held = []
    result.rate = optimizer.param_groups[0]["lr"]
    result.handle = fxpass.of(call) if call is not step else None
    return result


def mixedprec(step: Any) -> Any:
    return torch.compile(step, backend="mixedprec")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--accumulate", type=int, default=2)
    given = parser.parse_args()
    plain = train(accumulate=given.accumulate)
    ours = train(mixedprec, accumulate=given.accumulate)
    assert ours.handle is not None
    rows = [
        ["first loss", f"{plain.losses[0]:.4f}", f"{ours.losses[0]:.4f}"],
        ["last loss", f"{plain.losses[-1]:.4f}", f"{ours.losses[-1]:.4f}"],
        ["learning rate", f"{plain.rate:.5f}", f"{ours.rate:.5f}"],
        ["steps", f"{len(plain.losses)}", f"{ours.handle.stats().steps}"],
    ]
    print_table("Digits with accelerate", ["float32", "mixedprec"], rows)


if __name__ == "__main__":
    main()
