"""Weights gathered where they are read, gradients reduced to this rank's rows: in buckets."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from ..analysis.modules import nodes_kept
from ..analysis.nodes import nbytes
from ..ir.alias import is_view
from ..ir.edit import Editor
from ..ir.graph import Phase, StepGraph, phase, source, tensor
from ..ir.shards import AVERAGE_ROWS, GATHER_ROWS
from .graph_pass import GraphPass
from .results import Reductions

aten = torch.ops.aten
collectives: Any = torch.ops._c10d_functional
GATHERED = "the whole weight, where it is read"
REDUCED = "this rank's rows of the mean over the ranks"
_MB = 2**20


@dataclass(frozen=True)
class Shard(GraphPass):
    """Put collectives in the place of what capture has written for parameters of ``fxpass.shard_``.

    A weight is gathered before its use in forward and again before that in backward, and lives in
    neither between: behind its cast, in low precision. Weights are gathered in buckets of one dtype, at
    most ``bucket_mb`` MiB each and a tenth of all where that is more than 1 MiB, in the order of their
    use; each is started before the first use of the one before it. Gradients are multiplied by 1 / N and
    reduce-scattered in buckets in the order of their birth, each waited for when the next is started.

    ``reduce_dtype`` is what is summed and sent: None for the gradient's own, or float32.
    """

    name: ClassVar[str] = "shard"
    ensures: ClassVar = (Reductions,)
    dtype: torch.dtype = torch.float16
    keep_fp32: tuple[str, ...] = ()
    bucket_mb: float = 25.0
    reduce_dtype: torch.dtype | None = None

    def run(self, step: StepGraph, edit: Editor) -> None:
        if not step.shards:
            edit.decline("no parameter of fxpass.shard_")
            return
        _drop_unread(step, edit)
        self._gather_low_tables(step, edit)
        _gather_again(step, edit)
        segments = _segments(step)
        gathers = [node for node in step.graph.nodes if node.target is GATHER_ROWS]
        means = [node for node in step.graph.nodes if node.target is AVERAGE_ROWS]
        for group in _by(gathers, lambda node: (segments[node], tensor(node).dtype)):
            _Gathers(self, step, edit).run(group)
        for group in _by(means, lambda node: (segments[node], tensor(node).dtype)):
            _Means(self, step, edit).run(group)
        _drop_unread(step, edit)

    def _gather_low_tables(self, step: StepGraph, edit: Editor) -> None:
        """Send a table in low precision, of which only rows are read: they are widened there."""
        kept = nodes_kept(step, self.keep_fp32)
        for gather in [n for n in step.graph.nodes if n.target is GATHER_ROWS]:
            readers = list(gather.users)
            low = self.dtype is not torch.float32 and tensor(gather).dtype is torch.float32
            if not low or any(n.target is not aten.embedding.default or n in kept for n in readers):
                continue
            with edit.before(gather):
                part = edit.cast(source(gather), self.dtype, when=phase(gather), reason=GATHERED)
            edit.set_arg(gather, 0, part)
            edit.refresh(gather)
            for node in readers:
                edit.refresh(node)
                with edit.after(node):
                    rows = edit.cast(
                        node, torch.float32, when=phase(node), reason="rows of a table, as stored"
                    )
                edit.replace_uses(node, rows, keep=lambda user, rows=rows: user is rows)


class _Buckets:
    """Collectives of one direction: of one dtype, in one forward or one backward."""

    reason: ClassVar[str]

    def __init__(self, settings: Shard, step: StepGraph, edit: Editor) -> None:
        self.settings, self.step, self.edit = settings, step, edit
        self.reduced = step.result(Reductions).buckets

    def split(self, nodes: list[Node], closes: Callable[[list[Node], Node], bool]) -> list[list[Node]]:
        """Runs of ``nodes``, none larger than a bucket unless it is a single one."""
        sizes = {node: max(nbytes(node), nbytes(source(node))) / _MB for node in nodes}
        largest = min(self.settings.bucket_mb, max(1.0, sum(sizes.values()) / 10))
        buckets: list[list[Node]] = []
        size = 0.0
        for node in nodes:
            if not buckets or size + sizes[node] > largest or closes(buckets[-1], node):
                buckets.append([])
                size = 0.0
            buckets[-1].append(node)
            size += sizes[node]
        return buckets

    def start(self, bucket: list[Node], values: list[Node], target: Any, *args: Any) -> list[Node]:
        """One collective for all of ``values``, at the insertion point; its results, not there yet."""
        when, reason = phase(bucket[0]), self.reason
        started = self.edit.call(target, values, *args, when=when, reason=reason)
        shapes = [tensor(node if node.target is GATHER_ROWS else source(node)).shape for node in bucket]
        names = zip((node.args[-1] for node in bucket), shapes, strict=True)
        self.reduced[started] = tuple(f"{name}{list(shape)}" for name, shape in names)
        return [
            self.edit.call(operator.getitem, started, i, when=when, reason=reason) for i in range(len(bucket))
        ]

    def order(self) -> dict[Node, int]:
        return {node: i for i, node in enumerate(self.step.graph.nodes)}


class _Gathers(_Buckets):
    reason = GATHERED

    def run(self, gathers: list[Node]) -> None:
        order = self.order()
        first = {node: min(node.users, key=order.__getitem__) for node in gathers}
        free = sorted((n for n in gathers if _is_stored(source(n))), key=lambda n: order[first[n]])
        buckets = self.split(free, lambda bucket, node: False)
        uses = [first[bucket[0]] for bucket in buckets]
        ahead = [uses[max(i - 1, 0)] for i in range(len(uses))]
        late = [node for node in gathers if not _is_stored(source(node))]  # as an update has left it
        buckets += [[node] for node in late]
        uses, ahead = uses + late, ahead + late
        started = [self._start(bucket, before) for bucket, before in zip(buckets, ahead, strict=True)]
        for bucket, results, before in zip(buckets, started, uses, strict=True):
            for node, result in zip(bucket, results, strict=True):
                self._finish(node, result, before)

    def _start(self, bucket: list[Node], before: Node) -> list[Node]:
        _, group, ranks, *_ = bucket[0].args
        with self.edit.before(before):
            parts = [self._padded(node) for node in bucket]
            return self.start(
                bucket, parts, collectives.all_gather_into_tensor_coalesced.default, ranks, group
            )

    def _padded(self, node: Node) -> Node:
        """What this rank sends: its rows, as many as every rank."""
        _, _, ranks, _, rows, _ = node.args
        part = _made_here(self.edit, source(node))
        lacking = -(-_int(rows) // _int(ranks)) - tensor(part).shape[0]
        return _pad(self.edit, part, lacking, phase(node), GATHERED)

    def _finish(self, node: Node, result: Node, before: Node) -> None:
        with self.edit.before(before):
            when = phase(node)
            value = self.edit.call(collectives.wait_tensor.default, result, when=when, reason=GATHERED)
            if tensor(value).shape[0] != _int(node.args[4]):
                value = self.edit.call(
                    aten.slice.Tensor, value, 0, 0, node.args[4], when=when, reason=GATHERED
                )
        self.edit.replace_uses(node, value)
        self.edit.erase(node)


class _Means(_Buckets):
    reason = REDUCED

    def run(self, means: list[Node]) -> None:
        order = self.order()
        read = {node: min(order[user] for user in node.users) for node in means}
        born = sorted(means, key=lambda node: order[source(node)])
        buckets = self.split(born, lambda bucket, node: order[source(node)] > min(read[n] for n in bucket))
        begins: list[Node] = []
        started = [self._start(bucket, begins) for bucket in buckets]
        order = self.order()
        for i, (bucket, results) in enumerate(zip(buckets, started, strict=True)):
            users = [user for node in bucket for user in node.users]
            following = begins[i + 1 : i + 2]
            before = min([*users, *following], key=order.__getitem__)
            for node, result in zip(bucket, results, strict=True):
                self._finish(node, result, before)

    def _start(self, bucket: list[Node], begins: list[Node]) -> list[Node]:
        """Start a bucket; its first node comes to ``begins``."""
        _, group, ranks, *_ = bucket[0].args
        before = len(self.edit.inserted)
        with self.edit.after(self.edit.last(map(source, bucket))):
            shares = [self._share(node) for node in bucket]
            begins.append(self.edit.inserted[before])
            scatter = collectives.reduce_scatter_tensor_coalesced.default
            return self.start(bucket, shares, scatter, "sum", ranks, group)

    def _share(self, node: Node) -> Node:
        """What this rank sends: its gradient's N-th part, before the sum, so that large ones stay finite."""
        grad, when = source(node), phase(node)
        ranks, rows = _int(node.args[2]), tensor(grad).shape[0]
        if self.settings.reduce_dtype is not None:
            grad = self.edit.cast(grad, self.settings.reduce_dtype, when=when, reason=REDUCED)
        share = self.edit.call(aten.mul.Tensor, grad, 1.0 / ranks, when=when, reason=REDUCED)
        share = _pad(self.edit, share, -(-rows // ranks) * ranks - rows, when, REDUCED)
        if not tensor(share).is_contiguous():
            kind: dict[str, Any] = {"memory_format": torch.contiguous_format}
            share = self.edit.call(aten.clone.default, share, when=when, reason="rows lie together", **kind)
        return share

    def _finish(self, node: Node, result: Node, before: Node) -> None:
        own, when = _int(node.args[4]), phase(node)
        with self.edit.before(before):
            value = self.edit.call(collectives.wait_tensor.default, result, when=when, reason=REDUCED)
            value = self.edit.cast(value, tensor(node).dtype, when=when, reason=REDUCED)
            if tensor(value).shape[0] != own:
                value = self.edit.call(aten.slice.Tensor, value, 0, 0, own, when=when, reason=REDUCED)
        self.edit.replace_uses(node, value)
        self.edit.erase(node)


def _int(value: object) -> int:
    assert isinstance(value, int), f"{value!r} is no size of a parameter"
    return value


def _by(nodes: Iterable[Node], key: Callable[[Node], Hashable]) -> Iterator[list[Node]]:
    groups: dict[Hashable, list[Node]] = {}
    for node in nodes:
        groups.setdefault(key(node), []).append(node)
    yield from groups.values()


def _pad(edit: Editor, value: Node, rows: int, when: Phase, reason: str) -> Node:
    """``value`` with ``rows`` more, of zeros."""
    if not rows:
        return value
    sides = [0, 0] * (tensor(value).ndim - 1) + [0, rows]
    return edit.call(aten.constant_pad_nd.default, value, sides, 0.0, when=when, reason=reason)


# ---------------------------------------------------------------- where weights are gathered


def _segments(step: StepGraph) -> dict[Node, int]:
    """By node, which forward or backward of the step it belongs to: a number."""
    segments: dict[Node, int] = {}
    number, last = 0, Phase.FORWARD
    for node in step.graph.nodes:
        if phase(node) in (Phase.FORWARD, Phase.BACKWARD) and phase(node) is not last:
            number, last = number + 1, phase(node)
        segments[node] = number
    return segments


def _is_stored(node: Node) -> bool:
    """Whether a value is an input as it is, or a cast of it: there from the start of the step on."""
    while node.target is aten._to_copy.default:
        node = source(node)
    return node.op == "placeholder"


def _made_here(edit: Editor, node: Node) -> Node:
    """``node``, made again at the insertion point if it is a cast of an input."""
    if node.op == "placeholder" or not _is_stored(node):
        return node
    return edit.copy(node, {source(node): _made_here(edit, source(node))}, when=phase(node), reason=GATHERED)


def _gather_again(step: StepGraph, edit: Editor) -> None:
    """Let each forward and each backward read gathers of its own."""
    segments = _segments(step)
    made: dict[Node, int] = {}  # gathers and views of them: the segment that may read them
    again: dict[tuple[Node, int], Node] = {}

    def copy(value: Node, segment: int, when: Phase) -> Node:
        if made.get(value, segment) == segment or (
            value.target is GATHER_ROWS and not _is_stored(source(value))
        ):
            return value
        if (value, segment) not in again:
            inner = source(value)
            copies = {inner: copy(inner, segment, when)} if inner in made else {}
            new = edit.copy(value, copies, when=when, reason=GATHERED)
            again[value, segment] = new
        return again[value, segment]

    for node in list(step.graph.nodes):
        reads = [value for value in node.all_input_nodes if value in made]
        for value in reads:
            if node.op == "call_function" and made[value] != segments[node]:
                with edit.before(node):
                    new = copy(value, segments[node], phase(node))
                if new is not value:
                    edit.read_instead(node, value, new)
        if node.target is GATHER_ROWS or (reads and is_view(node)):
            made[node] = segments[node]


def _drop_unread(step: StepGraph, edit: Editor) -> None:
    """Erase gathers, means, casts and views that nothing reads: a message is sent even if nobody looks."""
    for node in reversed(list(step.graph.nodes)):
        idle = node.target in (GATHER_ROWS, AVERAGE_ROWS, aten._to_copy.default) or (
            node.op == "call_function" and is_view(node)
        )
        if idle and not node.users:
            edit.erase(node)
