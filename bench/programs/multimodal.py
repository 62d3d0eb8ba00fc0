"""Models of transformers for text with images, of actions, and of series."""

from __future__ import annotations

from typing import Any

import torch

from bench.programs.transformers_table import SIZES, ids, padded, register

TEXT: dict[str, Any] = {
    **SIZES,
    "max_position_embeddings": 32,
    "eos_token_id": 63,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
VISION: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 8,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}


def _captioned() -> dict[str, Any]:
    return {
        "input_ids": ids(),
        "attention_mask": padded(),
        "pixel_values": torch.randn(4, 3, 16, 16),
        "return_loss": True,
    }


def _question() -> dict[str, Any]:
    images = torch.randn(2, 3, 16, 16)
    return {
        "input_ids": ids(2, 8),
        "pixel_values": images,
        "attention_mask": torch.ones(2, 8).long(),
        "labels": ids(2, 8),
    }


def _vilt() -> dict[str, Any]:
    return {"input_ids": ids(2, 8), "pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.rand(2, 5)}


def _series() -> dict[str, Any]:
    return {"past_values": torch.randn(4, 16, 2), "future_values": torch.randn(4, 4, 2)}


def _llava() -> dict[str, Any]:
    tokens = ids(2, 10, 60)
    tokens[:, :4] = 62
    return {"input_ids": tokens, "pixel_values": torch.randn(2, 3, 16, 16), "labels": tokens}


LLAVA_TEXT: dict[str, Any] = {
    "model_type": "llama",
    **SIZES,
    "num_key_value_heads": 2,
}

register("multimodal", "CLIPModel", _captioned, text_config=TEXT, vision_config=VISION, projection_dim=16)
register("multimodal", "SiglipModel", _captioned, text_config=TEXT, vision_config=VISION)
register(
    "multimodal",
    "BlipForQuestionAnswering",
    _question,
    text_config={**TEXT, "encoder_hidden_size": 32},
    vision_config=VISION,
)
register(
    "multimodal",
    "ViltForQuestionAnswering",
    _vilt,
    image_size=16,
    patch_size=8,
    num_labels=5,
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
)
register(
    "multimodal",
    "LlavaForConditionalGeneration",
    _llava,
    text_config=LLAVA_TEXT,
    image_token_index=62,
    vision_config={"model_type": "clip_vision_model", **VISION},
    vision_feature_layer=-1,
)
register(
    "multimodal",
    "PatchTSTForPrediction",
    _series,
    num_input_channels=2,
    context_length=16,
    patch_length=4,
    patch_stride=4,
    prediction_length=4,
    d_model=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    ffn_dim=32,
    loss="mse",
)
