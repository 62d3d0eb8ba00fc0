"""Clip gradients by global norm or by value, after unscaling, in float32."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from ..ir.edit import Editor
from ..ir.graph import Phase, StepGraph, origin, phase, source, tensor
from ..ir.marks import GRAD, MARK, READ
from .base import GraphPass

aten = torch.ops.aten
EPS = 1e-6  # torch.nn.utils.clip_grad_norm_ adds it to the norm


@dataclass(frozen=True)
class Clip(GraphPass):
    """Compute the global norm of the unscaled gradients and apply the clip options.

    ``coef = clamp(max_norm / (norm + 1e-6), max=1)`` as in
    ``torch.nn.utils.clip_grad_norm_``, but with the norm in float32 (torch
    takes it in float16 for float16 gradients: two finite 60000s give inf). The
    norm reuses the finite check's sums of squares; it is reported unclipped.
    """

    name: ClassVar[str] = "clip"
    max_norm: float | None = None
    norm_type: float = 2.0
    clip_value: float | None = None

    def run(self, step: StepGraph, edit: Editor) -> None:
        if not step.found_inf:
            edit.decline("no optimizer step")
            return
        reads = list(zip(step.marks(READ), step.read_events, strict=True))
        for backwards in sorted(set(step.backwards_before)):
            group = [r for r, event in reads if step.backwards_before[event] == backwards]
            group = [r for r in group if tensor(r).numel() != 0]
            if group:
                self._clip_group(step, edit, group)
        if self.max_norm is None:
            edit.decline("max_norm is None: the norm is only reported")

    def _clip_group(self, step: StepGraph, edit: Editor, reads: list[Node]) -> None:
        """Clip what the optimizers between two backwards read, by their common norm."""
        first_update = edit.first(n for r in reads for n in r.users if phase(n) is Phase.UPDATE)
        if first_update is None or not all(edit.hoist(read, first_update) for read in reads):
            edit.decline("a gradient depends on an earlier optimizer's update: left unclipped")
            return
        with edit.before(first_update):
            values = {read: self._clamp(edit, read) for read in reads}
            step.grad_norm = self._norm(step, edit, {read: read for read in reads})
            coef = None
            if self.max_norm is not None:
                norm = step.grad_norm if self.clip_value is None else self._norm(step, edit, values)
                coef = self._coefficient(step, edit, norm, self.max_norm)
        for read, value in values.items():
            self._apply(edit, read, value, coef)

    def _clamp(self, edit: Editor, read: Node) -> Node:
        if self.clip_value is None:
            return read
        reason = f"clip by value {self.clip_value}"
        limits = (-self.clip_value, self.clip_value)
        return edit.call(aten.clamp.default, read, *limits, when=Phase.UPDATE, reason=reason)

    def _coefficient(self, step: StepGraph, edit: Editor, norm: Node, max_norm: float) -> Node:
        def call(target: Any, *args: object) -> Node:
            return edit.call(target, *args, when=Phase.CHECK, reason=f"clip by global norm {max_norm}")

        step.clipped = call(aten.gt.Scalar, norm, max_norm)
        inverse = call(aten.reciprocal.default, call(aten.add.Tensor, norm, EPS))
        return call(aten.clamp_max.default, call(aten.mul.Tensor, inverse, max_norm), 1.0)

    def _apply(self, edit: Editor, read: Node, value: Node, coef: Node | None) -> None:
        users = [u for u in read.users if phase(u) is Phase.UPDATE and u is not value]
        first = edit.first(users)
        if first is None or (coef is None and value is read):
            return
        if coef is not None:
            reason = f"clip by global norm {self.max_norm}"
            with edit.before(first):
                value = edit.call(aten.mul.Tensor, value, coef, when=Phase.UPDATE, reason=reason)
        edit.replace_uses(read, value, keep=lambda user: user not in users)

    def _norm(self, step: StepGraph, edit: Editor, values: dict[Node, Node]) -> Node:
        """The float32 norm of ``values`` (by READ mark), from the finite check's sums if possible."""

        def call(target: Any, *args: object) -> Node:
            return edit.call(target, *args, when=Phase.CHECK, reason="global norm before clipping")

        if self.norm_type == math.inf:
            largest = [call(aten.amax.default, call(aten.abs.default, v)) for v in values.values()]
            return call(aten.amax.default, call(aten.stack.default, largest))
        scaled, plain = [], []
        for read, value in values.items():
            mark = _unscaled_mark(read)
            if value is read and mark in step.square_sums:
                scaled.append(step.square_sums[mark])
            else:
                plain.append(call(aten.sum.default, call(aten.mul.Tensor, value, value)))
        totals = [
            call(aten.sum.default, call(aten.stack.default, terms)) for terms in (scaled, plain) if terms
        ]
        if scaled and "scale" in step.scaler:
            inverse = edit.cast(
                call(aten.reciprocal.default, step.scaler["scale"]),
                torch.float64,
                when=Phase.CHECK,
                reason="unscaled norm",
            )
            totals[0] = call(aten.mul.Tensor, totals[0], call(aten.mul.Tensor, inverse, inverse))
        total = call(aten.add.Tensor, *totals) if len(totals) == 2 else totals[0]
        root = call(aten.sqrt.default, total)
        return edit.cast(root, torch.float32, when=Phase.CHECK, reason="global norm before clipping")


def _unscaled_mark(read: Node) -> Node | None:
    """The GRAD mark that a READ mark reads directly (through the unscale), else None."""
    node = source(read)
    if node.target is aten.mul.Tensor and origin(node) is not None:
        node = source(node)
    if node.target is aten._to_copy.default:
        node = source(node)
    return node if node.target is MARK and node.args[1] == GRAD else None
