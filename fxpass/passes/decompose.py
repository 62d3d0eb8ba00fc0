"""Split normalisations, softmax and dropout of forward into their parts."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from .. import _torch
from ..analysis.nodes import is_cast
from ..analysis.policy import op_name
from ..ir.alias import is_view, layout_is_read, lie_alike
from ..ir.edit import Editor
from ..ir.graph import Phase, StepGraph, is_float, phase, source, tensor
from ..ir.marks import SEED
from .graph_pass import GraphPass

aten = torch.ops.aten

SPLIT = frozenset(
    "native_layer_norm native_group_norm _fused_rms_norm _log_softmax _softmax native_batch_norm "
    "_native_batch_norm_legit _native_batch_norm_legit_functional _batch_norm_with_update_functional "
    "cudnn_batch_norm".split()
)


@dataclass(frozen=True)
class Decompose(GraphPass):
    """Split normalisations, softmax and dropout of forward, so that backward can keep the small part.

    A layer norm is two statistics per row and a formula per element: once it is
    split, the recompute pass can keep the statistics and repeat the formula.
    The parts are those Inductor would split it into later. Precision has been
    decided before: the policy knows the whole operators. Statistics are float32,
    as the kernels return them; the decompositions would round them on CPU, where
    1 / sqrt(variance + 1e-12) may not fit into float16.
    """

    name: ClassVar[str] = "decompose"

    def run(self, step: StepGraph, edit: Editor) -> None:
        if not step.marks(SEED):
            edit.decline("no backward")
            return
        for node in list(step.nodes()):
            if phase(node) is not Phase.FORWARD:
                continue
            name = op_name(node.target)
            if name in SPLIT:
                self._split(edit, node, f"the parts of {name}")
            elif node.target is aten.native_dropout.default:
                _split_dropout(edit, node)

    def _split(self, edit: Editor, node: Node, reason: str) -> None:
        body = _torch.decomposition(node)
        if layout_is_read(node) and not _lies_as_whole(body, node):
            return  # the parts keep the input's strides, the whole has its own
        _keep_statistics(body)
        statistics = [user for user in node.users if user.target is operator.getitem and user.args[1] != 0]
        readers = [reader for result in statistics for reader in result.users]
        edit.expand(node, body, reason=reason)
        for reader in readers:  # which may have been told that a statistic is rounded
            if is_view(reader):
                edit.refresh(reader)
                readers += reader.users
            elif is_cast(reader, torch.float32) and tensor(source(reader)).dtype is torch.float32:
                edit.replace_uses(reader, source(reader))
                edit.erase(reader)


def _lies_as_whole(body: GraphModule, node: Node) -> bool:
    results = [n.meta["val"] for n in body.graph.output_node().all_input_nodes]
    wholes = node.meta["val"] if isinstance(node.meta["val"], (tuple, list)) else [node.meta["val"]]
    return all(lie_alike(part, whole) for part, whole in zip(results[:1], wholes, strict=False))


def _keep_statistics(body: GraphModule) -> None:
    """Let the results behind the first, a norm's statistics, leave without being rounded."""
    output = next(n for n in reversed(body.graph.nodes) if n.op == "output")
    results = output.args[0] if isinstance(output.args[0], (tuple, list)) else ()
    for result in results[1:]:
        while isinstance(result, Node) and is_view(result):
            result = result.args[0]
        if isinstance(result, Node) and result.target is torch.ops.prims.convert_element_type.default:
            wide = source(result)
            if tensor(wide).dtype is torch.float32 and is_float(result):
                result.replace_all_uses_with(wide)


def _split_dropout(edit: Editor, node: Node) -> None:
    """``native_dropout``'s value as a product with its mask: the mask is random, the product is not."""
    x, p, train = node.args
    values = {u.args[1]: u for u in node.users}
    if 0 not in values or 1 not in values or train is False or not isinstance(p, float) or p >= 1.0:
        return
    value, mask = values[0], values[1]
    if value < mask:  # in the order of the graph
        value.prepend(mask)
    with edit.after(value):
        kept = edit.call(aten.mul.Tensor, x, mask, when=Phase.FORWARD, reason="dropout by its mask")
        scaled = edit.call(
            aten.mul.Tensor, kept, 1.0 / (1.0 - p), when=Phase.FORWARD, reason="dropout by its mask"
        )
    edit.replace_uses(value, scaled)
    edit.erase(value)
