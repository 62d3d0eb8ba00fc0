"""Why a graph broke, in the words of a training program, and what to do about it there."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ..errors import CaptureError


@dataclass(frozen=True)
class Break:
    """One graph break of Dynamo's: its reason, the user's line, and whether the step called it from there."""

    reason: str = ""
    where: str = ""
    inside: bool = False
    why: str = ""  # a branch on data: why not both of its sides are in the graph

    @classmethod
    def of(cls, record: Any, outer: Break | None = None) -> Break:
        """The last graph break of a frame (``_torch.FrameRecord``), of an enclosing one if it has none."""
        why = next(filter(None, reversed(record.declined.values())), "")
        own = cls(record.break_reason, record.break_where, record.break_inside, why or (outer or cls()).why)
        return own if own else outer or own

    def __bool__(self) -> bool:
        return bool(self.reason)

    @property
    def cause(self) -> str:
        """What broke the graph, and Dynamo's own words."""
        known = _known(self.reason)
        if known is None:
            return self.reason
        why = f", and {self.why}" if self.why and known is _ON_DATA else ""
        words = self.reason if self.reason.startswith("raises ") else self.reason.split(". ")[0]
        return f"{known.found}{why} ({words})"

    @property
    def hint(self) -> str:
        """What to do at the line of the break."""
        known = _known(self.reason) or _OTHER
        return known.inside if self.inside else known.in_step


@dataclass(frozen=True)
class _Cause:
    pattern: str
    found: str
    in_step: str
    inside: str


_DISABLED = "take it out of torch.compiler.disable, or call it outside of the compiled function"
_OTHER = _Cause(
    "",
    "",
    "move it after optimizer.step(), behind any with, try or loop, or out of the compiled function",
    "call it before the compiled step, and give its result to the step as an argument",
)
_ON_DATA = _Cause(
    r"generic_jump|ata-dependent|step_unsupported|`item`|Tensor\.item\(\)|__bool__",
    "what happens next depends on a value that the step computes",
    "choose with torch.where(condition, a, b), which keeps both sides in the graph, or decide after "
    "optimizer.step(), behind any with, try or loop; a loss of inf or nan needs no test: it is skipped",
    "choose with torch.where(condition, a, b), which keeps both sides in the graph",
)
_HOOKED = "register the hook once, before the compiled step is called"
_RETURNED = (
    "let it return what it computes; for the gradient of h, ask before backward(): "
    "g = torch.autograd.grad(loss, h, retain_graph=True)"
)
_UNCOMPILED = "call the function without torch.compile, once: the error comes from there, with its traceback"
_CAUSES = (
    _Cause("^raises ", "this line fails", _UNCOMPILED, _UNCOMPILED),
    _ON_DATA,
    _Cause(
        "Unsafe side effect", "a hook or a checkpointed function changes other objects", _RETURNED, _RETURNED
    ),
    _Cause("RemovableHandle", "a hook is registered on a module inside the step", _HOOKED, _HOOKED),
    _Cause(r"compiler\.disable", "torch was told not to trace a function", _DISABLED, _DISABLED),
)


def _known(reason: str) -> _Cause | None:
    return next((cause for cause in _CAUSES if re.search(cause.pattern, reason)), None)


def given_up(record: Any) -> CaptureError:
    """The error for a frame that trains, and breaks where its graph cannot be resumed."""
    broke = Break.of(record)
    block = "inside a with, a try or a loop" if record.events else "before optimizer.step()"
    return CaptureError(f"the graph breaks {block}: {broke.cause}", where=broke.where, hint=broke.hint)
