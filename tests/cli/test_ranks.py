"""``--ranks``: several ranks in one process."""

from __future__ import annotations

import pytest

from .helpers import fx


def test_inspect_says_what_is_sent(capsys: pytest.CaptureFixture[str]) -> None:
    found = fx(capsys, "inspect", "@mlp", "--ranks", "4", "--of", "graph")
    assert (found.code, found.err) == (0, "")
    assert "4 ranks: each sends" in found.out
    assert "all_reduce  backward  float16" in found.out


def test_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    answer = fx(capsys, "inspect", "@mlp", "--ranks", "4", "--of", "graph", "--json").json()
    assert answer["ranks"] == 4
    assert (
        sum(t["sent"] for t in answer["transfers"])
        == 2 * 3 * sum(t["bytes"] for t in answer["transfers"]) // 4
    )


@pytest.mark.parametrize("command", ["memory", "explain", "graph"])
def test_every_command_takes_it(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = {"memory": ("@mlp", "--of", "graph"), "explain": ("@mlp", "all_reduce*"), "graph": ("@mlp",)}
    found = fx(capsys, command, *words[command], "--ranks", "2")
    assert (found.code, found.err) == (0, "")
    assert command == "memory" or "all_reduce" in found.out


def test_a_group_is_no_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--data-parallel" not in fx(capsys, "inspect", "--help").out


def test_sharded(capsys: pytest.CaptureFixture[str]) -> None:
    found = fx(capsys, "inspect", "@mlp", "--ranks", "4", "--sharded")
    assert found.code == 2
    assert "call fxpass.shard_" in found.err
    assert "say over how many" in fx(capsys, "inspect", "cnn", "--sharded").err
    found = fx(capsys, "inspect", "cnn", "--ranks", "4", "--sharded", "--of", "graph")
    assert (found.code, found.err) == (0, "")
    assert "reduce_scatter_tensor_coalesced   backward  float16" in found.out
