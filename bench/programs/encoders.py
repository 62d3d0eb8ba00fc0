"""Encoders of transformers: masked words, classes, spans."""

from __future__ import annotations

from typing import Any

import torch

from bench.programs.transformers_table import SIZES, ids, padded, register

SMALL: dict[str, Any] = {
    **SIZES,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
DISTIL: dict[str, Any] = {"vocab_size": 64, "dim": 32, "hidden_dim": 48, "n_layers": 1, "n_heads": 4}


def _masked_words() -> dict[str, Any]:
    tokens = ids()
    hidden = torch.rand(tokens.shape) < 0.3
    labels = tokens.masked_fill(~hidden, -100)
    labels[:, 0] = tokens[:, 0]
    return {"input_ids": tokens.masked_fill(hidden, 4), "attention_mask": padded(), "labels": labels}


def _classes() -> dict[str, Any]:
    return {"input_ids": ids(), "attention_mask": padded(), "labels": torch.randint(3, (4,))}


def _tags() -> dict[str, Any]:
    return {"input_ids": ids(), "attention_mask": padded(), "labels": torch.randint(3, (4, 12))}


def _spans() -> dict[str, Any]:
    return {
        "input_ids": ids(),
        "start_positions": torch.randint(6, (4,)),
        "end_positions": torch.randint(12, (4,)),
    }


def _choices() -> dict[str, Any]:
    return {"input_ids": torch.randint(5, 64, (3, 2, 8)), "labels": torch.randint(2, (3,))}


def _encoder(model: str, batch: Any, quick: bool = False, **config: Any) -> None:
    register("encoders", model, batch, quick=quick, **{**SMALL, **config})


_encoder("BertForMaskedLM", _masked_words)
_encoder("BertForSequenceClassification", _classes, num_labels=3)
_encoder("RobertaForTokenClassification", _tags, num_labels=3)
_encoder("ElectraForSequenceClassification", _classes, num_labels=3, embedding_size=16)
_encoder("AlbertForMaskedLM", _masked_words, embedding_size=16)
_encoder(
    "DebertaV2ForSequenceClassification",
    _classes,
    num_labels=3,
    relative_attention=True,
    pos_att_type=["p2c", "c2p"],
)
_encoder(
    "MobileBertForQuestionAnswering",
    _spans,
    embedding_size=32,
    intra_bottleneck_size=16,
    num_feedforward_networks=1,
)
_encoder("MPNetForMultipleChoice", _choices)
_encoder("ConvBertForQuestionAnswering", _spans, embedding_size=32, head_ratio=2, conv_kernel_size=3)
_encoder("SqueezeBertForTokenClassification", _tags, num_labels=3, embedding_size=32)
_encoder(
    "ModernBertForMaskedLM",
    _masked_words,
    local_attention=4,
    cls_token_id=1,
    sep_token_id=2,
    bos_token_id=1,
    eos_token_id=2,
)
_encoder("RoFormerForSequenceClassification", _classes, num_labels=3, embedding_size=32)
_encoder("FNetForMaskedLM", lambda: {k: v for k, v in _masked_words().items() if k != "attention_mask"})
register(
    "encoders", "DistilBertForQuestionAnswering", _spans, quick=True, max_position_embeddings=32, **DISTIL
)
register(
    "encoders",
    "XLNetForSequenceClassification",
    _classes,
    vocab_size=64,
    d_model=32,
    n_layer=1,
    n_head=4,
    d_inner=48,
    num_labels=3,
)
