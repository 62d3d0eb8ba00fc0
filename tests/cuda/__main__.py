"""The CUDA tier: ``python -m tests.cuda [pytest's arguments]``, with a CUDA build of torch.

With a GPU, all of it runs there. Without one, the stub driver of ``stub/`` is
compiled and preloaded, which has to happen before torch is imported; so this
starts pytest in processes of their own, one for each way of running (RUNS).
"""

from __future__ import annotations

import concurrent.futures
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
OUT = ROOT / "out" / "cuda"


@dataclass(frozen=True)
class Run:
    """One pytest process: which files, and what its environment says."""

    name: str
    files: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    processes: int = 1  # of pytest-xdist


COUNTED = (
    *("test_steps.py", "test_graphs.py", "test_growth.py", "test_inspect.py"),
    *("test_attention.py", "test_deterministic.py"),
)
RUNS = (
    # kernels are compiled for an H100 and counted
    Run("counted", COUNTED, processes=2),
    # kernels are interpreted, one program after the other: tiny models, true numbers
    Run("emulated", ("test_numbers.py",), {"TRITON_INTERPRET": "1"}),
    # kernels are compiled for an A100
    Run("sm_80", ("test_kernels.py",), {"STUB_CAPABILITY": "80"}),
)
TOGETHER = (("counted",), ("emulated", "sm_80"))  # on two cores


def main(arguments: list[str]) -> int:
    """Run the tier; returns the exit status."""
    if _has_gpu():
        files = [name for run in RUNS for name in run.files]
        return _pytest(Run("device", tuple(files)), {}, arguments)
    environment = _stub_environment(_compile_stub())
    runs = {run.name: run for run in RUNS}
    statuses: list[int] = []
    for names in TOGETHER:
        with concurrent.futures.ThreadPoolExecutor() as pool:
            started = [pool.submit(_pytest, runs[name], environment, arguments) for name in names]
            statuses += [future.result() for future in started]
    return max(statuses)


def _has_gpu() -> bool:
    """Asked in a process of its own: torch must not be imported before the stub is there."""
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def _compile_stub() -> Path:
    """The stub's library, compiled with the headers that come with Triton."""
    code = "import triton; print(triton.__path__[0])"
    triton = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    headers = Path(triton.stdout.strip()) / "backends" / "nvidia" / "include"
    library = OUT / "stub" / "libcuda.so.1"  # the name under which torch and Triton load the driver
    library.parent.mkdir(parents=True, exist_ok=True)
    sources = sorted(map(str, (HERE / "stub").glob("*.c")))
    flags = ["-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{headers}"]
    name = ["-Wl,-soname,libcuda.so.1", "-ldl", "-lpthread"]
    subprocess.run(["cc", *flags, *sources, "-o", str(library), *name], check=True)
    return library


def _stub_environment(library: Path) -> dict[str, str]:
    return {
        "LD_PRELOAD": str(library),
        "TRITON_LIBCUDA_PATH": str(library.parent),
        "TORCH_CUDNN_V8_API_DISABLED": "1",  # see stub/cudnn.c
    }


def _pytest(run: Run, environment: dict[str, str], arguments: list[str]) -> int:
    files = [str(HERE / name) for name in run.files]
    processes = ["-n", str(run.processes)] if run.processes > 1 else []
    ours = {
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(OUT / f"cache-{run.name}"),
        **environment,
        **run.environment,
    }
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *processes, *files, *arguments]
    print(f"--- {run.name}: {' '.join(run.files)}", flush=True)
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **ours}).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
