"""Notices training that runs uncompiled inside a function compiled with our backend.

Written for torch 2.11 to 2.13. Dynamo may give a frame up (a graph break in a
loop, a limit, a callee it was told to leave alone) and runs it as plain Python:
without scale, skip, casts or clipping. A ``backward()`` that then runs in
earnest looks for our compiled call on its stack. Elsewhere that look is all
that is different.
"""

from __future__ import annotations

import functools
import sys
import threading
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch._dynamo import eval_frame
from torch._dynamo.decorators import skip

from .dynamo_common import current_record, user_line
from .handles import innermost

CALLER = "compile_wrapper"  # the function that torch.compile returns, in eval_frame.py
_local = threading.local()


def watch_backward(find_backend: Callable[[Any], Any | None]) -> None:
    """Let ``backend.refuse_eager(line)`` raise where a backward runs uncompiled under ``backend``."""
    original = torch.autograd.backward
    if hasattr(original, "_fxpass"):
        return

    def look() -> None:
        if (backend := _uncompiled(find_backend)) is not None:
            backend.refuse_eager(user_line(traceback.extract_stack()))

    check: Any = torch.compiler.disable(look)

    @functools.wraps(original)
    def backward(*args: Any, **kwargs: Any) -> Any:
        check()
        return original(*args, **kwargs)

    skip(backward)  # it runs while Dynamo looks for frames to compile
    # what Dynamo, of any backend, traces in its place
    vars(backward).update(_fxpass=True, _torchdynamo_inline=_backward_of_each)
    torch.autograd.backward = backward


def _backward_of_each(
    tensors: Any,
    grad_tensors: Any = None,
    retain_graph: Any = None,
    create_graph: bool = False,
    grad_variables: Any = None,
    inputs: Any = None,
) -> None:
    """``torch.autograd.backward`` by ``Tensor.backward``."""
    tensors = (tensors,) if isinstance(tensors, torch.Tensor) else tuple(tensors)
    gradients = grad_variables if grad_tensors is None else grad_tensors
    if gradients is None or isinstance(gradients, torch.Tensor):
        gradients = (gradients,) * len(tensors)
    for number, (tensor, gradient) in enumerate(zip(tensors, gradients, strict=True), 1):
        retain = True if number < len(tensors) else retain_graph
        tensor.backward(gradient=gradient, retain_graph=retain, create_graph=create_graph, inputs=inputs)


def running(graph: Callable[..., Any]) -> Callable[..., Any]:
    """``graph``, a compiled one of ours: what its operators differentiate is their own affair."""

    def run(*args: Any) -> Any:
        before = getattr(_local, "running", False)
        _local.running = True
        try:
            return graph(*args)
        finally:
            _local.running = before

    return run


def _uncompiled(find_backend: Callable[[Any], Any | None]) -> Any | None:
    """The backend of ours that was to compile the caller, None if nothing was."""
    if getattr(_local, "running", False) or current_record() is not None:
        return None
    if eval_frame._stance.stance != "default":  # the user has asked for uncompiled code
        return None
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_name == CALLER and frame.f_code.co_filename == eval_frame.__file__:
            backend = find_backend(innermost(frame.f_locals.get("callback")))
            if backend is not None:
                return backend
        frame = frame.f_back
    return None
