"""Every inserted node has a pass, a reason and a source."""

from __future__ import annotations

import pytest

from fxpass.cli.builtin import BUILTINS
from fxpass.hallway.dry_run import dry_run
from fxpass.report.explanation import explanations

from .helpers import fx


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"dtype": "bfloat16", "clip_value": 0.5}], ids=str)
def test_every_inserted_node_of_the_gpt_step_is_explained(options: dict[str, object]) -> None:
    run = dry_run(BUILTINS["gpt"], options)
    inserted = [n.name for n in run.final.nodes if n.made_by]
    assert len(inserted) > 100
    found = {e.node: e for e in explanations(run, "*")}
    passes = {p.name for p in run.record.passes}
    for name in inserted:
        explanation = found[name]
        assert explanation.made_by in passes
        assert explanation.reason
        made_of_nothing = ("full", "arange", "scalar_tensor", "zeros", "ones", "empty")
        assert explanation.sources or any(word in explanation.text for word in made_of_nothing), explanation
        assert explanation.why_dtype
    for explanation in found.values():
        assert explanation.why_dtype or not explanation.dtype, explanation


@pytest.mark.slow
def test_one_name_is_looked_for_in_the_gpt(capsys: pytest.CaptureFixture[str]) -> None:
    found = fx(capsys, "explain", "tokens.weight")
    assert found.code == 0
    assert "made by  the caller" in found.out


def test_a_node_that_a_later_pass_removes_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    found = fx(capsys, "explain", "@mlp", "mark")
    assert "removed  by pass finish" in found.out
