"""What Dynamo is about to leave to plain Python, refused before any of it has run if a backward comes in it.

Written for torch 2.11 to 2.13; active only inside ``dynamo.py``'s patches. A graph
cannot be resumed inside a loop, a ``with`` or a ``try``: Dynamo gives up the frame, or what is
left of it, and it would be refused at its backward (``eager.py``), when the forward has run and
has changed running statistics. Only what cannot be read off the function's bytecode waits till then.
"""

from __future__ import annotations

import inspect
import linecache
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
from torch._dynamo.exc import Unsupported, UserError

from ..errors import CaptureError
from .dynamo_common import fail, function_of, record_of_frame
from .frame_record import FrameRecord
from .ways import Ways

DISABLED = "take the training step out of torch.compiler.disable, or call it outside of the compiled function"


def run_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    """``InstructionTranslator.run``, of the frame itself: a break that leaves it gives the frame up."""

    def run(self: Any) -> None:
        try:
            original(self)
        except (Unsupported, UserError):
            record_of_frame().will_train = _comes_backward(self, self.current_instruction.offset)
            raise

    return run


def rest_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    """``InstructionTranslator.step_graph_break``: what is left of the frame stays uncompiled."""

    def step_graph_break(self: Any, continue_inst: Any) -> None:
        record_of_frame().will_train = _comes_backward(self, continue_inst.offset)
        original(self, continue_inst)

    return step_graph_break


def log_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    """``InstructionTranslatorBase.log_graph_break``: what broke, where Dynamo starts anew and forgets it."""

    def log_graph_break(self: Any, *args: Any, **kwargs: Any) -> None:
        record_of_frame().broke = kwargs.get("exc")
        original(self, *args, **kwargs)

    return log_graph_break


def _comes_backward(tx: Any, offset: int | None) -> bool:
    """Whether a backward comes for sure; any that may come, once there is something to differentiate."""
    ways = Ways(tx.f_code)
    values = (n.meta.get("example_value") for n in tx.output.graph.nodes)
    every = all(getattr(value, "grad_fn", None) is None for value in values)
    line = ways.reach(ways.at(offset), "backward", every=every)
    return torch.is_grad_enabled() and line is not None


def trains_nothing(code: CodeType, record: FrameRecord) -> bool:
    """Whether ``code``, as far as it was traced, takes no backward and computes nothing to differentiate."""
    graph = record.graph() if record.graph is not None else None
    values = [n.meta.get("example_value") for n in graph.nodes] if graph is not None else []
    differentiates = any(getattr(value, "requires_grad", False) for value in values)
    if record.error is not None or record.backwards or differentiates:
        return False
    return Ways(code).reach(0, "backward", every=False) is None


def refuse_disabled(fn: Any) -> None:
    """Raise if ``fn``, which torch was told not to trace, takes a backward.

    Raises:
        CaptureError: it does, whichever way it goes.
    """
    function = function_of(fn)
    if not getattr(function, "_torchdynamo_disable", False) or not torch.is_grad_enabled():
        return
    code = getattr(inspect.unwrap(function), "__code__", None)
    if isinstance(code, CodeType) and (line := Ways(code).reach(0, "backward")) is not None:
        text = linecache.getline(code.co_filename, line).strip()
        found = "backward() would run uncompiled, without scaling, skip and casts"
        where = f"{code.co_filename}:{line} in {code.co_name}: {text}"
        raise fail(CaptureError(found, where=where, hint=DISABLED))
