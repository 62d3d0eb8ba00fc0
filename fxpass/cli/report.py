"""``fxpass report TARGET``: everything in one HTML file that opens offline."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from .dry_run import dry_run_of
from .flags import across_ranks, backend_options, capture_options, common_options, memory_of
from .output import bytes_text, console, print_json
from .usage import UsageProblem


@dataclass(frozen=True)
class ReportResult:
    """The answer of ``fxpass report``."""

    target: str
    output: str  # the file that was written
    bytes: int  # its size


@click.argument("target")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default="report.html",
    help="the file to write  [default: report.html]",
)
@memory_of
@backend_options
@across_ranks
@capture_options
@common_options
def report(
    target: str,
    *,
    output: Path,
    of: str,
    options: dict[str, Any],
    device: str | None,
    tensors: str,
    as_json: bool,
    traceback: bool,
) -> None:
    """Write all about TARGET's step into one HTML file: passes, precision, memory, graph, diffs.

    \b
    Example: fxpass report gpt -o report.html
    """
    try:
        from ..report import build

        run = dry_run_of(target, options, device, tensors, of=of)
        text = build(target, run)
    except ImportError as error:
        raise UsageProblem(f"the report needs {error.name}", "pip install 'fxpass[cli]'") from None
    try:
        output.write_text(text)
    except OSError as error:
        raise UsageProblem(f"cannot write {output}: {error.strerror}", "give another --output") from None
    if as_json:
        print_json("report", ReportResult(target, str(output), len(text)))
    else:
        console().print(f"wrote {output} ({bytes_text(len(text))})", markup=False)
