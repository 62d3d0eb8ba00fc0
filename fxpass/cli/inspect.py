"""``fxpass inspect TARGET``: was the step captured whole, what was inserted, what runs in which precision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click
from rich.console import Console

from ..hallway.dry_run import CAPTURED
from ..report.inspection import FLOATS, Inspection, inspection
from ..report.launches import KernelResources, Launches
from ..report.memory import NOTES, PROGRAM
from .dry_run import dry_run_of
from .flags import across_ranks, backend_options, capture_options, common_options, memory_of
from .memory import show_phases
from .output import bytes_text, console, print_json, table
from .usage import UsageProblem


@click.argument("target")
@click.option(
    "--launches",
    is_flag=True,
    help="kernels by phase and by pass; on a GPU they are compiled: registers and spills",
)
@memory_of
@backend_options
@across_ranks
@capture_options
@common_options
def inspect(
    target: str,
    *,
    launches: bool,
    of: str,
    options: dict[str, Any],
    device: str | None,
    tensors: str,
    as_json: bool,
    traceback: bool,
) -> None:
    """Say what was captured of TARGET's step, what each pass did, and what runs in which precision.

    \b
    Example: fxpass inspect gpt --max-norm 1.0
             fxpass inspect train.py:example --dtype bfloat16
             fxpass inspect gpt --device cuda --launches
    """
    if launches and options.get("codegen") == "eager":
        found = "codegen='eager' runs the graph node by node: there are no kernels to count"
        raise UsageProblem(found, "leave out --codegen or --launches")
    of = PROGRAM if launches else of
    run = dry_run_of(target, options, device, tensors, points={CAPTURED, "finish"}, of=of, kernels=launches)
    result = inspection(target, run, with_launches=launches)
    if as_json:
        print_json("inspect", result)
    else:
        show(result, console())


def show(result: Inspection, out: Console) -> None:
    """Print ``result`` for a person."""
    updated = f"{result.parameters:,} parameters updated"
    out.print(f"{result.target}: captured whole, one graph, {updated}", style="bold", markup=False)
    kind = "fake tensors, nothing allocated" if result.tensors == "fake" else "real tensors"
    times = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in result.seconds.items())
    out.print(f"{kind}, device {result.device}, {times}")
    for note in result.notes:
        out.print(f"note: {note}", markup=False)
    out.print()
    counts = ("captured", "compiled", "of these inserted")
    regions = [(r.phase, r.captured, r.compiled, r.inserted) for r in result.regions]
    out.print(table(("region", *counts), regions, right=counts))
    out.print()
    counts = ("inserted", "removed", "s")
    passes = [
        (p.name, p.inserted, p.removed, f"{p.seconds:.2f}", "; ".join(p.declined)) for p in result.passes
    ]
    out.print(table(("pass", *counts, "declined"), passes, right=counts))
    out.print()
    _show_precision(result, out)
    _show_names(out, "no gradient", result.no_gradient, "every trainable parameter gets a gradient")
    _show_names(out, "gradient escapes", result.escaping, "no gradient leaves the step")
    out.print()
    peak = f"{bytes_text(result.memory.peak)}, {result.memory.bytes_per_parameter:.2f} bytes per parameter"
    out.print(f"memory {NOTES[result.memory.of]}: peak {peak}", markup=False)
    show_phases(result.memory, out)
    if result.launches is not None:
        out.print()
        _show_launches(result.launches, out)
    if result.ranks > 1:
        out.print()
        _show_transfers(result, out)


def _show_launches(launches: Launches, out: Console) -> None:
    kernels = sum(p.kernels for p in launches.phases)
    text = f"{launches.total} launches a step: {kernels} generated {launches.language} kernels"
    out.print(f"{text}, {launches.total - kernels} library calls", markup=False)
    for note in launches.notes:
        out.print(f"note: {note}", markup=False)
    counts = ("kernels", "library calls")
    phases = [(p.phase, p.kernels, p.calls) for p in launches.phases]
    out.print(table(("launched in", *counts), phases, right=counts))
    out.print()
    counts = ("alone", "fused with others")
    passes = [(p.name, p.alone, p.fused) for p in launches.passes]
    out.print(table(("launched for", *counts), passes, right=counts))
    if launches.compiled:
        out.print()
        _show_resources(launches.compiled, out)


def _show_resources(kernels: Sequence[KernelResources], out: Console) -> None:
    fewest, most = min(k.fewest for k in kernels), max(k.most for k in kernels)
    spilling = [k for k in kernels if k.spilled]
    text = f"{len(kernels)} kernels compiled for sm_{kernels[0].capability}: {fewest} to {most} registers"
    out.print(f"{text}, {len(spilling) or 'none'} with spills", markup=False)
    if spilling:
        cells = [(k.name, f"{k.fewest} to {k.most}", k.spilled) for k in spilling]
        out.print(table(("spills", "registers", "bytes a thread"), cells, right=("bytes a thread",)))


def _show_transfers(result: Inspection, out: Console) -> None:
    sent = sum(t.sent for t in result.transfers)
    per = sent / max(result.parameters, 1)
    text = f"{result.ranks} ranks: each sends {bytes_text(sent)} a step, {per:.2f} bytes per parameter"
    early = sum(t.sent for t in result.transfers if t.early) / max(sent, 1)
    out.print(f"{text}; {early:.0%} of it starts before the last product of the backward", markup=False)
    head = ("collective", "phase", "dtype", "bytes", "sent", "of N ranks", "products meanwhile")
    cells = [
        (t.operator, t.phase, t.dtype, f"{t.bytes:,}", f"{t.sent:,}", t.formula, t.products)
        for t in result.transfers
    ]
    out.print(table(head, cells, right=("bytes", "sent", "products meanwhile")))


def _show_precision(result: Inspection, out: Console) -> None:
    dtypes = [d for d in FLOATS if any(p.dtype == d for p in result.precision)]
    numbers = {(p.colour, p.dtype): p.count for p in result.precision}
    colours = sorted({p.colour for p in result.precision})
    cells = [(c, *(numbers.get((c, d), 0) for d in dtypes)) for c in colours]
    out.print(table(("forward and backward", *dtypes), cells, right=dtypes))
    out.print()
    kept = [(f.op, f.count, f.reason) for f in result.float32]
    out.print(table(("in float32", "count", "why"), kept, right=("count",)))
    out.print()


def _show_names(out: Console, title: str, names: dict[str, str], none: str) -> None:
    if not names:
        out.print(none)
        return
    out.print(table((title, "why"), names.items()))
