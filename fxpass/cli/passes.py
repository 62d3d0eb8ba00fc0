"""``fxpass passes``: the pipeline."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ..passes import PASSES
from .flags import common_options
from .output import console, print_json, table


@dataclass(frozen=True)
class PassInfo:
    """One pass of the pipeline."""

    name: str
    summary: str
    options: tuple[str, ...]  # the backend's options it reads


@dataclass(frozen=True)
class PassesResult:
    """The answer of ``fxpass passes``: the pipeline, in order."""

    passes: tuple[PassInfo, ...]


@common_options
def passes(as_json: bool, traceback: bool) -> None:
    """List the passes in the order they run, with one line each.

    \b
    Example: fxpass passes
    """
    found = tuple(
        PassInfo(
            cls.name,
            (cls.__doc__ or "").strip().splitlines()[0],
            tuple(f.name for f in dataclasses.fields(cls)),
        )
        for cls in PASSES
    )
    if as_json:
        print_json("passes", PassesResult(found))
        return
    rows = [(p.name, p.summary, ", ".join(p.options)) for p in found]
    console().print(table(("pass", "what it does", "options"), rows))
