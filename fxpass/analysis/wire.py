"""What a step sends between ranks: bytes, when each transfer starts, and what runs until it is waited for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sympy
from torch import Tensor
from torch.fx import Node

from ..ir.dtypes import name_of
from ..ir.graph import Phase, StepGraph, phase, tensor
from .cost import flops
from .nodes import nbytes
from .policy import op_name

RANKS = sympy.Symbol("N", integer=True, positive=True)
_WAIT = "wait_tensor"
# Bytes that one rank sends for each byte of the result, by ring algorithms, which use the wire least:
# Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms for clusters of workstations (2009).
_SENT: Mapping[str, sympy.Expr] = {
    "all_reduce": 2 * (RANKS - 1) / RANKS,
    "reduce_scatter_tensor": RANKS - 1,
    "reduce_scatter_tensor_coalesced": RANKS - 1,
    "all_gather_into_tensor": (RANKS - 1) / RANKS,
    "all_gather_into_tensor_coalesced": (RANKS - 1) / RANKS,
    "all_to_all_single": (RANKS - 1) / RANKS,
    "broadcast": sympy.Integer(1),
}


@dataclass(frozen=True)
class Transfer:
    """One collective of the step."""

    node: str
    operator: str  # all_reduce, broadcast, ...
    phase: str
    dtype: str
    bytes: int  # of its result
    formula: str  # bytes that one rank sends, among N
    sent: int  # the same among the ranks of this step
    products: int  # matrix products and convolutions that run between its start and its wait
    early: bool  # it starts before the last of them in the backward


def transfers(step: StepGraph, ranks: int) -> tuple[Transfer, ...]:
    """The collectives of ``step``, in the order in which they start."""
    at = {node: index for index, node in enumerate(step.graph.nodes)}
    products = {index: phase(node) for node, index in at.items() if flops(node)}
    last = max((index for index, of in products.items() if of is Phase.BACKWARD), default=-1)
    collectives = []
    for node, start in at.items():
        if getattr(node.target, "namespace", "") != "_c10d_functional" or op_name(node.target) == _WAIT:
            continue
        parts = _results(node)
        waits = [at[user] for part in parts for user in part.users if op_name(user.target) == _WAIT]
        during = range(start, min(waits, default=start))
        size = sum(map(nbytes, parts))
        sent = _SENT.get(op_name(node.target), sympy.Integer(1)) * size
        collectives.append(
            Transfer(
                node=node.name,
                operator=op_name(node.target),
                phase=phase(node).value,
                dtype=name_of(tensor(parts[0]).dtype),
                bytes=size,
                formula=str(sympy.factor(sent)),
                sent=int(sent.subs(RANKS, ranks)),
                products=sum(index in during for index in products),
                early=start < last,
            )
        )
    return tuple(collectives)


def _results(node: Node) -> list[Node]:
    """What a collective gives: itself, or each result of one for several tensors."""
    return [node] if isinstance(node.meta.get("val"), Tensor) else list(node.users)
