"""Text and numbers made of values that are known only when the graph has run.

Written for torch 2.11 to 2.13; active only inside ``dynamo.py``'s patches. Dynamo
follows arithmetic on ``loss.item()`` and keeps f-strings of it for later. What it does not
follow (``"%.3f" % loss``, ``str(loss)``, ``math.exp(loss.item())``) becomes a call for later here.
"""

from __future__ import annotations

import json
import math
import operator
import pprint
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.exc import Unsupported
from torch._dynamo.variables import lazy, misc
from torch._dynamo.variables.constant import ConstantVariable
from torch._dynamo.variables.dicts import ConstDictVariable
from torch._dynamo.variables.lists import BaseListVariable
from torch._dynamo.variables.misc import StringFormatVariable
from torch._dynamo.variables.tensor import SymNodeVariable, TensorVariable
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.optim.lr_scheduler import LRScheduler

from ..errors import CaptureError
from .abandoned import refuse_disabled
from .dynamo_common import call, changed, fail, function_of, object_of, record_of_frame, user_line
from .frame_record import FrameRecord
from .selects import Raises
from .shown import as_now
from .telling import Bar, Later, call_later

_TESTS: dict[Any, Any] = {  # before the update: what a branch may ask
    math.isfinite: torch.isfinite,
    math.isnan: torch.isnan,
    math.isinf: torch.isinf,
}
_TO_TEXT: tuple[Any, ...] = (str, repr, ascii, format)
_DUMPS: tuple[Any, ...] = (json.dumps, json.dump, pprint.pprint, pprint.pformat, pprint.pp)
_INSPECTING: tuple[Any, ...] = (isinstance, type, callable, hasattr, getattr, setattr, id, iter, next, super)


def builtin_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    """``BuiltinVariable.call_function``: operators and builtin functions."""

    def call_function(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        made = _builtin_later(tx, self.fn, list(args), kwargs)
        return original(self, tx, args, kwargs) if made is None else made

    return call_function


def _builtin_later(tx: Any, fn: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
    if fn is str.format and args and args[0].is_python_constant():
        pattern = args[0].as_python_constant()
        text = None if re.search(r"{\w*[.\[!]", pattern) else str
        keywords = {k: as_now(tx, v, text) for k, v in kwargs.items()}
        return StringFormatVariable.create(pattern, [as_now(tx, a, text) for a in args[1:]], keywords)
    if fn in _TO_TEXT and args and _is_late(args[0]):
        return _text(call_later(tx, fn, args, kwargs))
    if fn in (operator.mod, operator.imod) and _is_text(args[0]):
        if not all(a.is_python_constant() for a in args):
            return _text(call_later(tx, fn, args, kwargs, text=str))
    if fn in (operator.add, operator.iadd, operator.mul, operator.imul) and any(
        isinstance(_real(a), StringFormatVariable) for a in args
    ):
        return _text(call_later(tx, fn, args, kwargs))
    if fn not in _INSPECTING and any(isinstance(_real(a), Later) for a in args):
        return call_later(tx, fn, args, kwargs)
    return None


def format_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    """``InstructionTranslatorBase._format_value``, of f-strings: a number that changes is written later."""

    def _format_value(self: Any, fmt_spec: Any, flags: int) -> None:
        value = self.stack[-1].realize()
        if not isinstance(value, SymNodeVariable):
            original(self, fmt_spec, flags)
            return
        self.pop()
        conversion = ("", "!s", "!r", "!a")[flags & 3]
        pattern = f"{{{conversion}:{fmt_spec.as_python_constant()}}}"
        self.push(StringFormatVariable.create(pattern, [value], {}))

    return _format_value


def call_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    """``InstructionTranslatorBase.call_function``: every call that is written as one."""

    def call_function(self: Any, fn: Any, args: Any, kwargs: Any) -> None:
        args = [_real(a).iterated(self) if isinstance(_real(a), Bar) else a for a in args]
        made = _called_later(self, fn, args, kwargs)
        if made is not None:
            self.push(made)
            return
        try:
            original(self, fn, args, kwargs)
        except Unsupported:
            refuse_disabled(_real(fn))
            if (made := _after_the_update(self, fn, args, kwargs)) is None:
                raise
            self.push(made)

    return call_function


def _called_later(tx: Any, fn: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
    given = [*args, *kwargs.values()]
    if isinstance(fn, misc.GetAttrVariable) and _is_text(fn.obj):
        known = _real(fn.obj).is_python_constant()
        if (not known or any(map(_is_late, given))) and not (known and fn.name == "format"):
            return _text(call_later(tx, fn.obj, args, kwargs, method=fn.name))
        return None
    function = function_of(fn)
    if function in _DUMPS and any(map(_is_late, given)):
        later = call_later(
            tx, function, args, kwargs, tells=function in (json.dump, pprint.pprint, pprint.pp)
        )
        return _text(later) if function in (json.dumps, pprint.pformat) else later
    if record_of_frame().forking and (function is sys.exit or type(object_of(fn)).__name__ == "Quitter"):
        raise Raises(f"SystemExit ({user_line()})")
    if function in _TESTS and not record_of_frame().events and isinstance(_real(args[0]), SymNodeVariable):
        return call(tx, _TESTS[function], call(tx, torch.scalar_tensor, args[0]))
    of_math = getattr(function, "__module__", "") == "math"
    traced = hasattr(torch, f"_sym_{getattr(function, '__name__', '')}")
    if of_math and not traced and any(map(_is_late_number, given)):
        return call_later(tx, function, args, kwargs)
    if of_math and any(isinstance(_real(a), Later) for a in given):
        return call_later(tx, function, args, kwargs)
    return None


def _after_the_update(tx: Any, fn: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """A call that Dynamo cannot trace, after ``optimizer.step()``, where the graph cannot be broken either.

    It is made when the graph has run, if all it is given are values: what it returns is
    known then. A scheduler's too, since the optimizer of this step has taken its rates.
    """
    record = record_of_frame()
    if not record.events:
        return None
    fn, root = _real(fn), tx.output.root_tx
    owner = getattr(getattr(fn, "obj", None), "value", None)
    open_ = root.should_compile_partial_graph()
    if isinstance(owner, LRScheduler) and not (open_ and not root.maybe_has_backedge()):
        return call_later(tx, fn.obj, args, kwargs, method=fn.fn.__name__, tells=True, settles=True)
    function = function_of(fn) or object_of(fn)
    if open_ or not callable(function) or owner is not None:
        return None
    if not all(map(_is_value, [*args, *kwargs.values()])):
        return None
    record.unseen = user_line()
    return call_later(tx, function, args, kwargs, tells=True)


def refuse_unseen_changes(record: FrameRecord, effects: Any) -> None:
    """What such a call reads and writes is not known: the frame itself must change nothing that it might."""
    if record.unseen and changed(effects):
        found = (
            "a call that torch cannot trace stands inside a block, in a step that changes objects of its own"
        )
        hint = "move it after the block, or out of the compiled function"
        raise fail(CaptureError(found, where=record.unseen, hint=hint))


def _is_value(variable: Any) -> bool:
    """Whether ``variable`` is nothing but constants, tensors and what is made of them later."""
    if isinstance(variable, lazy.LazyVariableTracker) and not variable.is_realized():
        return isinstance(variable.peek_value(), (torch.Tensor, bool, int, float, str, bytes, type(None)))
    variable = _real(variable)
    if isinstance(variable, BaseListVariable):
        return all(map(_is_value, variable.items))
    if isinstance(variable, ConstDictVariable):
        return all(map(_is_value, variable.items.values()))
    return variable.is_python_constant() or _is_late(variable)


def tolist_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    """``tensor.tolist()`` of floats, which are no sizes: a list for later."""

    def method_tolist(self: Any, tx: Any) -> Any:
        if self.dtype is not None and self.dtype.is_floating_point:
            return call_later(tx, as_now(tx, self), [], {}, method="tolist")
        return original(self, tx)

    return method_tolist


def _text(later: Later) -> Any:
    return StringFormatVariable.create("{}", [later], {})


def _real(variable: Any) -> Any:
    """The variable, None for a lazy one that nobody has looked at: to look would install a guard."""
    if isinstance(variable, lazy.LazyVariableTracker):
        return variable.unwrap() if variable.is_realized() else None
    return variable


def _is_text(variable: Any) -> bool:
    variable = _real(variable)
    constant = isinstance(variable, ConstantVariable) and isinstance(variable.value, str)
    return constant or isinstance(variable, StringFormatVariable)


def _is_late_number(variable: Any) -> bool:
    variable = _real(variable)
    symbolic = isinstance(variable, SymNodeVariable) and free_unbacked_symbols(variable.sym_num)
    return bool(symbolic) or isinstance(variable, Later)


def _is_late(variable: Any) -> bool:
    """Whether ``variable``, or something in it, is known only when the graph has run."""
    if isinstance(variable, lazy.LazyVariableTracker) and not variable.is_realized():
        return isinstance(variable.peek_value(), (torch.Tensor, lazy.LazySymNodeFormatString))
    variable = _real(variable)
    if isinstance(variable, BaseListVariable):
        return any(map(_is_late, variable.items))
    if isinstance(variable, ConstDictVariable):
        return any(map(_is_late, variable.items.values()))
    return isinstance(variable, (Later, StringFormatVariable, SymNodeVariable, TensorVariable))
