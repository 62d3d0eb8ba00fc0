"""Gradients by any road: which calls of Dynamo's graph take gradients, and which of them with the loss scale.

``backward()`` is not the only way to an optimizer: ``p.grad = g`` takes the results of
``torch.autograd.grad``, of ``torch.func.grad`` per sample, of both after the user's
edits. The data flow of Dynamo's graph tells three kinds of calls apart:

- ``backward()``: its seed and gradients were marked as Dynamo traced it.
- *scaled*: an optimizer reads what depends on the results, and nothing differentiates
  them. Seed and results get the same marks; scale, unscale and verdict follow.
- *unscaled*: the rest. Results that are differentiated again (a gradient penalty, the
  inner step of MAML) would bring a second scale into what the outer backward computes;
  of results that reach no optimizer nobody would notice that the scale is too large.
  They are computed in float32 (passes/cast.py), where no gradient needs a scale.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from .. import _torch
from ..ir.marks import GRAD, MARK, SEED
from .phases import UNSCALED
from .writes import storages


@dataclass
class Flow:
    """What depends on each of the gradient calls; sets of them are bit masks."""

    calls: list[Node]
    values: dict[Node, int] = field(default_factory=dict)
    memory: dict[int, int] = field(default_factory=dict)  # by storage: what was written into it
    differentiated: int = 0
    read: int = 0  # by an optimizer, as its gradient
    written: dict[Node, Node] = field(default_factory=dict)  # by input of the frame: who wrote it first

    @classmethod
    def of(cls, graph: Graph) -> Flow:
        """Follow the values of ``graph``, and what is written in place, from its start to its end."""
        flow, followed = cls(_torch.gradient_calls(graph)), cls([])
        bits, arguments = {call: 1 << i for i, call in enumerate(flow.calls)}, {}
        for node in graph.nodes:
            if node.target is _torch.optimizer_step:
                flow.read |= flow.behind(node.all_input_nodes)
                continue
            flow._pass_on(node, flow.behind(node.all_input_nodes) | bits.get(node, 0))
            if node in bits:
                arguments = _torch.gradient_arguments(node)
                flow.differentiated |= followed.behind(_nodes(arguments["outputs"]))
            passed = followed.behind(n for n in node.all_input_nodes if _requires_grad(n))
            if node in bits and arguments["create_graph"]:
                passed |= bits[node]
            if passed and (_requires_grad(node) or _torch.written(node)):
                followed._pass_on(node, passed)
        return flow

    def behind(self, nodes: Iterable[Node]) -> int:
        """The calls that values depend on."""
        calls = 0
        for node in nodes:
            calls |= self.values.get(node, 0)
            if self.memory:
                for storage in storages(node):
                    calls |= self.memory.get(storage, 0)
        return calls

    def _pass_on(self, node: Node, calls: int) -> None:
        if not calls:
            return
        self.values[node] = calls
        for target in _torch.written(node):
            self.values[target] = self.values.get(target, 0) | calls
            for storage in storages(target):
                self.memory[storage] = self.memory.get(storage, 0) | calls
            if target.op == "placeholder":
                self.written.setdefault(target, node)


def mark_gradients(graph: Graph, seeds: int, grads: int) -> tuple[set[Node], list[_torch.LeafGrad]]:
    """Mark the scaled calls, and gradients that an optimizer reads and none of them has made.

    The marks are numbered from the two counts. Returns the scaled calls, and what the new GRAD marks are.
    """
    flow, leaf_grads = Flow.of(graph), list[_torch.LeafGrad]()
    forward_mode = _forward_mode(graph)
    scaled = 0
    for number, call in enumerate(flow.calls):
        assert callable(call.target), "a gradient call is a function"
        function = _torch.with_forward_links(call.target)
        if is_backward(call):
            scaled |= 1 << number
        # a dual number has no marks: they have no rule for it
        elif flow.read & ~flow.differentiated & (1 << number) and call not in forward_mode and _is_real(call):
            arguments = _torch.gradient_arguments(call)
            function = _torch.with_marks(function, seeds, grads + len(leaf_grads))
            leaf_grads += [_torch.LeafGrad(seeds, _leaf(n).name) for n in _nodes(arguments["inputs"])]
            seeds += len(_nodes(arguments["outputs"]))
            scaled |= 1 << number
        else:
            call.meta["custom"] = {**(call.meta.get("custom") or {}), UNSCALED: True}
        call.target = function
    for read in _reads(graph):
        if not flow.behind([read.value]) & scaled:
            with graph.inserting_before(read.mark):
                leaving = graph.call_function(MARK, (read.value, GRAD, grads + len(leaf_grads)))
            leaving.meta["example_value"] = read.value.meta["example_value"]
            read.mark.replace_input_with(read.value, leaving)
            leaf_grads.append(_torch.LeafGrad(None, read.param.name))
    return {call for i, call in enumerate(flow.calls) if scaled & (1 << i)}, leaf_grads


@dataclass(frozen=True)
class _Read:
    """A gradient that one optimizer step reads."""

    event: int
    param: Node
    mark: Node
    value: Node
    computed: bool  # by the frame, or written by it

    @property
    def in_place(self) -> bool:
        """Whether it is the tensor that was in ``.grad`` before the frame."""
        return self.value.op == "placeholder"


def _reads(graph: Graph) -> Iterator[_Read]:
    memory: set[int] = set()  # that the frame has written
    for node in list(graph.nodes):
        if node.target is _torch.optimizer_step:
            arguments: Any = node.args
            event, params, marks, _ = arguments
            for param, mark in zip(params, marks, strict=True):
                value = mark.args[0]
                computed = value.op != "placeholder" or not memory.isdisjoint(storages(value))
                yield _Read(event, param, mark, value, computed)
        else:
            memory.update(s for target in _torch.written(node) for s in storages(target))


def differentiated(graph: Graph) -> set[Node]:
    """The operations that a gradient call of the frame may go back through; all if there is none."""
    calls = _torch.gradient_calls(graph)
    if not calls:
        return set(graph.nodes)
    operations = {n for call in calls for n in _nodes(_torch.gradient_arguments(call)["outputs"])}
    memory = {s for n in operations for s in storages(n)}
    for node in reversed(graph.nodes):
        if node in operations or any(not memory.isdisjoint(storages(n)) for n in _torch.written(node)):
            operations.add(node)
            operations.update(node.all_input_nodes)
            memory.update(s for n in node.all_input_nodes for s in storages(n))
    return operations


def is_gradient_call(node: Node) -> bool:
    """Whether a node of Dynamo's graph takes gradients."""
    return node.op == "call_function" and node.target in _torch.GRADIENT_CALLS


def inputs_of(call: Node) -> list[Node]:
    """What a gradient call differentiates by."""
    return _nodes(_torch.gradient_arguments(call)["inputs"])


def is_backward(call: Node) -> bool:
    """Whether a gradient call stands for ``backward()``: its seed has a mark."""
    seed = call.kwargs.get("grad_outputs")
    return isinstance(seed, Node) and seed.target is MARK and seed.args[1] == SEED


def updated_by_hand(graph: Graph) -> Node | None:
    """The first operation, of no optimizer, that writes to a parameter what depends on a gradient."""
    flow = Flow.of(graph)
    parameters = (n for n in flow.written if isinstance(n.meta.get("example_value"), torch.nn.Parameter))
    return next((flow.written[p] for p in parameters), None)


def computes_gradients(graph: Graph, event: int) -> bool:
    """Whether the frame has computed or written any of the gradients that an optimizer step reads."""
    return any(read.computed for read in _reads(graph) if read.event == event)


def written_in_place(graph: Graph) -> set[str]:
    """Parameters in whose ``.grad`` the frame has written, but put no other tensor: the user counts on it."""
    return {read.param.name for read in _reads(graph) if read.computed and read.in_place}


def _forward_mode(graph: Graph) -> set[Node]:
    """What runs within a level of forward-mode differentiation."""
    inside, level = set(), 0
    for node in graph.nodes:
        level += _torch.enters_forward_mode(node)
        if level:
            inside.add(node)
    return inside


def _leaf(node: Node) -> Node:
    """The input behind what functorch or ``detach()`` made of it, else ``node``."""
    start = node
    while node.op != "placeholder":
        passing = node.target in ("detach", "requires_grad_") or _torch.wraps(node)
        if not passing or not isinstance(node.args[0], Node):
            return start
        node = node.args[0]
    return node


def _is_real(call: Node) -> bool:
    """Whether neither outputs nor gradients of a call are complex."""
    arguments = _torch.gradient_arguments(call)
    nodes = [*_nodes(arguments["outputs"]), *_nodes(arguments["inputs"])]
    return not any(isinstance(v := n.meta.get("example_value"), Tensor) and v.is_complex() for n in nodes)


def _nodes(argument: Any) -> list[Node]:
    parts = argument if isinstance(argument, (list, tuple)) else [argument]
    return [n for n in parts if isinstance(n, Node)]


def _requires_grad(node: Node) -> bool:
    values = node.meta.get("example_value")
    values = values if isinstance(values, (list, tuple)) else [values]
    # a value of a level of torch.func's does not tell whether autograd follows it outside
    return any(isinstance(v, Tensor) and (v.requires_grad or _torch.is_wrapped(v)) for v in values)
