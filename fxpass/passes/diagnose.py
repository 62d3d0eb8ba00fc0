"""Keep, per parameter, when its gradient was first not finite, and how large and how small it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from ..ir.edit import Editor
from ..ir.graph import Phase, StepGraph, tensor
from ..runtime.watch import REPORT, WATCH, Report, Row
from ..scaling.writer import Writer
from .graph_pass import GraphPass
from .results import Checked, NextScale

aten = torch.ops.aten


@dataclass(frozen=True)
class Diagnose(GraphPass):
    """Write the watch table and the step's report from values the finite check has reduced anyway.

    A few operations on vectors with one element per parameter; nothing is read
    back. What the rows mean is said in ``runtime/watch.py``.
    """

    name: ClassVar[str] = "diagnose"
    requires: ClassVar = (Checked, NextScale)

    def run(self, step: StepGraph, edit: Editor) -> None:
        if not step.result(Checked).gradients or WATCH not in step.scaler:
            edit.decline("no gradient was checked")
            return
        scaler = set(step.scaler.values())
        writes = (n for n in step.graph.nodes if n.target is aten.copy_.default and n.args[0] in scaler)
        with edit.before(next(writes)):  # the old scale is still there
            out = Writer(step, edit, Phase.SCALE, "diagnosis")
            now = self._magnitudes(out)
            bad = out.op(aten.logical_not.default, out.op(aten.isfinite.default, now))
            self._write_table(out, now, bad)
            self._write_report(out, now, bad)
            out.flush()

    def _magnitudes(self, out: Writer) -> Node:
        """The largest magnitude of each checked gradient, unscaled: [gradients] float64."""
        checked = out.step.result(Checked)
        values = [out.cast(checked.largest[mark], torch.float64) for mark in checked.gradients]
        now = out.op(aten.stack.default, values)
        if "scale" not in out.step.scaler:
            return now
        return out.op(aten.div.Tensor, now, out.cast(out.step.scaler["scale"], torch.float64))

    def _write_table(self, out: Writer, now: Node, bad: Node) -> None:
        step = out.step
        table = step.scaler[WATCH]
        count = len(step.result(Checked).gradients)
        old = {row: self._old(out, table, row, count) for row in Row}
        number = out.cast(step.result(NextScale).written["steps"], torch.float64)
        first = out.op(aten.logical_and.default, bad, out.op(aten.eq.Scalar, old[Row.FIRST_STEP], 0.0))
        new = {
            Row.LARGEST: now,
            Row.PEAK: out.op(aten.maximum.default, old[Row.PEAK], out.select(bad, 0.0, now)),
            Row.FIRST_STEP: out.select(first, number, old[Row.FIRST_STEP]),
            Row.FIRST_VALUE: out.select(first, now, old[Row.FIRST_VALUE]),
            Row.LAST_STEP: out.select(bad, number, old[Row.LAST_STEP]),
            Row.LAST_VALUE: out.select(bad, now, old[Row.LAST_VALUE]),
            Row.TIMES: out.op(aten.add.Tensor, old[Row.TIMES], bad),
            Row.TINY: self._counts(out, 0),
            Row.ZERO: self._counts(out, 1),
        }
        rows = out.op(aten.stack.default, [new[row] for row in Row])
        unread = tensor(table).shape[1] - count  # gradients no optimizer reads
        padded = out.op(aten.constant_pad_nd.default, rows, [0, unread], 0.0) if unread else rows
        out.write(WATCH, padded)

    def _old(self, out: Writer, table: Node, row: Row, count: int) -> Node:
        whole = out.op(aten.select.int, table, 0, int(row))
        return out.op(aten.slice.Tensor, whole, 0, 0, count)

    def _counts(self, out: Writer, which: int) -> Node:
        step = out.step
        device = tensor(step.scaler[WATCH]).device
        nothing = out.op(aten.full.default, [], 0.0, dtype=torch.float32, device=device)
        gradients, tiny = step.result(Checked).gradients, step.result(Checked).tiny
        counts = [tiny[mark][which] if mark in tiny else nothing for mark in gradients]
        return out.cast(out.op(aten.stack.default, counts), torch.float64)

    def _write_report(self, out: Writer, now: Node, bad: Node) -> None:
        """See ``fxpass.runtime.watch.Report``."""
        written, read = out.step.result(NextScale).written, out.step.scaler
        number = out.cast(written["steps"], torch.float64)
        column = out.op(aten.argmax.default, out.cast(bad, torch.int64))
        none = out.op(aten.logical_not.default, out.op(aten.any.default, bad))
        value = out.op(aten.index.Tensor, now, [column])
        scale = written.get("scale", read.get("scale"))
        zero = out.op(aten.mul.Tensor, number, 0.0)
        values: dict[str, Node] = {
            "steps": number,
            "skipped": written["skipped"],
            "stuck": written.get("stuck", zero),
            "scale": scale if scale is not None else out.op(aten.add.Tensor, zero, 1.0),
            "first": out.select(none, -1.0, out.cast(column, torch.float64)),
            "value": value,
        }
        vector = [out.cast(values[name], torch.float64) for name in Report._fields]
        out.write(REPORT, out.op(aten.stack.default, vector))
