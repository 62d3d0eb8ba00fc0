"""The models of the tier: an MLP, a GPT, a conv net with BatchNorm and an encoder like BERT's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxpass
from bench.models import GPT, ConvNet, GPTConfig, gpt, image_batches, token_batches

Batch = tuple[Tensor, ...]


class Mlp(nn.Module):
    """Two linear layers around a norm."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.LayerNorm(width), nn.Linear(width, 4))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.layers(x), y)


class EncoderLayer(nn.Module):
    """Post-norm attention over what a mask allows, with dropout."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.dropout = nn.Dropout(dropout)

    def forward(self, h: Tensor, mask: Tensor) -> Tensor:
        rows, length, width = h.shape
        qkv = self.qkv(h).view(rows, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        mixed = mixed.transpose(1, 2).reshape(rows, length, width)
        h = self.norms[0](h + self.dropout(self.proj(mixed)))
        return self.norms[1](h + self.dropout(self.down(F.gelu(self.up(h)))))


class Encoder(nn.Module):
    """BERT's shape: tokens, positions and a padding mask; the loss is that of masked tokens."""

    def __init__(self, width: int = 64, layers: int = 2, vocab: int = 512, length: int = 32) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, width, padding_idx=0)
        self.positions = nn.Embedding(length, width)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(EncoderLayer(width, 2, 0.1) for _ in range(layers))
        self.head = nn.Linear(width, vocab)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.norm(self.tokens(x) + self.positions.weight[: x.shape[1]])
        mask = (x != 0)[:, None, None, :]
        for layer in self.layers:
            h = layer(h, mask)
        return F.cross_entropy(self.head(h).float().flatten(0, 1), y.flatten(), ignore_index=-100)


def _mlp() -> tuple[nn.Module, Batch]:
    return Mlp(), (torch.randn(6, 8), torch.randint(4, (6,)))


def _gpt() -> tuple[nn.Module, Batch]:
    return gpt("1M"), token_batches(1, 256)[0]


def _tiny_gpt() -> tuple[nn.Module, Batch]:
    config = GPTConfig(width=16, layers=1, heads=2, vocab=32, context=8)
    return GPT(config), token_batches(1, 16, vocab=32, context=8)[0]


def _conv_net() -> tuple[nn.Module, Batch]:
    return ConvNet(width=16), image_batches(1, 4)[0]


def _bert() -> tuple[nn.Module, Batch]:
    x = torch.randint(1, 512, (4, 32))
    x[:, 28:] = 0
    return Encoder(), (x, x.clone())


MODELS: dict[str, Callable[[], tuple[nn.Module, Batch]]] = {
    "mlp": _mlp,
    "gpt": _gpt,
    "tiny gpt": _tiny_gpt,
    "conv net": _conv_net,
    "bert": _bert,
}


class Training:
    """A model and AdamW on a device, and the step that trains one with the other."""

    def __init__(self, model: str, device: str = "cuda") -> None:
        torch.manual_seed(0)
        module, batch = MODELS[model]()
        self.model = module.to(device)
        self.batch = tuple(t.to(device) for t in batch)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return sum(p.numel() for p in self.model.parameters())

    def step(self, *batch: Tensor) -> Tensor:
        """One step, as a user would write it."""
        loss = self.model(*batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def compiled(
        self, options: dict[str, Any], **keywords: Any
    ) -> tuple[Callable[..., Tensor], fxpass.MixedPrecision]:
        """The step compiled by fxpass, and its handle."""
        handle = fxpass.MixedPrecision(**options)
        return torch.compile(self.step, backend=handle, **keywords), handle
