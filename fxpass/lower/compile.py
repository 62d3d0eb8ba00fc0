"""From a rewritten step graph to a callable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .. import _torch
from ..ir.graph import Role, StepGraph
from ..options import Options
from .half_gemm import replace_half_gemms

# The passes order the graph; Inductor's own reordering looks for the lowest peak by three
# heuristics of the whole graph and undoes it.
DEFAULTS = {"reorder_for_peak_memory": False}


def lower(step: StepGraph, inputs: Sequence[Any], options: Options, mode: str | None) -> Callable[..., Any]:
    """Compile ``step`` as ``options.codegen`` says; the callable takes one list of inputs and returns a tuple."""
    if not _torch.cpu_has_half_gemm():
        replace_half_gemms(step)
    step.gm.recompile()
    if options.codegen == "eager":
        return _eager(step)
    settings = {**DEFAULTS, **_torch.mode_settings(mode), **options.inductor}
    placeholders = [n for n in step.graph.nodes if n.op == "placeholder"]
    static = [i for i, n in enumerate(placeholders) if step.roles[n] is not Role.INPUT]
    return _torch.compile_graph(step.gm, inputs, settings, static)


def _eager(step: StepGraph) -> Callable[..., Any]:
    forward = step.gm.forward

    def run(inputs: list[Any]) -> Any:
        values = list(inputs)
        inputs.clear()
        with torch.no_grad():
            return forward(*values)

    run._boxed_call = True  # type: ignore[attr-defined] - AOTAutograd's name for "takes one list"
    return run
