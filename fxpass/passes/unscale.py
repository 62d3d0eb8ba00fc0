"""Unscale gradients with the scale of this very step, in float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..ir.edit import Editor
from ..ir.graph import Phase, StepGraph, tensor
from ..ir.marks import GRAD
from .graph_pass import GraphPass
from .results import Unscaled

aten = torch.ops.aten


@dataclass(frozen=True)
class Unscale(GraphPass):
    """Multiply every gradient by 1/scale as it is cast up, before anyone reads it.

    ``g32 = g16.float() * (1 / scale)``, with the scale that scaled this step's
    loss (torch.amp's order; DeepSpeed divides by the updated scale). Each use
    gets its own product, so that no float32 gradient needs a buffer.
    """

    name: ClassVar[str] = "unscale"
    ensures: ClassVar = (Unscaled,)

    def run(self, step: StepGraph, edit: Editor) -> None:
        if not step.trains or "scale" not in step.scaler:
            edit.decline("no optimizer step or no loss scale")
            return
        scale = step.scaler["scale"]
        marks = step.marks(GRAD)
        if not marks:
            return
        with edit.after(scale):
            inverse = edit.call(
                aten.reciprocal.default, scale, when=Phase.CHECK, reason="one factor for all gradients"
            )
        for mark in marks:
            dtype = torch.promote_types(tensor(mark).dtype, torch.float32)  # float64 stays
            for user in list(mark.users):
                with edit.before(user):
                    wide = edit.cast(mark, dtype, when=Phase.GRADIENT, reason="unscale in float32")
                    value = edit.call(
                        aten.mul.Tensor, wide, inverse, when=Phase.GRADIENT, reason="undo the loss scale"
                    )
                step.result(Unscaled).values.add(value)
                if user.target is aten._to_copy.default and user.kwargs.get("dtype") is dtype:
                    edit.replace_uses(user, value)
                    edit.erase(user)
                else:
                    user.replace_input_with(mark, value)
                    edit.touched.add(user)
