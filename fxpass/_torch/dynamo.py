"""Hooks into Dynamo, active only while a frame of our backend is being traced.

Written for torch 2.11 to 2.13 (``tests/_torch/test_dynamo.py`` fails when one of
the names used here goes away). One permanent patch, ``convert_frame._compile``,
asks whether the frame's backend is ours and otherwise steps aside; everything
else is patched inside that call, under Dynamo's compile lock, and restored.

What the hooks change, and why (docs/capture.md tells the whole story):

- ``Tensor.backward`` becomes ``autograd.grad`` with marked seed and gradients.
- ``optimizer.step()`` becomes one opaque node; fxpass expands it later, so the
  optimizer's Python is neither traced by Dynamo nor guarded on.
- ``zero_grad`` sets ``.grad`` to None without reading it: no guard on it.
- ``.grad`` of stepped parameters is not replayed as a side effect.
- outputs whose autograd graph was consumed do not force a graph break.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch._dynamo import config as dynamo_config
from torch._dynamo import convert_frame, output_graph
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.source import AttrSource, DictGetItemSource, GetItemSource
from torch._dynamo.variables import base, builder, functions, misc, optimizer, tensor, user_defined
from torch._dynamo.variables.constant import ConstantVariable
from torch._dynamo.variables.lists import TupleVariable
from torch._guards import TracingContext

from ..errors import FxpassError, OptimizerError
from ..ir.marks import GRAD, MARK, READ, SEED
from .record import FrameRecord, LeafGrad, StepEvent, StepParam

VariableTracker = base.VariableTracker

_local = threading.local()
_find_backend: Callable[[Any], Any | None] = lambda _: None  # noqa: E731 - replaced by install()


def install(find_backend: Callable[[Any], Any | None]) -> None:
    """Patch Dynamo once; ``find_backend(compiler_fn)`` returns our backend object or None."""
    global _find_backend
    _find_backend = find_backend
    if not hasattr(convert_frame._compile, "_fxpass"):
        convert_frame._compile = _hook(convert_frame._compile)


def current_record() -> FrameRecord | None:
    """The record of the frame being compiled on this thread, None outside of one of ours."""
    return getattr(_local, "record", None)


def optimizer_step(index: int, params: list[Any], grads: list[Any], dynamic: list[Any]) -> None:
    """The opaque node that stands for ``optimizer.step()`` in Dynamo's graph; never executed."""
    raise AssertionError("an optimizer_step node reached execution")


def _hook(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _compile(*args: Any, **kwargs: Any) -> Any:
        backend = _find_backend(args[5])
        if backend is None:
            return original(*args, **kwargs)
        record = FrameRecord(backend)
        outer = current_record()
        _local.record = record
        try:
            with _patches():
                return original(*args, **kwargs)
        except Exception as error:
            ours = record.error or _fxpass_cause(error)
            if ours is None:
                raise
            raise ours.with_traceback(None) from None
        finally:
            _local.record = outer
            if record.break_reason:
                backend.note_break(record)

    vars(_compile)["_fxpass"] = True
    return _compile


def _fxpass_cause(error: BaseException) -> FxpassError | None:
    """The FxpassError inside Dynamo's wrapping of a backend failure, if there is one."""
    for candidate in (error, getattr(error, "inner_exception", None), error.__cause__):
        if isinstance(candidate, FxpassError):
            return candidate
    return None


@contextlib.contextmanager
def _patches() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        patch = lambda owner, name, new: stack.enter_context(mock.patch.object(owner, name, new))  # noqa: E731
        stack.enter_context(dynamo_config.patch(trace_autograd_ops=True, allow_rnn=True))
        patch(tensor.TensorVariable, "method_backward", _backward)
        patch(optimizer.OptimizerVariable, "call_method", _optimizer_call_method)
        patch(optimizer.OptimizerVariable, "var_getattr", _optimizer_var_getattr)
        patch(builder.VariableBuilder, "_wrap", _wrap_hook(builder.VariableBuilder._wrap))
        patch(builder, "get_static_address_type", lambda _: None)
        patch(
            functions.UserMethodVariable,
            "call_function",
            _zero_grad_hook(functions.UserMethodVariable.call_function),
        )
        patch(output_graph.OutputGraph, "__init__", _restart_hook(output_graph.OutputGraph.__init__))
        patch(output_graph.OutputGraph, "_validate_outputs_safe_for_autograd_nodes", _note_consumed_outputs)
        patch(
            output_graph.OutputGraph,
            "compile_subgraph",
            _compile_subgraph_hook(output_graph.OutputGraph.compile_subgraph),
        )
        yield


def _restart_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    """Dynamo makes one OutputGraph per attempt: after a restart the record starts anew."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        _record().restart()
        original(self, *args, **kwargs)

    return __init__


def _record() -> FrameRecord:
    record = current_record()
    assert record is not None, "a Dynamo hook ran outside of a frame of ours"
    return record


def _fail(error: FxpassError) -> FxpassError:
    """Remember ``error`` so that it survives Dynamo's wrapping, and return it for raising."""
    record = _record()
    record.error = record.error or error
    return error


def user_line(stack: traceback.StackSummary | None = None) -> str:
    """``file:line in function: code`` of the innermost frame of the user's code."""
    frames = list(TracingContext.extract_stack() if stack is None else stack)
    theirs = [f for f in frames if "/torch/" not in f.filename and "/fxpass/_torch/" not in f.filename]
    if not (theirs or frames):
        return "unknown"
    frame = (theirs or frames)[-1]
    return f"{frame.filename}:{frame.lineno} in {frame.name}: {(frame.line or '').strip()}"


# ---------------------------------------------------------------- backward


def _call(tx: Any, fn: Any, *args: Any, **kwargs: Any) -> Any:
    """Trace ``fn(*args, **kwargs)`` where each argument is a variable or a Python constant."""
    wrap = lambda a: a if isinstance(a, VariableTracker) else ConstantVariable.create(a)  # noqa: E731
    callee = VariableTracker.build(tx, fn)
    return callee.call_function(tx, [wrap(a) for a in args], {k: wrap(v) for k, v in kwargs.items()})


@contextlib.contextmanager
def _no_grad(tx: Any) -> Iterator[None]:
    from torch._dynamo.variables.ctx_manager import GradModeVariable

    mode = GradModeVariable.create(tx, False, initialized=True)
    mode.enter(tx)
    try:
        yield
    finally:
        mode.exit(tx)


def _leaves(self: Any, tx: Any, inputs: Any) -> list[Any]:
    if inputs is None:
        created = list(getattr(tx.output, "leaf_var_creation_order", ()))
        return self._collect_backward_inputs([*created, *tx.output.input_source_to_var.values()]) or []
    provided = inputs.items if hasattr(inputs, "items") and not callable(inputs.items) else [inputs]
    return self._collect_backward_inputs(provided, error_on_non_leaf=True) or []


def _backward(
    self: Any,
    tx: Any,
    gradient: Any = None,
    retain_graph: Any = None,
    create_graph: Any = None,
    inputs: Any = None,
) -> Any:
    """``loss.backward()`` as ``autograd.grad`` over the frame's leaves, gradients added to ``.grad``."""
    record = _record()
    if create_graph is not None and create_graph.is_python_constant() and create_graph.as_python_constant():
        hint = "take the second derivative with torch.autograd.grad outside the compiled step"
        raise _fail(OptimizerError("backward(create_graph=True)", where=user_line(), hint=hint))
    leaves = [v for v in _leaves(self, tx, inputs) if v.dtype.is_floating_point]
    number = len(record.backwards)
    record.backwards.append(user_line())
    if not leaves:
        return ConstantVariable.create(None)
    with _no_grad(tx):
        seed = (
            gradient if gradient is not None and not _is_none(gradient) else _call(tx, torch.ones_like, self)
        )
        seed = _call(tx, MARK, seed, SEED, number)
    kwargs = {"allow_unused": True, "grad_outputs": seed}
    if retain_graph is not None:
        kwargs["retain_graph"] = retain_graph
    grads = _call(tx, torch.autograd.grad, self, TupleVariable(leaves), **kwargs)
    with _no_grad(tx):
        for position, leaf in enumerate(leaves):
            grad = grads.call_method(tx, "__getitem__", [ConstantVariable.create(position)], {})
            if _is_none(grad):
                continue
            grad = _call(tx, MARK, grad, GRAD, len(record.leaf_grads))
            record.leaf_grads.append(LeafGrad(number, leaf.as_proxy().node.name))
            old = leaf.var_getattr(tx, "grad")
            _store_grad(tx, leaf, grad if _is_none(old) else _call(tx, torch.add, old, grad))
    return ConstantVariable.create(None)


def _is_none(variable: Any) -> bool:
    return variable.is_python_constant() and variable.as_python_constant() is None


def _store_grad(tx: Any, leaf: Any, grad: Any) -> None:
    if not tx.output.side_effects.is_attribute_mutation(leaf):
        from torch._dynamo.variables.base import AttributeMutationExisting

        leaf.mutation_type = AttributeMutationExisting()
    tx.output.side_effects.store_attr(leaf, "grad", grad)


# ---------------------------------------------------------------- optimizer


def _optimizer_var_getattr(self: Any, tx: Any, name: str) -> Any:
    if name in ("step", "zero_grad"):
        return misc.GetAttrVariable(self, name, source=self.source and AttrSource(self.source, name))
    return user_defined.UserDefinedObjectVariable.var_getattr(self, tx, name)


def _optimizer_call_method(self: Any, tx: Any, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
    if name == "zero_grad":
        return _optimizer_zero_grad(self, tx, *args, **kwargs)
    if name == "step":
        return _optimizer_step(self, tx, *args, **kwargs)
    return user_defined.UserDefinedObjectVariable.call_method(self, tx, name, args, kwargs)


def _params(self: Any, tx: Any) -> Iterator[tuple[int, int, torch.Tensor, Any]]:
    """(group, position, parameter, its variable); guards on the structure of ``param_groups``."""
    groups = AttrSource(self.source, "param_groups")
    install_guard(groups.make_guard(GuardBuilder.SEQUENCE_LENGTH))
    for g, group in enumerate(self.value.param_groups):
        params = DictGetItemSource(GetItemSource(groups, g), "params")
        install_guard(params.make_guard(GuardBuilder.SEQUENCE_LENGTH))
        for p, param in enumerate(group["params"]):
            variable = VariableTracker.build(tx, param, GetItemSource(params, p))
            _record().real[variable.as_proxy().node.name] = param
            yield g, p, param, variable


def _optimizer_zero_grad(self: Any, tx: Any, set_to_none: Any = None) -> Any:
    to_none = set_to_none is None or set_to_none.as_python_constant()
    for _, _, param, variable in _params(self, tx):
        if to_none:
            if param.requires_grad or param.grad is not None:
                _store_grad(tx, variable, ConstantVariable(None))
        elif not _is_none(old := variable.var_getattr(tx, "grad")):
            _store_grad(tx, variable, _call(tx, torch.zeros_like, old))
    return ConstantVariable.create(None)


def _optimizer_step(self: Any, tx: Any, closure: Any = None) -> Any:
    record = _record()
    name = type(self.value).__name__
    if closure is not None and not _is_none(closure):
        hint = "compute the loss and call backward() in the step itself, then optimizer.step()"
        raise _fail(OptimizerError(f"{name}.step() was given a closure", where=user_line(), hint=hint))
    if isinstance(self.value, (torch.optim.LBFGS, torch.optim.SparseAdam)):
        hint = "use a first-order optimizer with dense gradients, such as torch.optim.AdamW"
        raise _fail(OptimizerError(f"{name} cannot be traced into the step", where=user_line(), hint=hint))
    index, params, nodes, grads = len(record.events), [], [], []
    for g, p, param, variable in _params(self, tx):
        grad = variable.var_getattr(tx, "grad") if param.requires_grad or param.grad is not None else None
        has_grad = grad is not None and not _is_none(grad)
        node = variable.as_proxy().node.name
        params.append(StepParam(g, p, has_grad, node))
        if has_grad:
            nodes.append(variable.as_proxy())
            with _no_grad(tx):
                grads.append(_call(tx, MARK, grad, READ, len(record.reads)).as_proxy())
            record.reads.append(node)
    dynamic = _hyperparameters(self, tx)
    record.events.append(
        StepEvent(
            index,
            weakref.ref(self.value),
            params,
            [d for d, _ in dynamic],
            user_line(),
            len(record.backwards),
        )
    )
    arguments = (index, nodes, grads, [proxy for _, proxy in dynamic])
    tx.output.create_proxy("call_function", optimizer_step, arguments, {})
    return ConstantVariable.create(None)


def _hyperparameters(self: Any, tx: Any) -> list[tuple[tuple[int, str, int | None], Any]]:
    """Guard on every setting of the optimizer but ``lr``; those Dynamo made symbolic, as graph values.

    A float that changed once (a momentum cycled by OneCycleLR) is a symbolic
    float from the second compilation on; ``lr`` is read anew at every call.
    """
    groups = AttrSource(self.source, "param_groups")
    found: list[tuple[tuple[int, str, int | None], Any]] = []
    for g, group in enumerate(self.value.param_groups):
        source = GetItemSource(groups, g)
        for key in self.value.defaults:
            value = group.get(key)
            if key in ("params", "lr") or not isinstance(value, (bool, int, float, str, tuple, type(None))):
                continue
            at = DictGetItemSource(source, key)
            items = enumerate(value) if isinstance(value, tuple) else [(None, value)]
            for position, item in items:
                if not isinstance(item, (bool, int, float, str, type(None))):
                    continue
                item_source = at if position is None else GetItemSource(at, position)
                variable = VariableTracker.build(tx, item, item_source).realize()
                if not variable.is_python_constant():
                    found.append(((g, key, position), variable.as_proxy()))
    return found


def _wrap_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    def _wrap(self: Any, value: Any) -> Any:
        if isinstance(value, torch.amp.GradScaler):
            hint = "remove the GradScaler: fxpass scales, unscales, checks and skips (option loss_scale)"
            raise _fail(OptimizerError("a GradScaler is used inside the step", where=user_line(), hint=hint))
        if isinstance(value, torch.nn.Module):
            _record().modules.append(value)
        return original(self, value)

    return _wrap


def _module_zero_grad(module: Any, set_to_none: bool = True) -> None:
    for p in module.parameters():
        if set_to_none:
            p.grad = None
        elif p.grad is not None:
            p.grad = torch.zeros_like(p.grad)


def _zero_grad_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    def call_function(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        if self.fn is torch.nn.Module.zero_grad:
            inlined = VariableTracker.build(tx, _module_zero_grad)
            return inlined.call_function(tx, [self.obj, *args], kwargs)
        return original(self, tx, args, kwargs)

    return call_function


# ---------------------------------------------------------------- end of the frame


def _note_consumed_outputs(self: Any, rv: list[Any], tx: Any) -> None:
    """Instead of breaking the graph, remember outputs whose autograd graph was consumed.

    The backend detaches them: in eager they still carry a graph, but one that
    raises when it is used.
    """
    consumed = self.autograd_grad_consumed_grad_fns
    for variable in rv:
        if not isinstance(variable, tensor.TensorVariable) or not variable.requires_grad:
            continue
        fake = variable.as_proxy().node.meta["example_value"]
        if fake.grad_fn is not None:
            reachable = output_graph.collect_reachable_grad_fns([(fake, None)])
            if reachable & consumed:
                _record().consumed.add(variable.as_proxy().node.name)


def _compile_subgraph_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    def compile_subgraph(self: Any, tx: Any, reason: Any, *args: Any, **kwargs: Any) -> Any:
        record = _record()
        if getattr(reason, "graph_break", True) and reason.user_stack:
            record.break_reason = str(reason.reason).strip()
            record.break_where = user_line(reason.user_stack)
        _take_over_grads(self.side_effects, record)
        return original(self, tx, reason, *args, **kwargs)

    return compile_subgraph


def _take_over_grads(side_effects: Any, record: FrameRecord) -> None:
    """Withdraw the pending ``.grad`` of stepped parameters: the runtime sets or clears it.

    Other leaves keep Dynamo's replay; a None among them gets a variable of its
    own, since Dynamo caches the None constant together with the last source it
    was read from and would write that parameter's gradient instead.
    """
    stepped = {p.node for event in record.events for p in event.params}
    for variable, pending in side_effects.store_attr_mutations.items():
        if "grad" not in pending or not isinstance(variable, tensor.TensorVariable):
            continue
        node = variable.as_proxy().node.name
        grad = pending["grad"]
        if node in stepped:
            del pending["grad"]
            kinds = getattr(side_effects, "attr_mutation_kinds", {})
            kinds.get(variable, {}).pop("grad", None)
            if _is_none(grad):
                record.cleared.add(node)
            else:
                record.kept.append((node, grad.as_proxy().node.name))
        elif _is_none(grad):
            pending["grad"] = ConstantVariable(None)
        else:
            record.escaping.append(node)
