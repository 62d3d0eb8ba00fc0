"""The quick part of `python -m bench.programs`: every program trains, most of them with codegen="eager"."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from bench.programs.program import Program, programs
from bench.programs.run import run

QUICK = [program for program in programs() if program.quick]
# with the options that users have, by which the whole table is made
WHOLE = {"forward_forward", "radam"}


@pytest.mark.breadth(20)
@pytest.mark.parametrize("program", QUICK, ids=lambda program: program.name)
def test_program(program: Program) -> None:
    options: dict[str, Any] = {} if program.name in WHOLE else {"codegen": "eager"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries, as users see them
        result = run(program, options)
    assert result.verdict == "ok", result.trace or result


def test_the_quick_part() -> None:
    assert len(QUICK) >= 40
    assert {p.name for p in QUICK} >= WHOLE
    assert not [p.name for p in QUICK if p.lines]
