"""One finite check over every gradient the optimizers read, on the values as stored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from ..analysis.updates import gradients_before, gradients_behind
from ..ir.alias import is_view
from ..ir.edit import Editor
from ..ir.graph import Phase, Read, StepGraph, is_float, phase, seed_losses, source, tensor
from ..ir.marks import GRAD, MARK, SEED
from .across import across
from .graph_pass import GraphPass
from .results import Checked, Unscaled

aten = torch.ops.aten
SMALLEST_NORMAL = torch.finfo(torch.float16).smallest_normal
SAMPLED = 2**16  # from this many elements on, underflow is counted in one row of
SAMPLE_STRIDE = 17  # this many: no power of two, as the sizes of heads are


@dataclass(frozen=True)
class CheckFinite(GraphPass):
    """Reduce each gradient once, as it leaves backward, to what the later passes need of it.

    Its largest magnitude is inf or nan exactly when an element is: the verdict.
    Its sum of squares makes the global norm: in float32 for a float16 gradient
    (65504**2 times 1e28 elements still fits), in float64 for the others. Both
    are one loop over the gradient. Of a float16 gradient, elements below the
    normal numbers (underflow) are counted, in a sample of its rows if it is large.

    A gradient that the user's code changes on its way to the optimizer is
    looked at as the optimizer reads it: an inf that an edit removes is none. But
    where float16 and a scale above 1 may have made it, of a finite loss, eager
    would have had nothing to remove: then the value as stored counts too.

    The verdict of an optimizer is over the gradients of all optimizers that
    stepped up to the same backward.
    """

    name: ClassVar[str] = "check_finite"
    uses: ClassVar = (Unscaled,)
    ensures: ClassVar = (Checked,)

    def run(self, step: StepGraph, edit: Editor) -> None:
        if not step.trains:
            edit.decline("no optimizer step")
            return
        checked = step.result(Checked)
        checked.sources = {read.mark: set(gradients_behind({read.mark})) for read in step.reads}
        before = {read: gradients_before(marks) for read, marks in checked.sources.items()}
        read_by_any = set[Node]().union(*checked.sources.values(), *before.values())
        born = _born(step)
        for mark in step.marks(GRAD):
            if mark in read_by_any and tensor(mark).numel() != 0:
                self._reduce(checked, edit, mark)
        _reduce_across(step, edit, checked)
        checked.gradients = sorted(checked.largest, key=born.__getitem__)
        self._decide(step, edit, checked, before)

    def _decide(self, step: StepGraph, edit: Editor, checked: Checked, before: dict[Node, set[Node]]) -> None:
        """Combine what was reduced to one verdict per optimizer.

        ``before``: gradients that a read depends on by way of a later forward, which may hide their overflow.
        """
        stored: dict[Node, list[Node]] = {}
        edited: dict[Node, list[Node]] = {}
        suspects = _Suspects(step, edit, checked)
        order = {mark: number for number, mark in enumerate(checked.largest)}
        for read, marks in checked.sources.items():
            ordered = sorted(marks & order.keys(), key=order.__getitem__)
            if _is_edited(read, step.result(Unscaled)):
                stored[read] = [value for mark in ordered if (value := suspects.of(mark)) is not None]
                edited[read] = [_largest(edit, read)]
            else:
                stored[read] = [checked.largest[mark] for mark in ordered]
            earlier = [mark for mark in step.gradients if mark in before[read] and mark in checked.largest]
            stored[read] += [value for mark in earlier if (value := suspects.of(mark)) is not None]
        _look_across(step, edit, edited)
        checked.deciding = {read: stored[read] + edited.get(read, []) for read in checked.sources}
        event_of = {read.mark: read.event for read in step.reads}
        verdicts: dict[tuple[Node, ...], Node] = {}
        for event, backwards in enumerate(step.backwards_before):
            reads = [read for read in checked.sources if step.backwards_before[event_of[read]] <= backwards]
            values = [value for read in reads for value in stored[read]]
            # an edit before a later optimizer's step may come after this one's
            values += [value for read in reads if event_of[read] <= event for value in edited.get(read, [])]
            values = list(dict.fromkeys(values))
            if tuple(values) not in verdicts:
                # without a value: gradients without elements, before any other
                with edit.after(edit.last(values or [r.mark for r in step.reads if r.event == event])):
                    verdicts[tuple(values)] = _any_non_finite(step, edit, values)
            checked.found_inf[event] = verdicts[tuple(values)]

    def _reduce(self, checked: Checked, edit: Editor, mark: Node) -> None:
        """Insert the reductions of one gradient."""

        def call(target: Any, *args: Any) -> Node:
            return edit.call(target, *args, when=Phase.CHECK, reason="finite check, norm, underflow")

        dtype = tensor(mark).dtype
        # squares of float16 fit into float32, and add up there; those of the others need float64
        narrow, wide = (torch.promote_types(dtype, torch.float32), torch.float64)
        if dtype is torch.float16:
            wide = torch.float32
        with edit.after(mark):
            value = edit.cast(mark, narrow, when=Phase.CHECK, reason="reduce in float32")
            checked.largest[mark] = call(aten.amax.default, call(aten.abs.default, value), [])
            value = edit.cast(value, wide, when=Phase.CHECK, reason="squares may not fit into float32")
            total = call(aten.sum.default, call(aten.mul.Tensor, value, value))
            total = edit.cast(total, torch.float64, when=Phase.CHECK, reason="sums add up in float64")
            checked.square_sums[mark] = total
            if dtype is torch.float16:
                checked.tiny[mark] = _count_tiny(edit, mark)


def _reduce_across(step: StepGraph, edit: Editor, checked: Checked) -> None:
    """Of gradients of which each rank has some rows: what was reduced, over all of them."""
    by_backward: dict[object, list[Node]] = {}
    for mark in checked.largest:
        if step.part(step.gradients[mark].leaf):
            by_backward.setdefault(step.gradients[mark].backward, []).append(mark)
    for marks in by_backward.values():
        shard = step.part(step.gradients[marks[0]].leaf)
        assert shard is not None, "they are parts"
        sums, largest = [checked.square_sums[m] for m in marks], [checked.largest[m] for m in marks]
        sums, largest = across(edit, shard, sums, largest)
        checked.square_sums.update(zip(marks, sums, strict=True))
        checked.largest.update(zip(marks, largest, strict=True))


def _look_across(step: StepGraph, edit: Editor, edited: dict[Node, list[Node]]) -> None:
    """The same for what optimizers read of edited gradients: by optimizer, before one of them updates."""
    by_event: dict[int, list[Read]] = {}
    for read in step.reads:
        if read.mark in edited and step.part(read.slot):
            by_event.setdefault(read.event, []).append(read)
    for reads in by_event.values():
        shard = step.part(reads[0].slot)
        assert shard is not None, "they are parts"
        _, largest = across(edit, shard, [], [edited[read.mark][0] for read in reads])
        edited.update((read.mark, [value]) for read, value in zip(reads, largest, strict=True))


class _Suspects:
    """Magnitudes of the gradients that the loss scale may have made overflow, 0 for the others."""

    def __init__(self, step: StepGraph, edit: Editor, checked: Checked) -> None:
        self.step, self.edit, self.largest = step, edit, checked.largest
        narrow = (is_float(n) and tensor(n).dtype is torch.float16 for n in _backward_nodes(step))
        self.possible = "scale" in step.scaler and any(narrow)
        losses = seed_losses(step)
        self.seeds = {number: (mark, losses[mark]) for number, mark in step.numbered(SEED).items()}
        self.cleared: dict[int, Node] = {}

    def of(self, mark: Node) -> Node | None:
        """What is to be finite beside the edited gradient; None if the scale is above all suspicion."""
        backward = self.step.gradients[mark].backward
        if not self.possible or backward is None:
            return None
        cleared = self._is_cleared(backward)
        with self.edit.after(self.edit.last((cleared, self.largest[mark]))):
            return self._call(aten.where.ScalarSelf, cleared, 0.0, self.largest[mark])

    def _is_cleared(self, backward: int) -> Node:
        """Whether an overflow of this backward() is none of the scale's making: 0-d bool."""
        if backward not in self.cleared:
            mark, loss = self.seeds[backward]
            with self.edit.before(mark):
                finite = self._call(aten.isfinite.default, loss or source(mark))
                wrong = self._call(aten.logical_not.default, self._call(aten.all.default, finite))
                unscaled = self._call(aten.le.Scalar, self.step.scaler["scale"], 1.0)
                self.cleared[backward] = self._call(aten.logical_or.default, wrong, unscaled)
        return self.cleared[backward]

    def _call(self, target: Any, *args: Any) -> Node:
        return self.edit.call(target, *args, when=Phase.CHECK, reason="whose overflow an edit removes")


def _backward_nodes(step: StepGraph) -> Iterator[Node]:
    return (n for n in step.nodes() if phase(n) is Phase.BACKWARD)


def _largest(edit: Editor, read: Node) -> Node:
    """The largest magnitude of a gradient as the optimizer reads it."""

    def call(target: Any, *args: Any) -> Node:
        return edit.call(target, *args, when=Phase.CHECK, reason="finite check of what the user's code left")

    with edit.before(read):
        return call(aten.amax.default, call(aten.abs.default, source(read)), [])


def _is_edited(read: Node, unscaled: Unscaled) -> bool:
    """Whether an optimizer reads more than gradients as they left backward, unscaled and added up."""
    if tensor(read).numel() == 0:
        return False
    stack = [source(read)]
    while stack:
        node = stack.pop()
        if (node.target is MARK and node.args[1] == GRAD) or node.target is aten.zeros_like.default:
            continue
        if node.target is aten.add.Tensor and not node.kwargs:
            stack += node.all_input_nodes
        elif is_view(node) or node.target is aten.clone.default or _widens(node):
            stack.append(source(node))
        elif node in unscaled.values:
            stack.append(source(node))
        else:
            return True
    return False


def _widens(node: Node) -> bool:
    """Whether a node is a cast that no finite number overflows in."""
    return node.target is aten._to_copy.default and tensor(node).dtype == torch.promote_types(
        tensor(node).dtype, tensor(source(node)).dtype
    )


def _count_tiny(edit: Editor, mark: Node) -> tuple[Node, Node, int]:
    """Of a sample of the gradient: elements below the normal numbers, elements that are zero, elements."""

    def call(target: Any, *args: Any) -> Node:
        return edit.call(target, *args, when=Phase.CHECK, reason="elements lost to underflow")

    def count(condition: Node) -> Node:
        number = edit.cast(condition, torch.float32, when=Phase.CHECK, reason="elements lost to underflow")
        return call(aten.sum.default, number)

    sample, shape = mark, tensor(mark).shape
    rows = next((dim for dim, size in enumerate(shape) if size >= 2 * SAMPLE_STRIDE), None)
    if tensor(mark).numel() >= SAMPLED and rows is not None:
        sample = call(aten.slice.Tensor, mark, rows, 0, shape[rows], SAMPLE_STRIDE)
    value = edit.cast(sample, torch.float32, when=Phase.CHECK, reason="count in float32")
    magnitude = call(aten.abs.default, value)
    tiny = count(call(aten.lt.Scalar, magnitude, SMALLEST_NORMAL))
    return tiny, count(call(aten.eq.Scalar, magnitude, 0.0)), int(tensor(sample).numel())


def _born(step: StepGraph) -> dict[Node, int]:
    """When backward computed each GRAD mark's gradient, as a position in the graph."""
    order = {n: i for i, n in enumerate(step.graph.nodes)}
    born = {}
    for mark in step.marks(GRAD):
        node = source(mark)
        while is_view(node) or node.target is aten._to_copy.default:
            node = source(node)
        born[mark] = order[node]
    return born


def _any_non_finite(step: StepGraph, edit: Editor, values: list[Node]) -> Node:
    reason = "one verdict for the whole step"
    if not values:
        device = tensor(step.reads[0].mark).device
        kind: dict[str, Any] = {"dtype": torch.bool, "device": device}
        return edit.call(aten.full.default, [], False, when=Phase.CHECK, reason=reason, **kind)
    if len({tensor(v).dtype for v in values}) > 1:
        values = [edit.cast(v, torch.float64, when=Phase.CHECK, reason=reason) for v in values]
    stacked = edit.call(aten.stack.default, values, when=Phase.CHECK, reason=reason)
    finite = edit.call(aten.isfinite.default, stacked, when=Phase.CHECK, reason=reason)
    bad = edit.call(aten.logical_not.default, finite, when=Phase.CHECK, reason=reason)
    return edit.call(aten.any.default, bad, when=Phase.CHECK, reason=reason)
