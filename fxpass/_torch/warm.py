"""A compiled step on disk, for the next process: an entry of AOTAutograd's own cache, under a key of ours.

Written for torch 2.11 to 2.13. Torch keys on Dynamo's graph, which does not say what becomes of
it here; capture/key.py does. What torch adds is kept: its settings, versions and devices in
the key, the wrappers around the compiled graph in the entry, files written atomically, and
``torch.compiler.save_cache_artifacts``, by which entries travel.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch._functorch import config as functorch_config
from torch._functorch._aot_autograd import autograd_cache
from torch._functorch.aot_autograd import SerializableAOTDispatchCompiler
from torch._inductor import config as inductor_config
from torch._inductor.codecache import FxGraphCache
from torch._inductor.output_code import CompiledFxGraph, OutputCode
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch.fx import Graph, GraphModule

from ..timing.clock import stage
from .kernels import few_programs
from .schedule import ATTRIBUTE

Call = Callable[[list[Any]], Any]


@dataclass(frozen=True)
class Warm:
    """How one step is kept: what decides its program, and what makes a callable of what was kept."""

    text: str
    settings: Mapping[str, Any]  # of Inductor's, as when it was compiled
    load: Callable[[list[Call], bytes], Call]  # of the compiled graphs, and what was kept with them


_warm: ContextVar[Warm | None] = ContextVar("fxpass_warm", default=None)


@dataclass
class StepCode(OutputCode):
    """A compiled step: Inductor's graphs, whatever else is known of it, and the callable of both."""

    parts: list[Any]
    kept: bytes
    call: Call | None = None

    def __post_init__(self) -> None:
        self._boxed_call = True  # the object's own: torch copies it to what it wraps around

    def __call__(self, inputs: Any) -> Any:
        """Run the step; the list of inputs is emptied."""
        assert self.call is not None, "a step is loaded before it runs"
        return self.call(inputs)

    def prepare_for_serialization(self) -> None:
        """Leave out what belongs to this process; called on a copy."""
        if not self.kept or not all(isinstance(part, CompiledFxGraph) for part in self.parts):
            raise autograd_cache.BypassAOTAutogradCache("the step cannot be written down")
        self.call = None
        self.parts = [copy.copy(part) for part in self.parts]
        for part in self.parts:
            part.prepare_for_serialization()
            vars(part).pop(ATTRIBUTE, None)

    def post_compile(self, example_inputs: Any, constants: Any, graph_kwargs: Any) -> None:
        """Make it callable; torch does this to an entry that it has read."""
        warm = _warm.get()
        assert warm is not None, "a step of fxpass is read by fxpass alone"
        with stage("load"), inductor_config.patch(dict(warm.settings)):
            with few_programs():
                self._load(constants, example_inputs, graph_kwargs)
            self.call = warm.load(self.parts, self.kept)

    def _load(self, constants: Any, example_inputs: Any, graph_kwargs: Any) -> None:
        for part in self.parts:
            graph, _ = FxGraphCache.cache_hit_post_compile(part, {}, constants)
            if graph is None:
                raise RuntimeError("the files of a compiled graph are gone")
            graph.post_compile(example_inputs, constants, graph_kwargs)

    def set_triton_bundle(self, triton_bundle: Any) -> None:
        """Nothing: each of the graphs has its own."""


def step_code(call: Call, parts: Sequence[Any], kept: bytes) -> Call:
    """``call`` as what torch can keep, where it asks for that; ``kept`` may be empty: then it is not."""
    return StepCode(list(parts), kept, call) if _warm.get() else call


def not_cached(settings: Mapping[str, Any]) -> str:
    """Why no step is kept; empty if it is."""
    with inductor_config.patch(dict(settings)):
        recorded, graphs = bool(inductor_config.triton.cudagraphs), inductor_config.fx_graph_cache
    if not (graphs and autograd_cache.should_use_local_autograd_cache()):
        return "torch's caches are switched off"
    if not hasattr(functorch_config, "bundled_autograd_cache"):
        return "this torch keeps no step"
    return "cudagraphs are recorded in each process" if recorded else ""


def cache_directory() -> str:
    """Where torch's caches on disk are."""
    return cache_dir()


def compiler(compile_inner: Callable[..., Any]) -> Callable[..., Any]:
    """``compile_inner`` as AOTAutograd takes one whose results it keeps.

    Inductor keeps each of its graphs as well, for steps that differ in part or only in the user's lines.
    """

    def compile_each(*args: Any) -> Any:
        with functorch_config.patch(bundled_autograd_cache=False):
            return compile_inner(*args)

    return SerializableAOTDispatchCompiler(StepCode, compile_each)


@contextlib.contextmanager
def kept(warm: Warm) -> Iterator[None]:
    """AOTAutograd looks ``warm`` up inside, and keeps what is compiled if it finds nothing."""
    original = autograd_cache.autograd_cache_key

    def key(mod: Any, inputs: Sequence[Any], *config: Any, **options: Any) -> tuple[str, list[str]]:
        if not all(type(x) in (bool, int, float) or isinstance(x, torch.Tensor) for x in inputs):
            raise autograd_cache.BypassAOTAutogradCache("an input is a symbol")
        base, lines = original(_empty(), inputs, *config, **options)
        return base + hashlib.sha256(warm.text.encode()).hexdigest(), lines

    token = _warm.set(warm)
    try:
        with (
            mock.patch.object(autograd_cache, "autograd_cache_key", key),
            functorch_config.patch(bundled_autograd_cache=True),
        ):
            yield
    finally:
        _warm.reset(token)


def _empty() -> GraphModule:
    """A graph that says nothing: ours is in the text."""
    graph = Graph()
    graph.output(())
    return GraphModule(torch.nn.Module(), graph)
