"""Attention with every kind of mask, the usual losses and layers: each follows torch.amp for some steps.

One by one with codegen="eager", and as users run them several in a step.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.steps.test_models import Case, both

pytestmark = [
    pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN:UserWarning"),
    # eager's rms norm, under autocast
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning"),
]
STEPS = 6


def follows(build: Callable[[], Case], dtype: torch.dtype = torch.float16, codegen: str = "inductor") -> None:
    actual, expected = both(build, dtype, STEPS, codegen)
    assert all(map(math.isfinite, expected))
    assert actual == pytest.approx(expected, rel=0.02, abs=2e-3)


def together(builds: Sequence[Callable[[], Case]]) -> Case:
    """All of them in one step, whose loss is the sum of theirs."""
    models, losses, inputs = zip(*(build() for build in builds), strict=True)
    ends = list(itertools.accumulate(map(len, inputs), initial=0))

    def loss(model: nn.Module, *args: Tensor) -> Tensor:
        parts = [args[a:b] for a, b in itertools.pairwise(ends)]
        return sum(one(m, *x) for one, m, x in zip(losses, model.children(), parts, strict=True))  # pyrefly: ignore[bad-return]

    return nn.ModuleList(models), loss, tuple(x for own in inputs for x in own)


def causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


class Attention(nn.Module):
    """Attention as people write it, ``mask(scores, allowed)`` in the middle."""

    def __init__(self, mask: Callable[[Tensor, Tensor], Tensor], dropout: float = 0.0) -> None:
        super().__init__()
        self.mask, self.dropout = mask, dropout
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p.unflatten(2, (2, 4)).transpose(1, 2) for p in self.qkv(x).chunk(3, -1))
        scores = self.mask(q @ k.transpose(-2, -1) / math.sqrt(4), causal(x.shape[1]))
        weights = F.dropout(scores.softmax(-1), self.dropout, self.training)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


MASKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "minus infinity": lambda s, ok: s.masked_fill(~ok, float("-inf")),
    "-1e9": lambda s, ok: s.float().masked_fill(~ok, -1e9),
    "finfo.min": lambda s, ok: s.masked_fill(~ok, torch.finfo(s.dtype).min),
    "where finfo.min": lambda s, ok: torch.where(ok, s, torch.full([], torch.finfo(s.dtype).min)),
    "where tensor": lambda s, ok: torch.where(ok, s.float(), torch.tensor(-1e9)),
    "additive": lambda s, ok: s + torch.zeros(ok.shape).masked_fill(~ok, torch.finfo(torch.float32).min),
    "additive product": lambda s, ok: s + (1.0 - ok.float()) * -10000.0,
}


@pytest.mark.breadth
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_masks(mask: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> None:
    follows(_attention(mask), dtype, "eager")


@pytest.mark.slow
def test_masks_by_default() -> None:
    follows(lambda: together([_attention(mask) for mask in MASKS.values()]))


def _attention(mask: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Case]:
    return lambda: (Attention(mask), lambda m, x: F.mse_loss(m(x), x), (torch.randn(2, 6, 8),))


@pytest.mark.breadth
@pytest.mark.parametrize("kind", ["boolean", "additive", "causal"])
def test_masks_of_sdpa(kind: str) -> None:
    class Sdpa(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (p.unflatten(2, (2, 4)).transpose(1, 2) for p in self.qkv(x).chunk(3, -1))
            allowed = causal(x.shape[1])
            mask = (
                allowed if kind == "boolean" else torch.zeros(allowed.shape).masked_fill(~allowed, -math.inf)
            )
            mask = None if kind == "causal" else mask
            mixed = F.scaled_dot_product_attention(
                q,
                k,
                v,
                mask.to(q.dtype) if mask is not None and kind == "additive" else mask,
                is_causal=kind == "causal",
            )
            return mixed.transpose(1, 2).flatten(2)

    follows(lambda: (Sdpa(), lambda m, x: F.mse_loss(m(x), x), (torch.randn(2, 6, 8),)))


def _classes(y: Tensor) -> Tensor:
    return y.argmax(-1)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": lambda out, y: F.cross_entropy(out, _classes(y), label_smoothing=0.1, ignore_index=1),
    "cross_entropy of probabilities": lambda out, y: F.cross_entropy(out, y.softmax(-1)),
    "cross_entropy weights": lambda out, y: F.cross_entropy(out, _classes(y), torch.tensor([1.0, 2.0, 0.5])),
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "smooth_l1": F.smooth_l1_loss,
    "huber": F.huber_loss,
    "bce_with_logits": lambda out, y: F.binary_cross_entropy_with_logits(out, y.sigmoid()),
    "nll": lambda out, y: F.nll_loss(F.log_softmax(out, -1), _classes(y)),
    "kl_div": lambda out, y: F.kl_div(F.log_softmax(out, -1), y.softmax(-1), reduction="batchmean"),
    "cosine": lambda out, y: F.cosine_embedding_loss(out, y, _classes(y).sign() * 2 - 1),
    "triplet": lambda out, y: F.triplet_margin_loss(out, y, y.flip(0)),
    "margin": lambda out, y: F.multi_margin_loss(out, _classes(y)),
    "soft_margin": lambda out, y: F.soft_margin_loss(out, y.sign()),
    "poisson": F.poisson_nll_loss,
}


@pytest.mark.breadth
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_losses(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    follows(_with_loss(loss), codegen="eager")


@pytest.mark.slow
@pytest.mark.parametrize("part", range(3))
def test_losses_by_default(part: int) -> None:
    follows(lambda: together([_with_loss(loss) for loss in [*LOSSES.values()][part::3]]))


def _with_loss(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Case]:
    def build() -> Case:
        model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3))
        return model, lambda m, x, y: loss(m(x), y), (torch.randn(8, 4), torch.randn(8, 3))

    return build


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(4, 4, 3), (2, 4, 9)),
    "conv3d": (lambda: nn.Conv3d(4, 4, 3, padding=1), (2, 4, 4, 4, 4)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(4, 4, 3, stride=2), (2, 4, 9)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(4, 4, 3, stride=2), (2, 4, 5, 5)),
    "grouped": (lambda: nn.Conv2d(4, 8, 3, groups=2), (2, 4, 6, 6)),
    "max_pool": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.MaxPool2d(2)), (2, 4, 8, 8)),
    "avg_pool": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.AvgPool2d(2)), (2, 4, 8, 8)),
    "avg_pool1d": (lambda: nn.Sequential(nn.Conv1d(4, 4, 3), nn.AvgPool1d(2)), (2, 4, 8)),
    "adaptive": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(2)), (2, 4, 8, 8)),
    "group_norm": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.SiLU()), (2, 4, 8, 8)),
    "instance_norm": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.InstanceNorm2d(4, affine=True)),
        (2, 4, 8, 8),
    ),
    "batch_norm1d": (lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)), (6, 8)),
    "rms_norm": (lambda: nn.Sequential(nn.Linear(8, 8), nn.RMSNorm(8), nn.Linear(8, 8)), (6, 8)),
    "layer_norm": (lambda: nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)), (6, 8)),
    "upsample": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.Upsample(scale_factor=2, mode="bilinear")),
        (2, 4, 6, 6),
    ),
    "padding": (lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), (2, 4, 6, 6)),
    "prelu": (lambda: nn.Sequential(nn.Linear(8, 8), nn.PReLU(8), nn.Linear(8, 8)), (6, 8)),
    "glu": (lambda: nn.Sequential(nn.Linear(8, 16), nn.GLU(), nn.Linear(8, 8)), (6, 8)),
    "softplus": (lambda: nn.Sequential(nn.Linear(8, 8), nn.Softplus(), nn.Linear(8, 8)), (6, 8)),
    "mish": (lambda: nn.Sequential(nn.Linear(8, 8), nn.Mish(), nn.ELU(), nn.Hardswish()), (6, 8)),
    "activations": (
        lambda: nn.Sequential(nn.Linear(8, 8), nn.LeakyReLU(), nn.Hardtanh(), nn.LogSigmoid()),
        (6, 8),
    ),
    "bilinear": (lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Sigmoid(), nn.Softmax(-1)), (6, 8)),
    "transformer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), (2, 5, 8)),
}


@pytest.mark.breadth
@pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)
def test_layers(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    follows(_layer(make, shape), codegen="eager")


@pytest.mark.breadth(4)
@pytest.mark.parametrize("part", range(4))
def test_layers_by_default(part: int) -> None:
    follows(lambda: together([_layer(*entry) for entry in [*LAYERS.values()][part::4]]))


def _layer(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> Callable[[], Case]:
    return lambda: (make(), lambda m, x: m(x).float().square().mean(), (torch.randn(shape),))


@pytest.mark.slow
def test_batch_norm_statistics_are_eager_s() -> None:
    """Running statistics are written, never cast: equal to eager's within the activations' rounding."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    follows(lambda: (model, lambda m, x: m(x).square().mean(), (torch.randn(4, 3, 6, 6),)))
    statistics: Any = model[1]
    assert statistics.running_mean.dtype is torch.float32
    assert int(statistics.num_batches_tracked) == STEPS
