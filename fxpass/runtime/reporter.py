"""What a step tells its host without waiting for the device: log lines, and that the scale is stuck."""

from __future__ import annotations

import ctypes
import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..errors import LossScaleError
from ..scaling import LossScale
from .watch import Column, Report, kind

logger = logging.getLogger("fxpass")
SLOTS = 16  # reports on their way at most; what comes when all are taken is told by a later one


class Transfer(Protocol):
    """A report on its way from the device into host memory."""

    def start(self, source: Tensor) -> None:
        """Begin the copy; never waits."""
        ...

    def done(self) -> bool:
        """Whether the copy has ended; never waits."""
        ...

    def read(self) -> Report:
        """The copied values, once ``done()``."""
        ...


def host_values(tensor: Tensor) -> list[float]:
    """The elements of a contiguous float64 tensor in host memory, read without calling an operator."""
    return list((ctypes.c_double * tensor.numel()).from_address(tensor.data_ptr()))


class DirectRead:
    """For a step on the CPU: the values are there."""

    def start(self, source: Tensor) -> None:
        self.report = Report(*host_values(source))

    def done(self) -> bool:
        return True

    def read(self) -> Report:
        return self.report


class PinnedCopy:
    """For a step on a GPU: a non-blocking copy into pinned memory, and an event that says when it's there."""

    def __init__(self, device: torch.device) -> None:
        self.buffer = torch.zeros(len(Report._fields), dtype=torch.float64, pin_memory=True)
        self.event = torch.Event(device)

    def start(self, source: Tensor) -> None:
        self.buffer.copy_(source, non_blocking=True)
        self.event.record()

    def done(self) -> bool:
        return self.event.query()

    def read(self) -> Report:
        return Report(*host_values(self.buffer))


def transfer_for(device: torch.device) -> Transfer:
    """The way to the host from ``device``."""
    return DirectRead() if device.type == "cpu" else PinnedCopy(device)


class Reporter:
    """Follows the reports of all graphs of one step, some steps behind on a GPU.

    Each skipped step is logged once as a warning, each change of the scale at
    debug level; ``patience`` overflows in a row at the minimum scale raise
    ``fxpass.LossScaleError``. Nothing here waits for the device.
    """

    def __init__(
        self, policy: LossScale, transfer: Callable[[torch.device], Transfer] = transfer_for
    ) -> None:
        self.patience, self.minimum = policy.stuck_after, policy.lowest
        self.transfer = transfer
        self.free: list[Transfer] = []
        self.pending: deque[tuple[Transfer, Sequence[Column]]] = deque()
        self.restart(0, policy.init)

    def restart(self, skipped: int, scale: float) -> None:
        """Go on from these values: a checkpoint was loaded. Reports on their way are about the past."""
        self.skipped, self.scale = skipped, scale
        self.pending.clear()
        self.free.clear()
        self.slots = 0

    def step(self, report: Tensor, columns: Sequence[Column]) -> None:
        """Send a step's report on its way, and tell what has arrived.

        Raises:
            LossScaleError: the scale has been stuck at its minimum for ``patience`` steps.
        """
        if report.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        self._send(report, columns)
        while self.pending and self.pending[0][0].done():
            transfer, known = self.pending.popleft()
            arrived = transfer.read()
            self.free.append(transfer)
            self._tell(arrived, known)

    def _send(self, report: Tensor, columns: Sequence[Column]) -> None:
        if not self.free:
            if self.slots == SLOTS:
                return
            self.slots += 1
            self.free.append(self.transfer(report.device))
        transfer = self.free.pop()
        transfer.start(report)
        self.pending.append((transfer, columns))

    def _tell(self, now: Report, columns: Sequence[Column]) -> None:
        skipped = int(now.skipped) - self.skipped
        before, self.skipped, self.scale = self.scale, int(now.skipped), now.scale
        where = f"{columns[int(now.first)].name}: {kind(now.value)}" if now.first >= 0 else "unknown"
        if skipped == 1 and now.first >= 0:
            logger.warning(
                "step %d skipped, first non-finite gradient %s; loss scale %g -> %g",
                now.steps,
                where,
                before,
                now.scale,
            )
        elif skipped:
            logger.warning(
                "%d steps skipped up to step %d; loss scale %g -> %g", skipped, now.steps, before, now.scale
            )
        if now.scale != before:
            logger.debug("loss scale %g -> %g after step %d", before, now.scale, now.steps)
        if self.patience is not None and now.stuck >= self.patience:
            self._stuck(where)

    def _stuck(self, where: str) -> None:
        found = (
            f"{self.patience} steps in a row overflowed at the minimum scale {self.minimum:g}; "
            f"first non-finite gradient: {where}"
        )
        hint = (
            "look for inf or nan in that parameter's module (the handle's diagnosis() has a table), "
            "or name it in keep_fp32"
        )
        raise LossScaleError(found, hint=hint)
