"""Hooks on parameters, run where eager runs them: on the gradient, and after it is accumulated.

Written for torch 2.11 to 2.13; active only inside ``dynamo.py``'s patches. With
``backward()`` traced as ``autograd.grad`` nothing calls the hooks of a leaf, so
the trace does. Guards on both dictionaries of each leaf see hooks that come or go later.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.source import AttrSource
from torch._dynamo.variables import base, tensor, user_defined
from torch._dynamo.variables.constant import ConstantVariable
from torch.nn.modules import module as _modules
from torch.utils._pytree import tree_leaves

from ..errors import CaptureError
from .dynamo_common import fail, is_none, record_of_frame, user_line
from .gradient_calls import gradient_calls

VariableTracker = base.VariableTracker
_GLOBAL = tuple(f"_global_{kind}_hooks" for kind in ("forward", "forward_pre", "backward", "backward_pre"))
ON_GRADIENT = "_backward_hooks"  # Tensor.register_hook
AFTER_ACCUMULATION = "_post_accumulate_grad_hooks"  # Tensor.register_post_accumulate_grad_hook


def hooked_gradient(tx: Any, leaf: Any, grad: Any) -> Any:
    """The gradient as the leaf's hooks leave it."""
    for hook in _hooks(tx, leaf, ON_GRADIENT):
        changed = hook.call_function(tx, [grad], {})
        if not is_none(changed):
            grad = changed
    return grad


def after_accumulation(tx: Any, leaf: Any) -> None:
    """Call what is to be called once ``leaf.grad`` is there; it may step an optimizer."""
    for hook in _hooks(tx, leaf, AFTER_ACCUMULATION):
        hook.call_function(tx, [leaf], {})


def _hooks(tx: Any, leaf: Any, attribute: str) -> list[Any]:
    registered = [entry[0] for entry in tx.output.side_effects.tensor_hooks.values()]
    if any(variable is leaf for variable in registered):
        hint = "register the hook once, before the compiled step is called"
        raise fail(
            CaptureError("a hook is registered on a parameter inside the step", where=user_line(), hint=hint)
        )
    example = leaf.as_proxy().node.meta.get("grapharg")
    if leaf.source is None or example is None:
        return []
    hooks = getattr(example.example, attribute, None)
    source = AttrSource(leaf.source, attribute)
    if hooks is None:
        install_guard(source.make_guard(GuardBuilder.CONSTANT_MATCH))
        return []
    table = VariableTracker.build(tx, hooks, source).realize()
    return [table.call_method(tx, "__getitem__", [ConstantVariable.create(key)], {}) for key in hooks]


def registering_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    """For ``TensorVariable._method_register_hook``: which node a handle belongs to."""

    def _method_register_hook(self: Any, tx: Any, name: str, hook: Any) -> Any:
        handle = original(self, tx, name, hook)
        if getattr(handle, "idx", 0) is None:  # of a tensor that the step computes
            record_of_frame().hooked.append((handle, self.as_proxy().node))
        return handle

    return _method_register_hook


def handle_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    """For ``RemovableHandleVariable.call_method``: ``remove()``, once ``backward()`` has called the hook."""

    def call_method(self: Any, tx: Any, name: str, args: Any, kwargs: Any) -> Any:
        record = record_of_frame()
        node = next((node for handle, node in record.hooked if handle is self), None)
        if name != "remove" or node is None:
            return original(self, tx, name, args, kwargs)
        if not gradient_calls(node.graph):
            found = "a hook is removed before any backward() has called it"
            raise fail(CaptureError(found, where=user_line(), hint="do not register it"))
        record.unhooked.append(node)
        self.idx = self.REMOVED
        return ConstantVariable.create(None)

    return call_method


def refuse_unhooked(losses: Any) -> None:
    """Raise if the gradient of ``losses`` goes through a tensor whose hook has been removed."""
    removed, seen = record_of_frame().unhooked, set[Any]()
    rest = [proxy.node for proxy in tree_leaves(losses.as_proxy())] if removed else []
    while rest:
        node = rest.pop()
        if node in removed:
            found = "a backward comes after the removal of a hook on one of its tensors"
            hint = "remove the hook after the last backward(), or compute that tensor again"
            raise fail(CaptureError(found, where=user_line(), hint=hint))
        rest += [n for n in node.all_input_nodes if n not in seen]
        seen.update(node.all_input_nodes)


def has_hooks(leaf: Any) -> bool:
    """Whether something is to be called with the leaf's gradient."""
    example = leaf.as_proxy().node.meta.get("grapharg")
    return example is not None and any(
        getattr(example.example, kind, None) for kind in (ON_GRADIENT, AFTER_ACCUMULATION)
    )


def refuse_backward_hooks(module: torch.nn.Module) -> None:
    """Raise for hooks of a module that eager calls in backward: no trace would call them."""
    everywhere = _modules._global_backward_hooks or _modules._global_backward_pre_hooks
    own = vars(module)  # of one that is being made inside the step, they are not there yet
    if everywhere or own.get("_backward_hooks") or own.get("_backward_pre_hooks"):
        found = f"{type(module).__name__} has a backward hook registered (register_full_backward_hook)"
        hint = "register it on the tensor, in forward: out.register_hook(fn), which is traced"
        raise fail(CaptureError(found, where=user_line(), hint=hint))


def global_module_hooks() -> tuple[int, ...]:
    """The hooks registered for all modules, by id: Dynamo has no guard on them."""
    return tuple(key for name in _GLOBAL for key in getattr(_modules, name))


def refuse_retain_grad(self: Any, tx: Any, *args: Any, **kwargs: Any) -> Any:
    """``h.retain_grad()``: gradients of a step are those of its leaves."""
    found = "retain_grad() on a tensor that the step computes: its .grad is not kept"
    hint = (
        "use h.register_hook(fn), or ask before backward(): torch.autograd.grad(loss, h, retain_graph=True)"
    )
    raise fail(CaptureError(found, where=user_line(), hint=hint))


HOOKS: list[tuple[Any, str, Callable[..., Any]]] = [
    (tensor.TensorVariable, "_method_register_hook", registering_hook),
    (user_defined.RemovableHandleVariable, "call_method", handle_hook),
]
