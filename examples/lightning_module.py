"""A LightningModule and a Trainer: in float32, and with the plugin that compiles the training steps."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fxpass
from _show import print_table

BATCH = 64


class Digits(pl.LightningModule):
    """Nothing in it knows of mixed precision."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        logits = self.model(images)
        loss = F.cross_entropy(logits, labels)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("accuracy", (logits.argmax(1) == labels).float().mean(), on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("val_loss", F.cross_entropy(self.model(images), labels))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 20)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def loader(rows: slice) -> DataLoader[Any]:
    images, labels = load_digits(return_X_y=True)
    inputs = torch.tensor(images[rows] / 16, dtype=torch.float32)
    return DataLoader(TensorDataset(inputs, torch.tensor(labels[rows])), batch_size=BATCH)


def train(
    plugin: Any = None,
    module: type[pl.LightningModule] = Digits,
    checkpoint: Path | None = None,
    rows: int = 768,
    **settings: Any,
) -> pl.Trainer:
    """A trainer after its training; ``plugin``: the one line."""
    torch.manual_seed(0)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    plain = {"max_epochs": 2, "enable_checkpointing": False, "accelerator": "auto", "devices": 1}
    trainer = pl.Trainer(plugins=plugin, **{**quiet, **plain, **settings})  # pyrefly: ignore[bad-argument-type]
    trainer.fit(module(), loader(slice(rows)), loader(slice(1024, 1280)), ckpt_path=checkpoint)
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--accumulate", type=int, default=2)
    given = parser.parse_args()
    plugin = fxpass.integrations.LightningPrecision(max_norm=1.0)
    clipped = {"accumulate_grad_batches": given.accumulate, "gradient_clip_val": 1.0}
    plain = train(**clipped)
    ours = train(plugin, accumulate_grad_batches=given.accumulate)
    names = ("loss_epoch", "accuracy", "val_loss")
    rows = [[name, *(f"{t.logged_metrics[name]:.4f}" for t in (plain, ours))] for name in names]
    rows.append(["steps", f"{plain.global_step}", f"{plugin.mp.stats().steps}"])
    print_table("Digits with Lightning", ["float32", "mixedprec"], rows)


if __name__ == "__main__":
    main()
