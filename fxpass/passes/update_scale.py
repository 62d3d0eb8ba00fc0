"""Advance the loss scale and the counters, on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from ..ir.edit import Editor
from ..ir.graph import Phase, StepGraph, tensor
from ..runtime.scale import DynamicLossScale, LossScale
from .base import GraphPass

aten = torch.ops.aten


@dataclass(frozen=True)
class UpdateScale(GraphPass):
    """torch.amp's update of the scale, plus counters, as selects on ``found_inf``.

    Overflow: ``scale * backoff`` (after ``hysteresis`` overflows in a row, not
    below ``min_scale``), tracker 0. ``growth_interval`` good steps in a row:
    ``scale * growth`` if that is finite and at most ``max_scale``, tracker 0.
    """

    name: ClassVar[str] = "update_scale"
    loss_scale: LossScale | None = None

    def run(self, step: StepGraph, edit: Editor) -> None:
        if not step.found_inf:
            edit.decline("no finite check to act on")
            return
        found = step.found_inf[max(step.found_inf)]
        output = next(n for n in reversed(step.graph.nodes) if n.op == "output")
        with edit.before(output):
            writer = _Writer(step, edit, found)
            writer.counters()
            if isinstance(self.loss_scale, DynamicLossScale):
                writer.scale(self.loss_scale)


class _Writer:
    def __init__(self, step: StepGraph, edit: Editor, found: Node) -> None:
        self.step, self.edit, self.found = step, edit, found

    def op(self, target: Any, *args: Any, reason: str = "loss scale state", **kwargs: Any) -> Node:
        return self.edit.call(target, *args, when=Phase.SCALE, reason=reason, **kwargs)

    def write(self, field: str, value: Node) -> None:
        self.op(aten.copy_.default, self.step.scaler[field], value)

    def select(self, condition: Node, yes: object, no: object) -> Node:
        """``where`` for 0-d values; a Python number takes the other side's dtype."""
        if isinstance(yes, Node) and isinstance(no, Node):
            return self.op(aten.where.self, condition, yes, no)
        target = aten.where.ScalarSelf if isinstance(no, Node) else aten.where.ScalarOther
        return self.op(target, condition, yes, no)

    def counters(self) -> None:
        read = self.step.scaler
        one = self.op(aten._to_copy.default, self.found, dtype=torch.int64)
        self.write("steps", self.op(aten.add.Tensor, read["steps"], 1))
        self.write("skipped", self.op(aten.add.Tensor, read["skipped"], one))
        again = self.op(aten.add.Tensor, read["consecutive_skipped"], 1)
        zero = self.op(aten.mul.Tensor, read["consecutive_skipped"], 0)
        self.write("consecutive_skipped", self.select(self.found, again, zero))
        if self.step.grad_norm is not None:
            self.write("grad_norm", self.op(aten._to_copy.default, self.step.grad_norm, dtype=torch.float32))
        if self.step.clipped is not None:
            good = self.op(
                aten.logical_and.default, self.step.clipped, self.op(aten.logical_not.default, self.found)
            )
            self.write(
                "clipped",
                self.op(
                    aten.add.Tensor, read["clipped"], self.op(aten._to_copy.default, good, dtype=torch.int64)
                ),
            )
        if "nonfinite" in read:
            values = self.op(aten.stack.default, [value for _, value in self.step.checked])
            unread = tensor(read["nonfinite"]).numel() - len(
                self.step.checked
            )  # gradients no optimizer reads
            padded = self.op(aten.constant_pad_nd.default, values, [0, unread], 0.0) if unread else values
            finite = self.op(aten.isfinite.default, padded)  # a finite sum may be too large for float32
            now = self.op(aten._to_copy.default, self.select(finite, 0.0, padded), dtype=torch.float32)
            self.write("nonfinite", self.select(self.found, now, read["nonfinite"]))

    def scale(self, settings: DynamicLossScale) -> None:
        read = self.step.scaler
        scale, tracker, overflows = read["scale"], read["growth_tracker"], read["overflows"]
        run = self.op(aten.add.Tensor, overflows, 1)
        zero = self.op(aten.mul.Tensor, overflows, 0)
        self.write("overflows", self.select(self.found, run, zero))
        patient = self.op(aten.lt.Scalar, run, settings.hysteresis)
        smaller = self.op(
            aten.clamp_min.default,
            self.op(aten.mul.Tensor, scale, settings.backoff_factor),
            settings.min_scale,
        )
        backed_off = self.select(patient, scale, smaller)

        good = self.op(aten.add.Tensor, tracker, 1)
        grows = self.op(aten.eq.Scalar, good, settings.growth_interval)
        larger = self.op(aten.mul.Tensor, scale, settings.growth_factor)
        allowed = self.op(aten.le.Scalar, larger, settings.max_scale)
        grown = self.select(self.op(aten.logical_and.default, grows, allowed), larger, scale)

        self.write("scale", self.select(self.found, backed_off, grown))
        zero_tracker = self.op(aten.mul.Tensor, tracker, 0)
        advanced = self.select(grows, zero_tracker, good)
        self.write("growth_tracker", self.select(self.found, zero_tracker, advanced))

        at_floor = self.op(aten.le.Scalar, scale, settings.min_scale)
        stuck = self.op(aten.logical_and.default, self.found, at_floor)
        count = self.op(aten.add.Tensor, read["stuck"], 1)
        self.write("stuck", self.select(stuck, count, self.op(aten.mul.Tensor, read["stuck"], 0)))
