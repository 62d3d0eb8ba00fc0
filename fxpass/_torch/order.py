"""What is read before an input is overwritten is read before, in Inductor too.

In the graphs that Inductor knows inputs are written last. A step writes them
early, and what looks harmless then is not: dropping a clone whose value has the
layout of what it copies, or computing an expression of an input only when a
library call has written it. Written for torch 2.11 to 2.13.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch._inductor import ir
from torch._inductor.fx_passes import post_grad
from torch._inductor.virtualized import V
from torch.fx import Graph, Node

from ..ir.alias import input_storages, written


@contextmanager
def keep_old_values() -> Iterator[None]:
    """Compile inside with every read of an input before the write that the graph puts after it."""
    original, known = post_grad.same_meta, dict[Graph, set[Node]]()
    create = ir.FallbackKernel.create

    def same_meta(node: Node, source: Node) -> Any:
        if node.graph not in known:
            known[node.graph] = _overwritten(node.graph)
        return source not in known[node.graph] and original(node, source)

    def create_kernel(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        for value in _written_by(kernel, args):
            value.realize()
            V.graph.mark_buffer_mutated(value.get_name())  # now, not when the call is in its place
        return create(kernel, *args, **kwargs)

    with (
        mock.patch.object(post_grad, "same_meta", same_meta),
        mock.patch.object(ir.FallbackKernel, "create", create_kernel),
    ):
        yield


def _written_by(kernel: Any, args: Sequence[Any]) -> Iterator[Any]:
    """The tensors that a library call writes in place."""
    if isinstance(kernel, torch._ops.OpOverload) and kernel._schema.is_mutable:
        for argument, given in zip(kernel._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                values = given if isinstance(given, (list, tuple)) else (given,)
                yield from (v for v in values if isinstance(v, ir.TensorBox))


def _overwritten(graph: Graph) -> set[Node]:
    """The values that lie in an input which the graph writes."""
    lies = input_storages(graph)
    targets = {base for node in graph.nodes for target in written(node) for base in lies.get(target, ())}
    return {value for value, inputs in lies.items() if not targets.isdisjoint(inputs)}
