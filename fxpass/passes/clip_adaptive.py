"""Clip each row of a gradient by the norm of the parameter's row: adaptive gradient clipping."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from ..ir.edit import Editor
from ..ir.graph import Phase, StepGraph, source
from ..ir.slots import Slot
from .graph_pass import GraphPass
from .norms import Norms, note_clipped, reads_with_elements
from .results import Checked, Clipped, Unscaled

aten = torch.ops.aten
MIN_PARAMETER = 1e-3  # the paper's epsilon: a row of zeros may still move
MIN_GRADIENT = 1e-6


@dataclass(frozen=True)
class ClipAdaptive(GraphPass):
    """Hold every row's gradient norm at or below ``adaptive_clip`` times the row's own norm.

    Brock et al. 2021 (NFNets), equation 3: where ``|g| > limit`` with
    ``limit = adaptive_clip * max(|w|, 1e-3)``, ``g`` becomes ``g * limit / |g|``.
    A row is a slice along the first dimension (an output unit of a Linear or
    Conv, a token of an Embedding); a vector or scalar is one row. ``w`` is the
    parameter as this update finds it. Gradient by gradient: nothing waits.
    """

    name: ClassVar[str] = "clip_adaptive"
    requires: ClassVar = (Checked,)
    uses: ClassVar = (Unscaled,)
    ensures: ClassVar = (Clipped,)
    adaptive_clip: float | None = None

    def run(self, step: StepGraph, edit: Editor) -> None:
        if self.adaptive_clip is None:
            edit.decline("adaptive_clip is None")
            return
        reads = reads_with_elements(step)
        if not step.result(Checked).found_inf or not reads:
            edit.decline("no gradient reaches an optimizer")
            return
        norms = Norms(step, edit, f"clip rows to {self.adaptive_clip} of the parameter's norm")
        parameters = _parameters(step)
        excess = [self._clip_rows(norms, read.mark, parameters[read.event, read.slot]) for read in reads]
        note_clipped(norms, excess, 1.0)

    def _clip_rows(self, norms: Norms, read: Node, parameter: Node) -> Node:
        """Clip one gradient; returns the largest ratio of a row's norm to its limit, 0-d."""
        call, grad = norms.call, norms.by_row(read)
        with norms.edit.before(read):
            weight = call(aten.clamp_min.default, norms.row_norms(parameter), MIN_PARAMETER)
            limit = call(aten.mul.Tensor, weight, self.adaptive_clip)
            shrink = call(aten.div.Tensor, limit, call(aten.clamp_min.default, grad, MIN_GRADIENT))
            coef = call(aten.where.ScalarOther, call(aten.gt.Tensor, grad, limit), shrink, 1.0)
            value = norms.edit.call(
                aten.mul.Tensor, source(read), coef, when=Phase.UPDATE, reason=norms.reason
            )
            excess = call(aten.amax.default, call(aten.div.Tensor, grad, limit))
        norms.edit.set_arg(read, 0, value)
        return excess


def _parameters(step: StepGraph) -> dict[tuple[int, Slot], Node]:
    """Each value as its update finds it: the user or an earlier optimizer may have changed a parameter."""
    return {(update.event, update.slot): source(source(update.mark, 3)) for update in step.updates}
