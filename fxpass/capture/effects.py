"""Operators without a result: assertions, checks of linear algebra, prints.

AOTAutograd threads a token through those whose order matters. Here the graph
is run in its order, so the token says nothing: the operator alone stays, as a
node whose value is None.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from ..errors import CaptureError
from ..ir.provenance import innermost

_TOKENS = (torch.ops.prims._make_token.default, torch.ops.prims._sink_tokens.default)


def drop_tokens(graph: Graph) -> None:
    """Call each operator with an effect as itself, and give every node a value."""
    for node in list(graph.nodes):
        if node.target is torch.ops.higher_order.with_effects:
            _call_alone(graph, node)
    for node in reversed(list(graph.nodes)):  # the last token is sunk, the first is made
        if node.target in _TOKENS:
            graph.erase_node(node)
    for node in graph.nodes:
        if node.op == "call_function":
            node.meta.setdefault("val", None)


def _call_alone(graph: Graph, node: Node) -> None:
    token, target, *args = node.args
    if not isinstance(target, torch._ops.OpOverload) or not isinstance(token, Node):
        hint = "call it outside of the compiled step"
        raise CaptureError(f"{target} has an effect", where=innermost(node), hint=hint)
    with graph.inserting_before(node):
        call = graph.call_function(target, tuple(args), node.kwargs)
    results: Any = node.meta["val"]
    call.meta = {**node.meta, "val": _alone(results[1:], len(target._schema.returns))}
    for user in list(node.users):
        index = user.args[1] if user.target is operator.getitem else None
        assert isinstance(index, int), f"{user} reads {node}"
        if index == 0:
            user.replace_all_uses_with(token)
        elif len(target._schema.returns) == 1:
            user.replace_all_uses_with(call)
        else:
            user.args = (call, index - 1)
            continue
        graph.erase_node(user)
    graph.erase_node(node)


def _alone(results: Any, count: int) -> Any:
    return results[0] if count == 1 else tuple(results) or None
