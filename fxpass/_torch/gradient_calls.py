"""The calls that take gradients, and what is done around them while AOTAutograd traces.

Written for torch 2.11 to 2.13. ``torch.func.grad``, ``vjp`` and ``jacrev`` reach the
graph as the function of functorch's that calls ``torch.autograd.grad`` on wrapped tensors.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._dynamo import output_graph
from torch._dynamo.exc import TorchRuntimeError
from torch._functorch import eager_transforms
from torch.fx import Graph, Node

from ..errors import CaptureError
from ..ir.marks import GRAD, SEED, TEXT, mark
from .dynamo_common import user_line
from .frame_record import FrameRecord

_WRAPPERS = frozenset(
    "_wrap_for_grad _unwrap_for_grad _set_tensor_requires_grad _add_batch_dim _remove_batch_dim".split()
)
GRADIENT_CALLS: tuple[Callable[..., Any], ...] = (torch.autograd.grad, eager_transforms._autograd_grad)


def gradient_calls(graph: Graph) -> list[Node]:
    """The calls of Dynamo's graph that take gradients, in order."""
    return [n for n in graph.nodes if n.op == "call_function" and n.target in GRADIENT_CALLS]


def behind(values: Sequence[Tensor]) -> set[Any]:
    """The nodes of autograd that a backward from fake values goes through; a leaf's is anybody's."""
    reached = output_graph.collect_reachable_grad_fns([(value, None) for value in values])
    return {fn for fn in reached if type(fn).__name__ != "AccumulateGrad"}


def traversed(graph: Graph) -> set[Any]:
    """The nodes of autograd's own level that the gradient calls of a graph go through."""
    nodes = [n for call in gradient_calls(graph) for n in _nodes(gradient_arguments(call)["outputs"])]
    values = [n.meta.get("example_value") for n in nodes]
    return behind([v for v in values if isinstance(v, Tensor) and not is_wrapped(v)])


def values_of_transforms(graph: Graph) -> set[Node]:
    """What depends on a gradient of torch.func's, or on what it was taken of: autograd follows it, too."""
    dependent: set[Node] = set()
    for call in gradient_calls(graph):
        if call.target is not torch.autograd.grad:
            dependent.update([call, *_nodes(gradient_arguments(call)["outputs"])])
    for node in graph.nodes:
        if not dependent.isdisjoint(node.all_input_nodes):
            dependent.add(node)
    return dependent


def enters_forward_mode(node: Node) -> int:
    """1 where a level of forward-mode differentiation begins, -1 where it ends, 0 elsewhere."""
    return {"_enter_dual_level": 1, "_exit_dual_level": -1}.get(getattr(node.target, "__name__", ""), 0)


def wraps(node: Node) -> bool:
    """Whether a node only takes a value into or out of a level of functorch's."""
    return getattr(node.target, "__name__", "") in _WRAPPERS


def is_wrapped(value: Tensor) -> bool:
    """Whether a tensor belongs to a level of functorch's; it has no storage of its own."""
    return is_functorch_wrapped_tensor(value)


def gradient_arguments(node: Node) -> dict[str, Any]:
    """The arguments of a gradient call, by name."""
    bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # pyrefly: ignore[bad-argument-type]
    bound.apply_defaults()
    return bound.arguments


def with_forward_links(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, one of GRADIENT_CALLS, with backward nodes that carry their forward node's number.

    AOTAutograd sets this up for graphs it differentiates itself; in a step that
    calls backward() it does not, and a pass could not tell which operation a
    backward node belongs to.
    """
    from torch._functorch._aot_autograd.logging_utils import setup_stacktrace_preservation_hooks

    def linked(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        setup_stacktrace_preservation_hooks([t.grad_fn for t in _flat(outputs) if t.grad_fn is not None])
        return function(outputs, inputs, *args, **kwargs)

    vars(linked)[TEXT] = f"linked {_name(function)}"
    return linked


def with_marks(function: Callable[..., Any], seed: int, grad: int) -> Callable[..., Any]:
    """``function``, one of GRADIENT_CALLS, with marks on its seeds and results, numbered from those two."""

    def marked(outputs: Any, inputs: Any, grad_outputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        outputs = _flat(outputs)
        given = (None,) * len(outputs) if grad_outputs is None else _flat(grad_outputs)
        with torch.no_grad():
            seeds = [torch.ones_like(o) if g is None else g for o, g in zip(outputs, given, strict=True)]
            seeds = tuple(mark(g, SEED, number) for number, g in enumerate(seeds, seed))
        gradients = function(outputs, inputs, seeds, *args, **kwargs)
        # an operator of ours has a derivative everywhere but in torch.func's levels
        wrapped = any(g is not None and is_wrapped(g) for g in gradients)
        with torch.no_grad() if wrapped else contextlib.nullcontext():
            return tuple(g if g is None else mark(g, GRAD, n) for n, g in enumerate(gradients, grad))

    vars(marked)[TEXT] = f"marked {_name(function)} {seed} {grad}"
    return marked


def _name(function: Callable[..., Any]) -> str:
    return vars(function).get(TEXT) or f"{function.__module__}.{function.__qualname__}"


def _nodes(argument: Any) -> list[Node]:
    parts = argument if isinstance(argument, (list, tuple)) else [argument]
    return [n for n in parts if isinstance(n, Node)]


def _flat(values: Tensor | Sequence[Any]) -> Sequence[Any]:
    return (values,) if isinstance(values, Tensor) else tuple(values)


def mixed_modes(record: FrameRecord, error: Exception) -> CaptureError | None:
    """The error for what fake tensors cannot do: a gradient of ``vmap(hessian(f))``."""
    graph = record.graph() if record.graph else None
    if graph is None or not isinstance(error, TorchRuntimeError):
        return None
    if not any(enters_forward_mode(n) for n in graph.nodes):
        return None
    found = "torch cannot trace a gradient through forward-mode derivatives of gradients (vmap of hessian())"
    hint = "take both derivatives in one mode: torch.func.jacrev(torch.func.jacrev(f)) for hessian(f)"
    return CaptureError(found, where=user_line(getattr(error, "real_stack", None)), hint=hint)
