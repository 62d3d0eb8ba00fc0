"""One clear message, exit code 2 for wrong use and 1 for a step that cannot be compiled, no traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from fxpass.cli.app import COMMANDS

from .helpers import TARGETS, fx

USAGE = {
    ("inspect",): "Missing argument 'TARGET'",
    ("inspect", "nonsense"): "neither a built-in step nor FILE.py:FUNCTION",
    ("inspect", "gtp"): "did you mean 'gpt'?",
    ("inspect", "missing.py:step"): "there is no file 'missing.py'",
    ("inspect", "missing.module:step"): "there is no module 'missing.module'",
    ("inspect", "@mlpp"): "did you mean 'mlp'?",
    ("inspect", "@not_a_function"): "is a int, not a function",
    ("inspect", "@raises"): "raised FileNotFoundError at targets.py:",
    ("inspect", "@returns_one"): "returned a function",
    ("inspect", "@returns_bad_step"): "returned a int as the step",
    ("inspect", "@returns_bad_args"): "Tensor as args",
    ("inspect", "@returns_bad_kwargs"): "returned a int as kwargs",
    ("inspect", "@mlp", "--dtype", "float8"): "option dtype='float8': allowed is float16",
    ("inspect", "@mlp", "--max-norm", "-1"): "option max_norm=-1: allowed is",
    ("inspect", "@mlp", "--loss-scale", "Nonsense(3)"): "cannot be read",
    ("inspect", "@mlp", "--loss-scale", "DynamicLossScale(min_scale=0)"): "min_scale",
    ("inspect", "@mlp", "--nonsense", "1"): "No such option '--nonsense'",
    ("inspect", "@mlp", "--device", "gpu0"): "'gpu0' is not a device",
    ("graph", "@mlp", "--at", "nonsense"): "there is no pass 'nonsense'",
    ("graph", "@mlp", "--diff", "captured", "nonsense"): "there is no pass 'nonsense'",
    ("graph", "@mlp", "--diff", "captured"): "requires 2 arguments",
    ("graph", "@mlp", "--grep", "("): "is not a regular expression",
    ("graph", "@mlp", "--around", "nonsense"): "there is no node 'nonsense'",
    ("graph", "@mlp", "--format", "pdf"): "'pdf' is not one of",
    ("graph", "@mlp", "--diff", "captured", "cast", "--format", "dot"): "a diff has no format dot",
    ("memory",): "Missing argument",
    ("memory", "@mlp", "--at", "batch=0"): "'0' is not a size",
    ("memory", "@mlp", "--at", "batch"): "'batch' is not KEY=VALUE",
    ("memory", "@mlp", "--at", "nonsense=3", "--of", "graph"): "no symbolic size 'nonsense'",
    ("memory", "@mlp", "--compare", "nonsense=3"): "option 'nonsense' does not exist",
    ("memory", "@mlp", "--compare", "dtype=float8"): "option dtype='float8'",
    ("memory", "@mlp", "--top", "-1"): "-1 is not in the range",
    ("report",): "Missing argument",
    ("report", "@mlp", "--of", "graph", "-o", "/missing/report.html"): "cannot write /missing/report.html",
    ("report", "@mlp", "-o", "/"): "is a directory",
    ("explain",): "Missing argument",
    ("explain", "@mlp", "adddm"): "did you mean addmm",
    ("explain", "@mlp", "a", "b"): "got 3 words",
    ("passes", "extra"): "unexpected extra argument",
    ("doctor", "--codegen", "nonsense"): "'nonsense' is not one of",
    ("nonsense",): "No such command 'nonsense'",
}


@pytest.mark.parametrize("command", USAGE, ids=" ".join)
def test_wrong_use_is_one_message_and_exit_code_2(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    found = fx(capsys, *command)
    assert found.code == 2, found
    assert USAGE[command] in found.err  # pyrefly: ignore[bad-index]
    assert found.err.startswith("fxpass: ")
    assert "Traceback" not in found.err
    assert found.out == ""


def test_a_graph_break_is_exit_code_1_and_names_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    found = fx(capsys, "inspect", "@breaks")
    assert found.code == 1
    assert "targets.py" in found.err
    assert "if loss.item() < 1e6" in found.err
    assert "Traceback" not in found.err


def test_an_error_of_the_users_step_is_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    found = fx(capsys, "inspect", "@wrong_shape")
    assert found.code == 1
    assert found.err.startswith("fxpass: the step cannot be traced")
    assert "graphs.py" in found.err  # where the step is written
    assert len(found.err.splitlines()) <= 4


def test_a_step_that_trains_nothing_is_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    found = fx(capsys, "inspect", "@trains_nothing")
    assert (found.code, found.out) == (1, "")
    assert "nothing was compiled" in found.err


def test_traceback_shows_where_it_came_from(capsys: pytest.CaptureFixture[str]) -> None:
    found = fx(capsys, "inspect", "@raises", "--traceback")
    assert found.code == 2
    assert "Traceback" in found.err
    assert 'raise FileNotFoundError("data.csv is not here")' in found.err


def test_json_has_the_error_too(capsys: pytest.CaptureFixture[str]) -> None:
    for command, code in ((("inspect", "@breaks"), 1), (("graph", "@mlp", "--at", "x"), 2)):
        found = fx(capsys, *command, "--json")
        assert found.code == code
        assert found.json()["schema"] == "fxpass.error/1"
        assert found.json()["code"] == code
        assert found.json()["error"] in found.err


def test_a_file_with_an_error_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.py").write_text("import torch\nx = 1 / 0\n")
    found = fx(capsys, "inspect", f"{tmp_path}/broken.py:step")
    assert found.code == 2
    assert "raised ZeroDivisionError at broken.py:2" in found.err
    (tmp_path / "unparsable.py").write_text("def step(:\n")
    found = fx(capsys, "inspect", f"{tmp_path}/unparsable.py:step")
    assert found.code == 2
    assert "SyntaxError" in found.err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = fx(capsys, command, "--help")
    assert found.code == 0
    assert f"Example: fxpass {command}" in found.out


def test_no_command_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    found = fx(capsys)
    assert found.code == 2
    assert "TARGET is FILE.py:FUNCTION" in found.out
    assert str(Path(TARGETS).name) not in found.out
