"""Skip the update exactly when a gradient is not finite."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..ir.edit import Editor
from ..ir.graph import Phase, StepGraph
from ..ir.marks import UPDATE
from .base import GraphPass

aten = torch.ops.aten


@dataclass(frozen=True)
class Skip(GraphPass):
    """Keep the old value of every parameter and optimizer state when ``found_inf``.

    ``new`` becomes ``where(found_inf, old, new)``: exact for any optimizer,
    fused into the update's own kernel, decided on the device.
    """

    name: ClassVar[str] = "skip"

    def run(self, step: StepGraph, edit: Editor) -> None:
        if not step.found_inf:
            edit.decline("no finite check to act on")
            return
        last = max(step.found_inf)
        finals = {n.args[0]: n for n in step.graph.nodes if n.target is aten.copy_.default}
        reason = "one gradient of the step is not finite: the update is skipped whole"
        for mark, update in zip(step.marks(UPDATE), step.updates, strict=True):
            found = step.found_inf[update.event]
            new = mark.args[0]
            with edit.before(mark):
                kept = edit.call(aten.where.self, found, update.old, new, when=Phase.UPDATE, reason=reason)
            edit.set_arg(mark, 0, kept)
            if found is not step.found_inf[last] and update.old in finals:
                # a later optimizer of the step overflowed: the whole step is skipped
                final = finals[update.old]
                with edit.before(final):
                    kept = edit.call(
                        aten.where.self,
                        step.found_inf[last],
                        update.old,
                        final.args[1],
                        when=Phase.UPDATE,
                        reason=reason,
                    )
                edit.set_arg(final, 1, kept)
