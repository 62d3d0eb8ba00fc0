"""Where the two ways of a conditional jump meet again, read off a function's bytecode.

Written for torch 2.11 to 2.13 and the bytecode of Python 3.10 to 3.13. The meeting point is
the immediate postdominator of the jump (Ferrante, Ottenstein, Warren: The Program Dependence
Graph, 1987); ways that end in a ``raise`` are left out, they never meet.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

END = -1  # the function's end: both sides return
_RETURNS = ("RETURN_VALUE", "RETURN_CONST")
_RAISES = ("RAISE_VARARGS", "RERAISE")
_ALWAYS = ("JUMP_FORWARD", "JUMP_BACKWARD", "JUMP_BACKWARD_NO_INTERRUPT", "JUMP_ABSOLUTE")


def is_conditional(opname: str) -> bool:
    """Whether the instruction jumps if what is on the stack is true, or if it is false."""
    return opname.startswith(("POP_JUMP", "JUMP_IF")) and opname.endswith(
        ("IF_TRUE", "IF_FALSE", "TRUE_OR_POP", "FALSE_OR_POP")
    )


def meeting(instructions: list[Any], indexof: dict[Any, int], jump: int) -> int | None:
    """The index where both sides of the jump at index ``jump`` meet: END, or None where they do not."""
    after = [list(_successors(instructions, indexof, i)) for i in range(len(instructions))]
    way = _way_to_end(after, jump)
    if way is None:
        return None
    return next((i for i in way if i == END or _way_to_end(after, jump, without=i) is None), None)


def _successors(instructions: list[Any], indexof: dict[Any, int], index: int) -> Iterator[int]:
    inst = instructions[index]
    if inst.opname in _RETURNS:
        yield END
    elif inst.opname not in _RAISES:
        jumps = "JUMP" in inst.opname or inst.opname in ("FOR_ITER", "SEND")
        if jumps and inst.target is not None:
            yield indexof[inst.target]
        if inst.opname not in _ALWAYS and index + 1 < len(instructions):
            yield index + 1


def _way_to_end(after: list[list[int]], start: int, without: int | None = None) -> list[int] | None:
    """A shortest way from ``start``, itself left out, to the function's end."""
    came: dict[int, int] = {start: start}
    queue = [start]
    for index in queue:
        for following in after[index]:
            if following in came or following == without:
                continue
            came[following] = index
            if following == END:
                return list(_back(came, start))[::-1]
            queue.append(following)
    return None


def _back(came: dict[int, int], start: int) -> Iterator[int]:
    index = END
    while index != start:
        yield index
        index = came[index]
