"""The models every benchmark trains: a plain GPT, a BatchNorm conv net and an LSTM language model.

Each maps (inputs, targets) to a scalar loss, so that a step looks the same for all of them.
They are ordinary modules on purpose: nothing here knows about precision or compilation, except
that logits are made float32 before the loss, without which a loop with fp16 weights cannot scale it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a GPT; heads must divide width."""

    width: int
    layers: int
    heads: int
    vocab: int = 4096
    context: int = 256
    tied: bool = True  # untied adds vocab * width parameters, and no gradient is a sum of two


GPT_SIZES: dict[str, GPTConfig] = {
    "1M": GPTConfig(width=128, layers=3, heads=2),  # smoke tests
    "5M": GPTConfig(width=256, layers=5, heads=4),
    "12M": GPTConfig(width=384, layers=6, heads=6),
    "21M": GPTConfig(width=512, layers=6, heads=8),
    "105M": GPTConfig(width=1024, layers=8, heads=16),
    # GPT-2's and GPT-3's shapes
    "125M": GPTConfig(width=768, layers=12, heads=12, vocab=50304, context=1024),
    "350M": GPTConfig(width=1024, layers=24, heads=16, vocab=50304, context=1024),
    "1.3B": GPTConfig(width=2048, layers=24, heads=32, vocab=50304, context=1024),
}


class Block(nn.Module):
    """Pre-norm causal self-attention, then a four times wider gelu MLP."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm1 = nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)
        self.norm2 = nn.LayerNorm(config.width)
        self.up = nn.Linear(config.width, 4 * config.width)
        self.down = nn.Linear(4 * config.width, config.width)

    def forward(self, h: Tensor) -> Tensor:
        batch, length, width = h.shape
        qkv = self.qkv(self.norm1(h)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.proj(mixed.transpose(1, 2).reshape(batch, length, width))
        return h + self.down(F.gelu(self.up(self.norm2(h))))


class GPT(nn.Module):
    """GPT-2's shape: learned positions, pre-norm blocks, the head tied to the token embedding."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = None if config.tied else nn.Linear(config.width, config.vocab, bias=False)
        self.apply(_init_gpt)
        for block in self.blocks:
            for residual in (block.proj, block.down):
                assert isinstance(residual, nn.Linear)
                nn.init.normal_(residual.weight, std=0.02 / math.sqrt(2 * config.layers))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.tokens(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            h = block(h)
        head = self.tokens if self.head is None else self.head
        logits = F.linear(self.norm(h), head.weight)
        return F.cross_entropy(logits.float().flatten(0, 1), y.flatten())


class ConvNet(nn.Module):
    """Three strided conv + BatchNorm + relu stages and a linear head, for 3x32x32 images."""

    def __init__(self, width: int = 64, classes: int = 100) -> None:
        super().__init__()
        channels = (3, width, 2 * width, 4 * width)
        stages = [
            nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in pairwise(channels)
        ]
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.stages(x).mean((2, 3))).float(), y)


class LSTMModel(nn.Module):
    """A two-layer LSTM language model."""

    def __init__(self, width: int = 256, layers: int = 2, vocab: int = 4096) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, width)
        self.lstm = nn.LSTM(width, width, num_layers=layers, batch_first=True)
        self.head = nn.Linear(width, vocab)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden, _ = self.lstm(self.tokens(x))
        return F.cross_entropy(self.head(hidden).float().flatten(0, 1), y.flatten())


def gpt(size: str, *, tied: bool = True, seed: int = 0) -> GPT:
    """Return the GPT named by a key of GPT_SIZES, with the same weights for the same seed."""
    torch.manual_seed(seed)
    return GPT(replace(GPT_SIZES[size], tied=tied))


def parameter_count(model: nn.Module) -> int:
    """Count parameters, a tied one once."""
    return sum(p.numel() for p in model.parameters())


def token_batches(
    count: int, tokens: int, *, vocab: int = 4096, context: int = 256, seed: int = 1
) -> list[Batch]:
    """Return `count` random (inputs, next tokens) batches of `tokens` tokens, in two rows or more."""
    length = max(1, min(context, tokens // 2))
    rows = max(1, tokens // length)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(vocab, (count, rows, length + 1), generator=generator)
    return [(batch[:, :-1].contiguous(), batch[:, 1:].contiguous()) for batch in drawn]


def image_batches(count: int, images: int, *, classes: int = 100, seed: int = 1) -> list[Batch]:
    """Return `count` random (3x32x32 images, classes) batches."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(images, 3, 32, 32, generator=generator),
            torch.randint(classes, (images,), generator=generator),
        )
        for _ in range(count)
    ]


def _init_gpt(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:  # the untied head has none
        nn.init.zeros_(module.bias)
