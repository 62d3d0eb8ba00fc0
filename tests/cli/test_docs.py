"""docs/cli.md shows what the commands print, and the fields that they write as JSON."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from fxpass.cli.app import COMMANDS

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("update_cli", PAGE.parent / "update_cli.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("command", ["passes", "passes --verbose"])
def test_the_output_of_passes_is_current(script: Any, command: str) -> None:
    block = re.search(rf"^\$ fxpass {command}\n(.*?)^(?:\$|```)", PAGE.read_text(), re.M | re.S)
    assert block is not None
    assert block[1] == script.output(command), "run python docs/update_cli.py"


def test_the_schema_is_current(script: Any) -> None:
    assert script.schema() in PAGE.read_text(), "run python docs/update_cli.py"


def test_every_command_is_shown() -> None:
    shown = set(re.findall(r"fxpass (\w+)", PAGE.read_text()))
    assert set(COMMANDS) <= shown


def test_the_picture_is_small() -> None:
    picture = PAGE.parent / "img" / "report.png"
    assert picture.stat().st_size < 300_000
    assert "img/report.png" in (PAGE.parents[1] / "README.md").read_text()


def test_what_ranks_send_is_current(script: Any) -> None:
    text = (PAGE.parent / "distributed.md").read_text()
    block = script.BLOCK.search(text)
    assert block is not None
    assert script.updated_block(block) == block[0], "run python docs/update_cli.py"
