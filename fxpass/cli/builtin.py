"""The built-in targets: small steps of the usual kinds, and a GPT in the sizes people ask about."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import shard_
from ..hallway.dry_run import Call


class Block(nn.Module):
    """Pre-norm self-attention (causal or not), then a four times wider gelu MLP."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, h: Tensor) -> Tensor:
        batch, length, width = h.shape
        qkv = self.qkv(self.norm1(h)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        h = h + self.proj(mixed.transpose(1, 2).reshape(batch, length, width))
        return h + self.down(F.gelu(self.up(self.norm2(h))))


class Transformer(nn.Module):
    """Token and position embeddings, blocks, a head tied to the tokens: GPT if causal, BERT if not."""

    def __init__(
        self, *, width: int, layers: int, heads: int, vocab: int, context: int, causal: bool
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads, causal) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.tokens(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            h = block(h)
        logits = F.linear(self.norm(h), self.tokens.weight)
        return F.cross_entropy(logits.float().flatten(0, 1), y.flatten())


class ConvNet(nn.Module):
    """Three strided conv + BatchNorm + relu stages and a linear head, for 3x32x32 images."""

    def __init__(self, width: int = 64, classes: int = 10) -> None:
        super().__init__()
        channels = (3, width, 2 * width, 4 * width)
        stages: list[nn.Module] = []
        for a, b in pairwise(channels):
            stages += [nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        self.stages, self.head = nn.Sequential(*stages), nn.Linear(channels[-1], classes)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.stages(x).mean((2, 3))).float(), y)


class LSTM(nn.Module):
    """A two-layer LSTM language model."""

    def __init__(self, width: int = 128, vocab: int = 1024) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, width)
        self.lstm = nn.LSTM(width, width, num_layers=2, batch_first=True)
        self.head = nn.Linear(width, vocab)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden, _ = self.lstm(self.tokens(x))
        return F.cross_entropy(self.head(hidden).float().flatten(0, 1), y.flatten())


SPREAD: ContextVar[Any] = ContextVar("spread", default=None)  # ranks over which the rows of models are spread


def _step(model: nn.Module, x: Tensor, y: Tensor) -> Call:
    if SPREAD.get() is not None:
        shard_(model, SPREAD.get())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)

    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = model(x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step, (x, y), {}


def _transformer(
    *, width: int, layers: int, heads: int, vocab: int, batch: int, seq: int, causal: bool = True
) -> Call:
    model = Transformer(width=width, layers=layers, heads=heads, vocab=vocab, context=seq, causal=causal)
    return _step(model, torch.randint(vocab, (batch, seq)), torch.randint(vocab, (batch, seq)))


def _cnn() -> Call:
    return _step(ConvNet(), torch.randn(32, 3, 32, 32), torch.randint(10, (32,)))


def _lstm() -> Call:
    return _step(LSTM(), torch.randint(1024, (8, 16)), torch.randint(1024, (8, 16)))


BUILTINS: dict[str, Callable[[], Call]] = {
    "gpt": partial(
        _transformer, width=256, layers=4, heads=4, vocab=4096, batch=4, seq=64
    ),  # 4.2M parameters
    "cnn": _cnn,  # 0.4M
    "lstm": _lstm,  # 0.5M
    "bert": partial(
        _transformer, width=256, layers=4, heads=4, vocab=4096, batch=4, seq=64, causal=False
    ),  # 4.2M
    "gpt-124M": partial(_transformer, width=768, layers=12, heads=12, vocab=50257, batch=4, seq=1024),
    "gpt-1.3B": partial(_transformer, width=2048, layers=24, heads=16, vocab=50257, batch=1, seq=2048),
    "gpt-7B": partial(_transformer, width=4096, layers=32, heads=32, vocab=50257, batch=1, seq=2048),
}
