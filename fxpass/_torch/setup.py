"""Set-up that a model does in its first call: functions without tensors that Dynamo cannot trace.

Written for torch 2.11 to 2.13; active only inside ``dynamo.py``'s patches. Libraries
install hooks, patch classes and fill registries when a model is first called, behind a flag.
Where the trace breaks in such a function, it is called as it is, once, and the trace
starts anew, in the state that eager's second call finds. So it is right only if that second call
does nothing: the trace has to show it, or the step is refused.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._dynamo import exc
from torch._dynamo.variables import functions, lazy
from torch._dynamo.variables.lists import BaseListVariable
from torch._dynamo.variables.tensor import TensorVariable

from ..errors import CaptureError
from .dynamo_common import changed, fail, is_new, local, object_of, record_of_frame, user_line
from .frame_record import FrameRecord
from .ways import Ways

_LASTING = (bool, int, float, str, bytes, type(None), type, types.FunctionType, types.ModuleType)
_STORES = functools.cached_property.__get__  # what it has returned stands where it is looked up
HINT = "call it once before the compiled step, and leave it out of the model's forward()"


@dataclass(eq=False)
class SetUp:
    """A call that was made while tracing."""

    function: Any
    arguments: list[Any]
    keywords: dict[str, Any]
    where: str
    caller: Any  # code
    skippable: bool  # where the caller does not call it again, it leaves out nothing else
    result: Any = None
    shown: bool = False  # the last trace showed that nothing is left to do
    entered: bool = False  # the last trace came to the caller

    def run(self) -> None:
        """What it does is not traced, and what trains in it is not this step."""
        record, local.record = local.record, None
        try:
            self.result = self.function(*self.arguments, **self.keywords)
        finally:
            local.record = record

    def is_call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
        """Whether it is this call that is traced now."""
        if getattr(func, "fn", None) is not self.function:
            return False
        try:
            values, keywords = [_real(a) for a in args], {k: _real(v) for k, v in kwargs.items()}
        except _NotReal:
            return False
        theirs = [*self.arguments, *self.keywords.values()]
        same = all(a is b for a, b in zip([*values, *keywords.values()], theirs, strict=False))
        return same and len(values) == len(self.arguments) and list(keywords) == list(self.keywords)

    def refusal(self, what: str) -> CaptureError:
        """The error, once ``what`` shows that it is no set-up."""
        name = self.function.__qualname__
        return CaptureError(
            f"torch cannot trace {name}(), which was called as set-up; {what}", where=self.where, hint=HINT
        )


def inline_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    """``InliningInstructionTranslator.inline_call``, a class method."""

    def inline_call(cls: Any, parent: Any, func: Any, args: Any, kwargs: Any, **options: Any) -> Any:
        record, nodes = record_of_frame(), len(parent.output.graph.nodes)
        for known in record.set_up:
            known.entered = known.entered or func.get_code() is known.caller
            if known.is_call(func, args, kwargs):
                return _again(
                    known, functools.partial(original, parent, func, args, kwargs, **options), parent.output
                )
        try:
            return original(parent, func, args, kwargs, **options)
        except (exc.Unsupported, exc.UserError) as broke:
            untouched = nodes == len(parent.output.graph.nodes)
            _consider(record, broke, parent, func=func, args=[*args], kwargs=kwargs, untouched=untouched)
            raise

    return inline_call


def unsettled(record: FrameRecord) -> CaptureError | None:
    """The error for set-up of which the trace did not show that it is done."""
    for known in record.set_up:
        passed = known.skippable and (known.entered or known.caller is record.code)
        if not (known.shown or passed):
            return known.refusal("the step goes another way after it, and would leave out what belongs to it")
    return None


# ---------------------------------------------------------------- the first trace


def _consider(
    record: FrameRecord,
    broke: Any,
    parent: Any,
    *,
    func: Any,
    args: list[Any],
    kwargs: dict[str, Any],
    untouched: bool,
) -> None:
    """Keep the outermost function around the break that sees no tensor; call it once a model's is reached.

    Only there the break would be an error: elsewhere Dynamo may resume after it.
    """
    if record.backwards or not torch.is_grad_enabled():
        return
    given = [*args, *kwargs.values()]
    open_ = not getattr(broke, "fxpass_closed", False)
    if open_ and untouched and not any(map(_is_tensor, given)):
        try:
            values, keywords = [_real(a) for a in args], {k: _real(v) for k, v in kwargs.items()}
            function = _real_function(func)
        except _NotReal:
            return
        where = user_line(getattr(broke, "real_stack", None))
        ways = Ways(parent.f_code)
        skippable = function is _STORES or ways.skips_only(ways.after(parent.current_instruction.offset))
        broke.fxpass_setup = SetUp(
            function=function,
            arguments=values,
            keywords=keywords,
            where=where,
            caller=parent.f_code,
            skippable=skippable,
        )
        return
    broke.fxpass_closed = True
    call = getattr(broke, "fxpass_setup", None)
    if call is None or not any(map(_is_model, given)) or changed(parent.output.side_effects):
        return
    broke.fxpass_setup = None
    record.set_up.append(call)
    call.run()
    raise exc.UnspecializeRestartAnalysis(restart_reason=f"{call.function.__qualname__} was called")


def _is_model(variable: Any) -> bool:
    value = object_of(variable)
    return isinstance(value, torch.nn.Module) and any(p.requires_grad for p in value.parameters())


# ---------------------------------------------------------------- the trace after it


def _again(known: SetUp, inline: Callable[[], Any], output: Any) -> Any:
    """Trace it again: it must do nothing, and return what it has returned."""
    before = _done(output)
    try:
        result = inline()
    except (exc.Unsupported, exc.UserError):
        raise fail(known.refusal("it cannot be traced the second time either")) from None
    if _done(output) != before:
        raise fail(known.refusal("the second time, it does something again"))
    if not _equal(result, known.result):
        raise fail(known.refusal("the second time, it returns something else"))
    known.shown = True
    return result


def _done(output: Any) -> tuple[Any, ...]:
    """What changes if the trace computes, changes, draws or tells something."""
    effects, record = output.side_effects, record_of_frame()
    stored = {
        id(v): {k: id(a) for k, a in attributes.items()}
        for v, attributes in effects.store_attr_mutations.items()
        if not is_new(v)
    }
    modified = {id(v) for v in effects._get_modified_vars() if not is_new(v)}
    computed = sum(n.op not in ("placeholder", "get_attr") for n in output.graph.nodes)
    said = len(record.told), len(output.random_calls), len(effects.tensor_hooks)
    return stored, modified, computed, said


def _equal(variable: Any, value: Any) -> bool:
    variable = variable.realize()
    if variable.is_python_constant():
        constant = variable.as_python_constant()
        return constant is value or (type(constant) is type(value) and constant == value)
    return value is not None and object_of(variable) is value


# ---------------------------------------------------------------- variables as what they stand for


class _NotReal(Exception):
    """A variable stands for nothing that exists outside of the trace."""


def _is_tensor(variable: Any) -> bool:
    if isinstance(variable, lazy.LazyVariableTracker) and not variable.is_realized():
        return isinstance(variable.peek_value(), torch.Tensor)
    variable = variable.realize()
    if isinstance(variable, BaseListVariable):
        return any(map(_is_tensor, variable.items))
    return isinstance(variable, TensorVariable)


def _real_function(func: Any) -> Any:
    if not isinstance(func, functions.UserFunctionVariable):
        raise _NotReal
    return func.fn


def _real(variable: Any) -> Any:
    if isinstance(variable, lazy.LazyVariableTracker) and not variable.is_realized():
        return variable.peek_value()
    variable = variable.realize()
    if variable.is_python_constant() and isinstance(constant := variable.as_python_constant(), _LASTING):
        return constant
    if variable.source is not None:
        for name in ("value", "fn"):
            if name in vars(variable):  # a list's value is a property on torch 2.11, and raises
                return getattr(variable, name)
    raise _NotReal
