"""``fxpass compile TARGET``: the compiled step into the cache on disk, before the training starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import click
from rich.console import Console

from ..hallway.ahead import Ahead, compile_ahead
from .dry_run import check_device
from .flags import backend_options, common_options
from .output import bytes_text, console, print_json, table
from .target import load

STATES = {"hit": "was on disk", "miss": "kept on disk"}


@dataclass(frozen=True)
class CompiledGraph:
    """One graph of the step."""

    name: str  # of the function, and where it begins
    why: str  # it was made
    cache: str  # hit: it was on disk; miss: it was compiled, and is now; else why it is not kept
    seconds: float  # of the CPU


@dataclass(frozen=True)
class CompileResult:
    """The answer of ``fxpass compile``."""

    target: str
    device: str
    kept: bool  # the next process takes the whole step from disk
    seconds: float  # on the wall
    directory: str
    files: int  # that are new in it
    bytes: int
    graphs: tuple[CompiledGraph, ...]


@click.argument("target")
@click.option("--device", metavar="DEVICE", help="build and compile for this device, which must be here")
@backend_options
@common_options
def compile_(
    target: str, *, device: str | None, options: dict[str, Any], as_json: bool, traceback: bool
) -> int:
    """Compile TARGET's step into the cache on disk; exits with 1 if it cannot be kept there.

    The model is built, and the step runs once. A training that calls it with the same options and sizes,
    on a machine of this kind, then starts without compiling.

    \b
    Example: fxpass compile train.py:example --max-norm 1.0
    """
    step = load(target)
    if device is not None:
        check_device(device)
    result = _result(target, compile_ahead(step.make, options, device))
    if as_json:
        print_json("compile", result)
    else:
        show(result, console())
    return 0 if result.kept else 1


def _result(target: str, done: Ahead) -> CompileResult:
    graphs = tuple(CompiledGraph(g.name, g.why, g.cache, sum(g.seconds.values())) for g in done.graphs)
    new = (done.directory, done.files, done.bytes)
    return CompileResult(target, done.device, not done.not_kept, done.seconds, *new, graphs)


def show(result: CompileResult, out: Console) -> None:
    """Print ``result`` for a person."""
    there = all(g.cache == "hit" for g in result.graphs)
    done = "everything was on disk, loaded" if there else "compiled"
    out.print(
        f"{result.target}: {done} for {result.device} in {result.seconds:.1f} s", style="bold", markup=False
    )
    if not there:
        out.print(
            f"new files: {result.files}, {bytes_text(result.bytes)}, in {result.directory}", markup=False
        )
    out.print()
    rows = [
        (g.name, g.why, f"{g.seconds:.1f}", STATES.get(g.cache, f"not kept: {g.cache}"))
        for g in result.graphs
    ]
    out.print(table(("graph", "made for", "cpu s", "cache"), rows, right=("cpu s",)))
