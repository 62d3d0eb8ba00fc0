"""Rewrite the texts of docs/tour.md: one step of a two-layer model, as each stage leaves it.

The program in the page is run through capture and passes, and each block that begins with ``# after: NAME``
is replaced by what there is at that point. Run it as ``python docs/update_tour.py``; it takes seconds.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

PAGE = Path(__file__).parent / "tour.md"
PROGRAM = re.compile(r"<!-- program -->\n```python\n(.*?)```", re.DOTALL)
BLOCK = re.compile(r"(?m)^```text\n# after: (?P<point>[^\n]*)\n.*?^```$", re.DOTALL)
WIDTH = 108


def stages(program: str) -> dict[str, str]:
    """By point, the text that there is of the step; ``program`` defines ``step`` and its ``args``."""
    import torch

    import fxpass.hallway.frame
    from fxpass.hallway.dry_run import dry_run
    from fxpass.passes import PASSES
    from fxpass.report.diff import diff

    found: dict[str, str] = {}

    def make() -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        names: dict[str, Any] = {}
        exec(compile(program, "step.py", "exec"), names)
        return names["step"], names["args"], {}

    capture = fxpass.hallway.frame.capture

    def seen(gm: Any, *args: Any, **kwargs: Any) -> Any:
        found["Dynamo"] = _fx_text(gm.graph)
        captured = capture(gm, *args, **kwargs)
        found["capture"] = _fx_text(captured.gm.graph)
        return captured

    torch.compiler.reset()
    with mock.patch.object(fxpass.hallway.frame, "capture", seen):
        run = dry_run(make, {"max_norm": 1.0}, tensors="real")
    views = list(run.views.values())
    found["AOTAutograd"] = run.record.before
    for before, after in pairwise(views):
        found[after.point] = "\n".join(f"{c.kind} {c.text}" for c in diff(before, after))
    assert all(cls.name in found for cls in PASSES)
    found["the passes"] = run.record.after
    found["the profile"] = run.record.memory_summary()
    return found


def _fx_text(graph: Any) -> str:
    """A graph of Dynamo's: one line per node, as a Python program would have it."""
    lines = []
    for node in graph.nodes:
        arguments = [str(a) for a in node.args] + [f"{k}={v}" for k, v in node.kwargs.items()]
        target = (
            node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.target)
        )
        if node.op == "placeholder":
            lines.append(f"{node.name}: an input")
        elif node.op == "output":
            lines.append(f"return {', '.join(map(str, node.args[0]))}")
        else:
            lines.append(f"{node.name} = {target}({', '.join(arguments)})")
    return "\n".join(lines)


def updated(text: str) -> str:
    """The page with its texts as they are now."""
    program = PROGRAM.search(text)
    assert program is not None
    found = stages(program[1])

    def block(match: re.Match[str]) -> str:
        name, _, only = match["point"].partition(", lines with ")
        lines = found[name].splitlines()
        kept = [line for line in lines if not only or re.search(only, line)]
        shown = [line if len(line) <= WIDTH else f"{line[: WIDTH - 4]} ..." for line in kept]
        return "\n".join(["```text", f"# after: {match['point']}", *shown, "```"])

    return BLOCK.sub(block, text)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    PAGE.write_text(updated(PAGE.read_text()))
