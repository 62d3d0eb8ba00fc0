"""Embedding gradients without a float32 table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from ..analysis.nodes import is_small_table
from ..ir.edit import Editor
from ..ir.graph import Phase, StepGraph, source, tensor
from ..ir.marks import GRAD, MARK
from .graph_pass import GraphPass

aten = torch.ops.aten
REASON = "only the rows of this batch's tokens have a gradient"


@dataclass(frozen=True)
class Embedding(GraphPass):
    """Accumulate an embedding's gradient over the batch's rows instead of over the whole table.

    ``embedding_dense_backward`` adds in float32 into a zeroed table of
    vocabulary * width, 4 bytes per parameter at the end of backward. Here rows
    of equal tokens are added in float32 into one row per position, and the sums
    are written once into the low-precision gradient (of the tied head, if there
    is one). Every position of a token writes the same sum: no atomics, no
    rounding between the additions.

    Before: ``low(embedding_dense_backward(g, ids) + head_grad)``. After:
    ``index_put(head_grad, ids, low(sums[first(ids)] + head_grad[ids]))``.
    Declined when the batch has as many positions as a quarter of the table.
    """

    name: ClassVar[str] = "embedding"

    def run(self, step: StepGraph, edit: Editor) -> None:
        for node in list(step.graph.nodes):
            if node.target is aten.embedding_dense_backward.default:
                reason = self._decline(node)
                if reason:
                    edit.decline(f"{node.name}: {reason}")
                else:
                    self._rewrite(edit, node)

    def _decline(self, node: Node) -> str:
        rows, positions = node.args[2], tensor(node.args[1]).numel()
        if not isinstance(positions, int) or not isinstance(rows, int):
            return "the batch's shape is symbolic"
        if is_small_table(node):
            return f"{positions} positions for {rows} rows: the table is smaller"
        if node.args[4]:
            return "scale_grad_by_freq"
        if _stored_as(node)[0] is None:
            return "the gradient is not stored in low precision"
        return ""

    def _rewrite(self, edit: Editor, node: Node) -> None:
        grad, ids, rows, padding, _ = node.args
        assert isinstance(grad, Node)
        assert isinstance(ids, Node)
        last, base = _stored_as(node)
        assert last is not None
        width, dtype = tensor(grad).shape[-1], tensor(last).dtype
        positions = tensor(ids).numel()

        def call(target: Any, *args: Any, **kwargs: Any) -> Node:
            return edit.call(target, *args, when=Phase.BACKWARD, reason=REASON, **kwargs)

        with edit.before(last):
            device = tensor(grad).device
            flat = call(aten.reshape.default, ids, [positions])
            flat = edit.cast(flat, torch.int64, when=Phase.BACKWARD, reason="scatter takes no other indices")
            values = call(
                aten.reshape.default,
                edit.cast(grad, torch.float32, when=Phase.BACKWARD, reason=REASON),
                [positions, width],
            )
            if isinstance(padding, int) and padding >= 0:
                is_padding = call(aten.unsqueeze.default, call(aten.eq.Scalar, flat, padding), 1)
                values = call(aten.where.ScalarSelf, is_padding, 0.0, values)
            order = call(aten.arange.default, positions, device=device)
            # the position that stands for each token: the last of scatter's writers, whichever it is
            table = call(aten.new_empty.default, flat, [rows])
            owner = call(aten.index.Tensor, call(aten.scatter.src, table, 0, flat, order), [flat])
            zeros = call(aten.full.default, [positions, width], 0.0, dtype=torch.float32, device=device)
            sums = call(
                aten.index.Tensor, call(aten.index_put.default, zeros, [owner], values, True), [owner]
            )
            if base is None:
                base = call(aten.full.default, [rows, width], 0.0, dtype=dtype, device=device)
            else:
                sums = call(aten.add.Tensor, sums, call(aten.index.Tensor, base, [flat]))
            new = call(
                aten.index_put.default,
                base,
                [flat],
                edit.cast(sums, dtype, when=Phase.BACKWARD, reason=REASON),
            )
        edit.replace_uses(last, new)


def _stored_as(node: Node) -> tuple[Node | None, Node | None]:
    """The cast that stores the gradient in low precision, and what else it adds up (a tied head's gradient).

    (None, None) when the gradient is used in another way.
    """
    user = _only_user(node)
    base: Node | None = None
    if user is not None and user.target is aten.add.Tensor:
        others = [a for a in user.args if isinstance(a, Node) and a is not node]
        if len(others) != 1 or len(others[0].users) != 1:
            return None, None
        base, user = others[0], _only_user(user)
        if base.target is aten._to_copy.default and len(source(base).users) == 1:
            base = source(base)  # cast up for the addition alone
    if user is None or user.target is not aten._to_copy.default:
        return None, None
    stored = _only_user(user)
    if stored is None or stored.target is not MARK or stored.args[1] != GRAD:
        return None, None
    if base is not None and tensor(base).dtype != tensor(user).dtype:
        return None, None
    return user, base


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
