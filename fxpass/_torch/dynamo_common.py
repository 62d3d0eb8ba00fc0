"""What the Dynamo hooks share: the frame's record, errors that survive Dynamo, calls on variables."""

from __future__ import annotations

import contextlib
import os
import re
import sysconfig
import threading
import traceback
import types
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch._dynamo.variables import base
from torch._dynamo.variables.constant import ConstantVariable
from torch._guards import TracingContext

from ..errors import FxpassError
from .frame_record import FrameRecord

VariableTracker = base.VariableTracker

local = threading.local()


def current_record() -> FrameRecord | None:
    """The record of the frame being compiled on this thread, None outside of one of ours."""
    return getattr(local, "record", None)


def record_of_frame() -> FrameRecord:
    """What has been seen of the frame that is traced now."""
    record = current_record()
    assert record is not None, "a Dynamo hook ran outside of a frame of ours"
    return record


def fail(error: FxpassError) -> FxpassError:
    """Remember ``error`` so that it survives Dynamo's wrapping, and return it for raising."""
    record = record_of_frame()
    record.error = record.error or error
    return error


_OWN = tuple(str(path) + os.sep for path in (Path(torch.__file__).parent, Path(__file__).parents[1]))
_INSTALLED = {sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")}


def is_users(filename: str) -> bool:
    """Whether code of this file is neither torch's nor ours."""
    return not filename.startswith(_OWN)


def user_line(stack: traceback.StackSummary | None = None) -> str:
    """``file:line in function: code`` of the user's innermost frame, then of the library's below it.

    Behind a graph break in a library its functions are traced by themselves: the user's line is then the
    one that runs and called them.
    """
    frames = list(TracingContext.extract_stack() if stack is None else stack)
    theirs = [f for f in frames if is_users(f.filename)]
    if not (theirs or frames):
        return "unknown"
    last = (theirs or frames)[-1]
    own = _own_lines(theirs) or _own_lines(traceback.extract_stack())
    if not own or own[-1] is last:
        return _line(last)
    return f"{_line(own[-1])} (in {_line(last)})"


def _own_lines(frames: list[traceback.FrameSummary]) -> list[traceback.FrameSummary]:
    return [f for f in frames if is_users(f.filename) and not _is_installed(f.filename)]


def inside(stack: traceback.StackSummary, code: CodeType | None) -> bool:
    """Whether the innermost line of the user's is in a function that ``code`` calls."""
    theirs = [f for f in stack if is_users(f.filename)]
    return bool(theirs) and code is not None and theirs[-1].name not in _names(code)


def frame_name(code: CodeType) -> str:
    """``step (train.py:12)``; of a part of it that follows a graph break, where that begins."""
    name, _, line = re.sub(r"^torch_dynamo_resume_in_(.*)_at_(\d+)$", r"\1@\2", code.co_name).partition("@")
    return f"{name} ({os.path.basename(code.co_filename)}:{line or code.co_firstlineno})"


def _names(code: CodeType) -> tuple[str, str]:
    """The function's name, and behind the prefix of a part of it that Dynamo has made."""
    name = code.co_name
    return name, re.sub(r"^torch_dynamo_resume_in_(.*)_at_\d+$", r"\1", name)


def _is_installed(filename: str) -> bool:
    return filename.startswith(tuple(_INSTALLED)) or f"{os.sep}site-packages{os.sep}" in filename


def _line(frame: traceback.FrameSummary) -> str:
    return f"{frame.filename}:{frame.lineno} in {frame.name}: {(frame.line or '').strip()}"


def call(tx: Any, fn: Any, *args: Any, **kwargs: Any) -> Any:
    """Trace ``fn(*args, **kwargs)`` where each argument is a variable or a Python constant."""
    wrap = lambda a: a if isinstance(a, VariableTracker) else ConstantVariable.create(a)  # noqa: E731
    callee = VariableTracker.build(tx, fn)
    return callee.call_function(tx, [wrap(a) for a in args], {k: wrap(v) for k, v in kwargs.items()})


@contextlib.contextmanager
def no_grad(tx: Any) -> Iterator[None]:
    """What Dynamo traces inside is traced under ``torch.no_grad()``."""
    from torch._dynamo.variables.ctx_manager import GradModeVariable

    mode = GradModeVariable.create(tx, False, initialized=True)
    mode.enter(tx)
    try:
        yield
    finally:
        mode.exit(tx)


def object_of(variable: Any) -> Any:
    """The Python object that a variable stands for; None for lists and dicts, known by their items."""
    return vars(variable.realize()).get("value")


def function_of(variable: Any) -> Any:
    """The function or class that a call of ``variable`` runs: equal only to itself. None for other objects.

    Those have an ``==``, a hash and a length of the user's own.
    """
    held = vars(variable.realize())
    function = held.get("value", held.get("fn"))
    return function if isinstance(function, _CALLED) else None


_CALLED = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, type)


def is_none(variable: Any) -> bool:
    """Whether a variable of Dynamo's is the constant None."""
    return variable.is_python_constant() and variable.as_python_constant() is None


def store_grad(tx: Any, leaf: Any, grad: Any) -> None:
    """``leaf.grad = grad``, as Dynamo notes an assignment."""
    if not tx.output.side_effects.is_attribute_mutation(leaf):
        leaf.mutation_type = base.AttributeMutationExisting()
    tx.output.side_effects.store_attr(leaf, "grad", grad)


def changed(effects: Any) -> bool:
    """Whether the frame has changed what exists outside of the trace; gradients that are cleared aside."""
    for variable in effects._get_modified_vars():
        attributes = effects.store_attr_mutations.get(variable)
        if not is_new(variable) and not (attributes and set(attributes) == {"grad"}):
            return True
    return False


def is_new(variable: Any) -> bool:
    """Whether the frame has made the object."""
    return isinstance(variable.mutation_type, (base.AttributeMutationNew, base.ValueMutationNew))
