"""How many launches a step may take: the one table of the tier.

A number is what was counted when the line was last changed, and three or four
more, as torch's versions differ. A change that needs fewer lowers it; one that
needs more says why, in its commit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """A model, options, and the most launches its step may take."""

    model: str
    launches: int
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.model, *(f"{name}={value}" for name, value in self.options.items())])


CLIP = {"max_norm": 1.0}
BF16 = {"dtype": "bfloat16"}

GROWTH = 1.0  # launches a parameter, beyond forward and backward

CASES = (
    Case("mlp", 24, CLIP),
    Case("mlp", 24, {**CLIP, **BF16}),
    Case("mlp", 27, {"skip": "tensor"}),
    Case("mlp", 28, {**CLIP, "release": True}),
    Case("mlp", 24, {**CLIP, "memory_budget": 0.5}),
    Case("conv net", 41, CLIP),
    Case("bert", 104, CLIP),
    Case("tiny gpt", 51, {**CLIP, "release": True, **BF16}),
    Case("tiny gpt", 60, {"skip": "tensor"}),
    # torch.compile(model) with autocast, GradScaler, clipping and fused AdamW needs 184
    Case("gpt", 150, CLIP),
)
