"""Python's search for cycles: rare while a step is compiled, the user's own way before and after."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from fxpass import VerifyError
from fxpass.ir.edit import Editor
from fxpass.ir.graph import StepGraph
from fxpass.passes.check_finite import CheckFinite
from fxpass.timing.garbage import YOUNG, rare_collections
from tests.support.graphs import graph_of, training_step


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)


@pytest.mark.parametrize(("before", "inside"), [(700, YOUNG), (0, 0), (YOUNG + 1, YOUNG + 1)])
def test_rarer_inside_and_never_against_the_users_own(before: int, inside: int) -> None:
    gc.set_threshold(before, 7, 5)
    with rare_collections():
        assert gc.get_threshold()[:2] == (inside, 7)
    assert gc.get_threshold()[:2] == (before, 7)


def test_a_step_is_compiled_with_it_and_leaves_the_threshold_even_if_it_fails() -> None:
    seen: list[int] = []

    class Look(CheckFinite):
        def run(self, step: StepGraph, edit: Editor) -> None:
            seen.append(gc.get_threshold()[0])
            raise VerifyError("not today")

    gc.set_threshold(700, 10, 10)
    with pytest.raises(VerifyError, match="not today"):
        graph_of(*training_step(), [Look()])
    assert seen == [YOUNG]
    assert gc.get_threshold()[0] == 700
