"""``fxpass doctor``: does fxpass work on this machine, and what is there to install."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from dataclasses import dataclass

import click
import torch

from .. import MixedPrecision, __version__
from .flags import common_options
from .output import console, print_json, table

EXTRAS = {p: "cli" for p in ("click", "rich", "plotly", "pydot")} | {
    "matplotlib": "plots",
    "transformers": "models",
}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    what: str
    ok: bool
    found: str
    hint: str  # what to do; "" if nothing


@dataclass(frozen=True)
class DoctorResult:
    """The answer of ``fxpass doctor``."""

    ok: bool  # a step was captured, compiled and gave the right result
    checks: tuple[Check, ...]


@common_options
@click.option(
    "--codegen", type=click.Choice(["inductor", "eager"]), default="inductor", help="[default: inductor]"
)
def doctor(*, codegen: str, as_json: bool, traceback: bool) -> int:
    """Say which versions and devices are here, and whether a step compiles; exits with 1 if not.

    \b
    Example: fxpass doctor
    """
    checks = (*_versions(), *_tools(), *_step(codegen))
    result = DoctorResult(checks[-1].ok, checks)
    if as_json:
        print_json("doctor", result)
    else:
        rows = [(c.what, "ok" if c.ok else "-", c.found, c.hint) for c in checks]
        console().print(table(("what", "", "found", "to do"), rows))
    return 0 if result.ok else 1


def _versions() -> list[Check]:
    version = torch.__version__.split("+")[0].split(".")
    fits = (2, 11) <= (int(version[0]), int(version[1])) < (2, 14)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu only"
    return [
        Check("fxpass", True, __version__, ""),
        Check("python", True, platform.python_version(), ""),
        Check("torch", fits, torch.__version__, "" if fits else "fxpass is written for torch 2.11 to 2.13"),
        Check("device", True, device, ""),
    ]


def _tools() -> list[Check]:
    checks = []
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or ""
    hint = "" if compiler else "install g++: Inductor needs it on the CPU; or codegen='eager'"
    checks.append(Check("C++ compiler", bool(compiler), compiler.rsplit("/", 1)[-1] or "none", hint))
    dot = shutil.which("dot")
    checks.append(
        Check(
            "graphviz",
            dot is not None,
            "dot" if dot else "none",
            "" if dot else "install graphviz for graph --format svg",
        )
    )
    for package, extra in EXTRAS.items():
        try:
            found, hint = importlib.metadata.version(package), ""
        except importlib.metadata.PackageNotFoundError:
            found, hint = "none", f"pip install 'fxpass[{extra}]'"
        checks.append(Check(package, not hint, found, hint))
    return checks


def _step(codegen: str) -> tuple[Check, ...]:
    """Compile a tiny step and run it; what the cache on disk had of it comes first."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.nn.Parameter(torch.ones(2, device=device))
    optimizer = torch.optim.SGD([weight], lr=0.5)

    def step() -> None:
        weight.sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    backend = MixedPrecision(codegen=codegen)
    try:
        torch.compile(step, backend=backend)()
    except Exception as error:
        text = str(error).strip().splitlines()
        found = text[0] if text else type(error).__name__
        return (Check("a step", False, found, "report it with this output"),)
    if torch.equal(weight.detach().cpu(), torch.full((2,), 0.5)):
        whole = Check("a step", True, f"captured whole, compiled ({codegen}), right result", "")
        return _cache(backend.graphs[0].cache), whole
    return (Check("a step", False, "it ran with a wrong result", "report it with this output"),)


def _cache(state: str) -> Check:
    """What the cache on disk had of a step."""
    known = {"hit": "the step was taken from disk", "miss": "the step is kept for the next process"}
    found = known.get(state, f"steps are not kept: {state or 'nothing to compile'}")
    return Check("cache", state in known, found, "")
