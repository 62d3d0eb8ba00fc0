"""Outputs whose autograd graph a backward of the frame went through: they leave the graph detached.

Written for torch 2.11 to 2.13; active only inside ``dynamo.py``'s patches.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

from torch._dynamo import output_graph
from torch._dynamo.variables import tensor

from .dynamo_common import record_of_frame
from .gradient_calls import traversed, values_of_transforms


def _note_hook(_: Callable[..., Any]) -> Callable[..., Any]:
    """Instead of breaking the graph, remember outputs whose autograd graph a backward() went through.

    The backend detaches them: in eager they still carry a graph, but one that
    raises when it is used (or holds all activations, after retain_graph=True).
    """

    def note(self: Any, rv: list[Any], tx: Any) -> None:
        record, behind = record_of_frame(), _gone_through(self)
        within = values_of_transforms(self.graph) if record.events else set()
        for variable in rv:
            if _is_consumed(variable, behind, within):
                record.consumed.add(variable.as_proxy().node.name)

    return note


def _gone_through(graph: Any) -> set[Any]:
    """The nodes of autograd that the frame's backwards went through."""
    record = record_of_frame()
    consumed = graph.autograd_grad_consumed_grad_fns | record.traversed
    return consumed | traversed(graph.graph) if record.events else consumed


def _is_consumed(variable: Any, behind: set[Any], within: Container[Any] = ()) -> bool:
    """Whether the autograd graph of an output reaches nodes ``behind`` a backward, or it is ``within``."""
    if not isinstance(variable, tensor.TensorVariable) or not variable.requires_grad:
        return False
    node = variable.as_proxy().node
    fake = node.meta["example_value"]
    if fake.grad_fn is None:
        return False
    return node in within or bool(output_graph.collect_reachable_grad_fns([(fake, None)]) & behind)


def _leak_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    """What leaves the graph detached may depend on an intermediate that was told to require grad."""

    def check(self: Any, rv: list[Any], tx: Any) -> None:
        behind = _gone_through(self)
        original(self, [v for v in rv if not _is_consumed(v, behind)], tx)

    return check


_HOOKS: list[tuple[Any, str, Callable[..., Any]]] = [
    (output_graph.OutputGraph, "_validate_outputs_safe_for_autograd_nodes", _note_hook),
    (output_graph.OutputGraph, "_check_requires_grad_intermediate_outputs", _leak_hook),
]
HOOKS = [(owner, name, hook) for owner, name, hook in _HOOKS if hasattr(owner, name)]  # torch 2.11 has one
