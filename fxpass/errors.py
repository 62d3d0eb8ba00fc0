"""What can go wrong, one class per failure; every message says what, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FxpassError(Exception):
    """Base of everything fxpass raises.

    The message has up to three parts: what was found, where in the user's
    code (``where``), and what to do about it (``hint``).
    """

    def __init__(self, found: str, *, where: str = "", hint: str = "") -> None:
        self.found = found
        self.where = where
        self.hint = hint
        parts = [found]
        if where:
            parts.append(f"  where: {where}")
        if hint:
            parts.append(f"  to do: {hint}")
        super().__init__("\n".join(parts))
        self._message = "\n".join(parts)

    def __str__(self) -> str:
        return self._message  # torch.fx appends its own text to args on the way out

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.found, self.where, self.hint))


def _rebuild(cls: type[FxpassError], found: str, where: str, hint: str) -> FxpassError:
    return cls(found, where=where, hint=hint)


class OptionError(FxpassError, ValueError):
    """An option that does not exist, has the wrong type or is out of range."""


class CaptureError(FxpassError):
    """The training step could not be captured as one graph."""


class OptimizerError(FxpassError):
    """The optimizer of the step cannot be traced."""


class VerifyError(FxpassError):
    """A pass left the graph in an illegal state: an fxpass bug."""


class LoweringError(FxpassError):
    """Inductor could not compile the rewritten graph: a bug of its, or of fxpass."""


class LossScaleError(FxpassError):
    """The loss scale is at its minimum and gradients still overflow."""


def nearest(name: object, known: Iterable[str]) -> str:
    """A hint with the name that was meant; empty if none is near."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else ""
