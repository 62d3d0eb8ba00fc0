"""Peak bytes of a call, bytes that stay allocated, interleaved step times, and what machine this is.

CPU peaks are the integral of the profiler's `[memory]` events. Two things to know about them:
the profiler reports the free of a block only if it also saw its allocation, so a first call
is recorded, and thrown away, before the one that is measured; and it sees torch's own allocator
alone, not the scratch of MKL or oneDNN (a malloc that counts found 0.1 to 0.3 MB a step at most
peaks, 6 MB of 82 where one lay inside a large fp16 matmul).
"""

from __future__ import annotations

import gc
import os
import platform
import statistics
import subprocess
import tempfile
import time
import warnings
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Mapping

_MARK = "bench::measured_call"
_CACHE_DIR = "TORCHINDUCTOR_CACHE_DIR"


@dataclass(frozen=True)
class Peak:
    """The most bytes a call held beyond those held when it began."""

    bytes: int
    at: float | None  # when, as a share of the call's duration; None where the device does not say
    live: tuple[tuple[int, int], ...]  # the largest blocks alive at that moment: (bytes, how many)


def peak_of_call(call: Callable[[], object], device: torch.device) -> Peak:
    """Call twice and return the peak of the second call."""
    gc.collect()
    if device.type == "cuda":
        return _cuda_peak(call, device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        call()
        with record_function(_MARK):
            call()
    events: list[Any] = recorded.profiler.kineto_results.events()  # pyrefly: ignore[missing-attribute]
    mark = next(e for e in events if e.name() == _MARK)
    return _integrate(
        sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"),
        mark.start_ns(),
        mark.duration_ns(),
    )


def _integrate(events: list[tuple[int, int]], start: int, duration: int) -> Peak:
    live: Counter[int] = Counter()  # block size -> how many are alive
    total = base = peak = 0
    moment, blocks = start, live
    for when, change in events:
        if when > start + duration:
            break
        total += change
        if when < start:
            base = peak = total
            continue
        live[abs(change)] += 1 if change > 0 else -1
        if total > peak:
            peak, moment, blocks = total, when, live.copy()
    largest = sorted(((size, n) for size, n in blocks.items() if n > 0), reverse=True)[:16]
    return Peak(peak - base, (moment - start) / max(duration, 1), tuple(largest))


def _cuda_peak(call: Callable[[], object], device: torch.device) -> Peak:
    call()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return Peak(torch.cuda.max_memory_allocated(device) - before, None, ())


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Add up the storages behind the tensors, each once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds one call takes, device work included."""
    _synchronise(device)
    began = time.perf_counter()
    call()
    _synchronise(device)
    return time.perf_counter() - began


def cpu_seconds() -> float:
    """CPU seconds so far of this process and of those it has waited for."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


def interleaved(
    calls: Mapping[str, Callable[[int], object]],
    rounds: int,
    device: torch.device,
    after_call: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Time every contender once a round, each round starting with another one; seconds per name.

    A machine that slows down for a while slows all of them, so compare medians of one run only.
    """
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            seconds[name].append(timed(partial(calls[name], turn), device))
            after_call()
    return seconds


def median_ms(seconds: list[float]) -> float:
    """Return the median in milliseconds."""
    return 1e3 * statistics.median(seconds)


@contextmanager
def no_compile_caches() -> Generator[None]:
    """Compile everything anew inside, and delete the directories torch leaves behind for it."""
    caching, directory = torch.compiler.config.force_disable_caches, os.environ.get(_CACHE_DIR)
    with tempfile.TemporaryDirectory(prefix="fxpass-bench-", ignore_cleanup_errors=True) as scratch:
        torch.compiler.config.force_disable_caches, os.environ[_CACHE_DIR] = True, scratch
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")  # as asked for
                yield
        finally:
            torch.compiler.config.force_disable_caches = caching
            os.environ.pop(_CACHE_DIR)
            if directory is not None:
                os.environ[_CACHE_DIR] = directory


def warm_compiler(device: torch.device) -> None:
    """Compile something small, so that imports and compiler checks are charged to no contender."""

    def small(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(x @ x).sum()

    torch.compile(small)(torch.ones(8, 8, device=device, requires_grad=True)).backward()
    _synchronise(device)


@dataclass(frozen=True)
class DeviceWork:
    """What one call asks of a GPU."""

    launches: int | None  # of kernels, those in a CUDA graph included; None where the profiler sees none
    graphs: int  # CUDA graphs launched
    waits: int  # of the host for the device


def device_work(call: Callable[[], object], device: torch.device) -> DeviceWork | None:
    """Count what a call launches, and how often the host waits in it; None without a GPU."""
    if device.type != "cuda":
        return None
    _synchronise(device)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = sum("synchronizing CUDA operation" in str(w.message) for w in heard)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        call()
        _synchronise(device)
    events = recorded.events() or []
    work = [e.name for e in events if e.device_type is torch.autograd.DeviceType.CUDA]
    copies = sum(name.startswith("Memcpy") for name in work)
    return DeviceWork(len(work) - copies or None, sum(e.name == "cudaGraphLaunch" for e in events), waits)


def machine(device: torch.device) -> dict[str, object]:
    """Describe what the numbers were measured on."""
    root = Path(__file__).resolve().parent.parent
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=False
    )
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or "none",
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
