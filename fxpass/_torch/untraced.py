"""What Dynamo could not trace: why a graph broke, and what is an error of ours.

Written for torch 2.11 to 2.13: a size that Python needs while tracing (a list of unknown
length), and whatever the tracer itself did not expect.
"""

from __future__ import annotations

import re
from types import CodeType
from typing import Any

from torch._dynamo.exc import InternalTorchDynamoError
from torch._dynamo.graph_break_hints import USER_ERROR
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from ..errors import CaptureError
from .dynamo_common import inside, user_line
from .frame_record import FrameRecord


def refusal(error: Exception, code: CodeType) -> CaptureError | None:
    """The error for a frame whose tracing failed; None if Dynamo's own says enough.

    ``code`` is the frame's, named where nothing tells the line.
    """
    chain: list[BaseException] = [error]  # Dynamo wraps what it did not expect, and leaves the line inside
    while (inner := chain[-1].__context__) is not None:
        chain.append(inner)
    stack = next((s for e in chain if (s := getattr(e, "real_stack", None))), None)
    text = str(error).partition("\n")[0]
    where = user_line(stack) if stack else f"{code.co_filename}:{code.co_firstlineno} in {code.co_name}"
    if isinstance(error, GuardOnDataDependentSymNode):
        found = f"Python asks for a number that is known only when the step runs: {text}"
        hint = "say how many there are: torch.bincount(y, minlength=5)[:5].tolist() has five for certain"
        return CaptureError(found, where=where, hint=hint)
    if isinstance(error, InternalTorchDynamoError) and "PendingUnbackedSymbolNotFound" in text:
        found = "a view that begins where a tensor says is written in place, which torch cannot trace"
        hint = "choose by a mask: h = torch.where((torch.arange(len(h)) == i)[:, None], h * 2, h)"
        return CaptureError(found, where=where, hint=hint)
    if isinstance(error, InternalTorchDynamoError):
        hint = "write that line in another way, or do it outside of the compiled function"
        failure = CaptureError(f"tracing fails with {text}", where=where, hint=hint)
        failure.__cause__ = error.__context__  # where in the tracer: for whoever mends it
        return failure
    return None


def note_break(record: FrameRecord, reason: str, stack: Any) -> None:
    """Remember why and where the graph of a frame broke, by Dynamo's message and its stack."""
    record.break_reason, record.break_where = _what_broke(reason), user_line(stack)
    record.break_inside = inside(stack, record.code)


def _what_broke(reason: str) -> str:
    """Dynamo's message without its advice, which is about graph breaks in general."""
    if unnamed := re.search(r"Failed to find name `(\w+)`", reason):
        return f"raises NameError: {unnamed[1]}"
    raised = re.search(r"Developer debug context: (?:raised exception )?(\S.*)", reason)
    if raised and USER_ERROR[0] in reason:
        return f"raises {raised[1]}"
    wanted = []
    for line in (line.strip() for line in reason.strip().splitlines()):
        if line.startswith(("Hint:", "Developer debug", "***", "from user code", "For more details")):
            break
        wanted.append(line.removeprefix("Explanation: "))
    return ". ".join(line.rstrip(".") for line in wanted if line)
