"""Where the CPU time of a compilation goes.

A stage is charged for what runs inside it, minus the stages that it contains: all of them
add up to the whole. Counted is the CPU time of this process and of the compilers that it
starts, which another program on the machine changes little; compilers in a pool of worker
processes (Inductor's default) are none of its children: their time shows as waiting.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

OTHER = "other"


class Clock:
    """Seconds by stage: ``cpu`` of the processor, ``wall`` on the wall."""

    def __init__(self) -> None:
        self.cpu: dict[str, float] = {}
        self.wall: dict[str, float] = {}
        self._running: list[str] = [OTHER]
        self._told: list[str] = [""]  # by stage: what it is about
        self._last = _now()

    def enter(self, stage: str) -> None:
        """From now on ``stage`` is charged."""
        self._charge()
        self._running.append(stage)
        self._told.append("")

    def leave(self) -> None:
        """The stage entered last is over, and the one around it goes on."""
        self._charge()
        self._running.pop()
        self._told.pop()

    def tell(self, about: str) -> None:
        """The stage that runs is about this: a part of many, say."""
        self._told[-1] = about

    def doing(self) -> tuple[str, str]:
        """The stage that runs, and what it or the one around it is about; for another thread to ask."""
        return self._running[-1], next(filter(None, reversed(self._told)), "")

    def _charge(self) -> None:
        now, stage = _now(), self._running[-1]
        for times, new, old in zip((self.cpu, self.wall), now, self._last, strict=True):
            times[stage] = times.get(stage, 0.0) + new - old
        self._last = now


_clock: ContextVar[Clock | None] = ContextVar("fxpass_clock", default=None)


def _now() -> tuple[float, float]:
    times = os.times()
    return time.process_time() + times.children_user + times.children_system, time.perf_counter()


@contextmanager
def timing(name: str) -> Iterator[Clock]:
    """Measure a compilation, from stage ``name`` on; one inside of another is charged to itself alone."""
    outer, clock = _clock.get(), Clock()
    if outer is not None:
        outer.enter(OTHER)
    token = _clock.set(clock)
    try:
        with stage(name):
            yield clock
    finally:
        _clock.reset(token)
        if outer is not None:
            outer._last = _now()
            outer.leave()


def current() -> Clock:
    """The clock of the compilation that runs; a new one outside of any."""
    return _clock.get() or Clock()


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Charge what runs inside to ``name``; without ``timing`` around, nothing."""
    clock = _clock.get()
    if clock is None:
        yield
        return
    clock.enter(name)
    try:
        yield
    finally:
        clock.leave()


def tell(about: str) -> None:
    """Say what the stage that runs is about, for those who wait; without ``timing`` around, nobody."""
    if (clock := _clock.get()) is not None:
        clock.tell(about)


def charged(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, charged to stage ``name``."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with stage(name):
            return function(*args, **kwargs)

    return run
