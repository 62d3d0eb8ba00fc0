"""What a step does to the device: its launches, copies, allocations, graphs, and where the host waits.

The stub writes a log of all that. On a real device torch's profiler and the
allocator's statistics say the same, and a wait is an error where it happens.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from fxpass._torch.cubins import Resources, resources

_library = ctypes.CDLL(None)
STUB = hasattr(_library, "stub_log_stop")
COUNTS_ONLY = STUB and not os.environ.get("TRITON_INTERPRET")  # nothing computes
if STUB:
    _library.stub_log_stop.restype = ctypes.c_char_p


@dataclass
class Log:
    """What happened, in order."""

    launches: list[str] = field(default_factory=list)  # kernels by name, and fills
    copies: list[tuple[str, int]] = field(default_factory=list)  # direction such as DtoH, bytes
    waits: list[str] = field(default_factory=list)
    allocations: int = 0  # from the driver, not from torch's pool
    graphs: int = 0  # CUDA graphs launched

    def count(self, name: str) -> int:
        """Launches whose name contains ``name``."""
        return sum(name in launch for launch in self.launches)


@contextlib.contextmanager
def recorded() -> Iterator[Log]:
    """Log what happens inside; complete at the end of the block."""
    log = Log()
    if not STUB:
        yield from _profiled(log)
        return
    _library.stub_log_start()
    try:
        yield log
    finally:
        for line in _library.stub_log_stop().decode().splitlines():
            kind, size, name = line.split(" ", 2)
            _add(log, kind, int(size), name)


def _add(log: Log, kind: str, size: int, name: str) -> None:
    if kind in ("kernel", "memset"):
        log.launches.append(name)
    elif kind == "copy":
        log.copies.append((name, size))
    elif kind == "sync":
        log.waits.append(name)
    elif kind == "graph":
        log.graphs += 1
    else:  # of device memory, or of pinned memory
        log.allocations += 1


def _profiled(log: Log) -> Iterator[Log]:
    before = torch.cuda.memory_stats()["num_device_alloc"]
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield log
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    log.allocations = torch.cuda.memory_stats()["num_device_alloc"] - before
    for event in found.events():
        if event.name == "cudaGraphLaunch":
            log.graphs += 1
        elif event.device_type is not torch.autograd.DeviceType.CUDA:
            continue
        elif copied := re.match(r"Memcpy (\w+)", event.name):
            log.copies.append((copied[1], 0))  # the profiler's events do not say how much
        else:
            log.launches.append(event.name)


def compiled_kernels() -> dict[str, list[Resources]]:
    """Of every Triton kernel in Inductor's cache, by name: each in the block sizes it is chosen from."""
    cache_dir = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    kernels: dict[str, list[Resources]] = {}
    for path in sorted(cache_dir.glob("triton/*/*/*.cubin")):
        found = resources(path)
        kernels.setdefault(found.name, []).append(found)
    return kernels


def spilling() -> list[str]:
    """Kernels that spill registers in every block size: Inductor drops those that do where others do not."""
    return [name for name, sizes in compiled_kernels().items() if all(size.stack for size in sizes)]
