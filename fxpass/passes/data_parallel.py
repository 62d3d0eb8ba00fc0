"""The mean of gradients over the ranks of a process group, in buckets."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar

import torch
from torch.fx import Node

from ..analysis.nodes import nbytes
from ..ir.edit import Editor
from ..ir.graph import StepGraph, phase, source, tensor
from ..ir.marks import AVERAGE
from .graph_pass import GraphPass
from .results import Reductions

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
    then a bucket is a second copy of its gradients: at most ``bucket_mb`` MiB each, and a tenth of what
    is reduced where that is more than 1 MiB, so that most is on its way before the backward ends.

    ``reduce_dtype`` is what is summed and sent: None for the gradient's own, or float32.
    """

    name: ClassVar[str] = "data_parallel"
    ensures: ClassVar = (Reductions,)
    bucket_mb: float = 25.0
    reduce_dtype: torch.dtype | None = None

    def run(self, step: StepGraph, edit: Editor) -> None:
        order = {node: i for i, node in enumerate(step.graph.nodes)}
        means = [node for node in step.graph.nodes if node.target is AVERAGE]
        for _, of_one in groupby(means, key=lambda n: n.args[1:4]):
            born = sorted(of_one, key=lambda n: order[source(n)])
            for dtype in dict.fromkeys(tensor(n).dtype for n in born):
                for bucket in self._buckets([n for n in born if tensor(n).dtype == dtype], order):
                    self._reduce(edit, bucket, step.result(Reductions).buckets)

    def _buckets(self, means: list[Node], order: dict[Node, int]) -> Iterator[list[Node]]:
        """Runs of gradients of one dtype, each at most ``bucket_mb`` large or a single one.

        All gradients of a bucket are there before the first of their means is read.
        """
        bucket: list[Node] = []
        size, read = 0.0, len(order)
        sizes = [nbytes(node) / _MB for node in means]
        largest = min(self.bucket_mb, max(1.0, sum(sizes) / 10))
        for node, more in zip(means, sizes, strict=True):
            full = size + more > largest or order[source(node)] > read
            if bucket and full:
                yield bucket
                bucket, size, read = [], 0.0, len(order)
            bucket.append(node)
            size, read = size + more, min(read, *(order[user] for user in node.users))
        if bucket:
            yield bucket

    def _reduce(self, edit: Editor, bucket: list[Node], reduced: dict[Node, tuple[str, ...]]) -> None:
        _, group, ranks, *_ = bucket[0].args
        grads = [source(node) for node in bucket]
        when = phase(bucket[0])
        assert isinstance(ranks, int)
        first = edit.first(user for node in bucket for user in node.users)
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
            reduced[started] = tuple(f"{n.args[4]}{list(tensor(n).shape)}" for n in bucket)
        with edit.before(first):
            done = call(collectives.wait_tensor.default, started)
            done = edit.cast(done, tensor(bucket[0]).dtype, when=when, reason=REASON)
            sizes = [tensor(node).numel() for node in bucket]
            parts = call(aten.split_with_sizes.default, done, sizes) if len(bucket) > 1 else None
            for i, node in enumerate(bucket):
                part = done if parts is None else call(operator.getitem, parts, i)
                mean = call(aten.view.default, part, list(tensor(node).shape))
                edit.replace_uses(node, mean)
                edit.erase(node)
