"""Report the global norm of the unscaled gradients, before any clipping."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..ir.edit import Editor
from ..ir.graph import StepGraph, source
from .graph_pass import GraphPass
from .norms import Norms, reads_with_elements
from .results import Checked, GlobalNorm, Unscaled


@dataclass(frozen=True)
class GradNorm(GraphPass):
    """Compute the norm of all gradients that the step's optimizers read: ``stats().grad_norm``.

    It costs nothing beside the finite check, whose sums of squares it adds up
    (``norm_type=inf`` takes one more reduction per gradient).
    """

    name: ClassVar[str] = "grad_norm"
    requires: ClassVar = (Checked,)
    uses: ClassVar = (Unscaled,)
    ensures: ClassVar = (GlobalNorm,)
    norm_type: float = 2.0

    def run(self, step: StepGraph, edit: Editor) -> None:
        reads = [read.mark for read in reads_with_elements(step)]
        if not step.result(Checked).found_inf or not reads:
            edit.decline("no gradient reaches an optimizer")
            return
        norms = Norms(step, edit, "global norm before clipping")
        reported = step.result(GlobalNorm)
        reported.norm, reported.norm_type = norms.total(reads, self.norm_type), self.norm_type
        reported.of = {read: source(read) for read in reads}
