"""Bytes over one training step: what is alive at every moment, where the peak is, and why.

One type for two views: the graph as written (``graph_profile``, what
``codegen="eager"`` runs) and the program Inductor made of it
(fxpass/lower/profile.py). Sizes are sympy expressions, so a step captured with
symbolic sizes answers for sizes it has never run with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from ..ir.dtypes import name_of
from ..ir.graph import Role, StepGraph
from ..ir.provenance import user_place
from ..ir.sizes import expression, resolver
from ..ir.unbacked import SIZES
from .bounds import Bound, at_most, bounds
from .liveness import Liveness, liveness
from .scratch import scratch

PHI = sympy.Symbol("Phi", integer=True, positive=True)
PROPORTIONAL = (
    "parameter",
    "optimizer state",
    "cast weight",
    "fp16 gradient",
    "bf16 gradient",
    "fp32 gradient",
)
DIMENSIONS = {"batch": 0, "seq": 1, "length": 1}  # what people call the first dimensions of their inputs


@dataclass(frozen=True)
class Moment:
    """One node of the graph, or one kernel launch."""

    index: int
    name: str
    phase: str
    # of a launch: the passes that inserted what it computes, "" for the user's own; is the kernel Inductor's
    made_by: tuple[str, ...] = ()
    generated: bool = False


@dataclass(frozen=True)
class LiveTensor:
    """One allocation, alive from moment ``birth`` to moment ``death``, both included."""

    name: str
    node: str  # the node of the step graph whose value it is; "" if unknown
    role: str
    phase: str
    dtype: str
    shape: str
    where: str  # line of the user's code, "file.py:12"; "" if unknown
    size: sympy.Expr  # bytes
    bytes: int  # size at the sizes of this profile; 0 if it is not known
    birth: int  # -1: there before the step
    death: int  # number of moments: there after it


@dataclass(frozen=True)
class Peak:
    """The moment with the most bytes, and what is alive then, largest first."""

    moment: Moment
    bytes: int
    live: list[LiveTensor]


@dataclass(frozen=True)
class MemoryProfile:
    """Every allocation of one step, inputs included.

    ``values`` are the symbolic sizes this profile stands for, ``sources`` where
    each comes from, such as ``x.shape[0]``.
    """

    moments: tuple[Moment, ...]
    tensors: tuple[LiveTensor, ...]
    parameters: int
    values: Mapping[str, int] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    estimate: int = 0  # Inductor's own, bytes beyond the inputs; 0 if it did not say
    # sizes that depend on data, counted at their largest: {"u0": "at most 10 (nonzero)"}
    bounds: Mapping[str, str] = field(default_factory=dict)
    unsized: tuple[str, ...] = ()  # what depends on data and has no bound: counted as 0 bytes
    missing: str = ""  # why there is no profile at all: the step runs all the same

    def live(self, moment: int) -> list[LiveTensor]:
        """What is alive at a moment, largest first."""
        alive = [t for t in self.tensors if t.birth <= moment <= t.death and t.bytes]
        return sorted(alive, key=lambda t: -t.bytes)

    def by_role(self, moment: int) -> dict[str, int]:
        """Bytes alive at a moment, by role."""
        return dict(self.timeline()[moment])

    def timeline(self) -> list[dict[str, int]]:
        """``by_role`` of every moment."""
        return self._timeline

    @cached_property
    def _timeline(self) -> list[dict[str, int]]:
        changes: list[dict[str, int]] = [{} for _ in range(len(self.moments) + 1)]
        for t in self.tensors:
            first, last = max(t.birth, 0), min(t.death + 1, len(self.moments))
            changes[first][t.role] = changes[first].get(t.role, 0) + t.bytes
            changes[last][t.role] = changes[last].get(t.role, 0) - t.bytes
        now: dict[str, int] = {}
        timeline = []
        for change in changes[:-1]:
            for role, size in change.items():
                now[role] = now.get(role, 0) + size
            timeline.append({role: size for role, size in now.items() if size})
        return timeline

    @cached_property
    def totals(self) -> list[int]:
        """Bytes alive at every moment."""
        return [sum(roles.values()) for roles in self._timeline]

    @property
    def persistent(self) -> int:
        """Bytes that are there before the step: parameters, optimizer state, inputs."""
        return sum(t.bytes for t in self.tensors if t.birth < 0)

    @property
    def transient(self) -> int:
        """Bytes that the step adds at its peak."""
        return self.peak.bytes - self.persistent

    @cached_property
    def peak(self) -> Peak:
        """The moment with the most bytes."""
        return self._peak(range(len(self.moments)))

    def peak_of(self, phase: str) -> Peak | None:
        """The peak among the moments of one phase; None if it has none."""
        moments = [m.index for m in self.moments if m.phase == phase]
        return self._peak(moments) if moments else None

    def _peak(self, moments: Iterable[int]) -> Peak:
        at = max(moments, key=self.totals.__getitem__, default=None)
        if at is None:  # a graph that computes nothing
            return Peak(Moment(0, "", "input"), self.persistent, self.live(0))
        return Peak(self.moments[at], self.totals[at], self.live(at))

    @property
    def expression(self) -> sympy.Expr:
        """The bytes at this peak, in Phi (the number of parameters) and the symbolic sizes.

        What is as large as the parameters, or as some of them, is counted in
        hundredths of a byte per parameter; the constant is what remains.
        """
        return self.expression_of(self.peak)

    def expression_of(self, peak: Peak) -> sympy.Expr:
        """Like ``expression``, for any moment."""
        counted = sum(t.bytes for t in peak.live if t.role in PROPORTIONAL and not t.size.free_symbols)
        rest = [t.size for t in peak.live if t.role not in PROPORTIONAL or t.size.free_symbols]
        hundredths = 100 * counted // max(self.parameters, 1)
        constant = counted - sympy.Rational(hundredths * self.parameters, 100)
        return sympy.Rational(hundredths, 100) * PHI + sympy.expand(sympy.Add(*rest, constant))

    def at(self, **sizes: int) -> MemoryProfile:
        """The same program at other sizes: by the names of ``symbols``, or batch, seq.

        Raises:
            KeyError: no such symbolic size; says which there are.
        """
        values = {**self.values, **{self._symbol(name): size for name, size in sizes.items()}}
        tensors, unsized = sized(self.tensors, values, lambda size: size)
        return replace(self, tensors=tensors, values=values, unsized=unsized)

    def _symbol(self, name: str) -> str:
        if name in self.values:
            return name
        dimension = DIMENSIONS.get(name)
        matching = [s for s, source in self.sources.items() if source.endswith(f".shape[{dimension}]")]
        if dimension is not None and len(matching) == 1:
            return matching[0]
        known = ", ".join(f"{k} ({v})" for k, v in self.symbols.items())
        raise KeyError(
            f"no symbolic size {name!r}; there are: {known or 'none, capture with dynamic shapes'}"
        )

    @property
    def symbols(self) -> dict[str, str]:
        """What each symbolic size is, and its value here: ``{"s0": "x.shape[0] = 8"}``."""
        return {s: f"{self.sources.get(s, '?')} = {value}" for s, value in self.values.items()}

    def plot(self, path: str | None = None) -> Any:
        """Live bytes by role as a matplotlib figure, saved to ``path`` if one is given.

        Raises:
            ImportError: matplotlib is not installed (``fxpass[plots]``).
        """
        from .plot import timeline_figure

        figure = timeline_figure(self)
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure


def evaluate(size: sympy.Expr, values: Mapping[str, int]) -> int | None:
    """``size`` in bytes where each symbol has the value of its name; None if one has none."""
    if not size.is_Integer:
        if any(str(s) not in values for s in size.free_symbols):
            return None
        size = size.subs({s: sympy.Integer(values[str(s)]) for s in size.free_symbols})
    return int(size)


@dataclass
class Symbols:
    """The symbolic sizes among the inputs of a step.

    ``values`` are those of the example, ``sources`` where each comes from. Both
    are read anew at every use: lowering may still find that two sizes are equal.
    """

    inputs: list[tuple[str, Any]]  # the user's name of an input, its fake value
    bounds: tuple[Bound, ...] = ()
    made: tuple[Any, ...] = ()  # fake values whose sizes depend on data

    @classmethod
    def of(cls, step: StepGraph) -> Symbols:
        """Those of a step; sizes that depend on data get the bounds that its graph gives them."""
        inputs = [(step.names.get(n) or n.name, n.meta.get("val")) for n in step.inputs()]
        made = tuple(n.meta.get("val") for n in step.nodes() if n.meta.get(SIZES))
        named = [(name, v) for name, v in inputs if isinstance(v, (Tensor, torch.SymInt))]
        return cls(named, bounds(step), made)

    @property
    def resolve(self) -> Callable[[sympy.Expr], sympy.Expr]:
        """Expressions at their bounds in the symbols that are left: see ``fxpass.ir.sizes.resolver``."""
        resolved = resolver([*(v for _, v in self.inputs), *self.made])
        pairs = [(resolved(b.symbol), resolved(b.size)) for b in self.bounds]
        known = {s: size for s, size in pairs if isinstance(s, sympy.Symbol) and s not in size.free_symbols}
        return lambda size: at_most(resolved(size), known)

    @property
    def stated(self) -> dict[str, str]:
        """The bounds in words: ``{"u0": "at most 10 (nonzero)"}``."""
        resolve = self.resolve
        return {str(b.symbol): f"at most {resolve(b.size)} ({b.node})" for b in self.bounds}

    def _sizes(self) -> Iterator[tuple[str, torch.SymInt, str]]:
        for name, value in self.inputs:
            sizes = enumerate(value.shape) if isinstance(value, Tensor) else [(None, value)]
            for position, size in sizes:
                if isinstance(size, torch.SymInt) and expression(size).is_Symbol:
                    source = name if position is None else f"{name}.shape[{position}]"
                    yield str(expression(size)), size, source

    @property
    def values(self) -> dict[str, int]:
        """``{"s0": 8}``: the sizes of the example. A size that depends on data has none."""
        return {symbol: size.node.hint for symbol, size, _ in self._sizes() if size.node.hint is not None}

    @property
    def sources(self) -> dict[str, str]:
        """``{"s0": "x.shape[0]"}``: the first shape that has the symbol, or the number that is given."""
        sources: dict[str, str] = {}
        for symbol, _, source in self._sizes():
            if symbol not in sources or (".shape" in source and ".shape" not in sources[symbol]):
                sources[symbol] = source
        return sources


def sized(
    tensors: Iterable[LiveTensor], values: Mapping[str, int], resolve: Callable[[sympy.Expr], sympy.Expr]
) -> tuple[tuple[LiveTensor, ...], tuple[str, ...]]:
    """``tensors`` with their bytes at ``values``, and the names of those that cannot be sized."""
    known: dict[sympy.Expr, tuple[sympy.Expr, int | None]] = {}
    measured, unsized = [], []
    for t in tensors:
        if t.size not in known:
            size = t.size if t.size.is_Integer else resolve(t.size)
            known[t.size] = size, evaluate(size, values)
        size, count = known[t.size]
        if count is None:
            unsized.append(t.name)
        measured.append(replace(t, size=size, bytes=count or 0))
    return tuple(measured), tuple(unsized)


def graph_profile(step: StepGraph) -> MemoryProfile:
    """The profile of ``step`` run node by node, as it is written."""
    alive = liveness(step)
    nodes = {n.name: n for n in step.graph.nodes}
    symbols = Symbols.of(step)
    moments = tuple(Moment(i, n, p) for i, (n, p) in enumerate(zip(alive.nodes, alive.phases, strict=True)))
    symbolic = [*_tensors(alive, nodes, step), *_scratch(alive, nodes)]
    tensors, unsized = sized(symbolic, symbols.values, symbols.resolve)
    count = parameter_count(step)
    return MemoryProfile(
        moments, tensors, count, symbols.values, symbols.sources, bounds=symbols.stated, unsized=unsized
    )


def _tensors(alive: Liveness, nodes: Mapping[str, Node], step: StepGraph) -> Iterable[LiveTensor]:
    for s in alive.storages:
        node = nodes[s.members[0]]
        yield LiveTensor(
            name=step.names.get(node, s.name),
            node=node.name,
            role=s.role,
            phase=s.phase,
            dtype=name_of(s.dtype),
            shape="x".join(map(str, s.shape)) or "scalar",
            where=user_place(node),
            size=s.size,
            bytes=0,
            birth=s.birth,
            death=s.death,
        )


def _scratch(alive: Liveness, nodes: Mapping[str, Node]) -> Iterable[LiveTensor]:
    for index, name in enumerate(alive.nodes):
        node = nodes[name]
        size = scratch(node)
        if size != 0:
            yield scratch_tensor(name, name, alive.phases[index], size, index)


def scratch_tensor(name: str, node: str, phase: str, size: sympy.Expr, index: int) -> LiveTensor:
    """What a library call allocates and frees inside; ``sized`` fills in the bytes."""
    role = "temporary"
    return LiveTensor(
        name=f"scratch of {name}",
        node=node,
        role=role,
        phase=phase,
        dtype="uint8",
        shape=str(size),
        where="",
        size=size,
        bytes=0,
        birth=index,
        death=index,
    )


def parameter_count(step: StepGraph) -> int:
    """Phi: elements of the parameters that the step's optimizers update, on all ranks together."""
    weights = [n for n, role in step.roles.items() if role is Role.PARAMETER]
    parts = {n: shard for n in weights if (shard := step.part(n)) is not None}
    sizes = {n: int(n.meta["val"].numel()) for n in weights}
    return sum(size // parts[n].own * parts[n].rows if n in parts else size for n, size in sizes.items())
