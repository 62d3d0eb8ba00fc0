"""150 programs of the fuzzer, compiled and eager; a failing one is printed as a script."""

from __future__ import annotations

import pytest

from tests.fuzz.grammar import KINDS, draw
from tests.fuzz.program import source
from tests.fuzz.run import run

SEEDS = range(9000, 9150)
BATCHES = 15  # tests, that several processes can share them out


@pytest.mark.parametrize("batch", range(BATCHES))
def test_programs(batch: int) -> None:
    for seed in SEEDS[batch::BATCHES]:
        program = draw(seed, "inductor" if seed % 3 == 0 else "eager")
        text = source(program)
        outcome = run(text)
        assert outcome.good, f"{outcome.kind}: {outcome.symptom}\n{outcome.detail}\n{text}"


def test_the_programs_of_a_seed_are_always_the_same_and_use_every_word() -> None:
    programs = [draw(seed, "eager") for seed in range(2000)]
    assert [source(p) for p in programs[:50]] == [source(draw(seed, "eager")) for seed in range(50)]
    drawn = {word.name for program in programs for _, word in program.chosen}
    assert drawn == {word.name for kind in KINDS for word in kind.words}


WRONG = {
    "calls are not counted": ("print in a loop", "compiled.step"),
}


def test_a_fault_is_found() -> None:
    """A program whose compiled run is given another learning rate differs; so does one that skips too much."""
    text = source(draw(9000, "eager"))
    text = text.replace("def before(call):\n", "def before(call):\n        mutate(optimizers, compile)\n")
