"""Skip the update exactly when a gradient is not finite."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from ..analysis.updates import gradients_behind, update_groups
from ..ir.edit import Editor
from ..ir.graph import Phase, StepGraph, source
from ..ir.marks import UPDATE
from .base import GraphPass

aten = torch.ops.aten


@dataclass(frozen=True)
class Skip(GraphPass):
    """Keep the old value of every parameter and optimizer state when ``found_inf``.

    ``new`` becomes ``where(found_inf, old, new)``: exact for any optimizer,
    fused into the update's own kernel, decided on the device. With
    ``skip="tensor"`` each parameter, with its optimizer state and step count,
    is kept by the verdict over its own gradient alone, which is known long
    before the others are computed; the scale still backs off for any of them.
    """

    name: ClassVar[str] = "skip"
    skip: str = "step"

    def run(self, step: StepGraph, edit: Editor) -> None:
        if not step.found_inf:
            edit.decline("no finite check to act on")
        elif self.skip == "tensor":
            _skip_tensors(step, edit)
        else:
            _skip_step(step, edit)


def _skip_step(step: StepGraph, edit: Editor) -> None:
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


def _skip_tensors(step: StepGraph, edit: Editor) -> None:
    finite = dict(step.checked)
    marks = {update.old: mark for mark, update in zip(step.marks(UPDATE), step.updates, strict=True)}
    events = {update.old: update.event for update in step.updates}
    for group in update_groups(step):
        values = [finite[mark] for mark in gradients_behind(group.body) if mark in finite]
        olds = [old for write in group.writes if (old := source(write)) in marks]
        found = _verdict(edit, values) if values else step.found_inf[events[olds[0]]]
        for old in olds:
            mark = marks[old]
            reason = "this parameter's own gradient is not finite"
            with edit.before(mark):
                kept = edit.call(aten.where.self, found, old, mark.args[0], when=Phase.UPDATE, reason=reason)
            edit.set_arg(mark, 0, kept)


def _verdict(edit: Editor, values: list[Node]) -> Node:
    """Whether any of the 0-d ``values`` is not finite, right behind the last of them."""
    reason = "a verdict for this parameter alone"
    with edit.after(edit.last(values)):
        total = values[0]
        for value in values[1:]:  # magnitudes: inf and nan are what a maximum keeps
            total = edit.call(aten.maximum.default, total, value, when=Phase.CHECK, reason=reason)
        finite = edit.call(aten.isfinite.default, total, when=Phase.CHECK, reason=reason)
        return edit.call(aten.logical_not.default, finite, when=Phase.CHECK, reason=reason)
