"""One program: compiled with the default options, with torch.amp, and in float32."""

from __future__ import annotations

import contextlib
import math
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

import fxpass
from bench.programs.program import Program, Training, losses
from bench.programs.references import Amp

CLOSE = 0.02


@dataclass
class Result:
    """A row of the table."""

    name: str
    family: str
    source: str
    lines: int
    options: dict[str, Any] = field(default_factory=dict)  # none for the table
    graphs: int = 0
    steps: int = 0
    skipped: int = 0
    calls: int = 0
    seconds: float = 0.0  # of the compiled run, compilation included
    fxpass: list[float] = field(default_factory=list)
    amp: list[float] = field(default_factory=list)
    amp_dtype: str = ""
    amp_skipped: int = 0
    float32: list[float] = field(default_factory=list)
    error: str = ""  # first line
    trace: str = ""

    @property
    def verdict(self) -> str:
        """ "ok", or what is wrong."""
        if self.error:
            return self.error
        if self.steps != self.calls:
            return f"{self.steps} steps in {self.calls} calls"
        if not (_close(self.fxpass, self.amp) or _close(self.fxpass, self.float32)):
            return "the losses differ"
        return "ok"


def _close(ours: list[float], theirs: list[float]) -> bool:
    return len(ours) == len(theirs) and all(
        math.isclose(a, b, rel_tol=CLOSE, abs_tol=1e-6) for a, b in zip(ours, theirs, strict=True)
    )


def run(program: Program, options: dict[str, Any]) -> Result:
    """The program's row. ``options``: none, for the table."""
    result = Result(program.name, program.family, program.origin(), program.lines, options)
    result.float32 = _eager(program, contextlib.nullcontext)
    for dtype in (torch.float16, torch.bfloat16):
        # an operator that autocast gives a dtype for which the CPU has no kernel
        with contextlib.suppress(RuntimeError, NotImplementedError):
            amp = Amp(dtype)
            result.amp, result.amp_skipped = _eager(program, amp.call), amp.skipped
            result.amp_dtype = str(dtype).removeprefix("torch.")
            break
    start = time.perf_counter()
    try:
        _compiled(program, result, options)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        result.error = f"{type(error).__name__}: {lines[0]}"
        result.trace = f"{error}\n\n{traceback.format_exc()}"[-6000:]
    result.seconds = time.perf_counter() - start
    return result


def _compiled(program: Program, result: Result, options: dict[str, Any]) -> None:
    training = _built(program)
    step = torch.compile(training.step, backend="mixedprec", options=options)
    try:
        result.fxpass = _losses(training, step)
    finally:
        with contextlib.suppress(fxpass.FxpassError):
            mp = fxpass.of(step)
            stats = mp.stats()
            result.calls, result.graphs = len(training.calls), len(mp.graphs)
            result.steps, result.skipped = stats.steps, stats.skipped


def _eager(program: Program, around: Callable[[], Any]) -> list[float]:
    training = _built(program)

    def step(*args: Any) -> Any:
        with around():
            return training.step(*args)

    return _losses(training, step)


def _built(program: Program) -> Training:
    torch.compiler.reset()
    torch.manual_seed(0)
    training = program.build()
    torch.manual_seed(1)
    return training


def _losses(training: Training, step: Callable[..., Any]) -> list[float]:
    results = [step(*arguments) for arguments in training.calls]
    if training.check:
        torch.manual_seed(2)
        return losses(training.check())
    return losses(results[-1])


def row(result: Result) -> dict[str, Any]:
    """The result for a JSON file."""
    numbers = {k: [float(f"{x:.6g}") for x in getattr(result, k)] for k in ("fxpass", "amp", "float32")}
    return {**asdict(result), **numbers, "seconds": round(result.seconds, 1), "verdict": result.verdict}
