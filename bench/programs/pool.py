"""Programs in a process of their own, so that a crash or a hang ends one row, not the run."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

import torch

from bench.programs.program import PROGRAMS, Program, programs
from bench.programs.run import Result, row, run

LIFE = 25  # programs before a process is replaced: libraries keep what they once built


def run_all(
    chosen: list[Program], jobs: int, options: dict[str, Any], timeout: float
) -> Iterator[dict[str, Any]]:
    """The rows of ``chosen``, as they are done; ``timeout``: seconds for one program."""
    workers = [_Worker(options, timeout) for _ in range(jobs)]
    free = list(workers)

    def one(program: Program) -> dict[str, Any]:
        worker = free.pop()
        try:
            return worker.run(program)
        finally:
            free.append(worker)

    with ThreadPoolExecutor(jobs) as threads:
        waiting = [threads.submit(one, program) for program in chosen]
        try:
            for done in as_completed(waiting):
                yield done.result()
        finally:
            for future in waiting:
                future.cancel()
            for worker in workers:
                worker.stop()


class _Worker:
    """A process that runs programs by name, made anew where it died or is old."""

    def __init__(self, options: dict[str, Any], timeout: float) -> None:
        self.options = options
        self.timeout = timeout
        self.process: SpawnProcess | None = None
        self.done = 0

    def run(self, program: Program) -> dict[str, Any]:
        if self.process is None or self.done == LIFE:
            self._start()
        assert self.process is not None
        self.pipe.send(program.name)
        self.done += 1
        try:
            if self.pipe.poll(self.timeout):
                answer = self.pipe.recv()
                if answer["error"]:
                    self.stop()  # what a failure left behind is nobody else's
                return answer
            error = f"no end after {self.timeout:g} s"
        except EOFError:
            self.process.join()
            error = f"crashed, exit code {self.process.exitcode}"
        self.stop()
        return row(_failed(program, self.options, error))

    def _start(self) -> None:
        self.stop()
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        process = self.process = context.Process(target=_serve, args=(theirs, self.options), daemon=True)
        process.start()
        theirs.close()
        self.done = 0

    def stop(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None


def _serve(pipe: Connection, options: dict[str, Any]) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    programs()
    while True:
        name = pipe.recv()
        program = PROGRAMS[name]
        try:
            answer = row(run(program, options))
        except Exception as error:  # of the program itself, in eager PyTorch
            text = f"in eager PyTorch: {type(error).__name__}: {error}"
            answer = row(_failed(program, options, text))
        pipe.send(answer)


def _failed(program: Program, options: dict[str, Any], error: str) -> Result:
    return Result(program.name, program.family, program.origin(), program.lines, options, error=error)
