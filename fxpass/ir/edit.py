"""The one door for changing a graph: keeps values true and stamps who inserted what, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_map_only  # public in all but name: torch.export's documents use it

from .graph import Phase, StepGraph, phase
from .provenance import Origin, inherit, origin
from .unbacked import SIZES, recompute

aten = torch.ops.aten


class Editor:
    """Inserts and rewires nodes of one graph on behalf of one pass."""

    def __init__(self, step: StepGraph, pass_name: str) -> None:
        self.step = step
        self.pass_name = pass_name
        self.inserted: list[Node] = []
        self.touched: set[Node] = set()
        self._computed: dict[Node, list[Any]] = {}  # what was read when the value was computed here
        self.removed = 0
        self.declined: list[str] = []
        inputs = [n.meta["val"] for n in step.inputs()]
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
            node = list(self.step.inputs())[-1]
        following = node.next
        with self.step.graph.inserting_before(following):
            yield

    def call(
        self,
        target: Callable[..., Any],
        *args: Any,
        when: Phase,
        reason: str,
        sizes_of: Node | None = None,
        **kwargs: Any,
    ) -> Node:
        """A new call at the insertion point, its fake value computed, its origin stamped.

        Sizes that depend on data are those of ``sizes_of``, which computes the same.
        """
        node = self.step.graph.call_function(target, args, kwargs)
        if sizes_of is not None and SIZES in sizes_of.meta:
            node.meta[SIZES] = sizes_of.meta[SIZES]
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
        return self.call(node.target, *args, when=when, reason=reason, sizes_of=node, **kwargs)

    def expand(self, node: Node, body: GraphModule, *, reason: str) -> None:
        """Replace ``node`` by ``body``, a graph over the same inputs that computes the same results."""
        values: dict[Node, Any] = {}
        inputs = iter(node.all_input_nodes)
        results: Any = None
        with self.before(node):
            for part in body.graph.nodes:
                if part.op == "placeholder":
                    values[part] = next(inputs)
                elif part.op == "output":
                    results = tree_map_only(Node, values.__getitem__, part.args[0])
                else:
                    made = self.copy(part, values, when=phase(node), reason=reason)
                    inherit(made, node)
                    values[part] = made
        if isinstance(results, (tuple, list)):
            for user in list(node.users):
                self.replace_uses(user, results[int(str(user.args[1]))])
                self.erase(user)
        else:
            self.replace_uses(node, results)
        self.erase(node)

    def refresh(self, node: Node) -> None:
        """Recompute the fake value of a node from those of its inputs."""
        args, kwargs = tree_map_only(Node, lambda n: n.meta["val"], (node.args, node.kwargs))
        assert callable(node.target), f"{node.name} is not a call"
        target = node.target
        node.meta["val"] = recompute(node, self._fake_mode, lambda: target(*args, **kwargs))
        self.touched.add(node)
        self._computed[node] = _reads(node)

    def unproven(self) -> Iterator[Node]:
        """The touched nodes whose value was not computed, here, from what they read now."""
        for node in self.touched:
            then, now = self._computed.get(node, []), _reads(node)
            if len(then) != len(now) or any(a is not b for a, b in zip(then, now, strict=True)):
                yield node

    def set_arg(self, node: Node, index: int, value: Any) -> None:
        """Replace one positional argument (the caller refreshes if the dtype changed)."""
        node.update_arg(index, value)
        self.touched.add(node)

    def replace_uses(self, old: Node, new: Any, *, keep: Callable[[Node], bool] = lambda _: False) -> None:
        """Make users of ``old`` read ``new``, except those that ``keep`` accepts."""
        for user in old.replace_all_uses_with(new, delete_user_cb=lambda user: not keep(user)):
            self.touched.add(user)

    def move_after(self, node: Node, anchor: Node) -> None:
        """Move ``node`` right behind ``anchor``; what it reads must stand before."""
        anchor.append(node)
        self.touched.add(node)

    def read_instead(self, user: Node, old: Node, new: Node) -> None:
        """Make one node read ``new`` where it reads ``old``."""
        user.replace_input_with(old, new)
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


def _reads(node: Node) -> list[Any]:
    """All that the value of ``node`` follows from, and the value: compared by identity."""
    values = [n.meta.get("val") for n in node.all_input_nodes]
    return [node.target, node.args, node.kwargs, node.meta.get("val"), *values]
