"""The ways a function goes after one of its instructions, read off its bytecode."""

from __future__ import annotations

import dis
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

_GO = frozenset("JUMP_FORWARD JUMP_ABSOLUTE JUMP_BACKWARD JUMP_BACKWARD_NO_INTERRUPT".split())
_NOTHING = frozenset("NOP RESUME CACHE NOT_TAKEN PRECALL".split())
_ATTRIBUTE = frozenset("LOAD_ATTR LOAD_METHOD".split())
_RETURN = -1


@dataclass
class Ways:
    """``code``'s instructions, and where the jumps among them lead."""

    code: CodeType
    instructions: list[dis.Instruction] = field(init=False)

    def __post_init__(self) -> None:
        self.instructions = list(dis.get_instructions(self.code))
        self._index = {instruction.offset: i for i, instruction in enumerate(self.instructions)}

    def at(self, offset: int | None) -> int | None:
        """The position of the instruction at ``offset``, None if that is not one of the function's own."""
        return self._index.get(offset) if offset is not None else None

    def after(self, offset: int | None) -> int | None:
        """The position behind it."""
        if (at := self.at(offset)) is None:
            return None
        while at + 1 < len(self.instructions) and self.instructions[at + 1].opname in _NOTHING:
            at += 1
        return at + 1

    def skips_only(self, at: int | None) -> bool:
        """Whether each condition before the call before ``at`` leads past it, to where its own way goes on.

        So it is with ``if not ready: set_up()``: once it is ready, the call is all that is left out.
        """
        if at is None or self.instructions[at].opname != "POP_TOP":
            return False
        end = self._landing(at + 1)
        conditions = 0
        for instruction in self.instructions[:at]:
            name = instruction.opname
            if name == "JUMP_FORWARD" or (name.startswith("RETURN") and name != "RETURN_GENERATOR"):
                return False  # a branch that has an else, or that ends the function
            if name in _GO or name == "FOR_ITER" or "JUMP" not in name:
                continue
            conditions += 1
            if self._landing(self._target(instruction)) != end:
                return False
        return conditions > 0

    def reach(self, at: int | None, attribute: str, *, every: bool = True) -> int | None:
        """The line of ``x.attribute``, if each way from ``at`` comes to one (or any); loops are entered."""
        if at is None:
            return None
        line, seen, todo = None, set[int](), [at]
        while todo:
            at = todo.pop()
            if at in seen or at >= len(self.instructions):
                continue
            seen.add(at)
            instruction = self.instructions[at]
            name = instruction.opname
            if name in _ATTRIBUTE and instruction.argval == attribute:
                line = self._line(at)
            elif name.startswith("RETURN_") and name != "RETURN_GENERATOR":
                if every:
                    return None
            elif name in _GO:
                target = self._target(instruction)
                again = target <= at and self.instructions[target].opname == "FOR_ITER"
                todo.append(self._target(self.instructions[target]) if again else target)
                if not every:
                    todo.append(target + 1)
            elif name not in ("RAISE_VARARGS", "RERAISE"):
                todo.append(at + 1)
                if "JUMP" in name:
                    todo.append(self._target(instruction))
        return line

    def _target(self, instruction: Any) -> int:
        return self._index[instruction.argval]

    def _line(self, at: int) -> int:
        starts = (i.starts_line for i in reversed(self.instructions[: at + 1]) if i.starts_line)
        line = next(starts, self.code.co_firstlineno)
        return self.instructions[at].line_number if line is True else line  # pyrefly: ignore[missing-attribute]

    def _landing(self, at: int) -> int:
        """The first instruction from ``at`` on that does something; all returns of None are the same."""
        for _ in range(len(self.instructions)):
            instruction = self.instructions[at]
            name = instruction.opname
            if name in _GO:
                at = self._target(instruction)
            elif name in _NOTHING:
                at += 1
            elif name == "RETURN_CONST" and instruction.argval is None:
                return _RETURN
            elif name == "LOAD_CONST" and instruction.argval is None:
                return _RETURN if self.instructions[at + 1].opname == "RETURN_VALUE" else at
            else:
                break
        return at
