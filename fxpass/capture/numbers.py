"""Python numbers that change from call to call, as tensors of the graph.

A float that changed once is a symbolic float to Dynamo. AOTAutograd replaces
arithmetic between tensors and such floats by tensors, and makes a constant, with
a guard, of one that is used otherwise: every new value would compile the step
anew. Here what makes a tensor of a float is written as arithmetic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node


def spell_out_numbers(graph: Graph) -> None:
    """Write ``torch.full(size, x)`` and the like of a symbolic float as ``torch.ones(size) * x``.

    That is also how Dynamo hands a float back that the step has computed
    (``beta += 0.01``): as a 0-d tensor of it.
    """
    for node in list(graph.nodes):
        made = _MAKERS.get(node.target) if node.op == "call_function" else None
        number = node.args[made] if made is not None and len(node.args) > made else None
        if not isinstance(number, Node) or not is_symbolic(number):
            continue
        with graph.inserting_before(node):
            ones = _ones(graph, node)
            product = graph.call_function(torch.mul, (ones, number))
        product.meta.update(node.meta)
        node.replace_all_uses_with(product)
        graph.erase_node(node)


def as_tensor(before: Node, number: Node, device: torch.device) -> Node:
    """A symbolic float as a 0-d float64 tensor."""
    with before.graph.inserting_before(before):
        one = before.graph.call_function(torch.ones, ((),), {"dtype": torch.float64, "device": device})
        return before.graph.call_function(torch.mul, (one, number))


def is_symbolic(node: Node) -> bool:
    """Whether the node is a float that is not known while tracing."""
    return isinstance(node.meta.get("example_value"), torch.SymFloat)


# Functions that fill a tensor with a number, and the position of that argument.
_MAKERS: dict[Any, int] = {
    torch.scalar_tensor: 0,
    torch.tensor: 0,
    torch.full: 1,
    torch.full_like: 1,
}


def _ones(graph: Graph, node: Node) -> Node:
    """Ones of the dtype, shape and device of what ``node`` makes."""
    if node.target is torch.full_like:
        return graph.call_function(torch.ones_like, (node.args[0],), node.kwargs)
    value = node.meta["example_value"]
    size = node.args[0] if node.target is torch.full else ()
    kwargs = {key: v for key, v in node.kwargs.items() if key in ("device", "requires_grad", "pin_memory")}
    return graph.call_function(torch.ones, (size,), {"dtype": value.dtype, **kwargs})
