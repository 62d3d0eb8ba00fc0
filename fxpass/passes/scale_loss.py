"""Scale the loss: multiply the initial gradient of every backward by the loss scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..ir.edit import Editor
from ..ir.graph import Phase, StepGraph, source, tensor
from ..ir.marks import SEED
from .graph_pass import GraphPass
from .results import ScaledSeeds

aten = torch.ops.aten


@dataclass(frozen=True)
class ScaleLoss(GraphPass):
    """Multiply the initial gradient of every backward() by the loss scale, in float32.

    d(S * loss) = S * d(loss): scaling the seed instead of the loss leaves the
    loss that the user sees untouched, and no float16 loss is ever multiplied.

    Before: ``seed = ones_like(loss)``. After: ``seed = ones_like(loss) * scale``.
    """

    name: ClassVar[str] = "scale_loss"
    ensures: ClassVar = (ScaledSeeds,)

    def run(self, step: StepGraph, edit: Editor) -> None:
        if not step.trains or "scale" not in step.scaler:
            edit.decline("no optimizer step or no loss scale")
            return
        scale = step.scaler["scale"]
        for mark in step.marks(SEED):
            seed = source(mark)
            dtype = tensor(seed).dtype
            reason = "gradients of float16 activations underflow without a loss scale"
            with edit.before(mark):
                wide = edit.cast(seed, torch.float32, when=Phase.BACKWARD, reason="scale in float32")
                scaled = edit.call(aten.mul.Tensor, wide, scale, when=Phase.BACKWARD, reason=reason)
                narrow = edit.cast(scaled, dtype, when=Phase.BACKWARD, reason="the loss's own dtype")
            edit.set_arg(mark, 0, narrow)
            step.result(ScaledSeeds).wide[narrow] = scaled
