"""Hooks into Dynamo, active only while a frame of our backend is being traced.

Written for torch 2.11 to 2.13 (``tests/_torch/test_names.py`` fails when one of
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
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any
from unittest import mock

import torch
from torch._dynamo import config as dynamo_config
from torch._dynamo import convert_frame, output_graph, side_effects, symbolic_convert
from torch._dynamo.exc import BackendCompilerFailed, InternalTorchDynamoError, UserError
from torch._dynamo.guards import GuardBuilder
from torch._dynamo.types import ConvertFrameReturn, FrameAction, FrameExecStrategy
from torch._dynamo.variables import builder, builtin, functions, optimizer, tensor
from torch._dynamo.variables.constant import ConstantVariable
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from ..errors import FxpassError, OptimizerError
from ..ir.slots import Slot
from ..timing.clock import tell, timing
from ..timing.garbage import rare_collections
from ..timing.progress import progress
from . import (
    abandoned,
    consumed,
    data_sizes,
    debugging,
    dtensors,
    dynamo_hooks,
    forks,
    indexing,
    replicas,
    sdpa,
    substitutes,
    telling,
    texts,
    untraced,
)
from .agreement import withdraw
from .borgs import one_of_many, refuse_two_ways
from .dynamo_backward import backward
from .dynamo_common import (
    current_record,
    fail,
    frame_name,
    is_none,
    local,
    record_of_frame,
    user_line,
)
from .dynamo_hooks import refuse_backward_hooks, refuse_retain_grad
from .dynamo_optimizer import module_zero_grad_hook, optimizer_call_method, optimizer_var_getattr
from .eager import watch_backward
from .frame_record import FrameRecord
from .gradient_calls import mixed_modes
from .growing import codegen_hook, wrap_growing
from .handles import readable_name
from .once import once_hook
from .reasons import change_of
from .requires_grad import SETATTR, assignment_hook, input_proxy, toggle_hook
from .same import same_hook
from .selects import refuse_written
from .setup import inline_hook, unsettled

_trains: weakref.WeakKeyDictionary[CodeType, bool] = weakref.WeakKeyDictionary()  # what was compiled last
SETTINGS = {
    "trace_autograd_ops": True,
    "allow_rnn": True,
    "capture_dynamic_output_shape_ops": True,  # logits[mask], nonzero(): sizes that depend on data
    "capture_scalar_outputs": True,  # .item(): a size, or a number for later
    "allow_unspec_int_on_nn_module": True,  # a counter of a module that changes is no constant
    "skip_nnmodule_hook_guards": False,  # hooks that come later are seen
}

# of other modules: the owner, what it calls by a name, and what makes ours of that
_HOOKS = (
    *dynamo_hooks.HOOKS,
    *indexing.HOOKS,
    *substitutes.HOOKS,
    *data_sizes.HOOKS,
    *consumed.HOOKS,
    *replicas.HOOKS,
    *sdpa.HOOKS,
    *dtensors.HOOKS,
)

# a frame, and what it calls, as plain Python; a backward in it raises: see eager.py
_PLAIN = ConvertFrameReturn(FrameExecStrategy(FrameAction.SKIP, FrameAction.SKIP))

Count = Callable[[torch.optim.Optimizer, int], dict[Slot, Any]]
_find_backend: Callable[[Any], Any | None] = lambda _: None  # noqa: E731 - replaced by install()
_count: Count = lambda *_: {}  # noqa: E731 - likewise


def install(find_backend: Callable[[Any], Any | None], count: Count) -> None:
    """Patch Dynamo once.

    ``find_backend(compiler_fn)`` returns our backend object or None; ``count(optimizer, number)`` what
    numbers an optimizer's step keeps beside its state.
    """
    global _find_backend, _count
    _find_backend, _count = find_backend, count
    if not hasattr(convert_frame._compile, "_fxpass"):
        convert_frame._compile = _hook(convert_frame._compile)
        watch_backward(lambda compiler_fn: _find_backend(compiler_fn))


def _hook(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _compile(*args: Any, **kwargs: Any) -> Any:
        backend = _find_backend(args[5])
        if backend is None:
            return original(*args, **kwargs)
        record = FrameRecord(backend, args[0], _count, int(dynamo_config.recompile_limit))
        outer = current_record()
        local.record = record
        try:
            with timing("dynamo") as clock, progress(clock, frame_name(args[0]), backend.progress):
                with rare_collections(), _patches(), _limits(args[0]):
                    result = _numbers_first(record, original, *args, **kwargs)
            _trains[args[0]] = bool(record.events)
            for call in record.at_end:
                call()
            return result
        except Exception as error:
            if isinstance(error, InternalTorchDynamoError) and abandoned.trains_nothing(args[0], record):
                return _PLAIN  # a metric behind the update, say
            ours = record.error or _fxpass_cause(error) or unsettled(record) or mixed_modes(record, error)
            ours = ours or untraced.refusal(error, args[0])
            if isinstance(error, BackendCompilerFailed):
                record.break_reason = ""  # the graph was whole: the error is the backend's own
            if ours is None:
                _note_failure(record, error)
                raise
            withdraw(ours)
            raise ours.with_traceback(None) from ours.__cause__
        finally:
            local.record = outer
            if record.error is None:
                backend.note_break(record)

    vars(_compile)["_fxpass"] = True
    return _compile


def _numbers_first(record: FrameRecord, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Try with ``.item()`` as a symbolic number; where Python has to know it, break the graph there."""
    try:
        return original(*args, **kwargs)
    except (UserError, GuardOnDataDependentSymNode):
        if record.error is not None:
            raise
    quietly = mock.patch.object(tensor.TensorVariable, "_warn_capture_scalar_outputs", return_value=None)
    with dynamo_config.patch(capture_scalar_outputs=False), quietly:
        return original(*args, **kwargs)


def _limits(code: CodeType) -> contextlib.AbstractContextManager[Any]:
    """No limit of Dynamo's on recompiling training code, which would run uncompiled then.

    The backend counts per optimizer instead, and raises. Code known to train nothing
    (what follows a print after the step, say) may run uncompiled.
    """
    if not _trains.get(code, True):
        return contextlib.nullcontext()
    return dynamo_config.patch(recompile_limit=sys.maxsize, accumulated_recompile_limit=sys.maxsize)


def _reason_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    """Remember what has changed since the graph that was used last: it comes first."""

    def reasons_of(entries: Any, frame: Any, *args: Any, **kwargs: Any) -> Any:
        reasons = original(entries, frame, *args, **kwargs)
        if reasons:
            record_of_frame().changed = change_of(str(reasons[0]), frame.f_locals, frame.f_globals)
        return reasons

    return reasons_of


def _note_failure(record: FrameRecord, error: Exception) -> None:
    """Dynamo gave the frame up, in a loop for instance: it runs uncompiled, the functions it calls do not."""
    if not record.break_reason and (stack := getattr(error, "real_stack", None)):
        untraced.note_break(record, str(error), stack)
    record.given_up = True


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
        stack.enter_context(dynamo_config.patch(SETTINGS))
        patch(tensor.TensorVariable, "method_backward", backward)
        toggles = toggle_hook(tensor.TensorVariable.method_requires_grad_)
        patch(tensor.TensorVariable, "method_requires_grad_", toggles)
        patch(*SETATTR, assignment_hook(getattr(*SETATTR)))
        patch(tensor.TensorVariable, "method_attr_retain_grad", refuse_retain_grad)
        patch(tensor.TensorVariable, "var_getattr", _grad_hook(tensor.TensorVariable.var_getattr))
        patch(optimizer.OptimizerVariable, "call_method", optimizer_call_method)
        patch(optimizer.OptimizerVariable, "var_getattr", optimizer_var_getattr)
        patch(builder.VariableBuilder, "_wrap", one_of_many(_wrap_hook(builder.VariableBuilder._wrap)))
        patch(builder.VariableBuilder, "__call__", same_hook(builder.VariableBuilder.__call__))
        patch(builder, "get_static_address_type", lambda _: None)
        effects = side_effects.SideEffects
        patch(effects, "codegen_update_mutated", codegen_hook(effects.codegen_update_mutated))
        patch(effects, "codegen_hooks", telling.codegen_hook(effects.codegen_hooks))
        patch(effects, "is_empty", telling.empty_hook(effects.is_empty))
        patch(effects, "prune_dead_object_new", telling.prune_hook(effects.prune_dead_object_new))
        called = builtin.BuiltinVariable
        patch(called, "call_function", texts.builtin_hook(called.call_function))
        cached = functions.WrapperUserFunctionVariable
        patch(cached, "call_function", once_hook(cached.call_function))
        inlining = symbolic_convert.InliningInstructionTranslator
        patch(inlining, "inline_call", classmethod(inline_hook(inlining.inline_call)))
        frame = symbolic_convert.InstructionTranslator
        patch(frame, "run", abandoned.run_hook(frame.run))
        patch(frame, "step_graph_break", abandoned.rest_hook(frame.step_graph_break))
        tx = symbolic_convert.InstructionTranslatorBase
        patch(tx, "log_graph_break", abandoned.log_hook(tx.log_graph_break))
        patch(tx, "step", forks.step_hook(tx.step))
        patch(tx, "_format_value", texts.format_hook(tx._format_value))
        patch(tx, "call_function", texts.call_hook(tx.call_function))
        patch(tensor.TensorVariable, "method_tolist", texts.tolist_hook(tensor.TensorVariable.method_tolist))
        reasons = convert_frame.get_and_maybe_log_recompilation_reasons
        patch(convert_frame, "get_and_maybe_log_recompilation_reasons", _reason_hook(reasons))
        patch(
            functions.UserMethodVariable,
            "call_function",
            module_zero_grad_hook(functions.UserMethodVariable.call_function),
        )
        for owner, name, hook in _HOOKS:
            patch(owner, name, hook(getattr(owner, name)))
        patch(output_graph.OutputGraph, "__init__", _restart_hook(output_graph.OutputGraph.__init__))
        patch(
            output_graph.OutputGraph,
            "compile_subgraph",
            _compile_subgraph_hook(output_graph.OutputGraph.compile_subgraph),
        )
        yield


def _restart_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    """Dynamo makes one OutputGraph per attempt: after a restart the record starts anew."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        record = record_of_frame()
        record.restart()
        original(self, *args, **kwargs)
        record.graph = weakref.ref(self.graph)

    return __init__


# ---------------------------------------------------------------- backward


def _grad_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    """``.grad`` that the frame has assigned is that value, and has no source.

    Dynamo writes the source of an attribute it read into the variable it found.
    A gradient would be fetched from the parameter after the step, where it may
    be gone. And None is one object for the whole process: any None of a later
    frame, of any backend, would be loaded from this parameter's .grad.
    """

    def var_getattr(self: Any, tx: Any, name: str) -> Any:
        if name == "grad" and tx.output.side_effects.has_pending_mutation_of_attr(self, "grad"):
            return tx.output.side_effects.load_attr(self, "grad")
        return original(self, tx, name)

    return var_getattr


def _is_scaler(value: Any) -> bool:
    """Whether this is a GradScaler whose calls do something."""
    return isinstance(value, torch.amp.GradScaler) and value.is_enabled()


def _wrap_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    def _wrap(self: Any, value: Any) -> Any:
        if _is_scaler(value):
            hint = "remove the GradScaler or make it with enabled=False: fxpass scales, checks and skips"
            raise fail(OptimizerError("a GradScaler is used inside the step", where=user_line(), hint=hint))
        if self.source is not None and any(value is known for known in debugging.KNOWN):
            self.install_guards(GuardBuilder.ID_MATCH)
            return debugging.Debugging(value, source=self.source)
        if telling.is_talk(value) and self.source is not None:
            self.install_guards(GuardBuilder.ID_MATCH)
            return telling.Talker(value, source=self.source)
        if type(value) in (list, deque):
            return wrap_growing(self, value)
        if isinstance(value, torch.nn.Module):
            refuse_backward_hooks(value)
            name = readable_name(self.source.name) if self.source else ""
            record_of_frame().modules.append((name, value))
            tell(name)
        return original(self, value)

    return _wrap


# ---------------------------------------------------------------- end of the frame


def _compile_subgraph_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    def compile_subgraph(self: Any, tx: Any, reason: Any, *args: Any, **kwargs: Any) -> Any:
        record = record_of_frame()
        if (error := unsettled(record)) is not None:
            raise fail(error)
        refuse_written(record, self.graph)
        texts.refuse_unseen_changes(record, self.side_effects)
        refuse_two_ways(record, self.side_effects)
        if getattr(reason, "graph_break", True) and reason.user_stack:
            cause, stack = reason.reason, reason.user_stack
            if cause == "step_unsupported" and record.broke is not None:
                cause, stack = str(record.broke), getattr(record.broke, "real_stack", None) or stack
            untraced.note_break(record, str(cause), stack)
        _take_over_grads(self.side_effects, record)
        return original(self, tx, reason, *args, **kwargs)

    return compile_subgraph


def _take_over_grads(effects: Any, record: FrameRecord) -> None:
    """Withdraw the pending ``.grad`` of stepped parameters: the runtime sets or clears it.

    Other leaves keep Dynamo's replay; a None among them gets a variable of its
    own, since Dynamo caches the None constant together with the last source it
    was read from and would write that parameter's gradient instead.
    """
    stepped = {p.node for event in record.events for p in event.params}
    for variable, pending in effects.store_attr_mutations.items():
        if "grad" not in pending or not isinstance(variable, tensor.TensorVariable):
            continue
        node = str(input_proxy(variable).node.name)
        grad = pending["grad"]
        if node in stepped:
            del pending["grad"]
            kinds = getattr(effects, "attr_mutation_kinds", {})
            kinds.get(variable, {}).pop("grad", None)
            if is_none(grad):
                record.cleared.add(node)
            else:
                record.kept.append((node, grad.as_proxy().node.name))
        elif is_none(grad):
            pending["grad"] = ConstantVariable(None)
        else:
            record.escaping[node] = grad.as_proxy().node.name
