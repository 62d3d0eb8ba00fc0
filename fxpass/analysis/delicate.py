"""Forward arithmetic that low precision would make singular."""

from __future__ import annotations

import torch
from torch.fx import Node

from ..ir.graph import Phase, StepGraph, is_float, phase
from .policy import LOGARITHMS, POINTWISE_HIGH, VIEWS, Colour, colour_of, has_number_lost, op_name


def delicate(step: StepGraph, low: torch.dtype) -> set[Node]:
    """Sums and bounds whose small number ``low`` loses, logarithms, and the arithmetic both are made from.

    In ``log(sigmoid(z) + 1e-8)`` neither the sum nor the sigmoid may be rounded
    to float16: the first would be log(0), and where the second is 0 its gradient
    of 1e8 times the scale would not fit. The arithmetic ends at products,
    normalisations and whatever runs in float32 already.
    """
    nodes: set[Node] = set()
    pending: list[Node] = []
    for node in step.nodes():
        if phase(node) is not Phase.FORWARD:
            continue
        if op_name(node.target) in LOGARITHMS:
            pending.append(node)
        elif _follows(node) and op_name(node.target) not in ("mul", "div") and has_number_lost(node, low):
            nodes.add(node)
            pending.append(node)
        elif _is_square(node) and all(colour_of(user.target) is Colour.HIGH for user in node.users):
            nodes.add(node)
    while pending:
        for value in pending.pop().all_input_nodes:
            if value not in nodes and _follows(value):
                nodes.add(value)
                pending.append(value)
    return {n for n in nodes if op_name(n.target) not in VIEWS}


def _follows(node: Node) -> bool:
    if node.op != "call_function" or phase(node) is not Phase.FORWARD or not is_float(node):
        return False
    name = op_name(node.target)
    follows = colour_of(node.target) in (Colour.FOLLOW, Colour.WIDEST) or name in POINTWISE_HIGH
    return follows and name not in ("embedding", "_to_copy")


def _is_square(node: Node) -> bool:
    """Whether a value is multiplied by itself: half of float16's range is not enough for a sum of these."""
    first, *others = node.args
    return op_name(node.target) in ("square", "mul") and is_float(first) and all(o is first for o in others)
