"""``fxpass memory TARGET``: live bytes over the step, the peak, other sizes, other modes, traces."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from ..analysis.memory import MemoryProfile
from ..hallway.dry_run import DryRun
from ..report.memory import NOTES, MemorySummary, chrome_trace, summary
from .dry_run import dry_run_of
from .flags import across_ranks, backend_options, capture_options, common_options, memory_of, parse_all
from .output import bytes_text, console, print_json, table
from .plot import timeline
from .usage import UsageProblem


@dataclass(frozen=True)
class Mode:
    """One set of options, and what it takes."""

    mode: str
    memory: MemorySummary


@dataclass(frozen=True)
class MemoryResult:
    """The answer of ``fxpass memory``: the mode asked for, then those to compare it with."""

    target: str
    tensors: str
    device: str
    notes: tuple[str, ...]
    modes: tuple[Mode, ...]


@click.argument("words", nargs=-1, required=True, metavar="TARGET [KEY=VALUE]...")
@click.option(
    "--at", metavar="SIZES", help="other sizes of the arguments: batch=64,seq=2048 or a symbol's name"
)
@click.option("--compare", multiple=True, metavar="KEY=VALUE...", help="other options, side by side")
@click.option("--top", type=click.IntRange(0), default=10, help="how many tensors to list  [default: 10]")
@click.option(
    "--png", type=click.Path(dir_okay=False, path_type=Path), help="write the timeline as a picture"
)
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="write the timeline as a page")
@click.option(
    "--trace",
    type=click.Path(dir_okay=False, path_type=Path),
    help="write a trace for Perfetto or chrome://tracing",
)
@memory_of
@backend_options
@across_ranks
@capture_options
@common_options
def memory(
    words: tuple[str, ...],
    *,
    at: str | None,
    compare: tuple[str, ...],
    of: str,
    top: int,
    png: Path | None,
    html: Path | None,
    trace: Path | None,
    options: dict[str, Any],
    device: str | None,
    tensors: str,
    as_json: bool,
    traceback: bool,
) -> None:
    """Say what is alive when in TARGET's step, and where the peak is.

    \b
    Example: fxpass memory gpt
             fxpass memory gpt --at batch=64,seq=2048
             fxpass memory gpt --compare dtype=bfloat16 skip=tensor
             fxpass memory gpt --png memory.png --trace memory.json
    """
    target, modes = words[0], _modes((*compare, *words[1:]), options)
    sizes = _sizes(at)
    runs = [
        dry_run_of(
            target,
            mode,
            device,
            tensors,
            points=None if html else {"finish"},
            dynamic=bool(sizes) or None,
            of=of,
        )
        for mode in modes.values()
    ]
    profiles = [_at(run.memory, sizes) for run in runs]
    first = runs[0]
    summaries = [
        Mode(name, summary(p, run.memory_of, top=top))
        for name, p, run in zip(modes, profiles, runs, strict=True)
    ]
    result = MemoryResult(target, first.tensors, first.device, first.notes, tuple(summaries))
    _write_files(target, first, profiles[0], png=png, html=html, trace=trace)
    if as_json:
        print_json("memory", result)
    else:
        show(result, profiles[0], console())


def _modes(compare: tuple[str, ...], options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By name: the options given, then these with each of ``compare``'s changes."""
    modes = {"as given" if options else "default": options}
    for text in compare:
        changes = dict(_pair(part) for part in text.split(","))
        modes[text] = {**options, **parse_all(changes)}
    return modes


def _sizes(at: str | None) -> dict[str, int]:
    sizes = {}
    for part in filter(None, (at or "").split(",")):
        name, value = _pair(part)
        if not value.isdecimal() or int(value) < 1:
            raise UsageProblem(f"--at {part}: {value!r} is not a size", "write batch=64,seq=2048")
        sizes[name] = int(value)
    return sizes


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name or not value:
        raise UsageProblem(f"{text!r} is not KEY=VALUE", "write for instance dtype=bfloat16 or batch=64")
    return name, value


def _at(profile: MemoryProfile, sizes: dict[str, int]) -> MemoryProfile:
    if not sizes:
        return profile
    try:
        return profile.at(**sizes)
    except KeyError as error:
        known = ", ".join(f"{name} ({what})" for name, what in profile.symbols.items())
        raise UsageProblem(str(error.args[0]), f"symbolic here: {known or 'nothing'}") from None


def _write_files(
    target: str,
    run: DryRun,
    profile: MemoryProfile,
    *,
    png: Path | None,
    html: Path | None,
    trace: Path | None,
) -> None:
    if png is not None:
        try:
            from ..analysis.plot import timeline_figure

            timeline_figure(profile, target).savefig(png, dpi=120)
        except ImportError:
            raise UsageProblem("--png needs matplotlib", "pip install 'fxpass[plots]'") from None
    if html is not None:
        from ..report import build

        html.write_text(build(target, run, profile, only="memory"))
    if trace is not None:
        trace.write_text(json.dumps(chrome_trace(profile)))


def show(result: MemoryResult, profile: MemoryProfile, out: Console) -> None:
    """Print ``result`` for a person, with the timeline of the first mode."""
    used = result.modes[0].memory
    per = f"{used.bytes_per_parameter:.2f} bytes per parameter"
    out.print(
        f"{result.target}: peak {bytes_text(used.peak)}, {per}, in {used.phase}", style="bold", markup=False
    )
    out.print(f"{NOTES[used.of]}; {result.tensors} tensors, device {result.device}", markup=False)
    for note in result.notes:
        out.print(f"note: {note}", markup=False)
    out.print(f"formula: {used.formula}", markup=False, soft_wrap=True)
    for name, what in used.sizes.items():
        out.print(f"  {name}: {what}", markup=False)
    out.print()
    timeline(profile, out)
    out.print()
    show_phases(used, out)
    out.print()
    rows = [(a.name, a.role, f"{a.dtype}[{a.shape}]", bytes_text(a.bytes), a.where) for a in used.largest]
    out.print(table(("alive at the peak", "role", "type", "size", "your line"), rows, right=("size",)))
    if len(result.modes) > 1:
        out.print()
        _show_modes(result, out)


def show_phases(used: MemorySummary, out: Console) -> None:
    """Bytes by role at the peak of each phase; the peak of all is marked."""
    phases = [f"{p.phase} *" if p.peak == used.peak else p.phase for p in used.phases]
    roles = list(dict.fromkeys(role for p in used.phases for role in p.roles))
    rows = [(role, *(bytes_text(p.roles.get(role, 0)) for p in used.phases)) for role in roles]
    rows.append(("all", *(bytes_text(p.peak) for p in used.phases)))
    out.print(table(("at the peak of", *phases), rows, right=phases))


def _show_modes(result: MemoryResult, out: Console) -> None:
    first = result.modes[0].memory.peak
    rows = [
        (
            m.mode,
            bytes_text(m.memory.peak),
            f"{m.memory.peak / first:.3f}x",
            f"{m.memory.bytes_per_parameter:.2f}",
            m.memory.phase,
        )
        for m in result.modes
    ]
    head = ("mode", "peak", "of the first", "bytes per parameter", "in")
    out.print(table(head, rows, right=head[1:4]))
