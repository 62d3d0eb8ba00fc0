"""Advance the loss scale and the counters, on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from ..ir.edit import Editor
from ..ir.graph import Phase, StepGraph
from ..scaling import LossScale
from ..scaling.writer import Writer
from .graph_pass import GraphPass
from .results import Checked, Clipped, GlobalNorm, NextScale

aten = torch.ops.aten


@dataclass(frozen=True)
class UpdateScale(GraphPass):
    """Move the loss scale by its policy and count, as selects on ``found_inf``.

    The rule of each policy is in its file in ``fxpass/scaling/``.
    """

    name: ClassVar[str] = "update_scale"
    requires: ClassVar = (Checked,)
    uses: ClassVar = (GlobalNorm, Clipped)
    ensures: ClassVar = (NextScale,)
    loss_scale: LossScale | None = None
    dtype: torch.dtype = torch.float16

    def run(self, step: StepGraph, edit: Editor) -> None:
        checked = step.result(Checked)
        if not checked.found_inf:
            edit.decline("no finite check to act on")
            return
        overflow = checked.last
        output = next(n for n in reversed(step.graph.nodes) if n.op == "output")
        with edit.before(output):
            out = Writer(step, edit, Phase.SCALE, "loss scale state")
            _count(out, overflow)
            if self.loss_scale is not None:
                magnitudes = [checked.largest[mark] for mark in checked.gradients]
                self.loss_scale.move(out, overflow, magnitudes, torch.finfo(self.dtype).max)
            out.flush()
        step.result(NextScale).written.update(out.written)


def _count(out: Writer, overflow: Node) -> None:
    read, step = out.step.scaler, out.step
    out.write("steps", out.op(aten.add.Tensor, read["steps"], 1))
    out.write("skipped", out.op(aten.add.Tensor, read["skipped"], out.cast(overflow, torch.int64)))
    again = out.op(aten.add.Tensor, read["consecutive_skipped"], 1)
    out.write("consecutive_skipped", out.select(overflow, again, out.zero("consecutive_skipped")))
    if (norm := step.result(GlobalNorm).norm) is not None:
        out.write("grad_norm", out.cast(norm, torch.float32))
    if (acted := step.result(Clipped).acted) is not None:
        good = out.op(aten.logical_and.default, acted, out.op(aten.logical_not.default, overflow))
        out.write("clipped", out.op(aten.add.Tensor, read["clipped"], out.cast(good, torch.int64)))
