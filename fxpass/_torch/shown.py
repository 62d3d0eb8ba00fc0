"""What a call that is made when the graph has run is given: values as they are now.

Written for torch 2.11 to 2.13; active only inside ``dynamo.py``'s patches. The step
may write to a tensor or change an object after it was shown. And what the step changes of objects is
done at its very end, later than these calls.
"""

from __future__ import annotations

import inspect
import types
from typing import Any

import torch
from torch._dynamo.bytecode_transformation import create_call_function
from torch._dynamo.variables import base, lazy
from torch._dynamo.variables.base import ValueMutationNew
from torch._dynamo.variables.dicts import ConstDictVariable
from torch._dynamo.variables.lists import BaseListVariable
from torch._dynamo.variables.tensor import TensorVariable
from torch._dynamo.variables.user_defined import UserDefinedObjectVariable

from ..errors import CaptureError
from .dynamo_common import changed, fail, user_line

VariableTracker = base.VariableTracker
_FIXED = (
    bool,
    int,
    float,
    str,
    bytes,
    type(None),
    type,
    types.FunctionType,
    types.ModuleType,
    torch.nn.Module,
)


def as_now(tx: Any, variable: Any, text: Any = None) -> Any:
    """``variable`` with a copy of each tensor in it, and by ``text`` (str, repr) the text of each object.

    What nothing was computed from (a counter that is only logged) is fetched afterwards, without a guard.
    """
    known = not changed(tx.output.side_effects)
    if isinstance(variable, lazy.LazyVariableTracker):
        if not variable.is_realized() and not _may_change(variable.peek_value(), known):
            return variable
        variable = variable.realize()
    if isinstance(variable, TensorVariable):
        if tx.output.current_tracer.parent is not None:
            found = "a tensor is shown to people inside a region that is checkpointed or transformed"
            hint = "show it outside of the region: return it, and print it where the region is called"
            raise fail(CaptureError(found, where=user_line(), hint=hint))
        return variable.call_method(tx, "detach", [], {}).call_method(tx, "clone", [], {})
    if isinstance(variable, UserDefinedObjectVariable):
        return _object_now(tx, variable, text, known)
    if not isinstance(variable, (BaseListVariable, ConstDictVariable)):
        return variable
    if known and variable.source is not None and not tx.output.side_effects.is_modified(variable):
        return variable
    within = repr if text is str else text
    if isinstance(variable, ConstDictVariable):
        items: Any = {k: as_now(tx, v, within) for k, v in variable.items.items()}
    else:
        items = [as_now(tx, v, within) for v in variable.items]
    return variable.clone(items=items, source=None, mutation_type=ValueMutationNew())


def _object_now(tx: Any, variable: Any, text: Any, known: bool) -> Any:
    """An object that nothing has changed, or its text."""
    modified = tx.output.side_effects.is_modified(variable)
    if isinstance(variable.value, torch.nn.Module) or (known and not modified):
        return variable
    if text is not None:
        if (write := _writes(type(variable.value), text)) is None:
            return variable  # its address
        made = VariableTracker.build(tx, write).call_function(tx, [variable], {})
        return Written(made) if text is repr else made
    if not modified:
        return variable
    found = f"a {type(variable.value).__name__} that the step has changed is shown to people"
    hint = "show its numbers, each by itself, or show it outside of the compiled step"
    raise fail(CaptureError(found, where=user_line(), hint=hint))


def _writes(kind: type, text: Any) -> Any:
    """The class's function that ``text`` calls, None if it has none in Python."""
    methods = [kind.__str__, kind.__repr__] if text is str else [kind.__repr__]
    written = [inspect.unwrap(method) for method in methods if isinstance(method, types.FunctionType)]
    return written[0] if written else None


class Written(VariableTracker):
    """The text of an object inside a list that is written: without quotes."""

    def __init__(self, text: Any, **options: Any) -> None:
        super().__init__(**options)
        self.text = text

    def reconstruct(self, codegen: Any) -> None:
        codegen.add_push_null(lambda: codegen.load_import_from(__name__, "Verbatim"))
        codegen(self.text)
        codegen.extend_output(create_call_function(1, False))


class Verbatim(str):
    """A text that is its own ``repr``."""

    __slots__ = ()
    __repr__ = str.__str__


def _may_change(value: Any, known: bool) -> bool:
    """Whether what stands in ``value`` may differ when the graph has run."""
    if isinstance(value, (list, tuple, dict)):
        return any(_may_change(v, known) for v in (value.values() if isinstance(value, dict) else value))
    if isinstance(value, (torch.Tensor, lazy.LazySymNodeFormatString)):
        return True
    return not known and not isinstance(value, _FIXED)
