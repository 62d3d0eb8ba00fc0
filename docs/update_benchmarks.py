"""Fill in docs/benchmarks.md what compiling costs, from results/compile.json."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
RESULTS = DOCS / "results" / "compile.json"
TABLE = re.compile(r"(<!-- compile -->\n).*?(<!-- end of compile -->)", re.DOTALL)
BASELINE = "compiled-amp"
NAMES = {BASELINE: "torch.compile(model) + GradScaler + fused AdamW", "fxpass": "**fxpass**"}
LEAST = 0.05  # seconds of a stage worth a row


def tables() -> str:
    """What was run where, a row for each contender and depth, and where fxpass spends it."""
    data = json.loads(RESULTS.read_text())
    rows: list[dict[str, Any]] = data["results"]
    machine = data["machine"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "python", "commit"))
    with_stages = [row for row in rows if row["stages"]]
    return "\n\n".join((f"{machine['cpu']}, {versions}.", _costs(rows), _stages(with_stages)))


def _costs(rows: list[dict[str, Any]]) -> str:
    base = {(r["layers"], r["width"]): r for r in rows if r["name"] == BASELINE}
    lines = [_line(("layers", "", "cold, s", "ratio", "warm, s", "ratio")), "|---" * 6 + "|"]
    for row in rows:
        peer = base[row["layers"], row["width"]]
        ratios = [f"{row[kind] / peer[kind]:.2f}x" for kind in ("cold", "warm")]
        name = NAMES.get(row["name"], row["name"])
        cells = (str(row["layers"]), name, f"{row['cold']:.1f}", ratios[0], f"{row['warm']:.1f}", ratios[1])
        lines.append(_line(cells))
    return "\n".join(lines)


def _stages(rows: list[dict[str, Any]]) -> str:
    heads = [f"{r['name']}, {r['layers']} layers" for r in rows]
    lines = [_line(("stage", *(f"{head}, s" for head in heads), "warm, s")), "|---" * (len(rows) + 2) + "|"]
    for stage in dict.fromkeys(s for r in rows for s in (*r["stages"], *r["warm_stages"])):
        costs = [r["stages"].get(stage, 0.0) for r in rows]
        warm = rows[-1]["warm_stages"].get(stage, 0.0)
        if max(*costs, warm) < LEAST:
            continue
        shares = [f"{c:.1f} ({c / sum(r['stages'].values()):.0%})" for c, r in zip(costs, rows, strict=True)]
        lines.append(_line((stage, *shares, f"{warm:.1f}")))
    return "\n".join(lines)


def _line(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Rewrite the page in place."""
    page = DOCS / "benchmarks.md"
    page.write_text(TABLE.sub(lambda m: f"{m[1]}\n{tables()}\n\n{m[2]}", page.read_text()))


if __name__ == "__main__":
    main()
