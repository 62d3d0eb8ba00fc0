"""From a rewritten step graph to a callable."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .. import _torch
from ..ir.graph import Role, StepGraph
from ..options import Options
from .half_gemm import replace_half_gemms
from .outline import call_units, find_units, to_graph, with_units

DEFAULTS = {
    # The passes order the graph. Inductor's reordering picks the best of three whole-graph
    # heuristics by an estimate that is 20 to 40 % off, and undoes that order.
    "reorder_for_peak_memory": False,
    # Meant for inference: it moves what makes a value down to its first reader. For a gradient
    # that is the verdict, after all of backward, with the activations of all layers still alive.
    "reorder_for_locality": False,
    # All updates read found_inf, the clip coefficient and the learning rate: of the pairs of
    # kernels that share a buffer, nearly all share only those, and asking about each of them
    # took half of the compile time.
    "max_fusion_buffer_group_pairwise_attempts": 4,
}


def lower(step: StepGraph, inputs: Sequence[Any], options: Options, mode: str | None) -> Callable[..., Any]:
    """Compile ``step`` as ``options.codegen`` says; the callable takes one list of inputs."""
    if not _torch.cpu_has_half_gemm():
        replace_half_gemms(step)
    if options.codegen == "eager":
        return _eager(step)
    settings = {**DEFAULTS, **_torch.mode_settings(mode), **options.inductor}
    on_cpu = all(x.device.type == "cpu" for x in inputs if isinstance(x, torch.Tensor))
    if options.outline == "auto" and on_cpu:
        return _outlined(step, inputs, settings)
    return _whole(step, inputs, settings)


def _whole(step: StepGraph, inputs: Sequence[Any], settings: Mapping[str, Any]) -> Callable[..., Any]:
    step.gm.recompile()
    placeholders = [n for n in step.graph.nodes if n.op == "placeholder"]
    static = [i for i, n in enumerate(placeholders) if step.roles[n] is not Role.INPUT]
    return _torch.compile_graph(step.gm, inputs, settings, static)


def _outlined(step: StepGraph, inputs: Sequence[Any], settings: Mapping[str, Any]) -> Callable[..., Any]:
    units = find_units(step)
    if not units:
        return _whole(step, inputs, settings)
    graphs = {unit.key: (to_graph(unit), [n.meta["val"] for n in unit.inputs]) for unit in units}
    call_units(step, units)
    main = _whole(step, inputs, settings)
    compiled = {
        key: _torch.compile_graph(gm, fakes, settings, range(len(fakes)))
        for key, (gm, fakes) in graphs.items()
    }
    return with_units(main, [compiled[unit.key] for unit in units])


def _eager(step: StepGraph) -> Callable[..., Any]:
    step.gm.recompile()
    forward = step.gm.forward

    def run(inputs: list[Any]) -> Any:
        values = list(inputs)
        inputs.clear()
        with torch.no_grad():
            return forward(*values)

    return _torch.boxed(run)
