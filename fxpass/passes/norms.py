"""Norms of gradients for the passes that report or clip them: each taken where the gradient is stored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from ..ir.edit import Editor
from ..ir.graph import Phase, Read, StepGraph, source, tensor
from ..ir.marks import GRAD, MARK
from ..ir.shards import Shard
from .across import across
from .results import Checked, Clipped, Unscaled

aten = torch.ops.aten


def reads_with_elements(step: StepGraph) -> list[Read]:
    """The gradients that optimizers read and that have a norm: those with elements."""
    return [read for read in step.reads if tensor(read.mark).numel() != 0]


class Norms:
    """Builds norms of unscaled gradients without unscaling a gradient.

    A gradient that reaches its optimizer as backward left it is reduced in its
    stored dtype, beside the finite check, and the 0-d (or per row) result is
    unscaled. One that the user, or another pass, has changed on the way is
    reduced as it is. All results are float32, float64 for a float64 gradient.
    """

    def __init__(self, step: StepGraph, edit: Editor, reason: str) -> None:
        self.step, self.edit, self.reason = step, edit, reason
        self.checked, self.unscaled = step.result(Checked), step.result(Unscaled)
        self._inverse: Node | None = None
        self._slots = {read.mark: read.slot for read in step.reads}

    def call(self, target: Any, *args: object, **kwargs: Any) -> Node:
        """``Editor.call`` in the phase of the check, for the reason of the pass."""
        return self.edit.call(target, *args, when=Phase.CHECK, reason=self.reason, **kwargs)

    def cast(self, x: Node, dtype: torch.dtype) -> Node:
        """``Editor.cast`` likewise."""
        return self.edit.cast(x, dtype, when=Phase.CHECK, reason=self.reason)

    def total(self, reads: Sequence[Node], norm_type: float) -> Node:
        """The 0-d norm of all ``reads`` together, placed after the last of them is reduced."""
        by_inf = norm_type == math.inf
        rows = [read for read in reads if self._of_rows(read)]
        parts = [(self._largest if by_inf else self._square_sum)(r) for r in reads if r not in rows]
        if rows:
            parts.append((self._across(rows, by_inf), False))
        dtype = torch.float64 if any(tensor(r).dtype is torch.float64 for r in reads) else torch.float32
        with self.edit.after(self.edit.last(part for part, _ in parts)):
            kinds = [[part for part, scaled in parts if scaled is kind] for kind in (True, False)]
            combined = [self._combine(by_inf, kind) if kind else None for kind in kinds]
            if combined[0] is not None:
                combined[0] = self._unscaled(combined[0], 1 if by_inf else 2)
            norm = self._combine(by_inf, [c for c in combined if c is not None])
            return self.cast(norm if by_inf else self.call(aten.sqrt.default, norm), dtype)

    def _of_rows(self, read: Node) -> Shard | None:
        """How a gradient is spread, of which no number is known yet that is about all ranks' rows."""
        stored, _ = self._stored(read)
        return None if stored in self.checked.square_sums else self.step.part(self._slots[read])

    def _across(self, reads: list[Node], by_inf: bool) -> Node:
        values = [(self._largest if by_inf else self._square_sum)(read)[0] for read in reads]
        shard = self._of_rows(reads[0])
        assert shard is not None, "each rank has some of the rows"
        with self.edit.after(self.edit.last(values)):
            mine = self._combine(by_inf, values)
        sums, largest = across(self.edit, shard, *(([], [mine]) if by_inf else ([mine], [])))
        return (largest if by_inf else sums)[0]

    def by_row(self, read: Node) -> Node:
        """The 2-norm of each slice along the first dimension; of the whole for fewer than two dimensions."""
        stored, scaled = self._stored(read)
        with self.edit.before(read):
            norms = self.row_norms(stored)
            return self._unscaled(norms) if scaled else norms

    def row_norms(self, x: Node) -> Node:
        """2-norms of a tensor ``[n, ...]`` as ``[n, 1, ...]``, or of all of it as ``[1]`` or ``[]``."""
        dims = list(range(1 if tensor(x).ndim > 1 else 0, tensor(x).ndim))
        total = self._square(x)
        if dims:
            total = self.call(aten.sum.dim_IntList, total, dims, True)
        return self.cast(self.call(aten.sqrt.default, total), _float(x))

    def _combine(self, by_inf: bool, parts: list[Node]) -> Node:
        if len(parts) == 1:
            return parts[0]
        stacked = self.call(aten.stack.default, parts)
        return self.call(aten.amax.default if by_inf else aten.sum.default, stacked)

    def _square(self, x: Node) -> Node:
        """Squares that do not overflow: in float32 of float16, else in float64."""
        wide = self.cast(x, torch.float32 if tensor(x).dtype is torch.float16 else torch.float64)
        return self.call(aten.mul.Tensor, wide, wide)

    def _square_sum(self, read: Node) -> tuple[Node, bool]:
        """0-d float64, and whether it is still scaled."""
        stored, scaled = self._stored(read)
        if stored in self.checked.square_sums:
            return self.checked.square_sums[stored], scaled
        with self.edit.before(read):
            return self.cast(self.call(aten.sum.default, self._square(stored)), torch.float64), scaled

    def _largest(self, read: Node) -> tuple[Node, bool]:
        """The largest magnitude, 0-d float32 or float64, and whether it is still scaled."""
        stored, scaled = self._stored(read)
        if stored in self.checked.largest:
            return self.checked.largest[stored], scaled
        with self.edit.before(read):
            largest = self.call(aten.amax.default, self.call(aten.abs.default, stored))
            return self.cast(largest, _float(stored)), scaled

    def _stored(self, read: Node) -> tuple[Node, bool]:
        """The GRAD mark that a READ mark reads through the unscale alone; else the value it reads.

        And whether what is returned is scaled.
        """
        node = source(read)
        if node in self.unscaled.values:
            node = source(node)
        if node.target is aten._to_copy.default:
            node = source(node)
        if node.target is MARK and node.args[1] == GRAD:
            return node, "scale" in self.step.scaler
        return source(read), False

    def _unscaled(self, norm: Node, power: int = 1) -> Node:
        if self._inverse is None:
            scale = self.step.scaler["scale"]
            with self.edit.after(scale):
                self._inverse = self.call(aten.reciprocal.default, scale)
        for _ in range(power):
            norm = self.call(aten.mul.Tensor, norm, self._inverse)
        return norm


def _float(x: Node) -> torch.dtype:
    return torch.float64 if tensor(x).dtype is torch.float64 else torch.float32


def note_clipped(norms: Norms, values: Sequence[Node], limit: float) -> None:
    """Count the step as clipped if one of the 0-d ``values`` is finite and above ``limit``."""
    step, edit = norms.step, norms.edit
    clipped = step.result(Clipped)
    output = next(n for n in reversed(step.graph.nodes) if n.op == "output")
    with edit.before(output):
        stacked = norms.call(aten.stack.default, [norms.cast(v, torch.float32) for v in values])
        above = norms.call(aten.gt.Scalar, stacked, limit)
        finite = norms.call(aten.isfinite.default, stacked)
        acted = norms.call(aten.any.default, norms.call(aten.logical_and.default, above, finite))
        if clipped.acted is not None:
            acted = norms.call(aten.logical_or.default, clipped.acted, acted)
    clipped.acted = acted
