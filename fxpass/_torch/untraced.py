"""What Dynamo could not trace, as an error of ours.

Written for torch 2.11 to 2.13: a size that Python needs while tracing (a list of unknown
length), and whatever the tracer itself did not expect.
"""

from __future__ import annotations

from types import CodeType

from torch._dynamo.exc import InternalTorchDynamoError
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from ..errors import CaptureError
from .dynamo_common import user_line


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
