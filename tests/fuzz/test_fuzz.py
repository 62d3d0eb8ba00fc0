"""150 programs of the fuzzer, compiled and eager; a failing one is printed as a script."""

from __future__ import annotations

from typing import Any

import pytest
from torch.fx import Node

from fxpass.ir.graph import Phase, phase
from tests.fuzz import reference
from tests.fuzz.grammar import KINDS, compose, draw
from tests.fuzz.program import source
from tests.fuzz.run import run

SEEDS = range(9000, 9150)


def check(seed: int, codegen: str) -> None:
    text = source(draw(seed, codegen))
    outcome = run(text)
    assert outcome.good, f"{outcome.kind}: {outcome.symptom}\n{outcome.detail}\n{text}"


@pytest.mark.breadth(17)
@pytest.mark.parametrize("seed", SEEDS[::3])  # a third of them as users run them
def test_programs(seed: int) -> None:
    check(seed, "inductor")


@pytest.mark.breadth(10)
@pytest.mark.parametrize("first", SEEDS[1::3])
def test_programs_operator_by_operator(first: int) -> None:
    check(first, "eager")
    check(first + 1, "eager")


def test_the_programs_of_a_seed_are_always_the_same_and_use_every_word() -> None:
    programs = [draw(seed, "eager") for seed in range(2000)]
    assert [source(p) for p in programs[:50]] == [source(draw(seed, "eager")) for seed in range(50)]
    drawn = {word.name for program in programs for _, word in program.chosen}
    assert drawn == {word.name for kind in KINDS for word in kind.words}


# Words, and the part of the reference that is taken out: then the compiled run must look wrong.
FAULTS: dict[str, tuple[list[str], Any, str]] = {
    "clip": (["max_norm"], reference.Eager, "_clip"),
    "clip, float16": (["max_norm", "float16"], reference.Eager, "_clip"),
    "update": (["bfloat16", "AdamW(lr=0.01)"], reference.Eager, "_apply"),
    "statistics": (["running norm", "inf"], reference.Saved, "restore_extras"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_difference_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words, owner, part = FAULTS[name]
    text = source(compose(words, "eager"))
    assert run(text).kind == "right"
    monkeypatch.setattr(owner, part, lambda *args: None)
    assert run(text).kind == "wrong"


def _after_as_forward(node: Node) -> Phase:
    return Phase.FORWARD if phase(node) is Phase.AFTER else phase(node)


# Words, and the part of fxpass that keeps their programs right, as it would be without: then they look wrong.
MENDS: dict[str, tuple[list[str], str, Any]] = {
    "lr 0": (["embedding", "warmup from 0", "AdamW(lr=0.01)"], "capture.optim._BRANCHING", object),
    "hooks": (["hook on a parameter"], "_torch.dynamo_backward.hooked_gradient", lambda tx, leaf, grad: grad),
    "step replaced": (["update replaced later"], "capture.assumptions.Assumptions.check", lambda *_: None),
    "old weights": (
        ["float16", "skip='tensor'", "diagonal kept for later"],
        "passes.release.input_storages",
        lambda graph: {},
    ),
    "own precision": (["float16", "rotated there and back"], "passes.cast.phase", _after_as_forward),
    "statistics": (["fisher information", "nan"], "passes.skip.follows_gradient", lambda step: []),
    "edits": (["gain that overflows"], "passes.check_finite._is_edited", lambda *_: False),
    "not linear": (
        ["float16, static", "straight-through clamp"],
        "passes.unscale_nonlinear.UnscaleNonlinear.run",
        lambda *_: None,
    ),
}


@pytest.mark.breadth
@pytest.mark.parametrize("name", MENDS)
def test_a_mend_that_is_taken_out_is_missed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words, part, other = MENDS[name]
    text = source(compose(words, "eager"))
    assert run(text).good
    monkeypatch.setattr(f"fxpass.{part}", other)
    assert run(text).kind == "wrong"
