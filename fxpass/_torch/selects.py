"""What the two sides of a branch on data leave behind, as one value: a select, and no other gradient.

Written for torch 2.11 to 2.13; active only inside ``dynamo.py``'s patches, for ``forks.py``.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch._dynamo.variables.lists import ListVariable, TupleVariable
from torch._dynamo.variables.tensor import TensorVariable

from ..errors import CaptureError
from .dynamo_common import call, fail, record_of_frame, user_line
from .frame_record import FrameRecord

_C: Any = torch._C  # whose stubs know less


class Declined(Exception):
    """Why the two sides can't both be in the graph."""


class Raises(Exception):
    """A side ends the program, or the function, with an exception: its text."""


def example(variable: Any) -> Any:
    """The fake tensor behind a variable."""
    return variable.as_proxy().node.meta["example_value"]


def storages(nodes: Iterable[torch.fx.Node]) -> set[int]:
    """Where the values of nodes lie."""
    values = (n.meta.get("example_value") for n in nodes)
    return {_storage(v) for v in values if isinstance(v, torch.Tensor)}


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def written_data(nodes: Iterable[torch.fx.Node]) -> set[int]:
    """Where is written through a ``.data``, which has a version of its own: nothing else shows it."""
    data = (n.meta["example_value"] for n in nodes if n.target is _C._autograd._get_data_attr)
    return {_storage(v) for v in data if v._version}


def keeps_statistics(node: torch.fx.Node) -> bool:
    """Whether a call updates running statistics: torch's schemas don't say so."""
    if not callable(node.target):
        return False
    try:
        names = list(inspect.signature(node.target).parameters)
    except ValueError:
        packet: Any = getattr(torch.ops.aten, getattr(node.target, "__name__", ""), None)
        names = [a.name for a in packet.default._schema.arguments] if hasattr(packet, "default") else []
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    updates = given.get("training") or given.get("use_input_stats", "use_input_stats" in names)
    return isinstance(given.get("running_mean"), torch.fx.Node) and bool(updates)


def select(tx: Any, older: set[int], taken: Any, a: Any, b: Any) -> Any:
    """One variable for what is ``a`` on the side taken if the condition holds, and ``b`` otherwise.

    ``older`` is where the values lie that were there before the branch.
    """
    a, b = a.realize(), b.realize()
    if a is b or (_constant(a) and _constant(b) and _same(a.as_python_constant(), b.as_python_constant())):
        return a
    if type(a) is type(b) and isinstance(a, (TupleVariable, ListVariable)) and len(a.items) == len(b.items):
        items = [select(tx, older, taken, x, y) for x, y in zip(a.items, b.items, strict=True)]
        return type(a)(items, mutation_type=a.mutation_type)
    if not all(isinstance(v, TensorVariable) or _is_number(v) for v in (a, b)):
        raise Declined(f"one of its sides gives a {_kind(a)}, the other a {_kind(b)}")
    _refuse_unlike([example(v) for v in (a, b) if isinstance(v, TensorVariable)])
    chosen = call(tx, torch.where, taken, a, b)
    if any(isinstance(v, TensorVariable) and _storage(example(v)) in older for v in (a, b)):
        record_of_frame().selected.append((example(chosen), user_line()))
    return chosen


def _refuse_unlike(sides: list[torch.Tensor]) -> None:
    """Raise unless a select between the tensors is what each of them would have been."""
    if len(sides) == 1 and sides[0].dim():
        raise Declined("one of its sides gives a number, the other a tensor with dimensions")
    kinds = {(t.dtype, t.device, tuple(map(str, t.shape))) for t in sides}
    if len(kinds) > 1:
        raise Declined("its sides make tensors of different shapes or dtypes")
    if not torch.is_grad_enabled() and any(t.requires_grad for t in sides):
        raise Declined("its sides meet where gradients are switched off")


def _constant(value: Any) -> bool:
    return bool(value.is_python_constant())


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b)


def _is_number(value: Any) -> bool:
    return _constant(value) and isinstance(value.as_python_constant(), (bool, float))


def _kind(value: Any) -> str:
    return "tensor" if isinstance(value, TensorVariable) else value.python_type_name()


def refuse_written(record: FrameRecord, graph: torch.fx.Graph) -> None:
    """Raise if the step writes in place to what a select has made: it may have been another name's tensor."""
    data = written_data(graph.nodes) if record.selected else set()
    for tensor, where in record.selected:
        if tensor._version or _storage(tensor) in data:
            found = "a tensor that depends on a branch on data is written in place"
            hint = "write to a copy (h = h.clone(), behind the branch), or choose with torch.where"
            raise fail(CaptureError(found, where=where, hint=hint))


# ---------------------------------------------------------------- gradients of the side not taken


def gate(graph: torch.fx.Graph, last: torch.fx.Node, taken: torch.fx.Node, other: torch.fx.Node) -> None:
    """Make the nodes behind ``last`` right where their side is not taken.

    What is older, and has a gradient, is read through a select; assertions hold on the ``other`` side.
    """
    side = []
    for node in reversed(graph.nodes):
        if node is last:
            break
        if node.op != "placeholder":
            side.append(node)
    inside: set[torch.fx.Node] = set(side)
    gates: dict[torch.fx.Node, torch.fx.Node] = {}
    for node in reversed(side):
        if node.target is torch._assert_async:
            with graph.inserting_before(node):
                holds = _call(graph, torch.logical_or, node.args[0], other)
            node.args = (holds, *node.args[1:])
        for value in node.all_input_nodes:
            if value not in inside and _has_gradient(value):
                if value not in gates:
                    with graph.inserting_before(side[-1]):
                        gates[value] = _gated(graph, taken, value)
                node.replace_input_with(value, gates[value])


def _has_gradient(node: torch.fx.Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, torch.Tensor) and value.requires_grad


def _gated(graph: torch.fx.Graph, taken: torch.fx.Node, value: torch.fx.Node) -> torch.fx.Node:
    """``where(taken, value, value.detach())``: the value, with a gradient if this side is taken."""
    return _call(graph, torch.where, taken, value, _call(graph, torch.Tensor.detach, value))


def _call(graph: torch.fx.Graph, function: Any, *args: torch.fx.Node) -> torch.fx.Node:
    """A node as Dynamo would have written it, with its fake result."""
    node = graph.call_function(function, args)
    node.meta.update({k: v for k, v in args[0].meta.items() if k in ("stack_trace", "nn_module_stack")})
    node.meta["example_value"] = function(*(a.meta["example_value"] for a in args))
    return node
