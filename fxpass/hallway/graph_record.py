"""What is known of one compiled graph: its text, what each pass did, and how to show it."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape

from ..analysis.memory import MemoryProfile
from ..passes.pipeline import PassRecord

STAGES = {
    "dynamo": "Dynamo traces Python, guards on it",
    "capture": "AOTAutograd: one graph of ATen operators, the optimizer's own Python in it",
    "passes": "fxpass rewrites the graph",
    "verify": "and checks it after each pass",
    "profile": "who lives when: the memory profile",
    "inductor": "Inductor: decompositions, patterns, lowering",
    "scheduler": "what is fused with what",
    "codegen": "the kernels' source text",
    "load": "the whole step from the cache of an earlier process",
    "compiler": "C++ and Triton compilers, loading what they made",
    "other": "",
}


FIRST = "the first call"


@dataclass
class GraphRecord:
    """One compiled graph: text before and after the passes, and what each pass did."""

    before: str
    after: str
    passes: list[PassRecord]
    unreached: dict[str, str]  # trainable parameter -> why it is not updated
    seconds: dict[str, float]  # CPU time of the compilation by stage, see STAGES
    memory: MemoryProfile  # what is alive when, and the peak
    escaping: dict[str, str] = field(default_factory=dict)  # leaf -> why its gradient outlives the step
    cache: str = ""  # "hit": taken from the cache on disk; "miss": kept there; else why it is not kept
    wall: dict[str, float] = field(default_factory=dict)  # the same on the wall: waiting included
    name: str = ""  # of the function, and where it begins: step (train.py:12)
    why: str = FIRST  # it was made: what changed since the graph that ran before, from what to what

    def inserted(self) -> dict[str, int]:
        """Nodes inserted per pass."""
        return {record.name: record.inserted for record in self.passes}

    def reason(self) -> str:
        """Which function it is of, and why it was made."""
        return f"{self.name}: {self.why}"

    def summary(self) -> str:
        """One line per pass: nodes inserted and removed, seconds, what it declined."""
        lines = [f"{'pass':<14}{'inserted':>9}{'removed':>9}{'seconds':>9}  declined"]
        for p in self.passes:
            declined = "; ".join(p.declined)
            lines.append(f"{p.name:<14}{p.inserted:>9}{p.removed:>9}{p.seconds:>9.3f}  {declined}".rstrip())
        return "\n".join(lines)

    def times(self) -> str:
        """CPU and wall seconds of each stage, and its share."""
        total = sum(self.seconds.values()) or 1.0
        lines = [f"{'stage':<10}{'cpu s':>8}{'share':>7}{'wall s':>8}"]
        for name, what in STAGES.items():
            if (cpu := self.seconds.get(name, 0.0)) >= 0.0005:
                wall = self.wall.get(name, 0.0)
                lines.append(f"{name:<10}{cpu:>8.2f}{cpu / total:>7.0%}{wall:>8.2f}  {what}".rstrip())
        lines.append(f"{'cache':<10}{self.cache or 'off'}")
        return "\n".join([*lines, f"{'total':<10}{total:>8.2f}{1:>7.0%}{sum(self.wall.values()):>8.2f}"])

    def memory_summary(self) -> str:
        """The peak, the peak of each phase, and the five largest tensors at the peak."""
        if self.memory.missing:
            return f"no memory profile: {self.memory.missing}"
        peak = self.memory.peak
        lines = [
            f"peak {peak.bytes:,} bytes at {peak.moment.name} ({peak.moment.phase}): {self.memory.expression}"
        ]
        for phase in dict.fromkeys(m.phase for m in self.memory.moments):
            if (highest := self.memory.peak_of(phase)) is not None:
                lines.append(f"  {phase:<9}{highest.bytes:>16,}  at {highest.moment.name}")
        lines += [f"  {t.bytes:>25,}  {t.name} ({t.role}) {t.where}".rstrip() for t in peak.live[:5]]
        if self.memory.bounds:
            stated = ", ".join(f"{symbol} {bound}" for symbol, bound in self.memory.bounds.items())
            lines.append(f"  counted at their largest, these sizes depend on data: {stated}")
        if self.memory.unsized:
            lines.append(f"  not counted, their sizes depend on data: {', '.join(self.memory.unsized)}")
        return "\n".join(lines)

    def print(self) -> None:
        """Print the summaries and the graph that is compiled."""
        print(self.reason())
        print(self.summary())
        print(self.memory_summary())
        print(self.after)

    def _repr_html_(self) -> str:
        """The same for a notebook."""
        rows = "".join(
            f"<tr><td>{escape(p.name)}</td><td>{p.inserted}</td><td>{p.removed}</td>"
            f"<td>{p.seconds:.3f}</td><td>{escape('; '.join(p.declined))}</td></tr>"
            for p in self.passes
        )
        head = "".join(f"<th>{h}</th>" for h in ("pass", "inserted", "removed", "seconds", "declined"))
        graphs = "".join(
            f"<details><summary>{name}</summary><pre>{escape(text)}</pre></details>"
            for name, text in (
                ("memory", self.memory_summary()),
                ("captured", self.before),
                ("compiled", self.after),
            )
        )
        return f"<p>{escape(self.reason())}</p><table><tr>{head}</tr>{rows}</table>{graphs}"
