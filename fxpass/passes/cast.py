"""Insert casts so that each operator runs in the precision the policy gives it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch.fx import Node

from ..analysis.modules import module_names
from ..analysis.policy import ACTIVATIONS, PINNED_ARGUMENTS, VIEWS, Colour, colour_of, op_name
from ..ir.edit import Editor
from ..ir.graph import Phase, Role, StepGraph, is_float, phase, tensor
from ..ir.marks import GRAD, MARK, SEED
from .base import GraphPass

aten = torch.ops.aten


@dataclass(frozen=True)
class Cast(GraphPass):
    """Run each operator of forward and backward in the dtype of its colour.

    One cast per value and dtype, except weights: a weight is cast where forward
    uses it and again where backward does, so that no low-precision copy of it
    has to live from one to the other. Casts the user wrote stay as they are.
    """

    name: ClassVar[str] = "cast"
    dtype: torch.dtype = torch.float16
    keep_fp32: tuple[str, ...] = ()

    def run(self, step: StepGraph, edit: Editor) -> None:
        if self.dtype is torch.float32:
            edit.decline("dtype is float32: no casts")
            return
        _Caster(self, step, edit).run()


class _Caster:
    def __init__(self, settings: Cast, step: StepGraph, edit: Editor) -> None:
        self.low = settings.dtype
        self.step, self.edit = step, edit
        self.memo: dict[tuple[Node, torch.dtype, object], Node] = {}
        self.original = {n: tensor(n).dtype for n in step.graph.nodes if is_float(n)}
        self.weights = self._weights()
        self.kept = _kept_nodes(step, settings.keep_fp32)
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
        """Inputs and their views: cheap to cast again, dear to keep in two precisions."""
        found = {n for n, role in self.step.roles.items() if role in (Role.PARAMETER, Role.INPUT)}
        for node in self.step.nodes():
            name = op_name(node.target)
            if name in VIEWS and node.args and node.args[0] in found:
                found.add(node)
        return found

    # ------------------------------------------------------------ one node

    def _visit(self, node: Node) -> None:
        if node.target is operator.getitem:
            self.edit.refresh(node)
            return
        floats = [n for n in node.all_input_nodes if is_float(n)]
        when = phase(node)
        if node.target is aten.copy_.default:
            self._cast_args(
                node,
                lambda n, _: tensor(node.args[0]).dtype if n is not node.args[0] else None,
                "stored value",
            )  # type: ignore[arg-type]
        elif not floats:
            return
        elif node.target is MARK and node.args[1] in (SEED, GRAD):
            self._visit_mark(node)
        elif when in (Phase.GRADIENT, Phase.UPDATE):
            self._cast_args(
                node, lambda n, _: torch.float32 if n in self.original else None, "gradients meet in float32"
            )
        else:
            self._apply(node, self._colour(node))
        if (
            any(tensor(n).dtype != self.original.get(n, tensor(n).dtype) for n in floats)
            or node in self.edit.touched
        ):
            self._refresh(node)

    def _visit_mark(self, node: Node) -> None:
        source = node.args[0]
        assert isinstance(source, Node)
        if node.args[1] == GRAD and tensor(source).ndim >= 2 and tensor(source).dtype is torch.float32:
            reason = "a weight's gradient waits for the verdict in low precision"
            self._replace(node, source, self.low, reason)

    def _colour(self, node: Node) -> Colour:
        if node in self.kept:
            return Colour.HIGH
        colour = colour_of(node.target)
        if colour is None:
            self.unknown[str(node.target)] = self.unknown.get(str(node.target), 0) + 1
            return Colour.HIGH
        if op_name(node.target) in ("_softmax", "_softmax_backward_data", "_safe_softmax"):
            return self._softmax(node)
        if colour is Colour.FOLLOW and _scalar_out_of_range(node, self.low):
            return Colour.HIGH
        return colour

    def _softmax(self, node: Node) -> Colour:
        """Low where attention multiplies by it (the kernel computes in float32 anyway), else HIGH."""
        if node.target is aten._softmax_backward_data.default:
            saved = node.args[1]
            return Colour.BACKWARD_FOLLOW if tensor(saved).dtype == self.low else Colour.HIGH  # type: ignore[arg-type]
        return Colour.FOLLOW if _only_low_users(node) else Colour.HIGH

    def _apply(self, node: Node, colour: Colour) -> None:
        name = op_name(node.target)
        if any(
            n.meta["val"].dtype is torch.float64
            for n in node.all_input_nodes
            if isinstance(n.meta.get("val"), torch.Tensor)
        ):
            return
        if colour is Colour.LOW:
            self._cast_args(
                node,
                lambda n, arg: None if arg in PINNED_ARGUMENTS else self.low,
                f"{name} runs in {self.low}",
            )
        elif colour is Colour.HIGH:
            self._cast_args(node, lambda n, arg: torch.float32, f"{name} runs in float32")
        elif colour is Colour.NORM:
            dtype = self._norm_dtype(node)
            pick: Callable[[Node, str], Any] = lambda n, arg: dtype if arg in ACTIVATIONS else torch.float32
            self._cast_args(node, pick, f"{name} follows its input; statistics stay float32")
        elif colour is Colour.BACKWARD_FOLLOW:
            dtype = self._saved_dtype(node)
            self._cast_args(node, lambda n, arg: dtype, f"{name} follows what forward saved")
        elif colour is Colour.WIDEST:
            dtypes = {tensor(n).dtype for n in node.all_input_nodes if is_float(n)}
            widest = torch.float32 if len(dtypes) > 1 else dtypes.pop()
            self._cast_args(node, lambda n, arg: widest, f"{name} needs one dtype")
        if node.target is aten._softmax_backward_data.default:
            self.edit.set_arg(node, 3, tensor(node.args[1]).dtype)  # type: ignore[arg-type]
        elif node.target is aten._log_softmax_backward_data.default:
            self.edit.set_arg(node, 3, torch.float32)

    def _norm_dtype(self, node: Node) -> torch.dtype:
        index = next(i for i, a in enumerate(node.target._schema.arguments) if a.name in ("input", "X"))  # type: ignore[union-attr]
        return tensor(node.args[index]).dtype  # type: ignore[arg-type]

    def _saved_dtype(self, node: Node) -> torch.dtype:
        saved = [a for a in node.args[1:] if is_float(a)]
        return tensor(saved[-1] if saved else node.args[0]).dtype  # type: ignore[arg-type]

    # ------------------------------------------------------------ casting

    def _cast_args(self, node: Node, wanted: Callable[[Node, str], torch.dtype | None], reason: str) -> None:
        schema = getattr(node.target, "_schema", None)
        names = [a.name for a in schema.arguments] if schema else []
        for index, arg in enumerate(node.args):
            name = names[index] if index < len(names) else ""
            for source in _nodes_in(arg):
                if is_float(source) and (dtype := wanted(source, name)) is not None:
                    self._replace(node, source, dtype, reason)
        for name, arg in node.kwargs.items():
            if is_float(arg) and (dtype := wanted(arg, name)) is not None:  # type: ignore[arg-type]
                self._replace(node, arg, dtype, reason)  # type: ignore[arg-type]

    def _replace(self, node: Node, source: Node, dtype: torch.dtype, reason: str) -> None:
        if tensor(source).dtype == dtype:
            return
        new = self._cast(node, source, dtype, reason)
        node.replace_input_with(source, new)
        self.edit.touched.add(node)

    def _cast(self, user: Node, source: Node, dtype: torch.dtype, reason: str) -> Node:
        key = (source, dtype, self.segment if source in self.weights else None)
        if key not in self.memo:
            with self.edit.before(user):
                when = phase(user) if phase(user) is not Phase.OUTPUT else Phase.FORWARD
                self.memo[key] = self.edit.cast(source, dtype, when=when, reason=reason)
            if (new := self.memo[key]) is not source and tensor(source).dtype is not torch.float32:
                self.memo.setdefault(
                    (new, tensor(source).dtype, None), source
                )  # widening is exact: casting back is free
        return self.memo[key]

    def _refresh(self, node: Node) -> None:
        before = node.meta["val"]
        try:
            self.edit.refresh(node)
        except Exception:
            self._cast_args(node, lambda n, _: torch.float32, f"{op_name(node.target)} refused low precision")
            self.edit.decline(f"{node.name} ({op_name(node.target)}) could not run in {self.low}: float32")
            self.edit.refresh(node)
        del before

    def _restore_outputs(self, output: Node) -> None:
        for source in list(output.all_input_nodes):
            if source in self.original and tensor(source).dtype != self.original[source]:
                new = self._cast(
                    output, source, self.original[source], "outputs keep the dtype of the uncompiled step"
                )
                output.replace_input_with(source, new)


def _nodes_in(arg: object) -> list[Node]:
    if isinstance(arg, Node):
        return [arg]
    return [a for a in arg if isinstance(a, Node)] if isinstance(arg, (list, tuple)) else []


def _only_low_users(node: Node) -> bool:
    """Whether everything that reads the value (through views and dropout) is a LOW operator or its own backward."""
    for user in node.users:
        name = op_name(user.target)
        if colour_of(user.target) is Colour.LOW or name == "_softmax_backward_data":
            continue
        passes_on = name in VIEWS or name in (
            "native_dropout",
            "clone",
            "_unsafe_view",
            "mul",
            "native_dropout_backward",
        )
        if not (passes_on and _only_low_users(user)):
            return False
    return bool(node.users)


def _scalar_out_of_range(node: Node, dtype: torch.dtype) -> bool:
    """Whether a Python number among the arguments would become infinite in ``dtype`` (a mask of -1e9, say)."""
    limit = torch.finfo(dtype).max
    numbers = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, float)]
    return any(limit < abs(a) < float("inf") for a in numbers)


def _kept_nodes(step: StepGraph, patterns: tuple[str, ...]) -> set[Node]:
    """Nodes of modules matching ``keep_fp32`` or of regions with autocast off, and their backward nodes."""
    kept = set()
    sequence = set()
    for node in step.nodes():
        names = module_names(node) if patterns else ()
        tagged = (node.meta.get("custom") or {}).get("fxpass_fp32")
        if tagged or any(fnmatchcase(name, pattern) for name in names for pattern in patterns):
            kept.add(node)
            sequence.add(node.meta.get("seq_nr"))
    sequence.discard(None)
    return kept | {n for n in step.nodes() if phase(n) is Phase.BACKWARD and n.meta.get("seq_nr") in sequence}
