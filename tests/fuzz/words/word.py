"""A feature of a program: text, and facts about it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from textwrap import dedent


@dataclass(frozen=True)
class Word:
    """A feature: text for the holes of the program's template, and what may stand beside it."""

    name: str
    code: str = ""  # fills the hole that the word was drawn for
    init: str = ""  # lines of Model.__init__
    whole: str = ""  # the model as an expression, instead of a class
    setup: str = ""  # lines of build(), behind the model
    behind: str = ""  # lines of the step, after the update
    ready: str = ""  # lines of build(), behind the optimizer
    before: str = ""  # lines that the host runs before each call of the step; `call` counts from 0
    preamble: str = ""  # lines of the module
    inputs: str = "floats"  # what the model takes: floats, tokens, tokens32, sequence or image
    tainted: tuple[str, ...] = ()  # names in `extras` whose value depends on a gradient
    exact: tuple[str, ...] = ()  # names in `extras` that no dtype may round
    clashes: tuple[str, ...] = ()  # names of words, or of their kinds, that it cannot stand beside
    likes: tuple[str, ...] = ()  # names of words that it is often drawn with: together they find faults
    refusable: bool = False  # an FxpassError is a right answer
    calls: int = 0  # how many calls it takes to matter
    weight: float = 1.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, str):
                object.__setattr__(self, field.name, dedent(value).strip())
