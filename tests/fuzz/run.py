"""Runs one program compiled and eagerly, and says whether fxpass kept its word."""

from __future__ import annotations

import contextlib
import math
import sys
import traceback
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

import fxpass
from tests.fuzz.compare import TOLERANCES, difference
from tests.fuzz.program import load
from tests.fuzz.reference import Call, Eager, Run, gradients, outputs_of, perturb, scales


@dataclass(frozen=True)
class Outcome:
    """``kind``: right, refused (where it may be), wrong, or invalid (the program fails in eager)."""

    kind: str
    symptom: str = ""  # one line, equal for programs with the same fault
    detail: str = ""
    steps: int = 0  # that were compared

    @property
    def good(self) -> bool:
        """Whether nothing is to be reported."""
        return self.kind in ("right", "refused")


class Wrong(AssertionError):
    """fxpass broke its word: a symptom, and where it was seen."""

    def __init__(self, symptom: str, detail: str = "") -> None:
        super().__init__(symptom)
        self.detail = detail


def run(text: str) -> Outcome:
    """The outcome of a program, given as its script."""
    return check(vars(load(text)))


def check(program: Mapping[str, Any]) -> Outcome:
    """The outcome of a program, given as the names of its script."""
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            eager = _eager(program)
        except Exception as error:
            return Outcome("invalid", _line(error), traceback.format_exc())
        try:
            _compare(program, eager)
        except Wrong as error:
            return Outcome("wrong", str(error), error.detail)
        except fxpass.FxpassError as error:
            kind = (
                "refused" if program["REFUSABLE"] and not isinstance(error, fxpass.VerifyError) else "wrong"
            )
            return Outcome(kind, _line(error), traceback.format_exc())
        except Exception as error:
            return Outcome("wrong", _line(error), traceback.format_exc())
    return Outcome("right", steps=program["CALLS"])


def main(program: Mapping[str, Any]) -> None:
    """What a script of the fuzzer does when it is run."""
    outcome = check(program)
    print(outcome.kind, outcome.symptom, outcome.detail, sep="\n")
    sys.exit(not outcome.good)


def _line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]


def _compare(program: Mapping[str, Any], theirs: Run) -> None:
    options = program["OPTIONS"]
    dtype = options.get("dtype", "float16")
    exact, ours, scale = _compiled(program)
    verdicts = [call.skipped for call in (theirs if dtype == "float32" else ours).calls]
    if any(verdicts) or dtype != "float32":  # what overflows once scaled need not overflow in eager
        theirs = _eager(program, verdicts=verdicts)
    for number, (mine, wanted) in enumerate(zip(ours.calls, theirs.calls, strict=True)):
        _check_verdict(number, mine, wanted, scale[number], dtype)
    if options.get("skip") == "tensor" and dtype != "float32":
        # which of its tensors overflow, once scaled or by an input beyond its range, is the dtype's affair
        overflows = list(map(_overflows_here_alone, ours.calls, theirs.calls))
        theirs.calls[overflows.index(True) if True in overflows else len(overflows) :] = []
    if _first_difference(ours, theirs, [], dtype, exact):
        text = _first_difference(ours, theirs, _noisy(program, verdicts, dtype), dtype, exact)
        if text:
            raise Wrong(f"differs from eager: {text.split(':')[1].strip()}", text)
    policy = options.get("loss_scale")
    if isinstance(policy, fxpass.DynamicLossScale):
        wanted = scales([call.skipped for call in ours.calls], policy.init_scale, policy.growth_interval)
        if scale[1:] != wanted:
            raise Wrong("another loss scale than GradScaler's", f"{scale[1:]} instead of {wanted}")


def _overflows_here_alone(ours: Call, theirs: Call) -> bool:
    """Whether a call overflows in half precision and not in float32."""
    return theirs.huge or (ours.skipped and not math.isinf(theirs.largest))


def _first_difference(ours: Run, theirs: Run, noisy: list[Run], dtype: str, exact: tuple[str, ...]) -> str:
    for number in range(len(theirs.calls)):
        text = difference(number, ours, theirs, noisy, TOLERANCES[dtype], exact)
        if text:
            return f"after call {number}: {text}"
    return ""


def _noisy(program: Mapping[str, Any], verdicts: list[bool], dtype: str) -> list[Run]:
    """Eager runs from perturbed parameters; in half precision one under torch.amp, too.

    Gradients that cancel are noise in half precision, whatever the parameters.
    """
    runs = [_eager(program, TOLERANCES[dtype].noise, verdicts, seed) for seed in (1, 2)]
    if dtype != "float32":
        # an operator that cannot take two dtypes raises under autocast
        with contextlib.suppress(RuntimeError), torch.autocast("cpu", getattr(torch, dtype)):
            runs.append(replace(_eager(program, verdicts=verdicts), autocast=True))
    return runs


def _check_verdict(number: int, ours: Call, theirs: Call, scale: float, dtype: str) -> None:
    """In float32 both skip the same calls; in half precision finite gradients may overflow once scaled."""
    overflow = math.isinf(theirs.largest)
    if overflow and not ours.skipped:
        raise Wrong("a gradient that is not finite is applied", f"call {number}")
    may = dtype != "float32" and (theirs.huge or theirs.largest * scale > 600.0)
    if ours.skipped and not overflow and not may:
        raise Wrong("skipped without an overflow", f"call {number}, largest gradient {theirs.largest:.3g}")


def _compiled(program: Mapping[str, Any]) -> tuple[tuple[str, ...], Run, list[float]]:
    mp = fxpass.MixedPrecision(**program["OPTIONS"])
    built = program["build"](lambda f: torch.compile(f, backend=mp))
    start = built.snapshot()
    step = torch.compile(built.step, backend=mp)
    calls, scale = [], [mp.stats().scale]
    for number in range(program["CALLS"]):
        built.before(number)
        skipped = mp.stats().skipped
        outputs = outputs_of(step(*program["inputs"](number)))
        after = mp.stats()
        calls.append(Call(built.snapshot(), outputs, after.skipped > skipped, gradients(built)))
        scale.append(after.scale)
        if after.steps != number + 1:
            raise Wrong("calls are not counted", f"{after.steps} steps counted in {number + 1} calls")
        if mp.grads == "drop" and calls[-1].grads:
            raise Wrong("gradients are left", f"call {number}, parameters {', '.join(calls[-1].grads)}")
    return built.exact, Run(start, calls), scale


def _eager(
    program: Mapping[str, Any], noise: float = 0.0, verdicts: list[bool] | None = None, seed: int = 0
) -> Run:
    built = program["build"](lambda f: f)
    if noise:
        perturb(built, noise, seed)
    start = built.snapshot()
    eager = Eager(built, program["OPTIONS"], verdicts)
    return Run(start, [eager.call(program["inputs"](number)) for number in range(program["CALLS"])])
