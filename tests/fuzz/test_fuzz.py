"""150 programs of the fuzzer, compiled and eager; a failing one is printed as a script."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fuzz import reference
from tests.fuzz.grammar import KINDS, compose, draw
from tests.fuzz.program import source
from tests.fuzz.run import run

SEEDS = range(9000, 9150)


@pytest.mark.parametrize("first", SEEDS[::3])
def test_programs(first: int) -> None:
    for seed in range(first, first + 3):
        text = source(draw(seed, "inductor" if seed % 3 == 0 else "eager"))
        outcome = run(text)
        assert outcome.good, f"{outcome.kind}: {outcome.symptom}\n{outcome.detail}\n{text}"


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
