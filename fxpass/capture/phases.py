"""When in the step a node runs: declared where Dynamo's graph knows it, read off where ATen's has it.

Dynamo's graph says how many ``optimizer.step()`` calls came before an
operation, and whether autograd follows it; both travel to the ATen graph as
annotations. What leads to a later backward or update, and what depends on a
gradient, is the data flow of the ATen graph, in which nothing is written in place.
"""

from __future__ import annotations

import operator
from collections.abc import Container, Iterable

import torch
from torch import Tensor
from torch.fx import Graph, Node

from .. import _torch
from ..ir.graph import Phase, Role, StepGraph, phase, source
from ..ir.marks import AVERAGE, GRAD, MARK, OLD, READ, SEED, UPDATE

STEPS = "fxpass_steps"  # how many optimizer steps came before
FOLLOWED = "fxpass_followed"  # whether autograd follows the operation
UNSCALED = "fxpass_unscaled"  # whether the operation computes a gradient without the loss scale
aten = torch.ops.aten


def declare(graph: Graph, differentiated: Container[Node]) -> None:
    """Annotate the operations of Dynamo's graph; ``differentiated``: those that a backward may reach."""
    enabled, steps = True, 0
    for node in graph.nodes:
        if node.target is _torch.set_grad_enabled:
            enabled = bool(node.args[0])
        values = _flat(node.meta.get("example_value"))
        followed = enabled and any(isinstance(v, Tensor) and v.requires_grad for v in values)
        followed = followed and node in differentiated
        if node.op in ("call_function", "call_method", "call_module"):
            facts = {STEPS: steps, FOLLOWED: followed}
            node.meta["custom"] = {**(node.meta.get("custom") or {}), **facts}
        steps += node.target is _torch.optimizer_step


def is_data(placeholder: Node) -> bool:
    """Whether an input of Dynamo's graph is what the function was called with, and no weight or buffer."""
    value = placeholder.meta.get("example_value")
    return _torch.is_argument(placeholder) and not isinstance(value, torch.nn.Parameter)


def _flat(value: object) -> Iterable[object]:
    return value if isinstance(value, (tuple, list)) else (value,)


def mark_backward(graph: Graph) -> None:
    """What was traced between a seed and the first gradient is backward; torch 2.11 does not say so."""
    inside = False
    for node in graph.nodes:
        if node.target is MARK and node.args[1] in (SEED, GRAD):
            inside = node.args[1] == SEED
        elif inside:
            node.meta["autograd_backward"] = True


def set_phases(step: StepGraph, data: set[Node]) -> None:
    """Give every node its phase, and tell what runs in the user's own precision; ``data``: see is_data."""
    nodes = list(step.graph.nodes)
    steps, followed = _declared(nodes)
    for node in nodes:
        node.meta["fxpass_phase"] = _known_phase(node)
    needed = _ancestors(n for n in nodes if phase(n) in (Phase.BACKWARD, Phase.UPDATE) or _is(n, READ))
    for node in nodes:
        if node.target is operator.getitem:
            node.meta["fxpass_phase"] = phase(source(node))
        elif phase(node) is Phase.FORWARD:
            behind_gradient = any(phase(n) is Phase.GRADIENT for n in node.all_input_nodes)
            if steps[node] and node not in needed:
                node.meta["fxpass_phase"] = Phase.AFTER
            elif behind_gradient and node not in followed:
                node.meta["fxpass_phase"] = Phase.GRADIENT
    for node in _own(step, nodes, followed, data):
        node.meta["fxpass_own"] = True
    for node in _unscaled(nodes):
        node.meta["fxpass_unscaled"] = True


def _declared(nodes: list[Node]) -> tuple[dict[Node, int], set[Node]]:
    """What was annotated; a node without annotation, made by a library, belongs to the one before."""
    steps: dict[Node, int] = {}
    followed: set[Node] = set()
    count, grad = 0, True
    for node in nodes:
        facts = node.meta.get("custom") or {}
        count, grad = facts.get(STEPS, count), facts.get(FOLLOWED, grad)
        steps[node] = count
        if grad:
            followed.add(node)
    return steps, followed


def _known_phase(node: Node) -> Phase:
    if node.op == "placeholder":
        return Phase.INPUT
    if node.op == "output" or node.target is aten.copy_.default:
        return Phase.OUTPUT
    if (node.meta.get("custom") or {}).get("fxpass") == "update":
        return Phase.UPDATE
    as_it_leaves = node.target is AVERAGE and any(_is(user, GRAD) for user in node.users)
    if node.meta.get("autograd_backward") or _is(node, SEED) or _is_unscaled(node) or as_it_leaves:
        return Phase.BACKWARD
    return Phase.GRADIENT if node.target in (MARK, AVERAGE) else Phase.FORWARD


def _is_unscaled(node: Node) -> bool:
    return bool((node.meta.get("custom") or {}).get(UNSCALED))


def _is(node: Node, role: str) -> bool:
    return node.target is MARK and node.args[1] == role


def _ancestors(nodes: Iterable[Node]) -> set[Node]:
    ancestors: set[Node] = set()
    stack = list(nodes)
    while stack:
        for node in stack.pop().all_input_nodes:
            if node not in ancestors:
                ancestors.add(node)
                stack.append(node)
    return ancestors


def _unscaled(nodes: list[Node]) -> set[Node]:
    """Gradients without the loss scale, and what a later backward makes of them before its own come in."""
    scaled: set[Node] = set()
    unscaled: set[Node] = set()
    for node in nodes:
        if phase(node) is not Phase.BACKWARD:
            continue
        if _is(node, SEED) or not scaled.isdisjoint(node.all_input_nodes):
            scaled.add(node)
        elif _is_unscaled(node) or not unscaled.isdisjoint(node.all_input_nodes):
            unscaled.add(node)
    return unscaled


def _own(step: StepGraph, nodes: list[Node], followed: set[Node], data: set[Node]) -> Iterable[Node]:
    """Nodes of forward, unseen by autograd, that make a new value for a weight or buffer.

    A weight that is divided by its spectral norm, say. A buffer that keeps what a
    model made of the data (a queue of keys) has the precision of that model.
    """
    writes = [n for n in nodes if n.target is aten.copy_.default]
    data = data - {source(write) for write in writes}
    of_data: set[Node] = set(data)
    for node in nodes:
        if not of_data.isdisjoint(node.all_input_nodes) or (
            node in followed and phase(node) is Phase.FORWARD
        ):
            of_data.add(node)
    own: set[Node] = set()
    for write in writes:
        is_weight = step.roles[source(write)] is Role.PARAMETER
        seen: set[Node] = set()
        stack = [source(write, 1)]
        while stack:
            node = stack.pop()
            if node in seen or phase(node) in (Phase.INPUT, Phase.BACKWARD):
                continue
            seen.add(node)
            if phase(node) is Phase.UPDATE:  # from the new value to the one it replaces
                stack += [n for n in node.all_input_nodes if _is(n, UPDATE) or _is(n, OLD) or _is(node, OLD)]
            elif phase(node) is not Phase.FORWARD:
                stack += node.all_input_nodes
            elif node not in followed and (is_weight or node not in of_data):
                own.add(node)
                stack += node.all_input_nodes
    return own
