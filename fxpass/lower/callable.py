"""From a rewritten step graph to a callable."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import _torch
from ..analysis.memory import MemoryProfile, graph_profile
from ..analysis.scratch import scratch
from ..errors import FxpassError, LoweringError
from ..ir.graph import Role, StepGraph
from ..options import Options
from ..timing.clock import stage, tell
from .half_gemm import replace_half_gemms
from .hoist import gather_scalars, store_scalars
from .outline import Unit, call_units, find_units, to_graph, with_units
from .profile import Facts, UnitRun, facts_of, program_profile

aten = torch.ops.aten

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

# Of an update that is compiled once and called: the step's own program has checked its inputs.
UNCHECKED = {"size_asserts": False, "alignment_asserts": False}


@dataclass(frozen=True)
class Lowered:
    """A callable of one list of inputs, and what it needs to run."""

    call: Callable[..., Any]
    memory: MemoryProfile
    parts: Sequence[Any] = ()  # what Inductor has compiled: the step, and what it calls
    calls: Sequence[int] = ()  # which of the parts each call in the step runs


def lower(step: StepGraph, inputs: Sequence[Any], options: Options, mode: str | None) -> Lowered:
    """Compile ``step`` as ``options.codegen`` says.

    Raises:
        LoweringError: Inductor cannot compile it; the cause is Inductor's own error.
    """
    try:
        with _torch.few_programs():
            return _lower(step, inputs, options, mode, dry=False)
    except FxpassError:
        raise
    except Exception as error:
        said = next((line for line in str(error).splitlines() if line.strip()), "")
        raise LoweringError(
            f"Inductor could not compile the step: {type(error).__name__}: {said}",
            hint='codegen="eager" runs the same graph without Inductor; please report the message',
        ) from error


def profile_only(
    step: StepGraph, inputs: Sequence[Any], options: Options, mode: str | None = None
) -> MemoryProfile:
    """The memory profile of ``step`` for fake ``inputs``: scheduled and laid out, but no kernel compiled."""
    return _lower(step, inputs, options, mode, dry=True).memory


def _lower(
    step: StepGraph, inputs: Sequence[Any], options: Options, mode: str | None, *, dry: bool
) -> Lowered:
    if not _torch.cpu_has_half_gemm():
        replace_half_gemms(step)
    if options.codegen == "eager":
        with stage("profile"):
            memory = _or_missing(lambda: graph_profile(step))
        return Lowered(_eager(step), memory)
    settings, on_cpu = settings_of(inputs, options, mode), _on_cpu(inputs)
    if on_cpu:
        gather_scalars(step)
    with stage("profile"):
        facts = facts_of(step)
    units = find_units(step) if options.outline == "auto" and on_cpu else []
    if units:
        return _outlined(step, units, facts, inputs=inputs, settings=settings, dry=dry, check=options.verify)
    if not on_cpu:
        store_scalars(step)
    whole = _whole(step, inputs, settings, dry)
    return _lowered(facts, [whole], [], {})


def settings_of(inputs: Sequence[Any], options: Options, mode: str | None) -> dict[str, Any]:
    """Inductor's settings for a step."""
    joined = {} if _on_cpu(inputs) else _torch.combo_settings()
    return {**DEFAULTS, **joined, **_torch.mode_settings(mode), **options.inductor}


def _on_cpu(inputs: Sequence[Any]) -> bool:
    return all(x.device.type == "cpu" for x in inputs if isinstance(x, torch.Tensor))


def _whole(step: StepGraph, inputs: Sequence[Any], settings: Mapping[str, Any], dry: bool) -> _torch.Compiled:
    tell(f"the step, {len(step.graph.nodes)} nodes")
    step.gm.recompile()
    static = [i for i, n in enumerate(step.inputs()) if step.roles[n] is not Role.INPUT]
    return _torch.compile_graph(step.gm, inputs, settings, static, scratch, dry=dry)


def _outlined(
    step: StepGraph,
    units: list[Unit],
    facts: Facts,
    *,
    inputs: Sequence[Any],
    settings: Mapping[str, Any],
    dry: bool,
    check: bool,
) -> Lowered:
    first = {unit.key: unit for unit in reversed(units)}
    graphs = {key: (to_graph(unit), [n.meta["val"] for n in unit.inputs]) for key, unit in first.items()}
    calls = call_units(step, units, check=check)
    main = _whole(step, inputs, settings, dry)
    compiled, settings = {}, {**UNCHECKED, **settings}
    for number, (key, (gm, fakes)) in enumerate(graphs.items(), 1):
        tell(f"repeated update {number} of {len(graphs)}")
        compiled[key] = _torch.compile_graph(gm, fakes, settings, range(len(fakes)), scratch, dry=dry)
    runs: dict[str, list[UnitRun]] = {}
    for call, unit in zip(calls, units, strict=True):
        run = UnitRun(compiled[unit.key].program, _renamed(first[unit.key], unit))
        runs.setdefault(call.name, []).append(run)
    position = {key: number for number, key in enumerate(compiled, 1)}
    return _lowered(facts, [main, *compiled.values()], [position[unit.key] for unit in units], runs)


def _lowered(
    facts: Facts, compiled: list[_torch.Compiled], calls: list[int], runs: Mapping[str, Sequence[UnitRun]]
) -> Lowered:
    with stage("profile"):
        memory = _or_missing(lambda: program_profile(facts, compiled[0].program, runs))
    parts = [c.call for c in compiled]
    return Lowered(assembled(parts, calls), memory, parts, calls)


def assembled(parts: Sequence[Callable[..., Any]], calls: Sequence[int]) -> Callable[..., Any]:
    """The callable of a ``Lowered``, by what it is made of."""
    if not calls:
        return parts[0]
    units = [_torch.bare_call(part) for part in parts]
    return with_units(parts[0], [units[number] for number in calls])


def _or_missing(profile: Callable[[], MemoryProfile]) -> MemoryProfile:
    """A profile is for people to read: one that fails says why, and the step runs all the same."""
    try:
        return profile()
    except Exception as error:  # whatever it is, it must not cost the user the step
        return MemoryProfile((), (), 0, missing=f"{type(error).__name__}: {error}")


def _renamed(compiled: Unit, unit: Unit) -> dict[str, str]:
    """The names of ``unit``'s nodes by those of the unit that is compiled for it."""
    return {a.name: b.name for a, b in zip(compiled.nodes, unit.nodes, strict=True)}


def _eager(step: StepGraph) -> Callable[..., Any]:
    for node in step.gm.graph.find_nodes(op="call_function", target=aten.view.default):
        # some kernels (mse_loss_backward) lay out their result otherwise than torch's fake tensors say
        node.target = aten.reshape.default
    step.gm.recompile()
    _ = step.gm.code  # written now: until then forward is a call of the module, with everybody's hooks
    forward = step.gm.forward

    def run(inputs: list[Any]) -> Any:
        values = list(inputs)
        inputs.clear()
        with torch.no_grad():
            return forward(*values)

    return _torch.boxed(run)
