"""Clip gradients by norm, after unscaling, in float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from ..ir.edit import Editor
from ..ir.graph import Phase, Read, StepGraph, source, tensor
from .graph_pass import GraphPass
from .norms import Norms, note_clipped, reads_with_elements
from .results import Checked, Clipped, GlobalNorm, Unscaled

aten = torch.ops.aten
EPS = 1e-6  # torch.nn.utils.clip_grad_norm_ adds it to the norm


@dataclass(frozen=True)
class Clip(GraphPass):
    """Scale gradients down together, so that their common norm is at most ``max_norm``.

    ``coef = clamp(max_norm / (norm + 1e-6), max=1)`` as in
    ``torch.nn.utils.clip_grad_norm_``, but with the norm in float32 (torch
    takes it in float16 for float16 gradients: two finite 60000s give inf).
    Which gradients have a norm in common is ``clip_per``: those of all
    optimizers, of each optimizer, of each of its parameter groups, or none, so
    that nothing waits for another gradient. An update in between ends what can
    be in common: optimizers that step after different backwards have norms of
    their own.
    """

    name: ClassVar[str] = "clip"
    requires: ClassVar = (Checked,)
    uses: ClassVar = (Unscaled, GlobalNorm)
    ensures: ClassVar = (Clipped,)
    max_norm: float | None = None
    norm_type: float = 2.0
    clip_per: str = "global"

    def run(self, step: StepGraph, edit: Editor) -> None:
        if self.max_norm is None:
            edit.decline("max_norm is None")
            return
        reads = reads_with_elements(step)
        if not step.result(Checked).found_inf or not reads:
            edit.decline("no gradient reaches an optimizer")
            return
        norms = Norms(step, edit, f"clip by norm {self.max_norm} per {self.clip_per}")
        groups: dict[object, list[Node]] = {}
        for read in reads:
            groups.setdefault(self._key(step, read), []).append(read.mark)
        acting = [self._clip(norms, group, self.max_norm) for group in groups.values()]
        if limited := [norm for norm in acting if norm is not None]:
            note_clipped(norms, limited, self.max_norm)

    def _key(self, step: StepGraph, read: Read) -> object:
        """Equal for gradients with one norm in common."""
        keys = {
            "global": step.backwards_before[read.event],
            "optimizer": read.event,
            "group": (read.event, read.slot.group),
        }
        return keys.get(self.clip_per, (read.event, read.slot))

    def _clip(self, norms: Norms, reads: list[Node], max_norm: float) -> Node | None:
        """Multiply ``reads`` by their coefficient; returns their norm, None if they are left alone."""
        edit = norms.edit
        norm = self._norm(norms, reads)
        with edit.after(norm):
            inverse = norms.call(aten.reciprocal.default, norms.call(aten.add.Tensor, norm, EPS))
            coef = norms.call(aten.clamp_max.default, norms.call(aten.mul.Tensor, inverse, max_norm), 1.0)
        first = edit.first(reads)
        assert first is not None, "a group has a gradient"
        if not edit.hoist(coef, first):
            edit.decline("a gradient depends on an earlier optimizer's update: left unclipped")
            return None
        for read in reads:
            with edit.before(read):
                own = norms.cast(coef, tensor(read).dtype)
                value = edit.call(aten.mul.Tensor, source(read), own, when=Phase.UPDATE, reason=norms.reason)
            edit.set_arg(read, 0, value)
        return norm

    def _norm(self, norms: Norms, reads: list[Node]) -> Node:
        """The reported norm if it is the one asked for: all gradients, unchanged."""
        reported = norms.step.result(GlobalNorm)
        same = reported.of == {read: source(read) for read in reads} and reported.norm_type == self.norm_type
        if reported.norm is not None and same:
            return reported.norm
        return norms.total(reads, self.norm_type)
