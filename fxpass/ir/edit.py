"""The one door for changing a graph: keeps values true and stamps who inserted what, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.fx import Node
from torch.utils._pytree import tree_map_only  # public in all but name: torch.export's documents use it

from .graph import Origin, Phase, StepGraph, origin, phase

aten = torch.ops.aten


class Editor:
    """Inserts and rewires nodes of one graph on behalf of one pass."""

    def __init__(self, step: StepGraph, pass_name: str) -> None:
        self.step = step
        self.pass_name = pass_name
        self.inserted: list[Node] = []
        self.touched: set[Node] = set()
        self.removed = 0
        self.declined: list[str] = []
        inputs = [n.meta["val"] for n in step.graph.nodes if n.op == "placeholder"]
        self._fake_mode = next((v.fake_mode for v in inputs if hasattr(v, "fake_mode")), None)

    def decline(self, reason: str) -> None:
        """Record why the pass left something alone."""
        self.declined.append(reason)

    @contextmanager
    def before(self, node: Node) -> Iterator[None]:
        """Insert what follows before ``node``."""
        with self.step.graph.inserting_before(node):
            yield

    @contextmanager
    def after(self, node: Node) -> Iterator[None]:
        """Insert what follows after ``node`` (after the last input, if it is one).

        Consecutive insertions keep their order.
        """
        if node.op == "placeholder":
            node = [n for n in self.step.graph.nodes if n.op == "placeholder"][-1]
        following = node.next
        with self.step.graph.inserting_before(following):
            yield

    def call(self, target: Callable[..., Any], *args: Any, when: Phase, reason: str, **kwargs: Any) -> Node:
        """A new call at the insertion point, its fake value computed, its origin stamped."""
        node = self.step.graph.call_function(target, args, kwargs)
        node.meta["fxpass_phase"] = when
        node.meta["fxpass_origin"] = Origin(self.pass_name, reason)
        source = next((a for a in node.all_input_nodes if "stack_trace" in a.meta), None)
        if source is not None:
            node.meta["stack_trace"] = source.meta["stack_trace"]
        self.refresh(node)
        self.inserted.append(node)
        return node

    def cast(self, x: Node, dtype: torch.dtype, *, when: Phase, reason: str) -> Node:
        """``x`` in ``dtype``; ``x`` itself if it has it."""
        if x.meta["val"].dtype == dtype:
            return x
        return self.call(aten._to_copy.default, x, dtype=dtype, when=when, reason=reason)

    def copy(self, node: Node, copies: dict[Node, Node], *, when: Phase, reason: str) -> Node:
        """``node`` again, reading ``copies`` of its inputs where there are any."""
        assert callable(node.target), f"{node.name} is not a call"
        args, kwargs = tree_map_only(Node, lambda n: copies.get(n, n), (node.args, node.kwargs))
        return self.call(node.target, *args, when=when, reason=reason, **kwargs)

    def never(self, loss: Node, reason: str) -> Node:
        """A 0-d bool right after ``loss`` that is always false, though it is computed from it."""
        with self.after(loss):
            total = loss
            if loss.meta["val"].ndim:
                total = self.call(aten.sum.default, loss, when=Phase.FORWARD, reason=reason)
            is_nan = self.call(aten.ne.Tensor, total, total, when=Phase.FORWARD, reason=reason)
            is_number = self.call(aten.eq.Tensor, total, total, when=Phase.FORWARD, reason=reason)
            return self.call(aten.logical_and.default, is_nan, is_number, when=Phase.FORWARD, reason=reason)

    def refresh(self, node: Node) -> None:
        """Recompute the fake value of a node from those of its inputs."""
        args, kwargs = tree_map_only(Node, lambda n: n.meta["val"], (node.args, node.kwargs))
        assert callable(node.target), f"{node.name} is not a call"
        with self._fake_mode or torch.no_grad(), torch.no_grad():
            node.meta["val"] = node.target(*args, **kwargs)
        self.touched.add(node)

    def set_arg(self, node: Node, index: int, value: Any) -> None:
        """Replace one positional argument (the caller refreshes if the dtype changed)."""
        node.update_arg(index, value)
        self.touched.add(node)

    def replace_uses(self, old: Node, new: Any, *, keep: Callable[[Node], bool] = lambda _: False) -> None:
        """Make users of ``old`` read ``new``, except those that ``keep`` accepts."""
        for user in old.replace_all_uses_with(new, delete_user_cb=lambda user: not keep(user)):
            self.touched.add(user)

    def erase(self, node: Node) -> None:
        """Remove a node without users."""
        self.step.graph.erase_node(node)
        self.touched.discard(node)
        self.removed += 1

    def first(self, nodes: Iterable[Node]) -> Node | None:
        """Whichever of ``nodes`` comes first in the graph."""
        wanted = set(nodes)
        return next((n for n in self.step.graph.nodes if n in wanted), None)

    def last(self, nodes: Iterable[Node]) -> Node:
        """Whichever of ``nodes`` comes last in the graph."""
        wanted = set(nodes)
        return next(n for n in reversed(self.step.graph.nodes) if n in wanted)

    def hoist(self, node: Node, before: Node) -> bool:
        """Move ``node`` and what it needs before ``before``; False if it needs a new value of an update."""
        order = {n: i for i, n in enumerate(self.step.graph.nodes)}
        late = {node}
        stack = [node]
        while stack:
            for source in stack.pop().all_input_nodes:
                if order[source] > order[before] and source not in late:
                    late.add(source)
                    stack.append(source)
        late = {n for n in late if order[n] > order[before]}
        # what a pass put into the update (a clip of the gradient) is no value of the optimizer's
        if before in late or any(phase(n) is Phase.UPDATE and origin(n) is None for n in late):
            return False
        for moved in sorted(late, key=order.__getitem__):
            before.prepend(moved)
        return True
