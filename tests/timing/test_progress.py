"""The line on the terminal while a compilation takes long: what it says, and that nothing of it stays."""

from __future__ import annotations

import io
import os
import pty
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from queue import Queue

import pytest
import torch

from fxpass import FxpassError, MixedPrecision
from fxpass.timing import clock, progress
from tests.support.graphs import training_step

DRAWN = re.compile(r"\x1b7\x1b\[\?7l\x1b\[K(.*?)\x1b\[\?7h\x1b8")


class Terminal(io.StringIO):
    """A stream that calls itself a terminal."""

    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        """What the line said, draw by draw."""
        return DRAWN.findall(self.getvalue())

    def rest(self) -> str:
        """Everything else."""
        return DRAWN.sub("", self.getvalue()).replace("\x1b[K", "")


class Time:
    """Stands for ``Event.wait``: it is later when the test says so."""

    def __init__(self) -> None:
        self.waits: list[float] = []
        self._later: Queue[bool] = Queue()
        self._waiting: Queue[None] = Queue()

    def wait(self, seconds: float) -> bool:
        self.waits.append(seconds)
        self._waiting.put(None)
        return self._later.get()

    def passes(self, over: bool = False) -> None:
        """The thread goes on, and waits again unless it is over."""
        self._waiting.get()
        self._later.put(over)
        if not over:
            self._waiting.get()
            self._waiting.put(None)


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(progress.VARIABLE, raising=False)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("TERM", "xterm")


@contextmanager
def _on(stream: Terminal) -> Iterator[Terminal]:
    """The process has that terminal; pytest puts its own streams back between fixture and test."""
    with redirect_stdout(stream), redirect_stderr(stream):
        yield stream
    assert "write" not in vars(stream)
    assert not [t for t in threading.enumerate() if t.name == "fxpass progress"]


def _during(body: Callable[[Time], None]) -> Terminal:
    time = Time()
    with _on(Terminal()) as terminal, clock.timing("dynamo") as measured:
        args = (terminal, measured, "step (train.py:12)", time.wait)
        thread = threading.Thread(target=progress._run, args=args)
        thread.start()
        body(time)
        time.passes(over=True)
        thread.join()
    return terminal


def test_it_says_stage_and_time_after_three_seconds_and_is_gone_at_the_end() -> None:
    def body(time: Time) -> None:
        time.passes()
        clock.tell("model.layers.3")
        time.passes()
        with clock.stage("compiler"):
            clock.tell("program 2 of 6")
            time.passes()
        assert time.waits == [progress.PATIENCE, *[progress.EVERY] * 3]

    terminal = _during(body)
    said = "fxpass compiles step (train.py:12): 0 s, "
    assert terminal.lines() == [
        f"{said}dynamo",
        f"{said}dynamo, model.layers.3",
        f"{said}compiler, program 2 of 6",
    ]
    assert terminal.rest() == ""
    assert terminal.getvalue().endswith("\x1b8\x1b[K")


def test_a_short_compilation_writes_nothing() -> None:
    assert _during(lambda time: None).getvalue() == ""


def test_what_the_user_prints_takes_its_place() -> None:
    def body(time: Time) -> None:
        time.passes()
        print("loss", 1.0, end="")
        time.passes()
        print("!", file=sys.stderr)

    terminal = _during(body)
    assert terminal.rest() == "loss 1.0!\n"
    assert re.search(r"\x1b8\x1b\[Kloss", terminal.getvalue())  # erased first
    assert re.search(r"\x1b8\x1b\[K!", terminal.getvalue())


def test_a_terminal_that_is_gone_stops_no_compilation() -> None:
    class Gone(Terminal):
        def write(self, text: str) -> int:
            raise OSError("gone")

    progress._run(Gone(), clock.Clock(), "step", lambda seconds: False)


@pytest.mark.parametrize("off", ["stream", "variable", "dumb", "rank", "option"])
def test_no_thread_where_nobody_looks(off: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"variable": (progress.VARIABLE, "0"), "dumb": ("TERM", "dumb"), "rank": ("RANK", "1")}
    if off in settings:
        monkeypatch.setenv(*settings[off])
    monkeypatch.setattr(threading, "Thread", None)
    stream = io.StringIO() if off == "stream" else Terminal()
    with redirect_stderr(stream), progress.progress(clock.Clock(), "step", wanted=off != "option"):
        pass
    assert stream.getvalue() == ""


@pytest.mark.parametrize("wanted", [True, False])
def test_a_step_says_what_it_is_at_even_if_it_fails(wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    monkeypatch.setattr(progress, "EVERY", 0.001)
    step, args = training_step()
    with _on(Terminal()) as terminal:
        torch.compile(step, backend=MixedPrecision(codegen="eager", progress=wanted))(*args)
    stages = {match[1] for line in terminal.lines() if (match := re.search(r"\d s, (\w+)", line))}
    assert ({"dynamo", "capture"} <= stages) == wanted
    assert terminal.rest() == ""

    def breaks() -> None:
        torch.ones(3, requires_grad=True).sum().backward()

    with _on(Terminal()) as terminal, pytest.raises(FxpassError):
        torch.compile(breaks, backend=MixedPrecision(codegen="eager", progress=wanted))()
    assert bool(terminal.lines()) == wanted
    assert terminal.rest() == ""
    assert terminal.getvalue() == "" or terminal.getvalue().endswith("\x1b[K")


def test_on_a_real_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    monkeypatch.setattr(progress, "EVERY", 0.001)
    screen, end = pty.openpty()
    with open(end, "w") as stream, redirect_stdout(stream), redirect_stderr(stream):
        print("begin")
        with clock.timing("dynamo") as measured, progress.progress(measured, "step"):
            seen = b""
            while seen.count(b"fxpass compiles") < 2:
                seen += os.read(screen, 4096)
            print("in the middle")
        print("end")
        while b"end" not in seen:
            seen += os.read(screen, 4096)
    os.close(screen)
    text = seen.decode()
    assert "fxpass compiles step: 0 s, dynamo" in text
    assert DRAWN.sub("", text).replace("\x1b[K", "") == "begin\r\nin the middle\r\nend\r\n"
