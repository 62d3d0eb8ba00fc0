"""The runner: passes stand in an order in which what each needs is there, and leave what they say."""

from __future__ import annotations

import ast
import inspect
import sys
from typing import ClassVar
from unittest import mock

import pytest

from fxpass import VerifyError
from fxpass.ir.edit import Editor
from fxpass.ir.graph import StepGraph
from fxpass.passes import PASSES, pipeline
from fxpass.passes.check_finite import CheckFinite
from fxpass.passes.clip import Clip
from fxpass.passes.grad_norm import GradNorm
from fxpass.passes.graph_pass import GraphPass
from fxpass.passes.pipeline import check_order
from fxpass.passes.results import Checked, GlobalNorm
from fxpass.passes.skip import Skip
from fxpass.passes.unscale import Unscale
from tests.support.graphs import graph_of, training_step


@pytest.mark.parametrize(
    ("passes", "said"),
    [
        ([Skip()], "'skip' requires Checked, which no pass before it ensures"),
        ([Skip(), CheckFinite()], "'skip' requires Checked, which no pass before it ensures"),
        ([CheckFinite(), Unscale()], "'check_finite' reads Unscaled, and pass 'unscale' changes it later"),
        ([CheckFinite(), Clip(), GradNorm()], "'clip' reads GlobalNorm, and pass 'grad_norm' changes it"),
    ],
)
def test_an_order_in_which_something_is_missing(passes: list[GraphPass], said: str) -> None:
    with pytest.raises(VerifyError, match=said):
        check_order(passes)


def test_a_result_that_is_not_what_it_should_be() -> None:
    class Wrong(GradNorm):
        ensures: ClassVar = (GlobalNorm,)

        def run(self, step: StepGraph, edit: Editor) -> None:
            step.result(GlobalNorm).norm = step.reads[0].mark

    with pytest.raises(VerifyError, match="'grad_norm' ensures GlobalNorm, but the norm is no single number"):
        graph_of(*training_step(), [CheckFinite(), Wrong()])

    class Nothing(CheckFinite):
        ensures: ClassVar = (Checked,)

        def run(self, step: StepGraph, edit: Editor) -> None:
            pass

    with pytest.raises(VerifyError, match="ensures Checked, but 0 verdicts for 1 optimizer steps"):
        graph_of(*training_step(), [Nothing()])


@pytest.mark.parametrize("kind", PASSES, ids=lambda kind: kind.name)
def test_a_pass_declares_the_results_it_touches(kind: type[GraphPass]) -> None:
    declared = {result.__name__ for result in (*kind.requires, *kind.uses, *kind.ensures)}
    assert _results_in(kind.__module__) == declared


def _results_in(module: str) -> set[str]:
    """The results that a pass's file imports, those of the norms if it takes norms."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(inspect.getsource(sys.modules[module]))):
        if isinstance(node, ast.ImportFrom) and node.module == "results":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "norms":
            clips = "note_clipped" in {alias.name for alias in node.names}
            found |= _results_in("fxpass.passes.norms") - (set() if clips else {"Clipped"})
    return found


class _Idle(GradNorm):
    ensures: ClassVar = ()

    def run(self, step: StepGraph, edit: Editor) -> None:
        pass


class _Forgets(_Idle):
    def run(self, step: StepGraph, edit: Editor) -> None:
        del next(n for n in step.graph.nodes if n.op == "call_function").meta["fxpass_phase"]


def test_a_graph_is_verified_again_where_a_pass_has_changed_it() -> None:
    with mock.patch.object(pipeline, "verify", wraps=pipeline.verify) as verified:
        graph_of(*training_step(), [CheckFinite(), _Idle()])
    assert [call.args[1] for call in verified.call_args_list] == ["check_finite"]
    with pytest.raises(VerifyError, match="grad_norm"):
        graph_of(*training_step(), [CheckFinite(), _Forgets()])
