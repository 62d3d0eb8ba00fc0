"""Models of timm, trained as its script does: mixed labels, weight decay by shape, EMA."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.programs.program import CALLS, Program, Training, add


def _register(name: str, **settings: Any) -> None:
    add(Program(f"timm_{name}", "timm_models", "timm", lambda: _training(name, settings)))


def _training(name: str, settings: dict[str, Any]) -> Training:
    import timm
    from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
    from timm.optim import param_groups_weight_decay

    model = timm.create_model(name, pretrained=False, num_classes=5, **settings)
    optimizer = torch.optim.AdamW(param_groups_weight_decay(model, 0.05), lr=1e-3)
    hard, soft = LabelSmoothingCrossEntropy(0.1), SoftTargetCrossEntropy()

    def step(x: Tensor, y: Tensor, target: Tensor) -> Tensor:
        output = model(x)
        loss = 0.5 * hard(output, y) + 0.5 * soft(output, target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss

    def batch() -> tuple[Tensor, ...]:
        return torch.rand(4, 3, 32, 32), torch.randint(5, (4,)), F.softmax(torch.randn(4, 5), 1)

    return Training(step, [batch() for _ in range(CALLS)])


_register("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=2)
_register("resnet10t", layers=(1, 1, 1, 1), channels=(8, 8, 16, 16), stem_width=8)
_register("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16))
_register("deit_tiny_distilled_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=2)
_register("beit_base_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=2)
