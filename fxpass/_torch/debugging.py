"""Anomaly detection and profilers started inside a step: what they look at is no longer there.

Written for torch 2.11 to 2.13; active only inside ``dynamo.py``'s patches. Dynamo drops
the profiler, and breaks the graph at the other.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch._dynamo.variables import base
from torch._dynamo.variables.ctx_manager import NullContextVariable

from ..errors import CaptureError
from .dynamo_common import fail, user_line

PROFILERS: tuple[Any, ...] = (torch.profiler.profile, torch.autograd.profiler.profile)
KNOWN: tuple[Any, ...] = (torch.autograd.detect_anomaly, torch.autograd.set_detect_anomaly, *PROFILERS)
ANOMALY_HINT = (
    "leave it out: every gradient is checked in the graph, and a step with inf or nan is skipped; "
    "print(fxpass.of(step).diagnosis()) names the parameter it came from"
)


class Debugging(base.VariableTracker):
    """``torch.autograd.detect_anomaly`` or a profiler's class, which the step calls."""

    _nonvar_fields: ClassVar[set[str]] = {"value", *base.VariableTracker._nonvar_fields}  # pyrefly: ignore[bad-override]

    def __init__(self, value: Any, **options: Any) -> None:
        super().__init__(**options)
        self.value = value

    def python_type(self) -> type:
        return type(self.value)

    def call_function(self, tx: Any, args: Any, kwargs: Any) -> Any:
        if self.value in PROFILERS:
            hint = "start it around the calls of the step: with torch.profiler.profile() as prof: step(x, y)"
            raise fail(CaptureError("a profiler is started inside the step", where=user_line(), hint=hint))
        mode = [*args[:1], *(v for k, v in kwargs.items() if k == "mode")]
        if self.value is torch.autograd.set_detect_anomaly and mode and mode[0].is_python_constant():
            if not mode[0].as_python_constant():
                return NullContextVariable()
        raise fail(anomaly(user_line()))

    def reconstruct(self, codegen: Any) -> None:
        codegen(self.source)


def anomaly(where: str) -> CaptureError:
    """The error for a step under anomaly detection."""
    found = "anomaly detection (torch.autograd.detect_anomaly) has no backward to look at in a compiled step"
    return CaptureError(found, where=where, hint=ANOMALY_HINT)
