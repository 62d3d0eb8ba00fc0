"""The memory command: timeline, other sizes, other modes, files; its totals are those of the backend."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fxpass import MixedPrecision

from . import targets
from .helpers import check_golden, fx


@pytest.mark.slow
def test_the_peak_is_that_of_the_compiled_step(capsys: pytest.CaptureFixture[str]) -> None:
    found = fx(capsys, "memory", "@mlp", "--max-norm", "1.0", "--json")
    assert found.code == 0, found.err
    step, args = targets.mlp()
    backend = MixedPrecision(max_norm=1.0)
    torch.compile(step, backend=backend)(*args)
    memory = found.json()["modes"][0]["memory"]
    assert memory["peak"] == backend.graphs[0].memory.peak.bytes
    assert memory["of"] == "program"


def test_phases_and_roles_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    memory = fx(capsys, "memory", "@mlp", "--of", "graph", "--json").json()["modes"][0]["memory"]
    for phase in memory["phases"]:
        assert sum(phase["roles"].values()) == phase["peak"]
    assert max(phase["peak"] for phase in memory["phases"]) == memory["peak"]
    assert sum(t["bytes"] for t in memory["largest"]) <= memory["peak"]


def test_the_picture_in_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    found = fx(capsys, "memory", "@mlp", "--of", "graph", "--top", "3")
    assert (found.code, found.err) == (0, "")
    check_golden("memory.txt", found.out.replace(f"{Path(__file__).parent}/", ""))


def test_other_sizes_are_those_of_a_step_captured_at_them(capsys: pytest.CaptureFixture[str]) -> None:
    asked = fx(capsys, "memory", "@mlp", "--of", "graph", "--at", "batch=48", "--json").json()
    direct = fx(capsys, "memory", "@mlp_48", "--of", "graph", "--json").json()
    at_48, captured = (r["modes"][0]["memory"]["peak"] for r in (asked, direct))
    assert abs(at_48 - captured) <= 0.02 * captured
    assert "s" in asked["modes"][0]["memory"]["formula"]


@pytest.mark.slow
def test_modes_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    command = ("memory", "@mlp", "--of", "graph", "--compare", "dtype=bfloat16", "dtype=float32,max_norm=1.0")
    found = fx(capsys, *command)
    assert found.code == 0, found.err
    assert "of the first" in found.out
    modes = fx(capsys, *command, "--json").json()["modes"]
    assert [m["mode"] for m in modes] == ["default", "dtype=bfloat16", "dtype=float32,max_norm=1.0"]
    assert len({m["memory"]["peak"] for m in modes}) > 1


def test_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    png, html, trace = (tmp_path / name for name in ("m.png", "m.html", "m.json"))
    files = ("--png", str(png), "--html", str(html), "--trace", str(trace))
    found = fx(capsys, "memory", "@mlp", "--of", "graph", *files, "--json")
    assert found.code == 0, found.err
    assert png.read_bytes().startswith(b"\x89PNG")
    assert 'data-only="memory"' in html.read_text()
    events = json.loads(trace.read_text())["traceEvents"]
    counters = [sum(e["args"].values()) for e in events if e["ph"] == "C"]
    assert max(counters) == found.json()["modes"][0]["memory"]["peak"]
    rows: dict[int, int] = {}
    for event in sorted((e for e in events if e["ph"] == "X" and e["pid"] == 2), key=lambda e: e["ts"]):
        assert event["ts"] >= rows.get(event["tid"], -1), "two tensors overlap in one row"
        rows[event["tid"]] = event["ts"] + event["dur"]
