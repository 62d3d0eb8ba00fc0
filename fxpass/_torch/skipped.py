"""Whether ``if not ready: set_up()`` leaves out the call alone once it is ready; read off Dynamo's instructions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_GO = frozenset("JUMP_FORWARD JUMP_ABSOLUTE JUMP_BACKWARD JUMP_BACKWARD_NO_INTERRUPT".split())
_NOTHING = frozenset("NOP RESUME CACHE NOT_TAKEN".split())
_RETURN = -1


def skips_only(instructions: Sequence[Any], index: dict[Any, int], after: int | None) -> bool:
    """Whether every condition before the call before ``after`` leads past it to where the call's own way leads."""
    if after is None or instructions[after].opname != "POP_TOP":
        return False
    end = _landing(instructions, index, after + 1)
    conditions = 0
    for instruction in instructions[:after]:
        name = instruction.opname
        if name.startswith("RETURN") and name != "RETURN_GENERATOR":
            return False
        if name in _GO or name == "FOR_ITER" or "JUMP" not in name:
            if name == "JUMP_FORWARD":
                return False  # the end of a branch that has an else
            continue
        conditions += 1
        if _landing(instructions, index, index[instruction.target]) != end:
            return False
    return conditions > 0


def _landing(instructions: Sequence[Any], index: dict[Any, int], at: int) -> int:
    """The first instruction from ``at`` on that does something; all returns of None are the same."""
    for _ in range(len(instructions)):
        name = instructions[at].opname
        if name in _GO:
            at = index[instructions[at].target]
        elif name in _NOTHING:
            at += 1
        elif name == "RETURN_CONST" and instructions[at].argval is None:
            return _RETURN
        elif name == "LOAD_CONST" and instructions[at].argval is None:
            following = instructions[at + 1].opname
            return _RETURN if following == "RETURN_VALUE" else at
        else:
            break
    return at
