"""Clip gradients by value, element by element, after unscaling."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..ir.edit import Editor
from ..ir.graph import Phase, StepGraph, source
from .graph_pass import GraphPass
from .norms import Norms, note_clipped, reads_with_elements
from .results import Checked, Clipped, Unscaled

aten = torch.ops.aten


@dataclass(frozen=True)
class ClipValue(GraphPass):
    """Clamp each element of the unscaled gradients to +-``clip_value`` as the optimizer reads it.

    ``torch.nn.utils.clip_grad_value_``, gradient by gradient: nothing waits for
    another gradient. Comes before the other clips, which see what it leaves.
    """

    name: ClassVar[str] = "clip_value"
    requires: ClassVar = (Checked,)
    uses: ClassVar = (Unscaled,)
    ensures: ClassVar = (Clipped,)
    clip_value: float | None = None

    def run(self, step: StepGraph, edit: Editor) -> None:
        if self.clip_value is None:
            edit.decline("clip_value is None")
            return
        reads = [read.mark for read in reads_with_elements(step)]
        if not step.result(Checked).found_inf or not reads:
            edit.decline("no gradient reaches an optimizer")
            return
        reason = f"clip by value {self.clip_value}"
        norms = Norms(step, edit, reason)
        note_clipped(norms, [norms.total([read], math.inf) for read in reads], self.clip_value)
        limits = (-self.clip_value, self.clip_value)
        for read in reads:
            with edit.before(read):
                value = edit.call(aten.clamp.default, source(read), *limits, when=Phase.UPDATE, reason=reason)
            edit.set_arg(read, 0, value)
