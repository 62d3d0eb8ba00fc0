"""Parameters of which each rank holds some rows: Dynamo's graph, of whole ones, made one of parts.

Dynamo has traced the step as one device would run it. Here each such input becomes this rank's part:
what reads the parameter reads a gather of it, whose derivative is this rank's rows of the mean of the
gradients, and what the optimizer reads and writes is the part. A gradient that the user's code looks
at between backward and update is gathered for it, and cut again for the optimizer.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from .. import _torch
from ..errors import CaptureError
from ..ir.marks import GRAD, MARK, TEXT
from ..ir.provenance import innermost
from ..ir.shards import GATHER_ROWS, Shard
from . import gradients
from .writes import storages


def split(graph: Graph, shards: Mapping[Node, Shard], names: Mapping[str, str]) -> None:
    """Rewrite ``graph`` for parts of the inputs ``shards``; ``names``: the user's, by input.

    Raises:
        CaptureError: the step does with a parameter or its gradient what parts cannot follow.
    """
    parts = {param: shard for param, shard in shards.items() if not shard.whole}
    for param, shard in parts.items():
        name = names.get(param.name, param.name)
        _refuse_writes(graph, param, name)
        _gather_where_read(graph, param, shard, name)
    if parts:
        _split_gradients(graph, parts, names)


def whole(part: Tensor, *how: Any) -> Tensor:
    """Traced: the whole of a part. Gradients go through it wherever the code that reads it stands."""
    with torch.enable_grad():
        return GATHER_ROWS(part, *how)


vars(whole)[TEXT] = "gather rows"


def _gather(graph: Graph, part: Node, shard: Shard, name: str) -> Node:
    """A gather of ``part`` at the insertion point."""
    node = graph.call_function(whole, (part, shard.group, shard.ranks, shard.rank, shard.rows, name))
    value = part.meta["example_value"]  # Dynamo's, of the whole
    node.meta["example_value"] = value.detach().clone().requires_grad_(value.requires_grad)
    return node


# ---------------------------------------------------------------- the parameter


def _gather_where_read(graph: Graph, param: Node, shard: Shard, name: str) -> None:
    """Let what reads the parameter read the whole of it: as it was, or as an update has left it."""
    at = next(n for n in graph.nodes if n.op != "placeholder")
    readers: dict[Node, list[Node]] = {}  # by the node before which the whole is made
    for node in graph.nodes:
        if node.target is _torch.optimizer_step and param in node.args[1]:
            _refuse_older_views(graph, param, node, name)
            at = node.next
        elif param in node.all_input_nodes and not gradients.is_gradient_call(node):
            readers.setdefault(at, []).append(node)
    for before, nodes in readers.items():
        with graph.inserting_before(before):
            made = _gather(graph, param, shard, name)
        for node in nodes:
            node.replace_input_with(param, made)


def _refuse_writes(graph: Graph, param: Node, name: str) -> None:
    own = storages(param)
    for node in graph.nodes:
        if node.target is not _torch.optimizer_step and any(
            not own.isdisjoint(storages(t)) for t in _torch.written(node)
        ):
            found = f"the step itself writes to {name}, of which each rank has its own rows"
            hint = "leave it to an optimizer, or write to the parameters outside of the compiled step"
            raise CaptureError(found, where=innermost(node), hint=hint)


def _refuse_older_views(graph: Graph, param: Node, update: Node, name: str) -> None:
    """Raise for a view of the parameter from before an update that is read after it: it shows new values."""
    own = storages(param)
    before = True
    views: set[Node] = set()
    for node in graph.nodes:
        before = before and node is not update
        if before and node.op != "placeholder" and not own.isdisjoint(storages(node)):
            views.add(node)
        elif not before and node is not update and not views.isdisjoint(node.all_input_nodes):
            found = f"a view of {name}, of which each rank has its own rows, is read across optimizer.step()"
            hint = "make the view again after the step"
            raise CaptureError(found, where=innermost(node), hint=hint)


# ---------------------------------------------------------------- its gradient


def _split_gradients(graph: Graph, parts: Mapping[Node, Shard], names: Mapping[str, str]) -> None:
    owner = _gradients(graph, parts, names)
    local = _local(graph, owner)
    whole_of: dict[Node, Node] = {}
    for value, param in owner.items():
        if value in local or value.target is operator.getitem:
            continue
        name = names.get(param.name, param.name)
        with graph.inserting_after(value):
            made = whole_of[value] = graph.call_function(
                GATHER_ROWS, (value, *_how(parts[param]), f"gradient of {name}")
            )
        made.meta["example_value"] = value.meta["example_value"].detach().clone()
        value.replace_all_uses_with(made, delete_user_cb=lambda user, made=made: user is not made)
    for node in list(graph.nodes):
        if node.target is _torch.optimizer_step:
            for param, read in zip(node.args[1], node.args[2], strict=True):
                if param in parts and read.args[0] not in local:
                    _cut(graph, read, parts[param], names.get(param.name, param.name), set(whole_of.values()))


def _how(shard: Shard) -> tuple[str, int, int, int]:
    return shard.group, shard.ranks, shard.rank, shard.rows


def _gradients(graph: Graph, parts: Mapping[Node, Shard], names: Mapping[str, str]) -> dict[Node, Node]:
    """What holds this rank's rows of a gradient, by parameter: results of backward, and their sums."""
    owner: dict[Node, Node] = {}
    for call in _torch.gradient_calls(graph):
        inputs = gradients.inputs_of(call)
        taken = [param for param in inputs if param in parts]
        if taken and not gradients.is_backward(call):
            name = names.get(taken[0].name, taken[0].name)
            found = (
                f"a gradient of {name}, of which each rank has its own rows, is taken by torch.autograd.grad"
            )
            hint = "call backward(), which leaves the mean over the ranks in .grad"
            raise CaptureError(found, where=innermost(call), hint=hint)
        for item in call.users:
            position = item.args[1] if item.target is operator.getitem else None
            if isinstance(position, int) and inputs[position] in parts:
                owner[item] = inputs[position]
    for node in graph.nodes:
        if node.target is MARK and node.args[1] == GRAD and node.args[0] in owner:
            owner[node] = owner[node.args[0]]
        elif node.target is torch.add and len(node.args) == 2 and not node.kwargs:
            first, second = (owner.get(value) if isinstance(value, Node) else None for value in node.args)
            if first is not None and first is second:
                owner[node] = first
    return owner


def _local(graph: Graph, owner: Mapping[Node, Node]) -> set[Node]:
    """Of those, what nothing reads but optimizers and sums that are read by nothing else either."""
    local = {value for value in owner if value.target is not operator.getitem}
    reads = set(_reads(graph))
    while True:
        seen = {v for v in local if any(user not in local and user not in reads for user in v.users)}
        seen |= {v for v in local if v.target is torch.add and not local.issuperset(v.args)}
        if not seen:
            return local
        local -= seen


def _reads(graph: Graph) -> Iterator[Node]:
    for node in graph.nodes:
        if node.target is _torch.optimizer_step:
            yield from node.args[2]


def _cut(graph: Graph, read: Node, shard: Shard, name: str, made: set[Node]) -> None:
    """Let an optimizer read this rank's rows of a gradient that the user's code has edited."""
    value = read.args[0]
    assert isinstance(value, Node)
    if made.isdisjoint(_behind(value)):
        found = (
            f"{name}, of which each rank has its own rows, is given a gradient that is no mean over the ranks"
        )
        hint = "call backward(), and edit the gradient that it leaves in .grad"
        raise CaptureError(found, where=innermost(value), hint=hint)
    with graph.inserting_before(read):
        rows = graph.call_function(torch.narrow, (value, 0, shard.start, shard.own))
    rows.meta["example_value"] = value.meta["example_value"]
    read.replace_input_with(value, rows)


def _behind(value: Node) -> set[Node]:
    nodes = {value}
    stack = [value]
    while stack:
        for node in stack.pop().all_input_nodes:
            if node not in nodes:
                nodes.add(node)
                stack.append(node)
    return nodes
