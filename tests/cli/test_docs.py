"""The docs show what commands print, the fields of their JSON, and what each stage makes of a step."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from fxpass.cli.app import COMMANDS

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"


def _script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, PAGE.parent / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script() -> Any:
    return _script("update_cli")


def test_the_tour_is_current() -> None:
    text = (PAGE.parent / "tour.md").read_text()
    assert _script("update_tour").updated(text) == text, "run python docs/update_tour.py"


def test_the_tour_names_what_there_is() -> None:
    text = (PAGE.parent / "tour.md").read_text()
    named = re.findall(r"`((?:fxpass|tests)/[\w/.]+)`", text)
    assert len(named) > 20
    assert not [path for path in named if not (PAGE.parents[1] / path).exists()]


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


@pytest.mark.slow
def test_what_ranks_send_is_current(script: Any) -> None:
    text = (PAGE.parent / "distributed.md").read_text()
    block = script.BLOCK.search(text)
    assert block is not None
    assert script.updated_block(block) == block[0], "run python docs/update_cli.py"
