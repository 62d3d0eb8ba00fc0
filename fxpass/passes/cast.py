"""Insert casts so that each operator runs in the precision the policy gives it."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch.fx import Node

from ..analysis.delicate import delicate
from ..analysis.modules import nodes_kept
from ..analysis.nodes import has_double, input_dtype, is_batch_sum, is_cast, widened_from
from ..analysis.policy import (
    ACTIVATIONS,
    PINNED_ARGUMENTS,
    VIEWS,
    Colour,
    colour_of,
    has_number_beyond,
    has_number_lost,
    has_saved_state,
    op_name,
    read_by_low_only,
)
from ..ir.alias import is_view, keeps_elements
from ..ir.edit import Editor
from ..ir.graph import Phase, Role, StepGraph, is_float, is_own, is_unscaled, phase, source, tensor
from ..ir.marks import AVERAGE, GRAD, MARK, SEED
from ..ir.provenance import origin
from ..ir.shards import AVERAGE_ROWS, GATHER_ROWS
from .graph_pass import GraphPass
from .results import ScaledSeeds

aten = torch.ops.aten
Choice = Callable[[Node, str], "torch.dtype | None"]
Caster = Callable[[Node, Node, torch.dtype, str], Node]
MASKS = ("attn_mask", "attn_bias")
# Of the norms' backwards: where the weight stands among the arguments, and where its shape does.
WEIGHT_OF = {"native_layer_norm_backward": (5, 2), "native_group_norm_backward": (4, 6)}
_MEANS = (AVERAGE, AVERAGE_ROWS)
MASKED = -1  # where the memo has a segment for weights


@dataclass(frozen=True)
class Cast(GraphPass):
    """Run each operator of forward and backward in the dtype of its colour.

    One cast per value and dtype, except weights: a weight is cast where forward
    uses it and again where backward does, so that no low-precision copy of it
    has to live from one to the other. Casts the user wrote stay as they are.
    """

    name: ClassVar[str] = "cast"
    uses: ClassVar = (ScaledSeeds,)
    dtype: torch.dtype = torch.float16
    keep_fp32: tuple[str, ...] = ()

    def run(self, step: StepGraph, edit: Editor) -> None:
        if self.dtype is torch.float32:
            for node in list(step.nodes()):
                _drop_if_idle(node, edit)
            edit.decline("dtype is float32: no casts")
            return
        _Caster(self, step, edit).run()


class _Caster:
    def __init__(self, settings: Cast, step: StepGraph, edit: Editor) -> None:
        self.low = settings.dtype
        self.step, self.edit = step, edit
        self.memo: dict[tuple[Node, torch.dtype, int | None], Node] = {}
        self.original = {n: tensor(n).dtype for n in step.graph.nodes if is_float(n)}
        self.scaled = step.result(ScaledSeeds).wide
        self.weights = self._weights()
        self.kept = nodes_kept(step, settings.keep_fp32)
        self.delicate = delicate(step, self.low)
        self.undelicate = {n.meta["seq_nr"] for n in self.delicate if "seq_nr" in n.meta}
        self.made_in: dict[Node, int] = {}  # the user's own low copies of weights, and their segment
        self.wide: set[object] = set()  # sequence numbers of forward arithmetic that ran in float32
        self.segment = 0  # a weight's casts are shared within one forward or one backward
        self.last_phase = Phase.FORWARD
        self.unknown: dict[str, int] = {}

    def run(self) -> None:
        for node in list(self.step.graph.nodes):
            if node.op == "output":
                self._restore_outputs(node)
            elif node.op == "call_function":
                if phase(node) in (Phase.FORWARD, Phase.BACKWARD) and phase(node) is not self.last_phase:
                    self.segment, self.last_phase = self.segment + 1, phase(node)
                self._visit(node)
        for name, count in sorted(self.unknown.items()):
            self.edit.decline(f"{name} ({count}x) is not in the op policy: it runs in float32")

    def _weights(self) -> set[Node]:
        """Inputs, their views and the user's casts of them: cheap to make again, dear to keep."""
        weights = {n for n, role in self.step.roles.items() if role in (Role.PARAMETER, Role.INPUT)}
        for node in list(self.step.nodes()):
            if node.args and node.args[0] in weights and not _drop_if_idle(node, self.edit):
                if op_name(node.target) in VIEWS or is_cast(node, self.low) or node.target is GATHER_ROWS:
                    weights.add(node)
        return weights

    # ------------------------------------------------------------ one node

    def _visit(self, node: Node) -> None:
        if node.target is operator.getitem:
            self.edit.refresh(node)
            self._settle(node)
            return
        floats = [n for n in node.all_input_nodes if is_float(n)]
        if not floats or _drop_if_idle(node, self.edit):
            return
        if node in self.weights and is_float(node) and tensor(node).dtype == self.low:
            self.made_in[node] = self.made_in.get(source(node), self.segment)
        if node.target is aten.copy_.default:
            self._replace(node, source(node, 1), tensor(source(node)).dtype, "stored value")
        elif node.target is MARK and node.args[1] in (SEED, GRAD):
            self._visit_mark(node)
        elif node.target in _MEANS and phase(node) is Phase.BACKWARD:
            self._store(node)  # it is sent as it is stored
        elif (colour := self._colour(self._read_unscaled(node))) is None:
            self._cast_args(node, lambda n, _: self._own(n), "runs as in the uncompiled step")
            self.edit.touched.discard(node)  # it reads what it always read
            return
        else:
            self._apply(node, colour)
        if node in self.edit.touched or any(self._changed(n) for n in floats):
            self._refresh(node)
        if is_float(node) and phase(node) is Phase.FORWARD and tensor(node).dtype is torch.float32:
            self.wide.add(node.meta.get("seq_nr"))
        if op_name(node.target) in ("_softmax", "_safe_softmax"):
            self._store_softmax(node)

    def _read_unscaled(self, node: Node) -> Node:
        """``node``, reading gradients as the user sees them: in float32, once they are unscaled."""
        for value in node.all_input_nodes if phase(node) in (Phase.FORWARD, Phase.BACKWARD) else ():
            if value.target is MARK and value.args[1] == GRAD and self._changed(value):
                self._replace(node, value, self._own(value), "a gradient that is read again has no scale")
        return node

    def _own(self, node: Node) -> torch.dtype:
        """The dtype of a value in the uncompiled step."""
        return self.original.get(node, torch.float32)

    def _changed(self, node: Node) -> bool:
        return node in self.original and tensor(node).dtype != self.original[node]

    def _visit_mark(self, node: Node) -> None:
        grad = source(node)
        if node.args[1] == SEED and grad in self.scaled and is_cast(grad, torch.float16):
            self.edit.set_arg(node, 0, self.scaled[grad])  # the product overflows in the user's float16
            return
        if node.args[1] == GRAD and grad.target not in _MEANS:
            self._store(node)

    def _store(self, node: Node) -> None:
        """Let ``node`` read a gradient in the dtype in which it waits for the verdict."""
        grad = source(node)
        if tensor(grad).ndim < 2 or tensor(grad).dtype is not torch.float32:
            return
        if not self.kept.isdisjoint((grad, *grad.all_input_nodes)):
            return  # whoever keeps a module in float32 may do so because its gradient overflows
        if is_batch_sum(grad):
            return  # it is larger than what it sums, and small beside it: a class token's, a small table's
        self._replace(node, grad, self.low, "a weight's gradient waits for the verdict in low precision")

    def _colour(self, node: Node) -> Colour | None:
        """The rule for a node; None if it has to run as in the uncompiled step."""
        own = phase(node) in (Phase.GRADIENT, Phase.UPDATE, Phase.AFTER) or is_own(node)
        if own or node in self.kept or has_double(node):
            return None
        colour = colour_of(node.target)
        if colour is None:
            self.unknown[str(node.target)] = self.unknown.get(str(node.target), 0) + 1
            return None
        name = op_name(node.target)
        unscaled = phase(node) is Phase.BACKWARD and any(map(is_unscaled, (node, *node.all_input_nodes)))
        if unscaled and colour is not Colour.HIGH and name not in VIEWS and not has_saved_state(node):
            return Colour.HIGH
        if name in ("_softmax", "_safe_softmax") and read_by_low_only(node, self.kept):
            return Colour.FOLLOW
        if name == "_softmax_backward_data" and tensor(source(node, 1)).dtype == self.low:
            return Colour.BACKWARD_FOLLOW
        follows = colour in (Colour.FOLLOW, Colour.WIDEST, Colour.BACKWARD_FOLLOW) and name not in VIEWS
        return Colour.HIGH if follows and self._needs_digits(node, colour) else colour

    def _needs_digits(self, node: Node, colour: Colour) -> bool:
        """Whether low precision loses a number that the node reads or, in backward, that its forward read."""
        if phase(node) is Phase.BACKWARD:
            wide = self.wide if colour is Colour.FOLLOW else self.undelicate
            if node.meta.get("seq_nr", self) in wide:
                return True
        if colour is Colour.BACKWARD_FOLLOW:
            return False
        limit = torch.finfo(self.low).max
        return node in self.delicate or has_number_beyond(node, limit) or has_number_lost(node, self.low)

    def _apply(self, node: Node, colour: Colour) -> None:
        name = op_name(node.target)
        if colour is Colour.LOW:
            low = self._low(node)
            self._cast_args(
                node, lambda _, arg: None if arg in PINNED_ARGUMENTS else low, f"{name} runs in {low}"
            )
        elif colour is Colour.HIGH:
            self._cast_args(node, lambda *_: torch.float32, f"{name} runs in float32")
        elif colour is Colour.NORM:
            self._apply_norm(node, name)
        elif colour is Colour.BACKWARD_FOLLOW:
            saved = next((n for n in node.args[1:] if is_float(n)), node.args[0])
            self._cast_args(node, lambda *_: tensor(saved).dtype, f"{name} follows what forward saved")
        elif colour is Colour.WIDEST:
            dtypes = {tensor(n).dtype for n in node.all_input_nodes if is_float(n)}
            widest = torch.float32 if len(dtypes) > 1 else dtypes.pop()
            self._cast_args(node, lambda *_: widest, f"{name} needs one dtype")
        if name in ("_softmax_backward_data", "_log_softmax_backward_data"):
            self._set_input_dtype(node)

    def _apply_norm(self, node: Node, name: str) -> None:
        dtype = input_dtype(node)
        self._cast_args(
            node,
            lambda _, arg: dtype if arg in ACTIVATIONS else torch.float32,
            f"{name} follows its input; statistics stay float32",
        )
        if dtype is torch.float32:
            return
        if name in WEIGHT_OF and node.args[WEIGHT_OF[name][0]] is None:
            self._give_weight(node, *WEIGHT_OF[name])
        if name == "_fused_rms_norm" and node.args[3] is None:  # would be that of the low dtype
            self.edit.set_arg(node, 3, torch.finfo(torch.float32).eps)

    def _give_weight(self, node: Node, weight: int, shape: int) -> None:
        """Kernels take float32 statistics beside a low input only with a float32 weight."""
        sizes = node.args[shape] if isinstance(node.args[shape], (list, tuple)) else [node.args[shape]]
        device = tensor(node.args[0]).device
        with self.edit.before(node):
            ones = self.edit.call(
                aten.full.default,
                sizes,
                1.0,
                dtype=torch.float32,
                device=device,
                when=phase(node),
                reason="float32 statistics ask for a float32 weight",
            )
        self.edit.set_arg(node, weight, ones)

    def _settle(self, result: Node) -> None:
        """Give an input gradient the dtype that the kernel writes, whatever its shape function says."""
        norm = source(result)
        if op_name(norm.target) != "native_group_norm_backward" or result.args[1] != 0:
            return
        dtype = input_dtype(norm)
        if tensor(result).dtype == dtype or origin(next(iter(result.users), result)) is not None:
            return
        with self.edit.after(result):
            reason = "the gradient of a norm's input has its dtype"
            settled = self.edit.cast(result, dtype, when=phase(result), reason=reason)
        self.edit.replace_uses(result, settled, keep=lambda user: user is settled)

    def _low(self, node: Node) -> torch.dtype:
        """The compute dtype, unless all is in another low one: the user's bfloat16 in a float16 step."""
        chosen = {self._own(n) for n in node.all_input_nodes if is_float(n)}
        return chosen.pop() if len(chosen) == 1 and torch.float32 not in chosen else self.low

    def _set_input_dtype(self, node: Node) -> None:
        """The softmax backwards are told the dtype of forward's input: that of what it saved."""
        dtype = tensor(source(node, 1)).dtype
        if node.args[3] != dtype:
            self.edit.set_arg(node, 3, dtype)

    def _store_softmax(self, node: Node) -> None:
        """Save attention weights in low precision where scores are float32 (a mask was added)."""
        if tensor(node).dtype is not torch.float32 or not read_by_low_only(node, self.kept):
            return
        with self.edit.after(node):
            reason = "the product reads attention weights in low precision: so does backward"
            stored = self.edit.cast(node, self.low, when=phase(node), reason=reason)
        self.edit.replace_uses(node, stored, keep=lambda user: user is stored)

    # ------------------------------------------------------------ casting

    def _cast_args(self, node: Node, wanted: Choice, reason: str) -> None:
        schema = getattr(node.target, "_schema", None)
        names = [a.name for a in schema.arguments] if schema else []
        names += [""] * (len(node.args) - len(names))
        for name, arg in (*zip(names, node.args, strict=False), *node.kwargs.items()):
            for value in arg if isinstance(arg, (list, tuple)) else [arg]:
                if isinstance(value, Node) and is_float(value) and (dtype := wanted(value, name)) is not None:
                    is_mask = name in MASKS and tensor(value).dtype is torch.float32
                    self._replace(node, value, dtype, reason, self._cast_mask if is_mask else self._cast)

    def _replace(
        self, node: Node, value: Node, dtype: torch.dtype, reason: str, cast: Caster | None = None
    ) -> None:
        outlived = self.made_in.get(value, self.segment) != self.segment
        if tensor(value).dtype != dtype or outlived:
            node.replace_input_with(value, (cast or self._cast)(node, value, dtype, reason))
            self.edit.touched.add(node)

    def _cast_mask(self, user: Node, mask: Node, dtype: torch.dtype, reason: str) -> Node:
        """An additive mask whose lowest float32 number becomes the lowest of ``dtype``.

        A plain cast makes it -inf, and attention over a row of nothing else nan.
        """
        call = partial(self.edit.call, when=phase(user), reason=reason)
        views: list[Node] = []
        while (
            (new := self.memo.get((mask, dtype, MASKED))) is None and is_view(mask) and is_float(mask.args[0])
        ):
            views.append(mask)
            mask = source(mask)
        with self.edit.before(user):
            if new is None:
                finite = call(aten.clamp.default, mask, torch.finfo(dtype).min)
                infinite = call(aten.eq.Scalar, mask, -math.inf)
                wide = call(aten.where.ScalarSelf, infinite, -math.inf, finite)
                new = self.memo[mask, dtype, MASKED] = self.edit.cast(
                    wide, dtype, when=phase(user), reason=reason
                )
            for view in reversed(views):  # of the cast: some kernels ask for the strides it has
                new = self.memo[view, dtype, MASKED] = call(_target(view), new, *view.args[1:])
        return new

    def _cast(self, user: Node, value: Node, dtype: torch.dtype, reason: str) -> Node:
        """``value`` in ``dtype`` before ``user``: what it was widened from, an earlier cast, or a new one."""
        when = phase(user) if phase(user) is not Phase.OUTPUT else Phase.FORWARD
        views: list[Node] = []
        while (new := self._at_hand(value, dtype)) is None:
            if value in self.made_in and is_cast(value, dtype):
                value, reason = source(value), "a weight's copy does not wait for backward"
            elif self._is_cast_below(value, dtype):
                views.append(value)
                value = source(value)
            else:
                break
        with self.edit.before(user):
            if new is None:
                new = self.edit.cast(value, dtype, when=when, reason=reason)
                self.memo[self._key(value, dtype)] = new
            for view in reversed(views):
                new = self.edit.call(_target(view), new, *view.args[1:], when=when, reason=reason)
                self.memo[self._key(view, dtype)] = new
        return new

    def _key(self, value: Node, dtype: torch.dtype) -> tuple[Node, torch.dtype, int | None]:
        return value, dtype, self.segment if value in self.weights else None

    def _at_hand(self, value: Node, dtype: torch.dtype) -> Node | None:
        """``value`` in ``dtype``, if it has been cast already or is an exact copy of such a tensor."""
        if (narrow := widened_from(value)) is not None and tensor(narrow).dtype == dtype:
            return narrow
        return self.memo.get(self._key(value, dtype))

    def _is_cast_below(self, value: Node, dtype: torch.dtype) -> bool:
        """Whether to cast what a view looks at, and look at that.

        An RNN transposes its weight at every time step, two products read a
        gradient in two shapes: one cast is enough.
        """
        shared = value in self.weights or dtype == self.low
        passes = keeps_elements(value) or (value.target is GATHER_ROWS and value in self.weights)
        return shared and passes and is_float(value.args[0])  # half of the bytes are sent

    def _refresh(self, node: Node) -> None:
        try:
            self.edit.refresh(node)
        except Exception:  # whatever a kernel's shape function raises for a dtype it does not take
            self._cast_args(node, lambda *_: torch.float32, f"{op_name(node.target)} refused low precision")
            self.edit.decline(f"{node.name} ({op_name(node.target)}) could not run in {self.low}: float32")
            self.edit.refresh(node)

    def _restore_outputs(self, output: Node) -> None:
        reason = "outputs keep the dtype of the uncompiled step"
        for value in output.all_input_nodes:
            if self._changed(value):
                output.replace_input_with(value, self._cast(output, value, self.original[value], reason))


def _target(node: Node) -> Callable[..., object]:
    assert callable(node.target), f"{node.name} is not a call"
    return node.target


def _drop_if_idle(node: Node, edit: Editor) -> bool:
    """Erase a cast of the user's to the dtype the value has; capture spells them out in case it has not."""
    if not is_cast(node, torch.float32) or tensor(source(node)).dtype is not torch.float32:
        return False
    if any(user.op == "output" or user.target is aten.copy_.default for user in node.users):
        return False  # the user may have asked for a copy
    edit.replace_uses(node, source(node))
    edit.erase(node)
    return True
