"""Clip gradients by global norm or by value, after unscaling, in float32."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from ..ir.edit import Editor
from ..ir.graph import Phase, StepGraph, tensor
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
        reads = step.marks(READ)
        if not step.trains or not step.found_inf:
            edit.decline("no optimizer step")
            return
        last = step.found_inf[max(step.found_inf)]
        groups = sorted(set(step.backwards_before))
        for backwards in groups:
            members = [
                r for r, e in zip(reads, step.read_events, strict=True) if step.backwards_before[e] == backwards
            ]
            self._clip_group(step, edit, members, last if backwards == groups[-1] else None)
        if self.max_norm is None:
            edit.decline("max_norm is None: the norm is only reported")

    def _clip_group(self, step: StepGraph, edit: Editor, reads: list[Node], anchor: Node | None) -> None:
        anchor = _latest(step, [*reads, *([anchor] if anchor else []), *step.square_sums.values()] if anchor else reads)
        with edit.after(anchor):
            norm = self._norm(step, edit, reads)
            coef = None
            if self.max_norm is not None:
                reason = f"clip by global norm {self.max_norm}"
                padded = edit.call(aten.add.Tensor, norm, EPS, when=Phase.CHECK, reason=reason)
                inverse = edit.call(aten.reciprocal.default, padded, when=Phase.CHECK, reason=reason)
                ratio = edit.call(aten.mul.Tensor, inverse, self.max_norm, when=Phase.CHECK, reason=reason)
                coef = edit.call(aten.clamp_max.default, ratio, 1.0, when=Phase.CHECK, reason=reason)
                step.clipped = edit.call(
                    aten.gt.Scalar, norm, self.max_norm, when=Phase.CHECK, reason="count clipped steps"
                )
            step.grad_norm = norm
        for read in reads:
            if self.clip_value is None and coef is None:
                break
            self._apply(edit, read, coef)

    def _apply(self, edit: Editor, read: Node, coef: Node | None) -> None:
        users = [u for u in read.users if u.meta["fxpass_phase"] is Phase.UPDATE]
        first = next((n for n in _following(read) if n in users), None)
        if first is None:
            return
        with edit.before(first):
            value: Node = read
            if self.clip_value is not None:
                reason = f"clip by value {self.clip_value}"
                value = edit.call(
                    aten.clamp.default, value, -self.clip_value, self.clip_value, when=Phase.UPDATE, reason=reason
                )
            if coef is not None:
                reason = f"clip by global norm {self.max_norm}"
                value = edit.call(aten.mul.Tensor, value, coef, when=Phase.UPDATE, reason=reason)
        edit.replace_uses(read, value, keep=lambda user: user not in users)

    def _norm(self, step: StepGraph, edit: Editor, reads: list[Node]) -> Node:
        scaled, plain = [], []
        for read in reads:
            mark = _unscaled_mark(read)
            if tensor(read).numel() == 0:
                continue
            if self.norm_type == 2.0 and mark in step.square_sums and self.clip_value is None:
                scaled.append(step.square_sums[mark])
            else:
                plain.append(self._one(edit, read))
        reason = "global norm before clipping"
        parts = []
        if scaled:
            stacked = edit.call(aten.stack.default, scaled, when=Phase.CHECK, reason=reason)
            total = edit.call(aten.sum.default, stacked, when=Phase.CHECK, reason=reason)
            if "scale" in step.scaler:
                root = edit.call(aten.sqrt.default, total, when=Phase.CHECK, reason=reason)
                root = edit.cast(root, torch.float32, when=Phase.CHECK, reason=reason)
                inverse = edit.call(
                    aten.reciprocal.default, step.scaler["scale"], when=Phase.CHECK, reason=reason
                )
                root = edit.call(aten.mul.Tensor, root, inverse, when=Phase.CHECK, reason="unscaled norm")
                if not plain:
                    return root
                total = edit.call(aten.mul.Tensor, root, root, when=Phase.CHECK, reason=reason)
            parts.append(total)
        if plain:
            stacked = edit.call(aten.stack.default, plain, when=Phase.CHECK, reason=reason)
            reduce = aten.amax.default if self.norm_type == math.inf else aten.sum.default
            parts.append(edit.call(reduce, stacked, when=Phase.CHECK, reason=reason))
        if self.norm_type == math.inf:
            return parts[0]
        total = parts[0]
        if len(parts) == 2:
            total = edit.call(aten.add.Tensor, *parts, when=Phase.CHECK, reason=reason)
        root = edit.call(aten.sqrt.default, total, when=Phase.CHECK, reason=reason)
        return edit.cast(root, torch.float32, when=Phase.CHECK, reason=reason)

    def _one(self, edit: Editor, read: Node) -> Node:
        reason = "part of the global norm"
        value: Node = read
        if self.clip_value is not None:
            value = edit.call(
                aten.clamp.default, value, -self.clip_value, self.clip_value, when=Phase.CHECK, reason=reason
            )
        if self.norm_type == math.inf:
            magnitude = edit.call(aten.abs.default, value, when=Phase.CHECK, reason=reason)
            return edit.call(aten.amax.default, magnitude, when=Phase.CHECK, reason=reason)
        square = edit.call(aten.mul.Tensor, value, value, when=Phase.CHECK, reason=reason)
        return edit.call(aten.sum.default, square, when=Phase.CHECK, reason=reason)


def _unscaled_mark(read: Node) -> Node | None:
    """The GRAD mark that a READ mark reads directly (through the unscale), else None."""
    node = read.args[0]
    assert isinstance(node, Node)
    if node.target is aten.mul.Tensor and node.meta.get("fxpass_origin") is not None:
        node = node.args[0]  # type: ignore[assignment]
    if node.target is aten._to_copy.default:
        node = node.args[0]  # type: ignore[assignment]
    return node if node.target is MARK and node.args[1] == GRAD else None


def _following(node: Node):  # noqa: ANN202 - a generator of nodes
    while node.next.op != "root":
        node = node.next
        yield node


def _latest(step: StepGraph, nodes: list[Node]) -> Node:
    order = {n: i for i, n in enumerate(step.graph.nodes)}
    return max(nodes, key=order.__getitem__)
