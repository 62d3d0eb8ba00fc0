"""Compute an update's scalars once, not once per element; put scalars side by side in one call.

Step sizes and bias corrections are 0-d tensors. Inductor inlines their
computation, ``pow`` included, into the loop over the parameter's elements,
unless it is told to store them. On CUDA the kernels that do so for all
parameters are joined.

What a step notes per gradient (a magnitude, a sum of squares) it puts into vectors. On a CPU
Inductor reads a hundred 0-d tensors by a dozen kernels of a dozen arguments, each a second
to compile and nothing to run.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from .. import _torch
from ..ir.graph import Phase, StepGraph, phase, source, tensor

_library = torch.library.Library("fxpass", "FRAGMENT")
_library.define("hold(Tensor[] xs) -> Tensor[]")
_library.define("gather(Tensor[] xs) -> Tensor", tags=(torch.Tag.flexible_layout,))
MANY = 8  # scalars: fewer are one kernel
aten = torch.ops.aten


def _hold(xs: list[Tensor]) -> list[Tensor]:
    return [x.clone() for x in xs]


_library.impl("hold", _hold, "CompositeExplicitAutograd")
torch.library.register_fake("fxpass::hold", _hold, lib=_library)
_library.impl("gather", torch.stack, "CompositeExplicitAutograd")
torch.library.register_fake("fxpass::gather", torch.stack, lib=_library)
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


def gather_scalars(step: StepGraph) -> int:
    """Stack many scalars of ``step`` by one call each time; returns how often."""
    stacks = [n for n in step.nodes() if n.target is aten.stack.default and len(n.args) == 1 and not n.kwargs]
    count = 0
    for node in stacks:
        values: list[Node] = list(node.all_input_nodes) if len(node.all_input_nodes) >= MANY else []
        if not values or not all(map(_is_scalar, values)):
            continue
        values = list(node.args[0])  # pyrefly: ignore[bad-argument-type, bad-assignment]
        bare = [source(v) if _is_cast(v) else v for v in values]
        if not all(map(_is_cast, values)) or len({tensor(v).dtype for v in bare}) > 1:
            bare = values
        if len({tensor(v).dtype for v in bare}) > 1:
            continue
        with step.graph.inserting_before(node):
            new = step.graph.call_function(torch.ops.fxpass.gather.default, (bare,))
            new.meta.update(node.meta, val=node.meta["val"].to(tensor(bare[0]).dtype))
            if bare is not values:
                cast: dict[str, Any] = {"dtype": tensor(node).dtype}
                new = step.graph.call_function(aten._to_copy.default, (new,), cast)
                new.meta.update(node.meta)
        node.replace_all_uses_with(new)
        step.graph.erase_node(node)
        count += 1
    step.graph.eliminate_dead_code()
    return count


def _is_cast(node: Node) -> bool:
    return node.target is aten._to_copy.default and [*node.kwargs] == ["dtype"]


def _is_scalar(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.ndim == 0
