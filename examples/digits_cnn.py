"""Train a conv net with BatchNorm on scikit-learn's digits in float16, one compiled step."""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import fxpass
from _show import Run, Step, print_table, progress
from models import ConvNet

BATCH = 64


def mixedprec_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    def train_step(images: Tensor, labels: Tensor) -> Tensor:
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return torch.compile(train_step, backend="mixedprec")


def digits(seed: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training images and labels, then test images and labels."""
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    train, test = train_test_split(range(len(labels)), test_size=0.2, random_state=seed, stratify=labels)
    images, labels = images.to(device), torch.tensor(labels, device=device)
    return images[train], labels[train], images[test], labels[test]


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    return (model(images).argmax(1) == labels).float().mean().item()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.manual_seed(args.seed)
    train_images, train_labels, test_images, test_labels = digits(args.seed, args.device)
    model = ConvNet().to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    run = Run("mixedprec", mixedprec_step(model, optimizer))

    steps = len(train_labels) // BATCH
    with progress() as bar:
        task = bar.add_task("training", total=args.epochs * steps, note="compiling the first step")
        for _ in range(args.epochs):
            order = torch.randperm(len(train_labels)).to(args.device)
            for batch in order.split(BATCH)[:steps]:
                run(train_images[batch], train_labels[batch])
                bar.update(task, advance=1, note=f"loss {run.losses[-1]:.4f}")

    stats = fxpass.of(run.step).stats()
    print_table(
        f"Digits, {len(run.losses)} steps of {BATCH} images in float16",
        [run.name],
        [
            ["test accuracy", f"{accuracy(model, test_images, test_labels):.1%}"],
            ["final loss (mean of 20)", f"{run.final_loss():.4f}"],
            ["ms per step (median)", f"{run.median_ms():.1f}"],
            ["skipped steps", f"{stats.skipped}"],
            ["final loss scale", f"{stats.scale:g}"],
        ],
    )


if __name__ == "__main__":
    main()
