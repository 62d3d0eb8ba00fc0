"""``Embedding(max_norm=...)``: the rows that a lookup is about to read are shortened first, in place.

torch does so behind autograd's back, on a detached weight, which AOTAutograd
does not take for an update. Spelled out under ``no_grad`` it is one.
"""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph

_SIGNATURES = {f: inspect.signature(f) for f in (F.embedding, F.embedding_bag)}


def spell_out_renorm(graph: Graph) -> None:
    """Shorten rows by an operator of its own before each lookup with ``max_norm``."""
    for node in list(graph.nodes):
        if node.target not in _SIGNATURES:
            continue
        given = _SIGNATURES[node.target].bind(*node.args, **node.kwargs)
        given.apply_defaults()
        limit, order = given.arguments["max_norm"], given.arguments["norm_type"]
        if limit is None:
            continue
        with graph.inserting_before(node):
            rows = given.arguments["input"], given.arguments["weight"]
            graph.call_function(_renormalize, (*rows, limit, order)).meta.update(node.meta)
        given.arguments["max_norm"] = None
        node.args, node.kwargs = given.args, given.kwargs


def _renormalize(ids: Tensor, weight: Tensor, limit: float, order: float) -> None:
    """``torch.embedding_renorm_``; a row that is read twice is written twice, with one value."""
    with torch.no_grad():
        flat = ids.reshape(-1)
        rows = weight[flat]
        norms = torch.linalg.vector_norm(rows, order, dim=1, keepdim=True)
        scale = torch.where(norms > limit, limit / (norms + 1e-7), 1.0)
        weight.index_put_((flat,), rows * scale)
