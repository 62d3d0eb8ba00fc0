"""Set-up that a model does in its first call: functions without tensors that Dynamo cannot trace.

Written for torch 2.11 to 2.13; active only inside ``dynamo.py``'s patches. Libraries
install hooks, patch classes and fill registries when a model is first called, behind a flag.
Where the trace breaks in such a function, it is called as it is, once, and the trace
starts anew: in the state that eager's second call finds. A function that breaks again
was no set-up, and the break stands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo import exc
from torch._dynamo.variables import functions, lazy
from torch._dynamo.variables.lists import BaseListVariable
from torch._dynamo.variables.tensor import TensorVariable

from .dynamo_common import record_of_frame
from .record import FrameRecord


def inline_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    """``InliningInstructionTranslator.inline_call``, a class method."""

    def inline_call(cls: Any, parent: Any, func: Any, args: Any, kwargs: Any, **options: Any) -> Any:
        record, nodes = record_of_frame(), len(parent.output.graph.nodes)
        try:
            return original(parent, func, args, kwargs, **options)
        except (exc.Unsupported, exc.UserError) as broke:
            _consider(record, broke, func, [*args], kwargs, untouched=nodes == len(parent.output.graph.nodes))
            raise

    return inline_call


def _consider(
    record: FrameRecord, broke: Any, func: Any, args: list[Any], kwargs: dict[str, Any], *, untouched: bool
) -> None:
    """Keep the outermost function around the break that sees no tensor; call it once the next one does."""
    if getattr(broke, "fxpass_decided", False):
        return
    tensors = any(map(_is_tensor, [*args, *kwargs.values()]))
    if untouched and not tensors and not record.backwards:
        try:
            call = (_real_function(func), [_real(a) for a in args], {k: _real(v) for k, v in kwargs.items()})
        except _NotReal:
            return
        broke.fxpass_setup = call
        return
    broke.fxpass_decided = True
    call = getattr(broke, "fxpass_setup", None)
    if call is None or any(_same(call, known) for known in record.set_up):
        return
    record.set_up.append(call)
    function, values, keywords = call
    function(*values, **keywords)
    raise exc.UnspecializeRestartAnalysis(restart_reason=f"{function.__qualname__} was called")


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
    if variable.is_python_constant():
        return variable.as_python_constant()
    if variable.source is not None:
        for name in ("value", "fn"):
            if hasattr(variable, name):
                return getattr(variable, name)
    raise _NotReal


def _same(a: Any, b: Any) -> bool:
    return a[0] is b[0] and len(a[1]) == len(b[1]) and all(x is y for x, y in zip(a[1], b[1], strict=True))
