"""Fill the tables of docs/memory.md from the JSON files beside it: `python docs/update_memory.py`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
MOMENTS = ("end of forward", "end of backward", "update")


def memory_table(name: str) -> str:
    """The table of one run of bench.memory."""
    data = json.loads((DOCS / "results" / f"{name}.json").read_text())
    results: list[dict[str, Any]] = data["results"]
    amp = next((r for r in results if r["name"] == "compiled-amp"), None)
    first, machine = results[0], data["machine"]
    lines = [
        f"GPT with {first['parameters'] / 1e6:.1f}M parameters, {first['tokens']} tokens, AdamW; "
        f"{machine['cpu']}, {machine['threads']} thread, torch {machine['torch']}:",
        "",
        "| | kept | "
        + " | ".join(MOMENTS)
        + " | **peak** | predicted | beyond 12, of compiled amp | ms per step |",
        "|---|" + "---|" * 8,
    ]
    for r in results:
        phi, kept = r["parameters"], r["kept_per_parameter"]
        moments = [f"{kept + r['moments'][m] / phi:.2f}" if m in r["moments"] else "-" for m in MOMENTS]
        predicted = f"{kept + r['predicted'] / phi:.2f}" if r["predicted"] else "-"
        peak = r["peak_per_parameter"]
        share = f"{(peak - 12) / (amp['peak_per_parameter'] - 12):.2f}x" if amp else "-"
        cells = [
            r["name"],
            f"{kept:.2f}",
            *moments,
            f"**{peak:.2f}**",
            predicted,
            share,
            f"{r['step_ms']:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def prediction_table(name: str) -> str:
    """The table of one run of bench.predict."""
    data = json.loads((DOCS / "results" / f"{name}.json").read_text())
    lines = [
        "| model | parameters | measured, bytes | predicted, bytes | ratio | Inductor's own estimate "
        "| compile, s | profile, s |",
        "|---|" + "---|" * 7,
    ]
    for r in data["results"]:
        lines.append(
            f"| {r['name']} | {r['parameters']} | {r['measured']} | {r['predicted']} | {r['ratio']:.4f} "
            f"| {r['inductor_ratio']:.3f} | {r['compile_s']:.0f} | {r['dry_s']:.2f} |"
        )
    return "\n".join(lines)


def filled(text: str) -> str:
    """``text`` with every block between `<!-- NAME -->` and `<!-- end -->` made anew."""

    def block(match: re.Match[str]) -> str:
        name = match[1]
        table = prediction_table(name) if name.startswith("predict") else memory_table(name)
        return f"<!-- {name} -->\n{table}\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", block, text, flags=re.DOTALL)


if __name__ == "__main__":
    page = DOCS / "memory.md"
    page.write_text(filled(page.read_text()))
