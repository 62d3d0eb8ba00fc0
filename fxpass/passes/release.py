"""Tie weight casts of backward to the loss, so that they are not made in forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from ..analysis.policy import VIEWS, op_name
from ..ir.edit import Editor
from ..ir.graph import Phase, StepGraph, phase, seed_losses, tensor
from .base import GraphPass

aten = torch.ops.aten


@dataclass(frozen=True)
class Release(GraphPass):
    """Make each backward's casts of weights depend on that backward's loss.

    Forward and backward each cast a weight for themselves, but both casts read
    the same input, so Inductor's scheduler fuses them into one kernel and every
    low-precision weight lives from forward to backward: 2 bytes per parameter
    at the peak. ``where(never, 0, weight)`` with a ``never`` computed from the
    loss is bitwise the weight, and cannot run before the loss is known.
    """

    name: ClassVar[str] = "release"

    def run(self, step: StepGraph, edit: Editor) -> None:
        seeds = seed_losses(step)
        current: Node | None = None
        never: dict[Node, Node] = {}
        for node in list(step.graph.nodes):
            if node in seeds:
                current = seeds[node]
            if current is None or not _casts_a_weight(node):
                continue
            if current not in never:
                never[current] = edit.never(current, "false for every loss, but no compiler knows")
            with edit.before(node):
                reason = "a weight cast of backward must wait for the loss"
                source = node.args[0]
                tied = edit.call(
                    aten.where.ScalarSelf, never[current], 0.0, source, when=Phase.BACKWARD, reason=reason
                )
            edit.set_arg(node, 0, tied)


def _casts_a_weight(node: Node) -> bool:
    if node.target is not aten._to_copy.default or phase(node) is not Phase.BACKWARD:
        return False
    source = node.args[0]
    while isinstance(source, Node) and source.op == "call_function" and op_name(source.target) in VIEWS:
        source = source.args[0]
    return isinstance(source, Node) and source.op == "placeholder" and tensor(node).numel() > 1
