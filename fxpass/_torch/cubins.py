"""What ptxas made of Triton kernels: registers, and what did not fit into them.

Written for torch 2.11 to 2.13 and the cubins in their cache of Triton kernels.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

from torch._inductor.codecache import PyCodeCache
from torch._inductor.runtime.cache_dir_utils import cache_dir


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes in one of the block sizes it is chosen from."""

    name: str
    capability: int  # 90 for sm_90
    registers: int
    stack: int  # bytes a thread: registers that were spilled


@contextmanager
def kernels_loaded() -> Iterator[list[list[Resources]]]:
    """At the end of the block, each Triton kernel that was compiled inside: its block sizes."""
    modules: list[Any] = []
    load = PyCodeCache.load_by_key_path

    def load_by_key_path(*args: Any, **kwargs: Any) -> Any:
        modules.append(load(*args, **kwargs))
        return modules[-1]

    loaded: list[list[Resources]] = []
    with mock.patch.object(PyCodeCache, "load_by_key_path", load_by_key_path):
        yield loaded
    kernels = {id(k): k for m in modules for k in vars(m).values() if hasattr(k, "launchers")}
    loaded += [sizes for kernel in kernels.values() if (sizes := _sizes(kernel))]


def _sizes(kernel: Any) -> list[Resources]:
    keys = [key for launcher in kernel.launchers if (key := getattr(launcher, "cache_hash", None))]
    files = (Path(cache_dir()).glob(f"triton/*/{key}/*.cubin") for key in keys)
    return [resources(path) for paths in files for path in sorted(paths)]


@cache
def resources(cubin: Path) -> Resources:
    """What the kernel in a file of Triton's cache takes, as the tool that comes with Triton says it."""
    triton = importlib.util.find_spec("triton")  # by name: a CPU build of torch comes without it
    assert triton is not None
    assert triton.origin is not None
    tool = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    said = subprocess.run([tool, "-res-usage", cubin], check=True, capture_output=True, text=True).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert match, said
    about = json.loads(cubin.with_suffix(".json").read_text())
    return Resources(about["name"], about["target"]["arch"], int(match[1]), int(match[2]))
