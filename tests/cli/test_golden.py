"""What each command prints, to the letter (durations aside)."""

from __future__ import annotations

import re

import pytest

from .helpers import check_golden, fx, without_times

COMMANDS = {
    "inspect.txt": ("inspect", "@mlp", "--max-norm", "1.0", "--of", "graph"),
    "inspect.json": ("inspect", "@mlp", "--json", "--of", "graph"),
    "graph.txt": ("graph", "@mlp", "--dtype", "bfloat16"),
    "graph_grep.json": ("graph", "@mlp", "--grep", "addmm", "--json"),
    "diff.txt": ("graph", "@mlp", "--diff", "captured", "cast"),
    "diff.json": ("graph", "@mlp", "--diff", "captured", "scale_loss", "--json"),
    "around.dot": ("graph", "@mlp", "--around", "addmm_1", "--format", "dot"),
    "explain.txt": ("explain", "@mlp", "*softmax*"),
    "explain.json": ("explain", "@mlp", "_softmax", "--json"),
    "passes.txt": ("passes",),
    "passes_verbose.txt": ("passes", "--verbose"),
    "passes.json": ("passes", "--json"),
    "inspect_help.txt": ("inspect", "--help"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_output(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = fx(capsys, *COMMANDS[name])
    assert (found.code, found.err) == (0, "")
    text = without_times(found.out)
    if name.endswith(".json"):
        text = _without_seconds(text)
    check_golden(name, text)


def _without_seconds(text: str) -> str:
    return re.sub(r'("(?:seconds|dynamo|capture|passes|verify)": )\d+\.\d+', r"\1#", text)


def test_nothing_is_printed_that_only_a_terminal_understands(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (("passes",), ("graph", "@mlp", "--diff", "captured", "cast")):
        assert "\x1b" not in fx(capsys, *command).out
