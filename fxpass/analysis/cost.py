"""What it costs to compute a node again, and whether it may be."""

from __future__ import annotations

import torch
from torch.fx import Node
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

from ..ir.alias import is_view
from .nodes import nbytes, size_hint
from .policy import op_name

# Only the ratio matters: how many floating point operations take as long as moving one byte.
# 50 to 150 on GPUs (an H100 does 990e12/s in float16 and moves 3.35e12 bytes/s), about 10 on a CPU core.
FLOPS_PER_BYTE = 100.0
BYTES_PER_SECOND = 1e12

# Elementwise, or cheap to read again, though torch does not tag them so.
_POINTWISE = frozenset("convert_element_type _to_copy clone embedding full scalar_tensor arange iota".split())
# Deterministic, but drawn or counted by the library: their results are kept.
_KEPT = frozenset("_cudnn_rnn mkldnn_rnn_layer _thnn_fused_lstm_cell _thnn_fused_gru_cell packed_rnn".split())


def is_pointwise(node: Node) -> bool:
    """Whether each element of the result is a formula of elements of the inputs."""
    tags = getattr(node.target, "tags", ())
    return is_deterministic(node) and (torch.Tag.pointwise in tags or op_name(node.target) in _POINTWISE)


def is_deterministic(node: Node) -> bool:
    """Whether a second run of the node gives the same bits: no random numbers, nothing written."""
    target = node.target
    if op_name(target) == "getitem":
        return True
    if not isinstance(target, torch._ops.OpOverload) or target.namespace not in ("aten", "prims", "fxpass"):
        return False
    random = torch.Tag.nondeterministic_seeded in target.tags
    return not random and not target._schema.is_mutable and op_name(target) not in _KEPT


def seconds(node: Node) -> float:
    """A rough time of one run of ``node``, on a nominal machine: memory traffic plus arithmetic."""
    if is_view(node):
        return 0.0
    traffic = nbytes(node) + sum(map(nbytes, node.all_input_nodes))
    return (traffic + flops(node) / FLOPS_PER_BYTE) / BYTES_PER_SECOND


def flops(node: Node) -> float:
    """Floating point operations of a matrix product, convolution or attention; 0 for all else."""
    count = flop_registry.get(getattr(node.target, "overloadpacket", None))
    if count is None:
        return 0.0
    values = tree_map_only(Node, lambda n: n.meta["val"], (node.args, node.kwargs))
    return float(size_hint(count(*values[0], **values[1], out_val=node.meta["val"])))
