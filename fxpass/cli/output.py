"""Where results and errors go: rich tables for people, one JSON object for programs."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO, cast

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import FxpassError
from .usage import UsageProblem

PLAIN_WIDTH = 120


class _WithoutPadding(io.TextIOBase):
    """A stream that drops the blanks with which rich fills lines."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        return self.stream.write(re.sub(r" +\n", "\n", text))

    def flush(self) -> None:
        self.stream.flush()


def console(*, stderr: bool = False) -> Console:
    """A console that is plain and 120 columns wide when it is not a terminal (``COLUMNS`` overrides it)."""
    stream = sys.stderr if stderr else sys.stdout
    if stream.isatty():
        return Console(file=stream, highlight=False, emoji=False)
    width = None if "COLUMNS" in os.environ else PLAIN_WIDTH
    return Console(
        file=cast(TextIO, _WithoutPadding(stream)), width=width, highlight=False, no_color=True, emoji=False
    )


def table(head: Sequence[str], rows: Iterable[Sequence[object]], *, right: Sequence[str] = ()) -> Table:
    """A table without lines; columns named in ``right`` are numbers."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in head:
        made.add_column(
            name, justify="right" if name in right else "left", overflow="fold", no_wrap=name in right
        )
    for row in rows:
        made.add_row(*(Text(str(cell)) for cell in row))  # not markup: names have brackets
    return made


def plain(value: Any) -> Any:
    """Dataclasses, tuples and mappings as what JSON knows."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [f for f in dataclasses.fields(value) if f.repr]
        return {f.name: plain(getattr(value, f.name)) for f in fields}
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value if isinstance(value, (str, int, float, bool)) or value is None else str(value)


def print_json(command: str, result: Any) -> None:
    """``{"schema": "fxpass.<command>/1", ...}`` on one object; docs/cli.md lists the fields."""
    json.dump({"schema": f"fxpass.{command}/1", **plain(result)}, sys.stdout, indent=1)
    print()


@contextmanager
def working(text: str) -> Iterator[None]:
    """A spinner on stderr, where that is a terminal."""
    errors = console(stderr=True)
    if not errors.is_terminal:
        yield
        return
    with errors.status(text):
        yield


def report_error(error: Exception, code: int, as_json: bool) -> None:
    """One message on stderr; with ``--json`` one object on stdout too."""
    found = error.found if isinstance(error, (FxpassError, UsageProblem)) else str(error)
    hint = getattr(error, "hint", "")
    where = getattr(error, "where", "")
    if as_json:
        print_json("error", {"error": found, "where": where, "hint": hint, "code": code})
    print(f"fxpass: {error}", file=sys.stderr)


def bytes_text(count: float) -> str:
    """``12.3 MB``, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
