"""A branch on what the step is given alone: decided while tracing, asked again before each call.

Written for torch 2.11 to 2.13; active only inside ``dynamo.py``'s patches, for ``forks.py``. Flags in
buffers (``if not self.initialized:``), the ends of a time grid, labels: what leads from the frame's inputs
to such a condition is computed with the real tensors, and its answer becomes a guard. A call with another
answer is compiled anew, a way of its own through the program. Parameters, and what was computed from
them, decide nothing: half of the forward would run before each call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._dynamo.guards import _get_closure_vars, install_guard
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Node, map_arg

from .dynamo_common import user_line
from .in_place import written
from .selects import keeps_statistics, storages, written_data

MOST = 256  # operations that lead to a condition: they are run again before each call


def answer(tx: Any, value: Any) -> bool | None:
    """The truth of ``value``, guarded; None where it depends on more than what the frame is given."""
    question = _question(tx.output.current_tracer.graph, value.as_proxy().node)
    if question is None:
        return None
    names = [source.name for source in question.sources]
    scope = {**_get_closure_vars(), "L": tx.output.local_scope, "G": tx.output.global_scope}
    with unset_fake_temporarily():
        states = _random_states()
        truth = question(*(eval(name, dict(scope)) for name in names))
        if truth is None or any(not torch.equal(a, b) for a, b in zip(states, _random_states(), strict=True)):
            return None
    place = user_line()

    def ask(builder: Any, guard: Any) -> None:
        known = {**_get_closure_vars(), "___fxpass_question": question}
        code = [f"___fxpass_question({', '.join(names)}) is {truth}"]
        builder.add_python_lambda_leaf_guard_to_root(code, [f"the branch is taken as before: {place}"], known)

    install_guard(question.sources[0].make_guard(ask))
    return truth


@dataclass(frozen=True, eq=False)
class _Question:
    """A function of the values of ``sources``: the truth of ``last``, None if it can't be told.

    What is called is copied from the nodes, for Dynamo takes unused ones apart.
    """

    sources: list[Any]
    inputs: list[Node]
    as_tensor: list[bool]
    calls: list[tuple[Node, Callable[..., Any], Any, Any]]
    writes: dict[Node, int]  # how often what is called writes to a tensor
    last: Node

    def __call__(self, *values: Any) -> bool | None:
        known = dict(zip(self.inputs, values, strict=True))
        for node, made in zip(self.inputs, self.as_tensor, strict=True):
            known[node] = torch._as_tensor_fullprec(known[node]) if made else known[node]
        with torch.no_grad(), torch._C.DisableTorchFunction():
            try:
                for node, function, *given in self.calls:
                    args, kwargs = map_arg(tuple(given), known.__getitem__)
                    known[node] = function(*args, **kwargs)  # pyrefly: ignore[not-iterable]
                # a write that the calls leave out would show here
                whole = all(getattr(known[n], "_version", 0) == count for n, count in self.writes.items())
                return bool(known[self.last]) if whole else None
            except Exception:  # whatever it is: in the step it comes where the program has it
                return None


def _function(node: Node) -> Callable[..., Any]:
    if callable(node.target):
        return node.target
    name = str(node.target)
    return lambda self, *args, **kwargs: getattr(self, name)(*args, **kwargs)


def _question(graph: torch.fx.Graph, last: Node) -> _Question | None:
    """What leads to ``last``, if it starts from inputs that are not trained, and writes to none of them."""
    waiting, needed = [last], {last}
    while waiting:
        node = waiting.pop()
        fresh = {*node.all_input_nodes, *(user for user in node.users if node in written(user))} - needed
        needed |= fresh
        waiting.extend(fresh)
        if len(needed) > MOST:
            return None
    nodes = [n for n in graph.nodes if n in needed]
    inputs = {n: n.meta.get("grapharg") for n in nodes if n.op == "placeholder"}
    calls = [n for n in nodes if n not in inputs]
    tensors = {n: v for n in nodes if isinstance(v := n.meta.get("example_value"), torch.Tensor)}
    known = len(nodes) == len(needed) and all(getattr(arg, "source", None) for arg in inputs.values())
    trained = any(v.requires_grad for v in tensors.values())
    changed = any(tensors[n]._version for n in inputs if n in tensors)
    if not inputs or not known or trained or changed or not all(map(_is_plain, calls)):
        return None
    if written_data(graph.nodes) & storages(nodes):
        return None
    return _Question(
        sources=[arg.source for arg in inputs.values()],
        inputs=list(inputs),
        as_tensor=[arg.pass_arg_as_tensor for arg in inputs.values()],
        calls=[(n, _function(n), n.args, n.kwargs) for n in calls],
        writes={n: v._version for n, v in tensors.items() if n not in inputs},
        last=last,
    )


def _is_plain(node: Node) -> bool:
    """Whether a node is a call that can be made twice."""
    if node.op not in ("call_function", "call_method") or keeps_statistics(node):
        return False
    return not isinstance(node.target, torch._ops.HigherOrderOperator)


def _random_states() -> list[torch.Tensor]:
    on_device = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *on_device]
