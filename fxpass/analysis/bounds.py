"""How large a size that depends on data can be, in sizes that do not.

``nonzero`` and what is built on it finds at most as many elements as it looks
at; a slice is at most as long as what it is cut from. A size that is a value
(``item()``, the repeats of ``repeat_interleave``) has the bound torch knows, if any.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from ..ir.alias import is_view
from ..ir.graph import StepGraph
from ..ir.sizes import expression, numel, product
from ..ir.unbacked import SIZES
from .policy import op_name

_BY_VALUE = frozenset(("repeat_interleave", "bincount"))  # how large their values are, not how many


@dataclass(frozen=True)
class Bound:
    """``symbol`` is at most ``size``, because of the node called ``node``."""

    symbol: sympy.Symbol
    size: sympy.Expr
    node: str


def bounds(step: StepGraph) -> tuple[Bound, ...]:
    """The bounds of the sizes that the graph makes from data, in the order in which it makes them."""
    return tuple(_bounds(step))


def at_most(size: sympy.Expr, known: Mapping[sympy.Symbol, sympy.Expr]) -> sympy.Expr:
    """``size`` with every bounded symbol at its bound; the bounds themselves may be in earlier symbols."""
    while bounded := {symbol: limit for symbol, limit in known.items() if symbol in size.free_symbols}:
        size = size.subs([*bounded.items()])
    return size


def _bounds(step: StepGraph) -> Iterator[Bound]:
    seen: set[sympy.Symbol] = set()
    for node in step.nodes():
        for symbol in node.meta.get(SIZES) or {}:
            size = None if symbol in seen else _bound(node, symbol)
            seen.add(symbol)
            if size is not None and symbol not in size.free_symbols:
                yield Bound(symbol, size, node.name)


def _bound(node: Node, symbol: sympy.Symbol) -> sympy.Expr | None:
    read = [v for n in node.all_input_nodes if isinstance(v := n.meta.get("val"), Tensor)]
    masks = [v for v in read if v.dtype in (torch.bool, torch.uint8)]
    tags = node.target.tags if isinstance(node.target, torch._ops.OpOverload) else ()
    if torch.Tag.dynamic_output_shape in tags and op_name(node.target) not in _BY_VALUE and read:
        if op_name(node.target) == "masked_select":
            return product(torch.broadcast_shapes(*(v.shape for v in read)))
        counts = [numel(v) for v in (masks if op_name(node.target) == "index" else read[:1])]
        return sympy.Max(*counts) if counts else None
    if is_view(node) and read:
        return sympy.Max(*map(expression, read[0].shape))
    return _known_to_torch(node, symbol)


def _known_to_torch(node: Node, symbol: sympy.Symbol) -> sympy.Expr | None:
    values = [node.meta.get("val"), *(n.meta.get("val") for n in node.all_input_nodes)]
    modes = (getattr(v, "fake_mode", None) for v in values)
    mode = next((m for m in modes if m is not None), None)
    limits = getattr(getattr(mode, "shape_env", None), "var_to_range", {})
    upper = limits[symbol].upper if symbol in limits else sympy.oo
    return upper if upper.is_Integer and upper < sys.maxsize // 2 else None
