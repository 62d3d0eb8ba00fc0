"""Recompute in backward what costs less to compute again than to keep."""

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

# Elementwise, or a reduction over the last dimension: no matrix product, no random number.
CHEAP = frozenset(
    "_to_copy add sub mul div neg gelu silu relu sigmoid tanh where masked_fill native_layer_norm "
    "_fused_rms_norm pow rsqrt mean getitem _log_softmax _softmax eq ne lt le gt ge logical_not "
    "clone exp log scalar_tensor full".split()
)
MAX_NODES = 6  # of one recomputation: beyond, time is no longer free
MIN_ELEMENTS = 1024


@dataclass(frozen=True)
class Recompute(GraphPass):
    """Repeat cheap forward operations in backward when their inputs take less memory than their result.

    A gelu's output is kept for the next product's gradient although its input
    is kept for the gelu's own gradient; a log-softmax is kept in float32 although
    the float16 logits would do. Inputs that backward keeps anyway count nothing.
    The repeated operations are bitwise the same. They read their inputs through
    ``where(never, 0, x)``, as the weights of the release pass do, so that
    Inductor cannot fuse them with the forward's.
    """

    name: ClassVar[str] = "recompute"

    def run(self, step: StepGraph, edit: Editor) -> None:
        losses = [loss for loss in seed_losses(step).values() if loss is not None]
        if len(losses) != 1:
            edit.decline(f"{len(losses)} backwards: it is not known which forward belongs to which")
            return
        order = {n: i for i, n in enumerate(step.graph.nodes)}
        saved = _saved(step)
        chosen: list[tuple[Node, set[Node]]] = []
        for node in sorted(saved, key=order.__getitem__):
            plan = _plan(node, saved)
            if plan is None:
                continue
            body, leaves = plan
            cost = sum(_bytes(leaf) for leaf in leaves if leaf not in saved and leaf.op != "placeholder")
            if _bytes(node) > cost:
                chosen.append((node, body))
                saved.remove(node)
                saved |= {leaf for leaf in leaves if leaf.op != "placeholder"}
        tie = _Tie(step, edit, losses[0])
        for node, body in reversed(chosen):
            _repeat(edit, node, sorted(body, key=order.__getitem__), tie)


class _Tie:
    """``where(never, 0, x)`` for values of forward, one per value."""

    def __init__(self, step: StepGraph, edit: Editor, loss: Node) -> None:
        self.step, self.edit, self.loss = step, edit, loss
        self.never: Node | None = None

    def __call__(self, value: Node) -> Node:
        if self.never is None:
            self.never = self.edit.never(self.loss, "false for every loss, but no compiler knows")
        dtype = tensor(value).dtype
        nothing = 0.0 if dtype.is_floating_point else False if dtype is torch.bool else 0
        arguments = (self.never, nothing, value)
        reason = "a recomputation must wait for the loss"
        return self.edit.call(aten.where.ScalarSelf, *arguments, when=Phase.BACKWARD, reason=reason)


def _storage(node: Node) -> Node:
    """The value that a view looks at."""
    while op_name(node.target) in VIEWS - {"getitem"} and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _saved(step: StepGraph) -> set[Node]:
    """Values of forward, big enough to matter, that backward reads, directly or through a view."""
    found = set()
    for node in step.nodes():
        if phase(node) is Phase.BACKWARD:
            found |= {_storage(n) for n in node.all_input_nodes if phase(n) is Phase.FORWARD}
    return {n for n in found if n.op == "call_function" and _elements(n) >= MIN_ELEMENTS}


def _elements(node: Node) -> int:
    value = node.meta["val"]
    return int(value.numel()) if isinstance(value, torch.Tensor) and not _symbolic(value) else 0


def _symbolic(value: torch.Tensor) -> bool:
    return any(isinstance(s, torch.SymInt) for s in value.shape)


def _bytes(node: Node) -> int:
    value = node.meta["val"]
    return int(value.numel()) * value.dtype.itemsize if isinstance(value, torch.Tensor) else 0


def _plan(node: Node, saved: set[Node]) -> tuple[set[Node], set[Node]] | None:
    """The cheap nodes that compute ``node`` and the values they start from; None if there are none."""
    body: set[Node] = set()
    leaves: set[Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current in body or current in leaves:
            continue
        starts = current is not node and (current.op == "placeholder" or _storage(current) in saved)
        if starts or (current is not node and not _cheap(current)):
            leaves.add(current)
            continue
        if not _cheap(current) or len(body) == MAX_NODES:
            return None
        body.add(current)
        stack += current.all_input_nodes
    if any(not isinstance(leaf.meta["val"], torch.Tensor) for leaf in leaves):
        return None
    return body, leaves


def _cheap(node: Node) -> bool:
    name = op_name(node.target)
    return node.op == "call_function" and phase(node) is Phase.FORWARD and (name in CHEAP or name in VIEWS)


def _repeat(edit: Editor, node: Node, body: list[Node], tie: _Tie) -> None:
    """Compute ``node`` again before its first use in backward, and use that there."""
    views = [n for n in node.users if phase(n) is Phase.FORWARD and _storage(n) is node]
    users = {u for n in (node, *views) for u in n.users if phase(u) is Phase.BACKWARD}
    first = edit.first(users)
    if first is None:
        return
    copies: dict[Node, Node] = {}
    with edit.before(first):
        for original in body:
            for source in original.all_input_nodes:
                if source not in copies and source not in body:
                    copies[source] = tie(source) if source.op != "placeholder" else source
            reason = f"{node.name} costs less again"
            copies[original] = edit.copy(original, copies, when=Phase.BACKWARD, reason=reason)
        for view in views:
            if any(u in users for u in view.users):
                reason = f"view of {node.name}"
                copies[view] = edit.copy(view, copies, when=Phase.BACKWARD, reason=reason)
    for old in (node, *views):
        if old in copies:
            edit.replace_uses(old, copies[old], keep=lambda user: user not in users)
