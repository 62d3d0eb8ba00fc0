"""What is known of one compiled graph: its text, what each pass did, and how to show it."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape

from .analysis.memory import MemoryProfile
from .passes.pipeline import PassRecord


@dataclass
class GraphRecord:
    """One compiled graph: text before and after the passes, and what each pass did."""

    before: str
    after: str
    passes: list[PassRecord]
    unreached: dict[str, str]  # trainable parameter -> why it is not updated
    seconds: dict[str, float]  # compile time by stage: capture, passes, lower
    memory: MemoryProfile  # what is alive when, and the peak
    escaping: dict[str, str] = field(default_factory=dict)  # leaf -> why its gradient outlives the step

    def inserted(self) -> dict[str, int]:
        """Nodes inserted per pass."""
        return {record.name: record.inserted for record in self.passes}

    def summary(self) -> str:
        """One line per pass: nodes inserted and removed, seconds, what it declined."""
        lines = [f"{'pass':<14}{'inserted':>9}{'removed':>9}{'seconds':>9}  declined"]
        for p in self.passes:
            declined = "; ".join(p.declined)
            lines.append(f"{p.name:<14}{p.inserted:>9}{p.removed:>9}{p.seconds:>9.3f}  {declined}".rstrip())
        return "\n".join(lines)

    def memory_summary(self) -> str:
        """The peak, the peak of each phase, and the five largest tensors at the peak."""
        if self.memory.missing:
            return f"no memory profile: {self.memory.missing}"
        peak = self.memory.peak
        lines = [
            f"peak {peak.bytes:,} bytes at {peak.moment.name} ({peak.moment.phase}): {self.memory.expression}"
        ]
        for phase in dict.fromkeys(m.phase for m in self.memory.moments):
            if (found := self.memory.peak_of(phase)) is not None:
                lines.append(f"  {phase:<9}{found.bytes:>16,}  at {found.moment.name}")
        lines += [f"  {t.bytes:>25,}  {t.name} ({t.role}) {t.where}".rstrip() for t in peak.live[:5]]
        if self.memory.bounds:
            stated = ", ".join(f"{symbol} {bound}" for symbol, bound in self.memory.bounds.items())
            lines.append(f"  counted at their largest, these sizes depend on data: {stated}")
        if self.memory.unsized:
            lines.append(f"  not counted, their sizes depend on data: {', '.join(self.memory.unsized)}")
        return "\n".join(lines)

    def print(self) -> None:
        """Print the summaries and the graph that is compiled."""
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
        return f"<table><tr>{head}</tr>{rows}</table>{graphs}"
