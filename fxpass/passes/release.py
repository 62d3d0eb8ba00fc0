"""Tie weight casts of backward to the loss, so that they are not made in forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from ..analysis.policy import VIEWS, op_name
from ..ir.edit import Editor
from ..ir.graph import Phase, StepGraph, phase, tensor
from ..ir.marks import SEED
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
        seeds = {mark: _loss_of(mark) for mark in step.marks(SEED)}
        current: Node | None = None
        never: dict[Node, Node] = {}
        for node in list(step.graph.nodes):
            if node in seeds:
                current = seeds[node]
            if current is None or not _casts_a_weight(node):
                continue
            if current not in never:
                never[current] = self._never(step, edit, current)
            with edit.before(node):
                reason = "a weight cast of backward must wait for the loss"
                source = node.args[0]
                tied = edit.call(
                    aten.where.ScalarSelf, never[current], 0.0, source, when=Phase.BACKWARD, reason=reason
                )
            edit.set_arg(node, 0, tied)

    def _never(self, step: StepGraph, edit: Editor, loss: Node) -> Node:
        reason = "false for every loss, but no compiler knows"
        with edit.after(loss):
            total = loss
            if tensor(loss).ndim:
                total = edit.call(aten.sum.default, loss, when=Phase.FORWARD, reason=reason)
            is_nan = edit.call(aten.ne.Tensor, total, total, when=Phase.FORWARD, reason=reason)
            is_number = edit.call(aten.eq.Tensor, total, total, when=Phase.FORWARD, reason=reason)
            return edit.call(aten.logical_and.default, is_nan, is_number, when=Phase.FORWARD, reason=reason)


def _loss_of(mark: Node) -> Node | None:
    """The loss behind a SEED mark: what ``ones_like`` was taken of."""
    node = mark.args[0]
    while isinstance(node, Node) and node.args and op_name(node.target) in ("mul", "_to_copy"):
        node = node.args[0]
    if isinstance(node, Node) and node.target is aten.ones_like.default:
        loss = node.args[0]
        return loss if isinstance(loss, Node) and loss.op == "call_function" else None
    return None


def _casts_a_weight(node: Node) -> bool:
    if node.target is not aten._to_copy.default or phase(node) is not Phase.BACKWARD:
        return False
    source = node.args[0]
    while isinstance(source, Node) and source.op == "call_function" and op_name(source.target) in VIEWS:
        source = source.args[0]
    return isinstance(source, Node) and source.op == "placeholder" and tensor(node).numel() > 1
