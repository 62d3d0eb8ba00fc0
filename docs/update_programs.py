"""Fill the table of docs/programs.md from results/programs.json: `python docs/update_programs.py`."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
RESULTS = DOCS / "results" / "programs.json"
HEAD = ("program", "source", "graphs", "lines", "skipped", "loss", "torch.amp", "float32", "verdict")


def table() -> str:
    """What was run on what, and a row for each program, family by family."""
    data = json.loads(RESULTS.read_text())
    rows: list[dict[str, Any]] = data["results"]
    machine = data["machine"]
    good = sum(row["verdict"] == "ok" for row in rows)
    whole = [row for row in rows if not row["options"]]
    lines = [
        f"{good} of {len(rows)} programs are ok, {sum(row['verdict'] == 'ok' for row in whole)} of the "
        f"{len(whole)} that were run with the default options. {machine['cpu']}, torch {machine['torch']}, "
        f"Python {machine['python']}, {_commits(rows)}.",
    ]
    family = ""
    for row in rows:
        if row["family"] != family:
            family = row["family"]
            lines += ["", f"### {family.replace('_', ' ')}", "", _line(HEAD), "|---" * len(HEAD) + "|"]
        lines.append(_line(_cells(row)))
    return "\n".join(lines)


def _commits(rows: list[dict[str, Any]]) -> str:
    """The commits the rows were made at, the one with most rows first."""
    counts = Counter(row["commit"] for row in rows)
    parts = [f"{commit} ({count} rows)" for commit, count in counts.most_common()]
    return "commit " + ", ".join(parts) if len(parts) > 1 else f"commit {rows[0]['commit']}"


def _cells(row: dict[str, Any]) -> list[str]:
    amp = _numbers(row["amp"]) + (" (bfloat16)" if row["amp_dtype"] == "bfloat16" else "")
    name = row["name"] + (" *" if row["options"] else "")
    verdict = row["verdict"] if len(row["verdict"]) < 200 else row["verdict"][:200] + " ..."
    numbers = [str(row[key]) for key in ("graphs", "lines", "skipped")]
    losses = [_numbers(row["fxpass"]), amp, _numbers(row["float32"])]
    return [name, row["source"], *numbers, *losses, verdict.replace("|", "\\|").replace("<", "&lt;")]


def _numbers(values: list[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def _line(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"


def filled(text: str) -> str:
    """``text`` with what stands between `<!-- programs -->` and `<!-- end -->` made anew."""
    made = f"<!-- programs -->\n{table()}\n<!-- end -->"
    return re.sub(r"<!-- programs -->\n.*?<!-- end -->", lambda _: made, text, flags=re.DOTALL)


if __name__ == "__main__":
    page = DOCS / "programs.md"
    page.write_text(filled(page.read_text()))
