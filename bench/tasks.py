"""What the studies train: four tasks small enough that a run of some hundred steps takes seconds.

Real data where there is some on every machine: the characters of Python's own standard library
and scikit-learn's digits. The fourth is made up, to have a table whose rows are rarely touched.
"""

from __future__ import annotations

import string
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.models import GPT, Batch, GPTConfig, LSTMModel

VOCABULARY = string.printable[:97]  # without carriage return, vertical tab and form feed
HELD_OUT = 20_000  # characters, or a sixth of the digits, for the final loss
TOKENS, CLASSES = 2000, 16  # of the sparse task
LABEL_NOISE = 0.1
BUCKETS = {"head": (0, 20), "middle": (20, 200), "tail": (200, TOKENS)}  # ranks by frequency


@dataclass(frozen=True)
class Task:
    """A model, its data and how it is trained; the model maps a batch to a scalar loss."""

    about: str
    model: Callable[[], nn.Module]
    batches: Callable[[int, int], list[Batch]]  # (count, seed)
    held_out: Callable[[], Mapping[str, list[Batch]]]  # "loss", and parts of it by name
    lr: Mapping[str, float]  # by optimizer; "hot sgd" is where training without clipping fails
    table: str | None = None  # the parameter whose rows are rarely touched

    def build(self, seed: int) -> nn.Module:
        """The same weights for the same seed."""
        torch.manual_seed(seed)
        return self.model()

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """The eager float32 loss on data never trained on, and on each named part of it."""
        model.eval()
        found = {
            name: torch.stack([model(x, y) for x, y in batches]).mean().item()
            for name, batches in self.held_out().items()
        }
        model.train()
        return found


class DigitsNet(nn.Module):
    """Two convolutions with BatchNorm and a linear head, for 8x8 images of ten classes."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * width * 16, 10),
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.layers(x).float(), y)


class TableNet(nn.Module):
    """An embedding and a small MLP that classifies each token."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.table = nn.Embedding(TOKENS, width)
        nn.init.normal_(self.table.weight, std=0.1)
        self.mlp = nn.Sequential(nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, CLASSES))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.mlp(self.table(x)).float(), y)


@cache
def _characters() -> Tensor:
    """The standard library's modules in alphabetical order, as numbers."""
    number = {character: i for i, character in enumerate(VOCABULARY)}
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = "".join(f.read_text(encoding="utf-8", errors="ignore") for f in files)[:1_000_000]
    return torch.tensor([number[c] for c in text if c in number])


def _windows(count: int, seed: int, rows: int, length: int, held_out: bool = False) -> list[Batch]:
    text = _characters()
    text = text[-HELD_OUT:] if held_out else text[:-HELD_OUT]
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - length, (count, rows, 1), generator=generator)
    drawn = text[starts + torch.arange(length + 1)]
    return [(b[:, :-1].contiguous(), b[:, 1:].contiguous()) for b in drawn]


@cache
def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    scaled = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    return scaled[order], torch.tensor(labels)[order]


def _digit_batches(count: int, seed: int) -> list[Batch]:
    images, labels = (part[len(part) // 6 :] for part in _digits())
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(labels), (count, 64), generator=generator)
    return [(images[rows], labels[rows]) for rows in drawn]


def _held_out_digits() -> dict[str, list[Batch]]:
    images, labels = (part[: len(part) // 6] for part in _digits())
    return {"loss": [(images, labels)]}


@cache
def _token_classes() -> tuple[Tensor, Tensor]:
    """How often each token is drawn (Zipf, exponent 1.1), and its class."""
    weights = torch.arange(1, TOKENS + 1, dtype=torch.float64) ** -1.1
    classes = torch.randint(CLASSES, (TOKENS,), generator=torch.Generator().manual_seed(0))
    return weights / weights.sum(), classes


def _token_batches(count: int, seed: int) -> list[Batch]:
    weights, classes = _token_classes()
    generator = torch.Generator().manual_seed(seed)
    x = torch.multinomial(weights, count * 128, replacement=True, generator=generator)
    noisy = torch.rand(x.shape, generator=generator) < LABEL_NOISE
    y = torch.where(noisy, torch.randint(CLASSES, x.shape, generator=generator), classes[x])
    return list(zip(x.view(count, 128), y.view(count, 128), strict=True))


def _held_out_tokens() -> dict[str, list[Batch]]:
    weights, classes = _token_classes()
    x = torch.multinomial(weights, 8192, replacement=True, generator=torch.Generator().manual_seed(-1))
    parts = {name: [(r := torch.arange(*ranks), classes[r])] for name, ranks in BUCKETS.items()}
    return {"loss": [(x, classes[x])], **parts}


TASKS: dict[str, Task] = {
    "gpt": Task(
        "GPT, 2 layers of width 64, on characters of the standard library, 4 x 64 a step",
        lambda: GPT(GPTConfig(width=64, layers=2, heads=2, vocab=97, context=64)),
        lambda count, seed: _windows(count, seed, 4, 64),
        lambda: {"loss": _windows(16, -1, 8, 64, held_out=True)},
        {"adamw": 3e-3, "sgd": 0.1, "hot sgd": 1.6},
    ),
    "conv": Task(
        "Conv net with BatchNorm on scikit-learn's digits, 64 images a step",
        DigitsNet,
        _digit_batches,
        _held_out_digits,
        {"adamw": 2e-3, "sgd": 0.1, "hot sgd": 1.6},
    ),
    "lstm": Task(
        "LSTM of width 64 on the same characters, 32 x 16 a step",
        lambda: LSTMModel(width=64, layers=1, vocab=97),
        lambda count, seed: _windows(count, seed, 32, 16),
        lambda: {"loss": _windows(16, -1, 32, 16, held_out=True)},
        {"adamw": 2e-2, "sgd": 2.0, "hot sgd": 8.0},
    ),
    "sparse": Task(
        "Embedding of 2000 tokens, drawn by Zipf's law, and an MLP, 128 tokens a step",
        TableNet,
        _token_batches,
        _held_out_tokens,
        {"adamw": 2e-2, "sgd": 0.8, "hot sgd": 3.2},
        table="table.weight",
    ),
}
