"""Compute an update's scalars once, not once per element.

Step sizes and bias corrections are 0-d tensors. Inductor inlines their
computation, ``pow`` included, into the loop over the parameter's elements. A
call that it cannot look into keeps them outside: on the CPU. Elsewhere, where a
call would be a launch of its own, it is told to store them, and the kernels
that do so for all parameters are joined.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor
from torch.fx import Graph, Node

from .. import _torch
from ..ir.graph import Phase, StepGraph, phase

_library = torch.library.Library("fxpass", "FRAGMENT")
_library.define("hold(Tensor[] xs) -> Tensor[]")


def _hold(xs: list[Tensor]) -> list[Tensor]:
    return [x.clone() for x in xs]


_library.impl("hold", _hold, "CompositeExplicitAutograd")
torch.library.register_fake("fxpass::hold", _hold, lib=_library)
_torch.store_results_of(torch.ops.fxpass.hold.default)


def hold_scalars(graph: Graph) -> int:
    """Rewrite an update's graph (a unit of outline.py) in place; returns how many scalars are held."""
    prologue: list[Node] = []
    for node in graph.nodes:
        known = all(n in prologue or (n.op == "placeholder" and _is_scalar(n)) for n in node.all_input_nodes)
        if node.op == "call_function" and _is_scalar(node) and known:
            prologue.append(node)
    held = [
        n for n in prologue if any(not _is_scalar(user) for user in n.users if user.op == "call_function")
    ]
    if not held:
        return 0
    first = next(n for n in graph.nodes if n.op == "call_function")
    for node in prologue:
        if node is not first:
            first.prepend(node)
        else:
            first = first.next
    with graph.inserting_before(first):
        call = graph.call_function(torch.ops.fxpass.hold.default, (held,))
        call.meta["val"] = [n.meta["val"] for n in held]
        for index, node in enumerate(held):
            item = graph.call_function(operator.getitem, (call, index))
            item.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(item, lambda user: user is not call and not _is_scalar(user))
    return len(held)


def store_scalars(step: StepGraph) -> int:
    """Hold each scalar of the updates where it stands in the step; returns how many."""
    stored = [
        node
        for node in step.nodes()
        if node.op == "call_function"
        and phase(node) is Phase.UPDATE
        and _is_scalar(node)
        and any(not _is_scalar(user) for user in node.users if user.op == "call_function")
    ]
    for node in stored:
        with step.graph.inserting_after(node):
            call = step.graph.call_function(torch.ops.fxpass.hold.default, ([node],))
        with step.graph.inserting_after(call):
            item = step.graph.call_function(operator.getitem, (call, 0))
        for new, value in ((call, [node.meta["val"]]), (item, node.meta["val"])):
            new.meta.update(val=value, fxpass_phase=Phase.UPDATE)
        node.replace_all_uses_with(item, lambda user, call=call: user is not call and not _is_scalar(user))
    return len(stored)


def _is_scalar(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.ndim == 0
