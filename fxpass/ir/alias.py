"""One model of storage: which values may lie in the same memory, read off the operators' schemas.

A schema says which results are views of which arguments and what is written in
place. An operator without a schema may do either: its results are taken to lie
in the storage of everything it reads. ``reshape``, ``contiguous`` and ``to``
copy or do not, depending on strides: they may share, and ``view_of`` looks
at the values of the graph.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import guard_or_false, statically_known_true

from .marks import MARK

aten = torch.ops.aten

# Which elements these return, or whether they can, depends on strides.
_READ_LAYOUTS = {aten.view.default, aten.view.dtype, aten.as_strided.default, aten.view_as_complex.default}

Storages = dict[Node, frozenset[Node]]


def shared(node: Node) -> tuple[Node, ...]:
    """The arguments in whose storage a result of ``node`` may lie."""
    if node.op not in ("call_function", "call_module", "call_method"):
        return ()
    target = node.target
    if target is operator.getitem or target in _IDENTITIES:
        return tuple(n for n in node.args[:1] if isinstance(n, Node))
    if isinstance(target, torch._ops.OpOverload):
        return tuple(_arguments(node, _may_be_returned(target)))
    if isinstance(target, torch._ops.HigherOrderOperator) or not _holds_tensor(node.meta.get("val", ...)):
        return ()  # a higher-order operator must not return what it was given
    return tuple(node.all_input_nodes)


def written(node: Node) -> tuple[Node, ...]:
    """The arguments that ``node`` writes in place."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return ()
    return tuple(_arguments(node, _in_place(node.target)))


def is_view(node: Node) -> bool:
    """Whether the node only looks at its input's storage, or picks one of several results."""
    known = node.target is operator.getitem or isinstance(node.target, torch._ops.OpOverload)
    return known and node.target is not MARK and bool(shared(node)) and not written(node)


def keeps_elements(node: Node) -> bool:
    """Whether the node is a view of all elements of its input, whatever their strides are."""
    if not is_view(node) or not isinstance(node.target, torch._ops.OpOverload):
        return False
    arguments = {a.name for a in node.target._schema.arguments}
    old, new = node.args[0].meta.get("val") if isinstance(node.args[0], Node) else None, node.meta.get("val")
    if not isinstance(old, Tensor) or not isinstance(new, Tensor) or "storage_offset" in arguments:
        return False
    return old.dtype == new.dtype and old.ndim + new.ndim > 0 and guard_or_false(old.numel() == new.numel())


def layout_is_read(node: Node) -> bool:
    """Whether what follows, through views, was traced for the strides of this very value."""
    return any(u.target in _READ_LAYOUTS or (is_view(u) and layout_is_read(u)) for u in node.users)


def lie_alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape have the same strides, where those matter.

    Nothing is guarded on; of sizes that depend on data nobody knows more than that they are alike.
    """
    if a.layout is not torch.strided or b.layout is not torch.strided:
        return a.layout == b.layout
    strides = [(n, hint_of(s), hint_of(t)) for n, s, t in zip(a.shape, a.stride(), b.stride(), strict=True)]
    return all(statically_known_true(n <= 1) or None in (s, t) or s == t for n, s, t in strides)


def hint_of(size: Any) -> int | None:
    """What a size or stride is while tracing; None if it depends on data."""
    if isinstance(size, int):
        return size
    return int(size.node.hint) if size.node.has_hint() else None


def view_of(node: Node) -> Node | None:
    """The argument in whose storage the result does lie; None if it is a new one."""
    operands = shared(node)
    if node.target is MARK or not isinstance(node.target, torch._ops.OpOverload) or not operands:
        return None
    copies = {aten.reshape.default: _reshape_copies, aten.contiguous.default: _contiguous_copies}
    return None if copies.get(node.target, _never)(operands[0], node) else operands[0]


def storage_of(node: Node) -> Node:
    """The value whose storage a chain of views looks at; a result of a multi-output kernel is its own."""
    while is_view(node) and isinstance(node.args[0], Node):
        if node.target is operator.getitem and not is_view(node.args[0]):
            break
        node = node.args[0]
    return node


def input_storages(graph: Graph) -> Storages:
    """The inputs in whose storage each value may lie; values that lie in none are left out."""
    storages: Storages = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            storages[node] = frozenset((node,))
        elif not written(node):  # what a write returns is the new value
            inputs = [storages[n] for n in shared(node) if n in storages]
            if inputs:
                storages[node] = frozenset[Node]().union(*inputs)
    return storages


@dataclass(frozen=True)
class Hazard:
    """``reader`` reads ``value`` after ``write`` has replaced what it looks at."""

    reader: Node
    value: Node
    write: Node


def hazards(graph: Graph) -> Iterator[Hazard]:
    """Reads of an input's storage after the write that ends its old value; linear in the graph's size.

    What the graph returns is not a read: a view of an input that the step
    updates shows the new value in the uncompiled step too.
    """
    lies = input_storages(graph)
    ended: dict[Node, Node] = {}
    for node in graph.nodes:
        if node.op == "output":
            return
        for value in node.all_input_nodes:
            for base in lies.get(value, ()):
                if base in ended:
                    yield Hazard(node, value, ended[base])
        for target in written(node):
            for base in lies.get(target, ()):
                ended.setdefault(base, node)


_IDENTITIES = frozenset((MARK, aten._unsafe_view.default))  # views that the schema does not call so


def _holds_tensor(value: object) -> bool:
    """Whether a fake value is or holds a tensor; one that is not known may."""
    if isinstance(value, (tuple, list)):
        return any(map(_holds_tensor, value))
    return value is ... or isinstance(value, Tensor)


Places = tuple[tuple[int, str], ...]  # arguments of an operator, by position and name


@functools.cache
def _may_be_returned(op: torch._ops.OpOverload) -> Places:
    """The arguments that a result of ``op`` may be a view of."""
    return _annotated(op, lambda info: _returned(op._schema, info))


@functools.cache
def _in_place(op: torch._ops.OpOverload) -> Places:
    """The arguments that ``op`` writes."""
    return _annotated(op, lambda info: info.is_write)


def _annotated(op: torch._ops.OpOverload, wanted: Callable[[Any], bool]) -> Places:
    arguments = enumerate(op._schema.arguments)
    return tuple((i, a.name) for i, a in arguments if a.alias_info is not None and wanted(a.alias_info))


def _arguments(node: Node, places: Places) -> Iterator[Node]:
    """The nodes given at ``places``."""
    for position, name in places:
        given = node.args[position] if position < len(node.args) else node.kwargs.get(name)
        for value in given if isinstance(given, (list, tuple)) else (given,):
            if isinstance(value, Node):
                yield value


def _returned(schema: Any, info: Any) -> bool:
    """Whether a result may be a view of the argument with this annotation."""
    for result in schema.returns:
        # a list of views is written Tensor(a -> *) self -> Tensor(a)[], and keeps no name for the list
        if result.alias_info and (info.before_set & result.alias_info.before_set or "*" in info.after_set):
            return True
    return False


def _is_view_schema(schema: Any) -> bool:
    first = schema.arguments[0].alias_info
    converts = any(a.name == "dtype" for a in schema.arguments)
    return first is not None and not schema.is_mutable and not converts and _returned(schema, first)


def _never(_: Node, __: Node) -> bool:
    return False


def _reshape_copies(source: Node, node: Node) -> bool:
    try:
        source.meta["val"].view(node.meta["val"].shape)
    except (RuntimeError, ValueError):  # the latter from fake tensors
        return True
    return False


def _contiguous_copies(source: Node, node: Node) -> bool:
    memory_format = node.kwargs.get("memory_format", torch.contiguous_format)
    return not source.meta["val"].is_contiguous(memory_format=memory_format)


# Names of the operators that are views of their first argument, in its dtype; getitem picks one of several.
VIEWS = frozenset(
    schema.name.split("::")[-1]
    for schema in torch._C._jit_get_all_schemas()
    if schema.name.startswith(("aten::", "prims::"))
    if schema.arguments and str(schema.arguments[0].type) == "Tensor" and _is_view_schema(schema)
) | {"_unsafe_view", "getitem"}
