"""``fxpass passes``: the pipeline."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import click

from ..passes import PASSES
from ..passes.results import Result
from .flags import common_options
from .output import console, print_json, table


@dataclass(frozen=True)
class PassInfo:
    """One pass of the pipeline."""

    name: str
    summary: str
    options: tuple[str, ...]  # the backend's options it reads
    requires: tuple[str, ...]  # results that a pass before it must have left
    uses: tuple[str, ...]  # results that it reads where a pass has left them
    ensures: tuple[str, ...]  # the result that it leaves


@dataclass(frozen=True)
class PassesResult:
    """The answer of ``fxpass passes``: the pipeline, in order."""

    passes: tuple[PassInfo, ...]
    results: dict[str, str]  # what passes leave for later ones, in words


@click.option("--verbose", is_flag=True, help="what each pass requires, uses and ensures instead")
@common_options
def passes(*, verbose: bool, as_json: bool, traceback: bool) -> None:
    """List the passes in the order they run, with one line each.

    \b
    Example: fxpass passes
             fxpass passes --verbose
    """
    infos = tuple(
        PassInfo(
            name=cls.name,
            summary=first_line(cls),
            options=tuple(f.name for f in dataclasses.fields(cls)),
            requires=_names(cls.requires),
            uses=_names(cls.uses),
            ensures=_names(cls.ensures),
        )
        for cls in PASSES
    )
    results = {kind.__name__: first_line(kind) for cls in PASSES for kind in cls.ensures}
    if as_json:
        print_json("passes", PassesResult(infos, results))
        return
    if verbose:
        cells = ((p.name, *map(", ".join, (p.requires, p.uses, p.ensures))) for p in infos)
        console().print(table(("pass", "requires", "uses", "ensures"), cells))
        console().print()
        console().print(table(("result", "what it is"), results.items()))
        return
    rows = [(p.name, p.summary, ", ".join(p.options)) for p in infos]
    console().print(table(("pass", "what it does", "options"), rows))


def first_line(documented: type) -> str:
    """What a class is, by the first line of its docstring."""
    return (documented.__doc__ or "").strip().splitlines()[0]


def _names(results: tuple[type[Result], ...]) -> tuple[str, ...]:
    return tuple(result.__name__ for result in results)
