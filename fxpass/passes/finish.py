"""Erase the marks: what is left is an ordinary ATen graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import guard_or_false

from ..ir.alias import input_storages
from ..ir.edit import Editor
from ..ir.graph import StepGraph, phase, source, tensor
from ..ir.marks import MARK
from .graph_pass import GraphPass

aten = torch.ops.aten


@dataclass(frozen=True)
class Finish(GraphPass):
    """Replace every mark by its value and drop what is then dead.

    Functionalisation writes an in-place update as ``copy(old, new)``; where
    both have one dtype and shape that is ``new``, unless the step writes over it
    later: a target that becomes what a weight was. A tensor that the step writes
    down stays behind its ``lift_fresh_copy``, which alone takes real data among fake values.
    """

    name: ClassVar[str] = "finish"

    def run(self, step: StepGraph, edit: Editor) -> None:
        lies = input_storages(step.graph)
        written = {source(n) for n in step.graph.nodes if n.target is aten.copy_.default}
        for node in list(step.graph.nodes):
            if node.target is MARK or node.target is aten.detach.default:
                _replace(edit, node, node.args[0])
            elif node.target is aten.copy.default and _same(node.args[0], node.args[1]):
                value = source(node, 1)
                if not written.isdisjoint(lies.get(value, ())):
                    with edit.before(node):
                        reason = "the step writes over what is copied here"
                        value = edit.call(aten.clone.default, value, when=phase(node), reason=reason)
                _replace(edit, node, value)
        before = len(step.graph.nodes)
        step.graph.eliminate_dead_code(
            is_impure_node=lambda n: n.op in ("placeholder", "output") or _writes(n)
        )
        edit.removed += before - len(step.graph.nodes)
        edit.touched.clear()


def _replace(edit: Editor, node: Node, value: object) -> None:
    edit.replace_uses(node, value)
    edit.erase(node)


def _same(a: object, b: object) -> bool:
    if not (isinstance(a, Node) and isinstance(b, Node)):
        return False
    x, y = tensor(a), tensor(b)
    if x.dtype != y.dtype or x.device != y.device or x.ndim != y.ndim:
        return False
    sizes = zip((*x.shape, *x.stride()), (*y.shape, *y.stride()), strict=True)
    return all(guard_or_false(a == b) for a, b in sizes)


def _writes(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is None or schema.is_mutable or node.is_impure()
