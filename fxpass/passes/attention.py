"""Attention on CUDA, by the kernel for the dtype it has been given."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from ..ir.alias import storage_of
from ..ir.dtypes import name_of
from ..ir.edit import Editor
from ..ir.graph import NO_FLASH, StepGraph, is_tagged, phase, source, tensor
from ..ir.provenance import inherit
from .graph_pass import GraphPass

aten = torch.ops.aten

_EFFICIENT = aten._scaled_dot_product_efficient_attention.default
_EFFICIENT_BACKWARD = aten._scaled_dot_product_efficient_attention_backward.default
_FLASH = aten._scaled_dot_product_flash_attention.default
_FLASH_BACKWARD = aten._scaled_dot_product_flash_attention_backward.default
_HALF = (torch.float16, torch.bfloat16)
_ALIGNED = 8  # elements of a head: what flash attention takes without padding


@dataclass(frozen=True)
class Attention(GraphPass):
    """Use the kernel that torch would for the dtype of attention's operands.

    ``scaled_dot_product_attention`` chooses its kernel while it is traced, when all is
    float32 still: the memory-efficient one, never flash attention, which takes half
    precision alone. Once the policy has decided, torch's own rule
    (``torch.backends.cuda.can_use_flash_attention``: dtype, device, head size, mask,
    what the user has switched off) is asked again, and the two kernels of a
    call, forward and backward, are exchanged. In half precision both kernels want heads
    of a multiple of eight elements: others are padded with zeros, as torch does for
    flash attention. Results keep their strides.

    Before: ``efficient(q, k, v, None, True, 0.0, True)``. After: ``flash(q, k, v, 0.0, True)``.
    """

    name: ClassVar[str] = "attention"

    def run(self, step: StepGraph, edit: Editor) -> None:
        backwards: dict[Node, list[Node]] = {}
        for node in step.graph.nodes:
            if node.target is _EFFICIENT_BACKWARD:
                saved = storage_of(source(node, 6))  # the logsumexp of the forward kernel
                backwards.setdefault(source(saved), []).append(node)
        calls = [_Call.of(node) for node in step.graph.nodes if node.target is _EFFICIENT]
        for call in calls:
            why = _why_not(call)
            if why:
                edit.decline(f"{call.node.name}: {why}")
            if not why or not call.aligned:
                _Exchange(edit, call, backwards.get(call.node, []), flash=not why).run()
        if not calls:
            edit.decline("no attention whose kernel depends on the dtype")


@dataclass(frozen=True)
class _Call:
    """The arguments of one call of the memory-efficient kernel."""

    node: Node
    operands: tuple[Node, Node, Node]  # query, key, value
    bias: Node | None
    saves: bool  # the logsumexp
    dropout: float
    causal: bool
    scale: float

    @classmethod
    def of(cls, node: Node) -> _Call:
        arguments: Any = node.args
        query, key, value, bias, saves, *rest = arguments
        dropout, causal = [*rest, *(0.0, False)[len(rest) :]]
        scale: Any = node.kwargs.get("scale")
        if scale is None:  # the kernels' own default, as torch writes it for flash attention
            scale = float(tensor(query).shape[-1]) ** -0.5
        return cls(node, (query, key, value), bias, saves, dropout, causal, scale)  # pyrefly: ignore[bad-argument-type]

    @property
    def aligned(self) -> bool:
        """Whether the kernels take the heads as they are."""
        half = tensor(self.operands[0]).dtype in _HALF
        return not half or not any(_missing(operand) for operand in self.operands)


def _missing(value: Node) -> int:
    """How many elements a head lacks to a multiple of ``_ALIGNED``."""
    return -int(tensor(value).shape[-1]) % _ALIGNED


def _why_not(call: _Call) -> str:
    """Why torch would not use flash attention; empty if it would."""
    query, key, value = map(tensor, call.operands)
    if is_tagged(call.node, NO_FLASH):
        return "the step allows no flash attention there"
    if call.bias is not None:
        return "flash attention takes no mask"
    if query.dtype not in _HALF:
        return f"its operands are {query.dtype}"
    parameters = torch.backends.cuda.SDPAParams(query, key, value, None, call.dropout, call.causal, False)
    able = torch.backends.cuda.can_use_flash_attention(parameters)
    return "" if able else "torch would not use flash attention here"


class _Exchange:
    """Puts other kernels where those of one call stand: flash attention's, or the same with padded heads."""

    def __init__(self, edit: Editor, call: _Call, backwards: list[Node], *, flash: bool) -> None:
        self.edit, self.call, self.backwards, self.flash = edit, call, backwards, flash
        dtype = name_of(tensor(call.operands[0]).dtype)
        self.reason = f"flash attention: the operands are {dtype}" if flash else f"{dtype} wants padded heads"

    def run(self) -> None:
        call = self.call
        operands = [self._padded(call.node, operand) for operand in call.operands]
        options: dict[str, Any] = {"scale": call.scale}
        chance = (call.dropout, call.causal)
        if self.flash:
            made = self._make(call.node, _FLASH, *operands, *chance, **options)
        else:
            made = self._make(call.node, _EFFICIENT, *operands, call.bias, call.saves, *chance, **options)
        results = self._results(made, 8 if self.flash else 4)
        for old in self.backwards:
            grad = self._padded(old, source(old))
            if self.flash:
                out, lse, *sizes, seed, offset = results
                saved = (out, lse, *sizes, *chance, seed, offset)
                new = self._make(old, _FLASH_BACKWARD, grad, *operands, *saved, **options)
            else:
                wanted = (call.dropout, old.args[10], call.causal)
                saved = (call.bias, *results, *wanted)
                new = self._make(old, _EFFICIENT_BACKWARD, grad, *operands, *saved, **options)
            self._replace(old, self._results(new, 3 if self.flash else 4))
        self._replace(call.node, results)

    def _make(self, like: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
        """A call where ``like`` stands, of the same line and phase."""
        with self.edit.before(like):
            made = self.edit.call(target, *args, when=phase(like), reason=self.reason, **kwargs)
        inherit(made, like)
        return made

    def _padded(self, like: Node, value: Node) -> Node:
        missing = _missing(value)
        return self._make(like, aten.constant_pad_nd.default, value, [0, missing]) if missing else value

    def _results(self, made: Node, count: int) -> list[Any]:
        """The first results of ``made``; None and numbers as they are."""
        results: list[Any] = list(made.meta["val"][:count])
        with self.edit.after(made):
            for number, value in enumerate(results):
                if isinstance(value, (Tensor, torch.SymInt)):
                    results[number] = self.edit.call(
                        operator.getitem, made, number, when=phase(made), reason=self.reason
                    )
        return results

    def _replace(self, old: Node, results: list[Any]) -> None:
        for user in list(old.users):
            number = int(str(user.args[1]))
            if user.users:
                self.edit.replace_uses(user, self._as_it_was(user, results[number]))
            self.edit.erase(user)
        self.edit.erase(old)

    def _as_it_was(self, old: Node, new: Node) -> Node:
        """``new`` with the size and strides of ``old``, on which views behind it may rely."""
        if new.meta["val"].shape[-1:] != old.meta["val"].shape[-1:]:
            new = self._make(old, aten.slice.Tensor, new, -1, 0, tensor(old).shape[-1])
        if tensor(new).stride() == tensor(old).stride():
            return new
        swapped = self._make(old, aten.transpose.int, new, 1, 2)  # heads within a position
        dense = self._make(old, aten.clone.default, swapped, memory_format=torch.contiguous_format)
        return self._make(old, aten.transpose.int, dense, 1, 2)
