"""Whole models: float16 and bfloat16 follow torch.amp, float32 follows eager, every operator is known."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxpass import MixedPrecision

# said by torch.backends.mkldnn.flags on machines without an Intel GPU
pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN:UserWarning")
STEPS = 30
# Gradients of embeddings are stored in float16 here and in float32 by torch.amp, which can
# therefore go on with a larger scale: start where neither of them overflows.
SCALE = 2.0**10
Loss = Callable[..., Tensor]
Case = tuple[nn.Module, Loss, tuple[Tensor, ...]]


def _ids(rows: int = 4, length: int = 8, vocab: int = 32) -> Tensor:
    return torch.randint(2, vocab, (rows, length))


class Gpt(nn.Module):
    """Pre-norm blocks with attention as PyTorch has it, the head tied to the embedding."""

    def __init__(self, width: int = 32, vocab: int = 32) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, width)
        self.places = nn.Embedding(16, width)
        self.blocks = nn.ModuleList(GptBlock(width) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        for table in (self.tokens, self.places):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
        for block in self.blocks:
            h = block(h)
        return F.linear(self.norm(h), self.tokens.weight)


class GptBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = (p.unflatten(2, (4, -1)).transpose(1, 2) for p in self.qkv(self.norm1(h)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.proj(mixed.transpose(1, 2).flatten(2))
        return h + self.down(F.gelu(self.up(self.norm2(h))))


def gpt() -> Case:
    ids = _ids()
    return Gpt(), lambda m, ids: F.cross_entropy(m(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()), (ids,)


def conv_net() -> Case:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.BatchNorm2d(16),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )
    return (
        model,
        lambda m, x, y: F.cross_entropy(m(x), y),
        (torch.randn(8, 3, 12, 12), torch.randint(5, (8,))),
    )


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.tokens = nn.Embedding(32, 16)
        self.rnn = kind(16, 16, num_layers=2, batch_first=True)  # pyrefly: ignore[bad-argument-type, missing-argument]
        self.head = nn.Linear(16, 32)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.rnn(self.tokens(ids))[0])


def _next_token(m: nn.Module, ids: Tensor) -> Tensor:
    return F.cross_entropy(m(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def lstm() -> Case:
    return Recurrent(nn.LSTM), _next_token, (_ids(),)


def gru() -> Case:
    return Recurrent(nn.GRU), _next_token, (_ids(),)


# transformers writes problem_type into the config during the first call: a second graph
CLASSES = "single_label_classification"
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def llama() -> Case:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_key_value_heads=2, use_cache=False, **SMALL))
    return model, lambda m, ids: m(input_ids=ids, labels=ids).loss, (_ids(),)


def bert() -> Case:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=32,
        num_labels=3,  # pyrefly: ignore[unexpected-keyword]
        problem_type=CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **SMALL,
    )
    mask = torch.ones(4, 8, dtype=torch.int64)
    mask[0, 5:] = 0
    loss = lambda m, ids, mask, y: m(input_ids=ids, attention_mask=mask, labels=y).loss  # noqa: E731
    return BertForSequenceClassification(config), loss, (_ids(), mask, torch.randint(3, (4,)))


def t5() -> Case:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 32, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    model = T5ForConditionalGeneration(T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0))  # pyrefly: ignore[unexpected-keyword]
    return model, lambda m, ids, y: m(input_ids=ids, labels=y, use_cache=False).loss, (_ids(), _ids(length=6))


def vit() -> Case:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=16,
        patch_size=4,
        num_labels=5,  # pyrefly: ignore[unexpected-keyword]
        problem_type=CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **SMALL,
    )
    loss = lambda m, x, y: m(pixel_values=x, labels=y).loss  # noqa: E731
    return ViTForImageClassification(config), loss, (torch.randn(4, 3, 16, 16), torch.randint(5, (4,)))


def resnet() -> Case:
    from transformers import ResNetConfig, ResNetForImageClassification

    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    config = ResNetConfig(**sizes, num_labels=5, problem_type=CLASSES)  # pyrefly: ignore[unexpected-keyword]
    loss = lambda m, x, y: m(pixel_values=x, labels=y).loss  # noqa: E731
    return ResNetForImageClassification(config), loss, (torch.randn(8, 3, 16, 16), torch.randint(5, (8,)))


MODELS = [gpt, conv_net, lstm, gru, llama, bert, t5, vit, resnet]


def train(
    case: Case, dtype: torch.dtype | None, backend: MixedPrecision | None = None, steps: int = STEPS
) -> list[float]:
    """Losses of ``steps`` steps: compiled with ``backend``, else eagerly with autocast to ``dtype``."""
    model, loss_of, batch = case
    model.train()
    opt = torch.optim.AdamW(model.parameters(), lr=2e-3)
    scaler = torch.amp.GradScaler("cpu", SCALE, enabled=dtype is torch.float16)

    def eager(*batch: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            loss = loss_of(model, *batch)
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        return loss

    def ours(*batch: Tensor) -> Tensor:
        loss = loss_of(model, *batch)
        loss.backward()
        opt.step()
        opt.zero_grad()
        return loss

    step = torch.compile(ours, backend=backend) if backend else eager
    # oneDNN has no float16 LSTM for CPUs without AVX512-FP16, and autocast asks for it
    with torch.backends.mkldnn.flags(enabled=dtype is not torch.float16):
        return [float(step(*batch).detach()) for _ in range(steps)]


def one_known_graph(mp: MixedPrecision) -> None:
    """One graph per step, and no operator the policy has not heard of."""
    assert len(mp.graphs) == 1
    cast = next(record for record in mp.graphs[0].passes if record.name == "cast")
    assert not [reason for reason in cast.declined if "policy" in reason or "could not" in reason]


def both(
    build: Callable[[], Case], dtype: torch.dtype, steps: int = STEPS, codegen: str | None = None
) -> tuple[list[float], list[float]]:
    """Losses of the compiled step and of eager torch.amp, from the same weights."""
    case = build()
    twin = copy.deepcopy(case[0]), *case[1:]
    scale = SCALE if dtype is torch.float16 else None
    # as users run it in float16; the other two for breadth
    codegen = codegen or ("inductor" if dtype is torch.float16 else "eager")
    mp = MixedPrecision(dtype=dtype, loss_scale=scale, codegen=codegen)
    actual = train(case, None, mp, steps)
    one_known_graph(mp)
    assert mp.stats().steps == steps
    return actual, train(twin, None if dtype is torch.float32 else dtype, steps=steps)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_follows_autocast(build: Callable[[], Case], dtype: torch.dtype) -> None:
    actual, expected = both(build, dtype)
    assert expected[-1] < expected[0]
    assert all(math.isclose(a, e, rel_tol=0.02) for a, e in zip(actual, expected, strict=True)), (
        actual,
        expected,
    )


@pytest.mark.breadth("first")
@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_float32_equals_eager(build: Callable[[], Case]) -> None:
    actual, expected = both(build, torch.float32)
    assert actual == pytest.approx(expected, rel=1e-5, abs=1e-5)
