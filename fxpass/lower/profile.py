"""The memory profile of what Inductor made of a step: one program, or one and its update units.

Replays the lines of each ``Program``: names hold storages, a storage goes
with its last name, a launch is a moment. Roles come from the step graph where
a buffer is a value of it, and from what the program does with the buffer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import sympy
from torch import Tensor

from .._torch.schedule import Alias, Allocate, Block, Free, Launch, Program
from ..analysis.liveness import liveness
from ..analysis.memory import (
    LiveTensor,
    MemoryProfile,
    Moment,
    Symbols,
    parameter_count,
    scratch_tensor,
    sized,
)
from ..ir.graph import StepGraph, phase
from ..ir.provenance import origin, user_place
from ..ir.sizes import storage_bytes

ORDER = ("input", "forward", "backward", "gradient", "check", "scale", "update", "after", "output")
CUDA_BLOCK = 512  # bytes: the caching allocator rounds every request up to a multiple


@dataclass
class Facts:
    """What the step graph knows of its nodes, taken before lowering takes it apart."""

    roles: Mapping[str, str]
    phases: Mapping[str, str]
    lines: Mapping[str, str]
    makers: Mapping[str, str]  # the pass that inserted a node
    inputs: tuple[LiveTensor, ...]
    parameters: int
    symbols: Symbols
    rounding: int
    missing: str = ""  # why there are none


def facts_of(step: StepGraph) -> Facts:
    """The facts of a step graph that is about to be lowered; without any, it is lowered all the same."""
    try:
        return _facts_of(step)
    except Exception as error:  # whatever it is: a profile is not worth a failed compilation
        return Facts(
            roles={},
            phases={},
            lines={},
            makers={},
            inputs=(),
            parameters=0,
            symbols=Symbols([]),
            rounding=1,
            missing=f"{type(error).__name__}: {error}",
        )


def _facts_of(step: StepGraph) -> Facts:
    alive = liveness(step)
    roles = {member: s.role for s in alive.storages for member in s.members[::-1]}
    inputs = []
    storages = {s.name: s for s in alive.storages}
    placeholders = list(step.inputs())
    for node in placeholders:
        value = node.meta["val"]
        size = storage_bytes(value) if isinstance(value, Tensor) else sympy.Integer(0)
        role = storages[node.name].role if node.name in storages else "input"
        dtype = str(getattr(value, "dtype", "int")).removeprefix("torch.")
        shape = "x".join(map(str, getattr(value, "shape", ()))) or "scalar"
        name = step.names.get(node) or node.name
        inputs.append(
            LiveTensor(
                name=name,
                node=node.name,
                role=role,
                phase="input",
                dtype=dtype,
                shape=shape,
                where="",
                size=size,
                bytes=0,
                birth=-1,
                death=0,
            )
        )
    tensors = [n.meta["val"] for n in placeholders if isinstance(n.meta["val"], Tensor)]
    rounding = CUDA_BLOCK if any(t.device.type == "cuda" for t in tensors) else 1
    return Facts(
        roles=roles,
        phases={n.name: phase(n).value for n in step.graph.nodes},
        lines={n.name: user_place(n) for n in step.graph.nodes},
        makers={n.name: made.pass_name for n in step.graph.nodes if (made := origin(n))},
        inputs=tuple(inputs),
        parameters=parameter_count(step),
        symbols=Symbols.of(step),
        rounding=rounding,
    )


@dataclass(frozen=True)
class UnitRun:
    """One run of an update unit: its program, and its nodes' names in the step."""

    program: Program
    names: Mapping[str, str]


def program_profile(facts: Facts, main: Program, units: Mapping[str, Sequence[UnitRun]]) -> MemoryProfile:
    """The profile of ``main``; ``units`` are what its calls of updates run, by the name of the call."""
    programs = (main, *(unit.program for runs in units.values() for unit in runs))
    if error := next((e for e in (facts.missing, *(p.error for p in programs)) if e), ""):
        return MemoryProfile((), (), facts.parameters, missing=error)
    replay = _Replay(facts, units)
    replay.run(main, {})
    return replay.finish(main.estimate)


class _Storage:
    """A storage while the program runs: how many names hold it."""

    __slots__ = ("birth", "block", "count", "death")

    def __init__(self, block: Block, birth: int) -> None:
        self.block, self.birth, self.count = block, birth, 0
        self.death: int | None = None


class _Replay:
    """Runs programs on names instead of tensors."""

    def __init__(self, facts: Facts, units: Mapping[str, Sequence[UnitRun]]) -> None:
        self.facts, self.units = facts, units
        self.moments: list[Moment] = []
        self.storages: list[_Storage] = []
        self.scratch: list[LiveTensor] = []
        self.phase = "forward"

    def run(self, program: Program, names: Mapping[str, str]) -> None:
        """Replay one program; the storages of its results stay held."""
        held: dict[str, list[_Storage]] = {}
        fresh: list[Block] = []
        for line in program.lines:
            if isinstance(line, Allocate):
                self.hold(held, line.block.name, [self.new(line.block, names)])
                fresh.append(line.block)
            elif isinstance(line, Alias):
                self.alias(held, line)
                fresh += [line.block] if line.block else []
            elif isinstance(line, Free):
                self.drop(held.pop(line.name, []))
            elif line.node in self.units:  # what it reads is held here until the call is over
                for unit in self.units[line.node]:
                    self.run(unit.program, unit.names)
            else:
                self.launch(held, line, [*fresh, *line.results], names)
                fresh = []
        for storage in [s for name in program.outputs for s in held.get(name, [])]:
            storage.count += 1
        for storages in held.values():
            self.drop(storages)

    def new(self, block: Block, names: Mapping[str, str]) -> _Storage:
        storage = _Storage(replace(block, node=names.get(block.node, block.node)), len(self.moments))
        self.storages.append(storage)
        return storage

    def hold(self, held: dict[str, list[_Storage]], name: str, storages: list[_Storage]) -> None:
        for storage in storages:
            storage.count += 1
        self.drop(held.pop(name, []))
        held[name] = storages

    def drop(self, storages: list[_Storage]) -> None:
        for storage in storages:
            storage.count -= 1
            if storage.count == 0:
                storage.death = max(storage.birth, len(self.moments) - 1)

    def alias(self, held: dict[str, list[_Storage]], line: Alias) -> None:
        storages = held.get(line.old, [])
        own = [s for s in storages if s.block.name == line.new]
        self.hold(held, line.new, own or storages)
        if line.frees_old:
            self.drop(held.pop(line.old, []))

    def launch(
        self, held: dict[str, list[_Storage]], line: Launch, made: list[Block], names: Mapping[str, str]
    ) -> None:
        index = len(self.moments)
        nodes = [names.get(n, n) for n in (line.node, *(b.node for b in made)) if n]
        computed = [names.get(n, n) for n in line.nodes] or nodes
        phases = [self.facts.phases[n] for n in computed if n in self.facts.phases]
        if phases:
            # "output" is the write of a value where it belongs, in the kernel that computes it
            self.phase = max([p for p in phases if p != "output"] or phases, key=ORDER.index)
        elif names:
            self.phase = "update"
        if line.results:
            self.hold(held, line.holder, [self.new(b, names) for b in line.results])
        makers = tuple(sorted({self.facts.makers.get(n, "") for n in computed}))
        self.moments.append(Moment(index, line.kernel, self.phase, makers, line.generated))
        size = line.scratch
        if size != 0:
            node = nodes[0] if nodes else ""
            self.scratch.append(scratch_tensor(line.kernel, node, self.phase, size, index))

    def finish(self, estimate: int) -> MemoryProfile:
        facts, end = self.facts, len(self.moments)
        inputs = [replace(t, death=end) for t in facts.inputs]
        symbolic = [*inputs, *(self.tensor(storage, end) for storage in self.storages), *self.scratch]
        values, sources = facts.symbols.values, facts.symbols.sources
        tensors, unsized = sized(symbolic, values, facts.symbols.resolve)
        return MemoryProfile(
            moments=tuple(self.moments),
            tensors=tensors,
            parameters=facts.parameters,
            values=values,
            sources=sources,
            estimate=estimate,
            bounds=facts.symbols.stated,
            unsized=unsized,
        )

    def tensor(self, storage: _Storage, end: int) -> LiveTensor:
        facts, block = self.facts, storage.block
        birth = min(storage.birth, end - 1)
        death = end if storage.death is None else storage.death
        size = block.size
        if facts.rounding > 1:
            size = sympy.ceiling(size / facts.rounding) * facts.rounding
        born = self.moments[birth].phase if self.moments else "forward"
        return LiveTensor(
            name=block.node or block.name,
            node=block.node,
            role=self.role(storage, born, death),
            phase=born,
            dtype=block.dtype,
            shape=block.shape,
            where=facts.lines.get(block.node, ""),
            size=size,
            bytes=0,
            birth=birth,
            death=death,
        )

    def role(self, storage: _Storage, born: str, death: int) -> str:
        """The role of the node it is the value of, corrected by when the program really drops it."""
        role = self.facts.roles.get(storage.block.node, "temporary")
        if death >= len(self.moments):
            return "output"
        if role in ("temporary", "saved activation"):
            later = self.moments[max(death, 0)].phase
            return "saved activation" if born == "forward" and later != "forward" else "temporary"
        return role
