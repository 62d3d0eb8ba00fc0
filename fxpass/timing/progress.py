"""A line on the terminal while a compilation takes long: which stage it is in, and since when.

The cursor stays where the user has left it: the line is written behind it, not wrapped, and is taken
away before the user's next text and when the compilation ends. Where stderr is no terminal,
nothing is written and no thread runs.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO
from unittest import mock

from .clock import OTHER, Clock

VARIABLE = "FXPASS_PROGRESS"  # 0: never
PATIENCE, EVERY = 3.0, 0.25  # seconds without a line, and from one to the next
# xterm's, which all terminals know: keep the cursor, no wrapping, erase to the end; and back
_DRAW, _DRAWN, _ERASE = "\x1b7\x1b[?7l\x1b[K", "\x1b[?7h\x1b8", "\x1b[K"

_one = threading.Lock()  # a terminal has room for one


class Line:
    """Text behind the cursor of a terminal; what others write to ``streams`` takes its place."""

    def __init__(self, stream: TextIO, streams: tuple[TextIO, ...]) -> None:
        self._lock, self._drawn = threading.RLock(), False
        self._write, self._flush = stream.write, stream.flush
        self._hooks = contextlib.ExitStack()
        for other in streams:
            with contextlib.suppress(AttributeError):  # a stream of the user's that cannot be hooked
                self._hooks.enter_context(mock.patch.object(other, "write", self._after(other)))

    def draw(self, text: str) -> None:
        """Show ``text`` instead of what is there."""
        with self._lock:
            self._write(f"{_DRAW}{text}{_DRAWN}")
            self._flush()
            self._drawn = True

    def erase(self) -> None:
        """Leave the terminal as it was."""
        with self._lock:
            if self._drawn:
                self._write(_ERASE)
                self._flush()
                self._drawn = False

    def close(self) -> None:
        """Erase it, and leave the streams alone."""
        with self._hooks:
            self.erase()

    def _after(self, other: TextIO) -> Callable[[str], int]:
        """``other.write``, once the line is gone."""
        original, flush = other.write, other.flush

        def write(text: str) -> int:
            with self._lock:
                drawn = self._drawn
                self.erase()
                count = original(text)
                if drawn:
                    flush()  # before the line comes back
                return count

        return write


def text_of(clock: Clock, what: str, seconds: float) -> str:
    """``fxpass compiles step (train.py:12): 14 s, compiler, program 2 of 6``."""
    stage, about = clock.doing()
    doing = ", ".join(part for part in ("" if stage == OTHER else stage, about) if part)
    return f"fxpass compiles {what}: {seconds:.0f} s" + (f", {doing}" if doing else "")


@contextlib.contextmanager
def progress(clock: Clock, what: str, wanted: bool = True) -> Iterator[None]:
    """Show what ``clock`` measures inside, in a line that comes after ``PATIENCE`` seconds."""
    stream: Any = sys.stderr
    if not (wanted and _is_terminal(stream) and _is_allowed()) or not _one.acquire(blocking=False):
        yield
        return
    over = threading.Event()
    thread = threading.Thread(
        target=_run, args=(stream, clock, what, over.wait), name="fxpass progress", daemon=True
    )
    try:
        with contextlib.suppress(RuntimeError):  # no thread to be had: no line
            thread.start()
        yield
    finally:
        over.set()
        if thread.ident is not None:
            thread.join()
        _one.release()


def _run(stream: TextIO, clock: Clock, what: str, over: Callable[[float], bool]) -> None:
    """Draw until it is over, which ``over`` says after so many seconds at the latest."""
    began = time.perf_counter()
    if over(PATIENCE):
        return
    both = sys.stdout is not stream and _is_terminal(sys.stdout)
    line = Line(stream, (stream, sys.stdout) if both else (stream,))
    try:
        line.draw(text_of(clock, what, time.perf_counter() - began))
        while not over(EVERY):
            line.draw(text_of(clock, what, time.perf_counter() - began))
    except (OSError, ValueError):
        pass  # the terminal is gone: the compilation goes on
    finally:
        with contextlib.suppress(OSError, ValueError):
            line.close()


def _is_terminal(stream: Any) -> bool:
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):  # None, somebody's own, closed
        return False


def _is_allowed() -> bool:
    """The user has not switched it off, the terminal knows cursors, and no other rank shows it."""
    asked = os.environ.get(VARIABLE, "1") != "0" and os.environ.get("TERM") != "dumb"
    return asked and os.environ.get("RANK", "0") == "0"
