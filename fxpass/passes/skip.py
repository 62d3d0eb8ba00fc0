"""Skip the update exactly when a gradient is not finite."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from ..analysis.updates import follows_gradient, marks_behind, update_groups
from ..ir.edit import Editor
from ..ir.graph import Phase, StepGraph, Update, source
from ..ir.marks import GRAD, READ
from .graph_pass import GraphPass
from .results import Checked

aten = torch.ops.aten


@dataclass(frozen=True)
class Skip(GraphPass):
    """Keep the old value of every parameter and optimizer state when ``found_inf``.

    ``new`` becomes ``where(found_inf, old, new)``: exact for any optimizer,
    fused into the update's own kernel, decided on the device. ``old`` is the
    value as the optimizer finds it: what the user wrote before is not undone.
    With ``skip="tensor"`` each parameter, with its optimizer state and step
    count, is kept by the verdict over its own gradient alone, which is known
    long before the others are computed; the scale still backs off for any.

    Whatever else the step writes from a gradient (a running norm) is kept too.
    """

    name: ClassVar[str] = "skip"
    requires: ClassVar = (Checked,)
    skip: str = "step"

    def run(self, step: StepGraph, edit: Editor) -> None:
        if not step.result(Checked).found_inf:
            edit.decline("no finite check to act on")
            return
        statistics = follows_gradient(step)
        if self.skip == "tensor":
            _skip_tensors(step, edit, statistics)
        else:
            _skip_step(step, edit, statistics)


def _skip_step(step: StepGraph, edit: Editor, statistics: list[Node]) -> None:
    checked = step.result(Checked)
    last = checked.last
    finals = {n.args[0]: n for n in step.graph.nodes if n.target is aten.copy_.default}
    for update in step.updates:
        mark, overflow = update.mark, checked.found_inf[update.event]
        final = finals.pop(step.slots[update.slot], None)
        reason = "one gradient of the step is not finite: the update is skipped whole"
        _keep(edit, mark, 0, overflow, source(mark, 3), reason=reason)
        if overflow is not last and final is not None:
            reason = "a gradient of a later optimizer is not finite: the step is skipped whole"
            _keep(edit, final, 1, last, source(mark, 3), reason=reason)
    for write in statistics:
        _keep(edit, write, 1, last, source(write), reason="depends on a gradient, and the step is skipped")


def _skip_tensors(step: StepGraph, edit: Editor, statistics: list[Node]) -> None:
    checked = step.result(Checked)
    last = checked.last
    read = {write: marks_behind({source(write, 1)}, GRAD, guarded=True) for write in statistics}
    checks = {write: _checks(step, {source(write, 1)}, guarded=True) for write in statistics}
    updates: dict[Node, list[Update]] = defaultdict(list)
    for update in step.updates:
        updates[step.slots[update.slot]].append(update)
    for group in update_groups(step):
        own = [update for write in group.writes for update in updates[source(write)]]
        for event in dict.fromkeys(update.event for update in own):  # none: the user's own writes
            values = _checks(step, group.body, event=event)
            overflow = _verdict(edit, values) if values else checked.found_inf[event]
            for mark in (update.mark for update in own if update.event == event):
                _keep(
                    edit,
                    mark,
                    0,
                    overflow,
                    source(mark, 3),
                    reason="this parameter's own gradient is not finite",
                )
    for write in statistics:  # of gradients that no optimizer reads nothing is known but what they led to
        known = set(read[write]) <= set(checked.gradients)
        overflow = _verdict(edit, checks[write]) if known else last
        _keep(edit, write, 1, overflow, source(write), reason="a gradient it depends on is not finite")


def _keep(edit: Editor, node: Node, index: int, overflow: Node, old: Node, *, reason: str) -> None:
    """Make argument ``index`` of ``node`` the ``old`` value where ``overflow``."""
    when = Phase.UPDATE if index == 0 else Phase.AFTER
    if (
        node < overflow
    ):  # an optimizer that steps inside of backward, before the other gradients are looked at
        edit.hoist(overflow, node)
    with edit.before(node):
        kept = edit.call(aten.where.self, overflow, old, source(node, index), when=when, reason=reason)
    edit.set_arg(node, index, kept)


def _checks(
    step: StepGraph, nodes: set[Node], *, guarded: bool = False, event: int | None = None
) -> list[Node]:
    """What decides about the gradients behind ``nodes``: as optimizers read them, or that ``event`` alone."""
    reads = set(marks_behind(nodes, READ, guarded=guarded))
    others = set(marks_behind(nodes, GRAD, guarded=guarded))
    checked = step.result(Checked)
    others.difference_update(*(checked.sources[read] for read in reads))
    behind = [r for r, marks in checked.sources.items() if r in reads or not marks.isdisjoint(others)]
    if event is not None:
        own = {read.mark for read in step.reads if read.event == event}
        behind = [read for read in behind if read in own]
    return list(dict.fromkeys(value for read in behind for value in checked.deciding[read]))


def _verdict(edit: Editor, values: list[Node]) -> Node:
    """Whether any of the 0-d ``values`` is not finite, right behind the last of them."""
    reason = "a verdict for this parameter alone"
    with edit.after(edit.last(values)):
        total = values[0]
        for value in values[1:]:  # magnitudes: inf and nan are what a maximum keeps
            total = edit.call(aten.maximum.default, total, value, when=Phase.CHECK, reason=reason)
        finite = edit.call(aten.isfinite.default, total, when=Phase.CHECK, reason=reason)
        return edit.call(aten.logical_not.default, finite, when=Phase.CHECK, reason=reason)
