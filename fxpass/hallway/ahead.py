"""A step compiled ahead of time, into torch's caches on disk, for the processes that will train with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import _torch
from ..backend import MixedPrecision
from ..errors import CaptureError, FxpassError
from .graph_record import GraphRecord

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]  # step, args, kwargs


@dataclass(frozen=True)
class Ahead:
    """What a step's first call has left on disk."""

    graphs: tuple[GraphRecord, ...]  # each says what became of it: "hit", "miss", or why it is not kept
    device: str
    seconds: float  # on the wall, the call of the step included
    directory: str
    files: int  # that are new in it
    bytes: int

    @property
    def not_kept(self) -> tuple[str, ...]:
        """Why graphs will be compiled again in the next process."""
        return tuple(dict.fromkeys(g.cache for g in self.graphs if g.cache not in ("hit", "miss")))


def compile_ahead(make: Callable[[], Call], options: Mapping[str, Any], device: str | None = None) -> Ahead:
    """Call the step that ``make`` returns once, compiled, on what ``make`` has built.

    Args:
        make: builds model, optimizer and arguments; returns ``(step, args, kwargs)``.
        options: of the backend, as the training will give them.
        device: where what ``make`` builds goes by default.

    Raises:
        FxpassError: the step cannot be captured whole; or there is no such device here.
    """
    place = torch.device(device or torch.get_default_device())
    if place.type == "cuda" and not torch.cuda.is_available():
        hint = (
            "compile on a machine with the GPU that trains, and ship the folder TORCHINDUCTOR_CACHE_DIR or "
            "what torch.compiler.save_cache_artifacts() returns"
        )
        raise FxpassError("no GPU is here, and a compiled step is one for a certain kind of GPU", hint=hint)
    with place:
        step, args, kwargs = make()
    backend, directory = MixedPrecision(**options), Path(_torch.cache_directory())
    before, began = _files(directory), time.perf_counter()
    torch.compile(step, backend=backend)(*args, **kwargs)
    seconds = time.perf_counter() - began
    if not backend.graphs:
        hint = "the function must call loss.backward() and optimizer.step() itself"
        raise CaptureError("the step ran to its end and nothing was compiled", hint=hint)
    new = {path: size for path, size in _files(directory).items() if path not in before}
    made = (len(new), sum(new.values()))
    return Ahead(tuple(backend.graphs), str(place), seconds, str(directory), *made)


def _files(directory: Path) -> dict[Path, int]:
    return {path: path.stat().st_size for path in directory.rglob("*") if path.is_file()}
