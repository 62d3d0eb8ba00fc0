"""Numbers that the host only reads: ``loss.item()`` is a tensor of the graph until the step is over.

Dynamo makes a symbolic number of ``.item()``, and a call of the graph would wait
for the device in its middle. What is computed from such a number alone (an
average, a perplexity) is computed here with 0-d tensors of Python's precision,
float64 and int64, and becomes a number again when the graph has run.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import has_free_unbacked_symbols

from .numbers import is_symbolic

_KINDS: dict[type, torch.dtype] = {
    torch.SymFloat: torch.float64,
    torch.SymInt: torch.int64,
    torch.SymBool: torch.bool,
}
_SAME = (
    *(
        operator.add,
        operator.sub,
        operator.mul,
        operator.truediv,
        operator.floordiv,
        operator.mod,
        operator.pow,
    ),
    *(operator.neg, operator.pos, abs, operator.lt, operator.le, operator.gt, operator.ge, operator.eq),
    operator.ne,
)
# What Dynamo calls on symbolic numbers, and the same on tensors.
_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    **{function: function for function in _SAME},
    torch.sym_float: lambda x: x,
    torch.sym_int: torch.trunc,
    torch.sym_max: torch.maximum,
    torch.sym_min: torch.minimum,
    torch.sym_not: torch.logical_not,
    torch.sym_ite: lambda condition, a, b: torch.where(condition.bool(), a, b),
}


def read_afterwards(graph: Graph) -> set[int]:
    """Compute numbers that are only read as tensors; returns the outputs that are to be Python numbers."""
    made: dict[Node, Node] = {}
    _drop_bounds_of_booleans(graph)
    for node in list(graph.nodes):
        kind = _KINDS.get(type(node.meta.get("example_value")))
        if kind is not None and (function := _as_tensors(node, made)) is not None:
            made[node] = _insert(graph, node, function, kind, made)
        elif node.target is torch.scalar_tensor and node.args[0] in made:
            with graph.inserting_before(node):
                dtype = node.kwargs.get("dtype") or node.meta["example_value"].dtype
                value = graph.call_method("to", (made[node.args[0]], dtype))
            value.meta.update(node.meta)
            node.replace_all_uses_with(value)
            graph.erase_node(node)
    numbers = _hand_out(graph, made)
    for node in reversed(graph.nodes):
        if (node in made or node in made.values()) and not node.users:
            graph.erase_node(node)
    return numbers


def _drop_bounds_of_booleans(graph: Graph) -> None:
    """A boolean that is read is 0 or 1: Dynamo's assertions of that would read it in the middle."""
    for node in list(graph.nodes):
        if node.target is torch.ops.aten._assert_scalar.default and isinstance(node.args[0], Node):
            (bounded, *_) = node.args[0].all_input_nodes or [node]
            if bounded.target is torch.sym_ite and not node.users:
                graph.erase_node(node)


def _as_tensors(node: Node, made: dict[Node, Node]) -> Callable[..., Any] | None:
    """The function of tensors that computes what ``node`` does of numbers read before, if there is one."""
    if _is_input(node):
        return None  # AOTAutograd's to follow, which takes a float that it finds nowhere for a constant
    if node.op == "call_method" and node.target == "item":
        return lambda tensor: tensor.detach().reshape(())
    if node.op == "call_method" and node.target == "__round__":
        function = _round
    else:
        function = _FUNCTIONS.get(node.target) or (
            _unary(node.target) if node.op == "call_function" else None
        )
    known = all(n in made or n.op == "placeholder" or _is_input(n) for n in node.all_input_nodes)
    return function if known and any(n in made for n in node.all_input_nodes) else None


def _is_input(node: Node) -> bool:
    """Whether the node is a float that the step gets from Python, as Dynamo reads it."""
    reads = node.op == "call_method" and node.target == "item"
    return reads and is_symbolic(node) and not has_free_unbacked_symbols(node.meta["example_value"])


def _unary(target: Any) -> Callable[..., Any] | None:
    """``torch.sqrt`` for ``torch._sym_sqrt``, which is what Dynamo calls for ``math.sqrt``."""
    name = getattr(target, "__name__", "")
    return getattr(torch, name.removeprefix("_sym_"), None) if name.startswith("_sym_") else None


def _round(number: torch.Tensor, digits: int = 0) -> torch.Tensor:
    return torch.round(number, decimals=digits)


def _insert(
    graph: Graph, node: Node, function: Callable[..., Any], kind: torch.dtype, made: dict[Node, Node]
) -> Node:
    arguments = [made.get(a, a) if isinstance(a, Node) else a for a in node.args]
    reads = node.op == "call_method" and node.target == "item"
    as_floats = kind is torch.float64 or any(
        isinstance(a, float) or isinstance(getattr(a, "meta", {}).get("example_value"), torch.SymFloat)
        for a in node.args
    )

    def compute(*values: Any) -> Any:
        if reads:
            return function(values[0]).to(kind)
        device = next(v.device for v in values if isinstance(v, torch.Tensor))
        one = torch.ones((), dtype=torch.float64 if as_floats else torch.int64, device=device)
        digits = function is _round  # the second argument is no operand
        operands = [v if digits and i else v * one for i, v in enumerate(values)]
        return function(*operands).to(kind)

    with graph.inserting_before(node):
        inserted = graph.call_function(compute, tuple(arguments))
    inserted.meta.update({k: v for k, v in node.meta.items() if k in ("custom", "stack_trace")})
    return inserted


def _hand_out(graph: Graph, made: dict[Node, Node]) -> set[int]:
    output = next(n for n in reversed(graph.nodes) if n.op == "output")
    (values,) = output.args
    numbers = {i for i, v in enumerate(values) if v in made}  # type: ignore[union-attr]
    output.args = (tuple(made.get(v, v) for v in values),)  # type: ignore[union-attr]
    return numbers
