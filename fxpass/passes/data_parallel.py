"""The mean of gradients over the ranks of a process group, in buckets."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar

import torch
from torch.fx import Node

from ..ir.edit import Editor
from ..ir.graph import StepGraph, phase, source, tensor
from ..ir.marks import AVERAGE
from .base import GraphPass

aten = torch.ops.aten
collectives: Any = torch.ops._c10d_functional
REASON = "the mean over the ranks"
_MB = 2**20


@dataclass(frozen=True)
class DataParallel(GraphPass):
    """Average gradients over the ranks: all-reduces of buckets, started as they fill.

    A bucket takes gradients of one backward in the order in which the graph computes them, the same on
    every rank. Each is multiplied by 1 / N before the sum, so that two large finite ones stay finite.
    The all-reduce stands behind the last gradient of its bucket, the wait behind the backward. Until
    then a bucket is a second copy of its gradients: at most ``bucket_mb`` MiB each.

    ``reduce_dtype`` is what is summed and sent: None for the gradient's own, or float32.
    """

    name: ClassVar[str] = "data_parallel"
    bucket_mb: float = 25.0
    reduce_dtype: torch.dtype | None = None

    def run(self, step: StepGraph, edit: Editor) -> None:
        order = {node: i for i, node in enumerate(step.graph.nodes)}
        means = [node for node in step.graph.nodes if node.target is AVERAGE]
        for _, of_one in groupby(means, key=lambda n: n.args[1:]):
            for bucket in self._buckets(sorted(of_one, key=lambda n: order[source(n)])):
                self._reduce(edit, bucket)

    def _buckets(self, means: list[Node]) -> Iterator[list[Node]]:
        """Runs of equal dtype, each at most ``bucket_mb`` large or a single gradient."""
        bucket: list[Node] = []
        size = 0.0
        for node in means:
            value = tensor(node)
            more = value.numel() * value.element_size() / _MB
            if bucket and (size + more > self.bucket_mb or value.dtype != tensor(bucket[0]).dtype):
                yield bucket
                bucket, size = [], 0.0
            bucket.append(node)
            size += more
        if bucket:
            yield bucket

    def _reduce(self, edit: Editor, bucket: list[Node]) -> None:
        _, group, ranks, _ = bucket[0].args
        when, grads = phase(bucket[0]), [source(node) for node in bucket]
        assert isinstance(ranks, int)
        first = edit.first(bucket)
        assert first is not None

        def call(target: Any, *args: Any) -> Node:
            return edit.call(target, *args, when=when, reason=REASON)

        with edit.after(edit.last(grads)):
            flat = [call(aten.reshape.default, g, [-1]) for g in grads]
            filled = call(aten.cat.default, flat) if len(flat) > 1 else flat[0]
            if self.reduce_dtype is not None:
                filled = edit.cast(filled, self.reduce_dtype, when=when, reason=REASON)
            shares = call(aten.mul.Tensor, filled, 1.0 / ranks)
            started = call(collectives.all_reduce.default, shares, "sum", group)
        with edit.before(first):
            done = call(collectives.wait_tensor.default, started)
            done = edit.cast(done, tensor(first).dtype, when=when, reason=REASON)
            sizes = [tensor(node).numel() for node in bucket]
            parts = call(aten.split_with_sizes.default, done, sizes) if len(bucket) > 1 else None
            for i, node in enumerate(bucket):
                part = done if parts is None else call(operator.getitem, parts, i)
                mean = call(aten.view.default, part, list(tensor(node).shape))
                edit.replace_uses(node, mean)
                edit.erase(node)
