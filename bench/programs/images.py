"""Image models of transformers: classes, masks, depth, boxes."""

from __future__ import annotations

from typing import Any

import torch

from bench.programs.transformers_table import register

CLASSES: dict[str, Any] = {"num_labels": 5, "problem_type": "single_label_classification"}
VIT: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    **CLASSES,
}
BOXES: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "num_queries": 5,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "num_labels": 3,
}


def _images(side: int = 16) -> dict[str, Any]:
    return {"pixel_values": torch.randn(4, 3, side, side), "labels": torch.randint(5, (4,))}


def _large() -> dict[str, Any]:
    return _images(32)


def _segments() -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.randint(4, (2, 32, 32))}


def _backbone() -> Any:
    import transformers

    make: Any = transformers.ResNetConfig  # its fields that backbones share are known to no type checker
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]}
    return make(**sizes, layer_type="basic", out_features=["stage4"])


def _boxes() -> dict[str, Any]:
    one = lambda n: {"class_labels": torch.randint(3, (n,)), "boxes": torch.rand(n, 4) * 0.3 + 0.3}  # noqa: E731
    return {"pixel_values": torch.randn(2, 3, 32, 32), "labels": [one(1), one(2)]}


register("images", "ViTForImageClassification", _images, **VIT)
register("images", "DeiTForImageClassification", _images, **VIT)
register("images", "BeitForImageClassification", _images, use_mask_token=False, **VIT)
register("images", "Dinov2ForImageClassification", _images, **VIT)
register(
    "images",
    "ResNetForImageClassification",
    _large,
    embedding_size=8,
    hidden_sizes=[8, 16],
    depths=[1, 1],
    layer_type="basic",
    **CLASSES,
)
register(
    "images",
    "ConvNextForImageClassification",
    _large,
    hidden_sizes=[8, 16],
    depths=[1, 1],
    num_stages=2,
    **CLASSES,
)
register(
    "images",
    "SwinForImageClassification",
    _large,
    image_size=32,
    patch_size=4,
    embed_dim=16,
    depths=[1, 1],
    num_heads=[2, 2],
    window_size=4,
    **CLASSES,
)
register(
    "images",
    "PoolFormerForImageClassification",
    _large,
    hidden_sizes=[8, 16, 16, 16],
    depths=[1, 1, 1, 1],
    **CLASSES,
)
register(
    "images",
    "SegformerForSemanticSegmentation",
    _segments,
    hidden_sizes=[8, 16],
    depths=[1, 1],
    num_encoder_blocks=2,
    sr_ratios=[2, 1],
    patch_sizes=[3, 3],
    strides=[2, 2],
    num_attention_heads=[1, 2],
    mlp_ratios=[2, 2],
    decoder_hidden_size=16,
    num_labels=4,
)
register(
    "images",
    "ViTMAEForPreTraining",
    lambda: {"pixel_values": torch.randn(4, 3, 16, 16)},
    image_size=16,
    patch_size=4,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
    decoder_hidden_size=16,
    decoder_num_hidden_layers=1,
    decoder_num_attention_heads=2,
    decoder_intermediate_size=32,
    mask_ratio=0.5,
)
register(
    "images", "DetrForObjectDetection", _boxes, backbone_config=_backbone, use_timm_backbone=False, **BOXES
)
register(
    "images",
    "YolosForObjectDetection",
    _boxes,
    image_size=[32, 32],
    patch_size=8,
    hidden_size=32,
    num_labels=3,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_detection_tokens=5,
)
