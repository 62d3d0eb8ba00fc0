"""From a rewritten step graph to a callable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .. import _torch
from ..ir.graph import Role, StepGraph
from ..options import Options


def lower(step: StepGraph, inputs: Sequence[Any], options: Options, mode: str | None) -> Callable[..., Any]:
    """Compile ``step`` as ``options.codegen`` says; the callable takes one list of inputs and returns a tuple."""
    step.gm.recompile()
    if options.codegen == "eager":
        return _eager(step)
    settings = {**_torch.mode_settings(mode), **options.inductor}
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
