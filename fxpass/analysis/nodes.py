"""Questions about one node that passes ask."""

from __future__ import annotations

import torch
from torch.fx import Node

from ..ir.graph import is_float, source, tensor
from .policy import VIEWS, op_name

aten = torch.ops.aten
LARGE = 4096  # bytes


def is_cast(node: Node, dtype: torch.dtype) -> bool:
    """Whether the node does nothing but convert to ``dtype``."""
    return node.target is aten._to_copy.default and dict(node.kwargs) == {"dtype": dtype}


def has_double(node: Node) -> bool:
    """Whether an input of the node is float64."""
    values = (n.meta.get("val") for n in node.all_input_nodes)
    return any(isinstance(v, torch.Tensor) and v.dtype is torch.float64 for v in values)


def input_dtype(node: Node) -> torch.dtype:
    """The dtype of the activations a normalization reads."""
    assert isinstance(node.target, torch._ops.OpOverload), f"{node.target} has no schema"
    names = [a.name for a in node.target._schema.arguments]
    return tensor(source(node, names.index("X" if "X" in names else "input"))).dtype


def widened_from(value: Node) -> Node | None:
    """The float16 or bfloat16 tensor that ``value`` is an exact float32 copy of."""
    if value.target is not aten._to_copy.default or tensor(value).dtype is not torch.float32:
        return None
    narrow = source(value)
    same_device = tensor(narrow).device == tensor(value).device
    return narrow if is_float(narrow) and same_device else None


def nbytes(node: Node) -> int:
    """Bytes of a node's tensor; 0 for numbers and tuples, an estimate for symbolic sizes."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return 0
    return int(size_hint(value.numel())) * value.dtype.itemsize


def is_large(node: Node) -> bool:
    """Whether a tensor is worth a decision about memory; one of symbolic size may always become so."""
    value = node.meta.get("val")
    symbolic = isinstance(value, torch.Tensor) and isinstance(value.numel(), torch.SymInt)
    return symbolic or nbytes(node) >= LARGE


def is_small_table(grad: Node) -> bool:
    """Whether ``embedding_dense_backward`` writes a table that is small beside the activations it sums up."""
    rows, positions = grad.args[2], tensor(source(grad, 1)).numel()
    assert isinstance(rows, int | torch.SymInt)
    return size_hint(positions) * 4 > size_hint(rows)


def is_batch_sum(grad: Node) -> bool:
    """Whether a gradient is summed over a batch, as that of a bias or of a small table is."""
    while op_name(grad.target) in VIEWS:
        grad = source(grad)
    name = op_name(grad.target)
    return name == "sum" or (name == "embedding_dense_backward" and is_small_table(grad))


def size_hint(size: int | torch.SymInt) -> int:
    """A size as a number: for a symbolic one, that of the call being compiled."""
    if isinstance(size, torch.SymInt):
        hint = size.node.hint
        return 1 if hint is None else int(hint)
    return size
