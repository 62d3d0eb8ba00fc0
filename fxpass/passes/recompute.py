"""Recompute in backward what costs less to compute again than to keep."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from ..analysis.cost import is_deterministic, is_pointwise, seconds
from ..analysis.nodes import is_large, nbytes
from ..ir.alias import is_view, storage_of
from ..ir.edit import Editor
from ..ir.graph import Phase, StepGraph, phase
from .graph_pass import GraphPass

# How many large values one recomputation may start from. A residual stream is a chain of sums:
# without a bound its last sum would be recomputed from all of them, which then live at once.
MAX_LEAVES = 2
MAX_NODES = 200
EPSILON = 1e-12  # seconds: what repeats nothing but views is free


@dataclass(frozen=True)
class Recompute(GraphPass):
    """Choose which values of forward are kept for backward, and compute the others again there.

    Without a budget only what is free is repeated: elementwise operations whose
    inputs are kept anyway, or are smaller than their result. A gelu's output is
    kept for the next product's gradient although its input is kept for the
    gelu's own; a log-softmax is kept in float32 although the float16 logits and
    two numbers per row would do. With a ``memory_budget``, matrix products,
    attention and reductions are repeated too, until the kept bytes are at most
    that share of those of the step without recomputation: those first that free
    the most bytes, for the longest time, per second of repeated work. A smaller budget repeats
    all that a larger one does, and more. Random numbers are never drawn again.
    """

    name: ClassVar[str] = "recompute"
    memory_budget: float | None = None

    def run(self, step: StepGraph, edit: Editor) -> None:
        choice = _Choice(step)
        if not choice.kept:
            edit.decline("backward reads nothing large of forward")
            return
        allowed = choice.kept_bytes() * (1.0 if self.memory_budget is None else self.memory_budget)
        choice.take_what_is_free()
        choice.take_until(allowed)
        if self.memory_budget is not None and choice.kept_bytes() > allowed:
            edit.decline(
                f"{choice.kept_bytes()} bytes stay: nothing more can be repeated ({allowed:.0f} allowed)"
            )
        _repeat(step, edit, choice.again)


@dataclass(frozen=True)
class _Plan:
    """One value computed again: the nodes to repeat and the large values they start from."""

    value: Node
    body: frozenset[Node]
    leaves: frozenset[Node]


class _Choice:
    """The values kept for backward, and the nodes that are computed again instead."""

    def __init__(self, step: StepGraph) -> None:
        self.order = {n: i for i, n in enumerate(step.graph.nodes)}
        self.kept = set(_read_by_backward(step))
        self.again: set[Node] = set()
        self.cost = functools.cache(seconds)

    def kept_bytes(self) -> int:
        return sum(map(nbytes, self.kept))

    def take_what_is_free(self) -> None:
        for value in sorted(self.kept, key=self.order.__getitem__):
            plan = self._plan(value, pointwise_only=True)
            if plan is not None and self._freed(plan) > 0:
                self._take(plan)

    def take_until(self, allowed: float) -> None:
        """Take the plans that free the most bytes per second until ``kept_bytes() <= allowed``."""
        while self.kept_bytes() > allowed:
            best: tuple[float, _Plan] | None = None
            for value in sorted(self.kept, key=self.order.__getitem__):
                plan = self._plan(value, pointwise_only=False)
                if plan is None or self._freed(plan) <= 0:
                    continue
                work = sum(map(self.cost, plan.body - self.again)) or EPSILON
                rate = self._freed(plan) * self._idle(value) / work
                if best is None or rate > best[0]:
                    best = rate, plan
            if best is None:
                return
            self._take(best[1])

    def _idle(self, value: Node) -> int:
        """How many nodes run between the last reader in forward and the first in backward."""
        readers, stack = [], [value]
        while stack:
            for user in stack.pop().users:
                readers.append(user)
                stack += [user] if is_view(user) else []
        forward = [self.order[n] for n in readers if phase(n) is Phase.FORWARD]
        backward = [self.order[n] for n in readers if phase(n) is Phase.BACKWARD and not is_view(n)]
        return max(1, min(backward, default=0) - max(forward, default=self.order[value]))

    def _freed(self, plan: _Plan) -> int:
        return nbytes(plan.value) - sum(nbytes(leaf) for leaf in plan.leaves - self.kept)

    def _take(self, plan: _Plan) -> None:
        self.kept.remove(plan.value)
        self.kept |= plan.leaves
        self.again |= plan.body

    def _plan(self, value: Node, *, pointwise_only: bool) -> _Plan | None:
        body: set[Node] = set()
        leaves: set[Node] = set()
        stack = [value]
        while stack:
            node = stack.pop()
            if node in body or node.op == "placeholder":
                continue
            can_repeat = phase(node) is Phase.FORWARD and is_deterministic(node)
            can_repeat = can_repeat and (not pointwise_only or is_pointwise(node) or is_view(node))
            if node is not value and (node in self.kept or not can_repeat):
                leaves.add(node)
                continue
            body.add(node)
            if not can_repeat or len(body) > MAX_NODES:
                return None
            stack += node.all_input_nodes
        large = [leaf for leaf in leaves if nbytes(leaf) * 8 > nbytes(value)]
        if len(large) > MAX_LEAVES or any(not isinstance(leaf.meta["val"], torch.Tensor) for leaf in leaves):
            return None
        return _Plan(value, frozenset(body), frozenset(leaves))


def _read_by_backward(step: StepGraph) -> Iterator[Node]:
    """Values of forward, big enough to matter, that backward reads, directly or through views."""
    for node in step.nodes():
        if phase(node) is Phase.BACKWARD:
            for value in map(storage_of, node.all_input_nodes):
                if value.op == "call_function" and phase(value) is Phase.FORWARD and is_large(value):
                    yield value


def _repeat(step: StepGraph, edit: Editor, again: set[Node]) -> None:
    """Let backward read copies of ``again``, each made right before its first reader."""
    copies: dict[Node, Node] = {}
    order = {n: i for i, n in enumerate(step.graph.nodes)}
    for node in list(step.nodes()):
        if phase(node) is not Phase.BACKWARD:
            if phase(node) is Phase.FORWARD:
                copies.clear()  # another forward begins: its backward repeats for itself
            continue
        with edit.before(node):
            for needed in sorted(_needed(node, again, copies), key=order.__getitem__):
                reason = "costs less to compute again than to keep"
                copies[needed] = edit.copy(needed, copies, when=Phase.BACKWARD, reason=reason)
        for old in node.all_input_nodes:
            if old in copies:
                edit.read_instead(node, old, copies[old])


def _needed(node: Node, again: set[Node], copies: dict[Node, Node]) -> set[Node]:
    """What must be copied before ``node``: nodes of ``again`` it reads, views of them, and their inputs."""
    needed: set[Node] = set()
    stack = [n for n in node.all_input_nodes if storage_of(n) in again]
    while stack:
        current = stack.pop()
        if current in needed or current in copies:
            continue
        if current in again or (is_view(current) and storage_of(current) in again):
            needed.add(current)
            stack += current.all_input_nodes
    return needed
