"""Draws a program: one word per kind, none that clashes with another."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

from tests.fuzz.words import around, models, optimizers, settings, steps, updates
from tests.fuzz.words.word import Word


@dataclass(frozen=True)
class Kind:
    """A hole of the template: the words that fit, and how many a program has of them."""

    name: str
    words: tuple[Word, ...]
    chances: tuple[float, ...]  # of having at least one, at least two...

    @property
    def needed(self) -> bool:
        """Whether no program does without."""
        return self.chances[0] == 1.0


KINDS = (
    Kind("model", models.MODELS, (1.0,)),
    Kind("form", steps.FORMS, (1.0,)),
    Kind("optimizer", optimizers.OPTIMIZERS, (1.0,)),
    Kind("loss", steps.LOSSES, (1.0,)),
    Kind("result", steps.RESULTS, (1.0,)),
    Kind("dtype", settings.DTYPES, (1.0,)),
    Kind("scale", settings.SCALES, (0.4,)),
    Kind("mode", settings.MODES, (0.4, 0.1)),
    Kind("edit", updates.EDITS, (0.35, 0.05)),
    Kind("overflow", settings.OVERFLOWS, (0.25,)),
    Kind("clip", settings.CLIPS, (0.3,)),
    Kind("size", settings.SIZES, (0.25,)),
    Kind("params", optimizers.PARAMS, (0.35,)),
    Kind("schedule", optimizers.SCHEDULES, (0.4,)),
    Kind("trick", models.TRICKS, (0.4, 0.1)),
    Kind("after", updates.AFTER, (0.3, 0.05)),
    Kind("around", around.AROUND, (0.25, 0.05)),
)


@dataclass(frozen=True)
class Program:
    """The words of one program, by kind, in the order of ``KINDS``."""

    seed: int
    codegen: str
    chosen: tuple[tuple[str, Word], ...]

    def of(self, kind: str) -> list[Word]:
        """The words of one kind."""
        return [word for name, word in self.chosen if name == kind]

    def one(self, kind: str) -> Word:
        """The only word of a kind that no program does without."""
        (word,) = self.of(kind)
        return word

    def has(self, name: str) -> bool:
        """Whether a word of this name is in it."""
        return any(word.name == name for _, word in self.chosen)

    @property
    def refusable(self) -> bool:
        """Whether an error of fxpass is a right answer."""
        return any(word.refusable for _, word in self.chosen)

    @property
    def title(self) -> str:
        """All features, for people."""
        return f"seed {self.seed}, {self.codegen}: " + "; ".join(word.name for _, word in self.chosen)


def draw(seed: int, codegen: str, without: AbstractSet[str] = frozenset()) -> Program:
    """The program of a seed, of words whose names are not in ``without``."""
    rng = random.Random(seed)
    chosen: list[tuple[str, Word]] = []
    for kind in KINDS:
        liked = {name for _, word in chosen for name in word.likes} & {word.name for word in kind.words}
        for chance in kind.chances:
            if rng.random() >= (max(chance, 0.5) if liked else chance):
                break
            fitting = [w for w in kind.words if not any(_clash(kind.name, w, *other) for other in chosen)]
            fitting = [w for w in fitting if (kind.name, w) not in chosen and w.name not in without]
            if fitting:
                chosen.append((kind.name, rng.choices(fitting, [_weight(w, liked) for w in fitting])[0]))
            liked = set()
    return Program(seed, codegen, tuple(chosen))


def _weight(word: Word, liked: set[str]) -> float:
    """A word that may be refused hides what else is wrong in its program: it is rarer."""
    return word.weight * (0.25 if word.refusable else 1.0) * (10.0 if word.name in liked else 1.0)


def compose(names: Iterable[str], codegen: str) -> Program:
    """A program with these words, and the first of every kind that is needed beside them."""
    wanted = set(names)
    chosen: list[tuple[str, Word]] = []
    for kind in KINDS:
        found = [word for word in kind.words if word.name in wanted]
        chosen += [(kind.name, word) for word in found or kind.words[: int(kind.needed)]]
    unknown = wanted - {word.name for _, word in chosen}
    if unknown:
        raise ValueError(f"no words of the grammar: {', '.join(sorted(unknown))}")
    return Program(0, codegen, tuple(chosen))


def simpler(program: Program) -> Iterator[Program]:
    """The programs with one feature less, or with the simplest of its kind instead."""
    for at, (name, word) in reversed(list(enumerate(program.chosen))):
        kind = next(k for k in KINDS if k.name == name)
        before, behind = program.chosen[:at], program.chosen[at + 1 :]
        if not kind.needed:
            yield replace(program, chosen=before + behind)
            continue
        first = kind.words[0]
        if word != first and not any(_clash(name, first, *other) for other in before + behind):
            yield replace(program, chosen=(*before, (name, first), *behind))


def _clash(kind: str, word: Word, other_kind: str, other: Word) -> bool:
    return bool(_tags(kind, word) & set(other.clashes) or _tags(other_kind, other) & set(word.clashes))


def _tags(kind: str, word: Word) -> set[str]:
    return {kind, word.name, word.inputs.removesuffix("32")} | ({"tainted"} if word.tainted else set())
