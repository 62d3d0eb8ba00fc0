"""Run a command line in this process and read what it printed."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

HERE = Path(__file__).parent
TARGETS = str(HERE / "targets.py")
SECONDS = re.compile(r"\d+\.\d+ s\b")


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


def fx(capsys: pytest.CaptureFixture[str], *args: str) -> Result:
    """``fxpass ARGS``; ``@name`` stands for a function of targets.py."""
    from fxpass.cli.app import run

    torch.compiler.reset()
    with mock.patch.dict(os.environ):
        os.environ.pop("COLUMNS", None)  # set by whoever runs pytest: output is as wide as without
        code = run([f"{TARGETS}:{a[1:]}" if a.startswith("@") else a for a in args])
    printed = capsys.readouterr()
    return Result(code, printed.out, printed.err)


def without_times(text: str) -> str:
    """``text`` with every duration and machine path replaced."""
    text = SECONDS.sub("# s", text).replace(f"{HERE}/", "")
    return re.sub(r"(?m)^(\w+ +\d+ +\d+ +)\d+\.\d\d\b", r"\1#.##", text)


def check_golden(name: str, text: str) -> None:
    """Compare with golden/NAME; ``FXPASS_UPDATE_GOLDEN=1`` writes it instead."""
    path = HERE / "golden" / name
    if os.environ.get("FXPASS_UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text(), f"{name} differs: FXPASS_UPDATE_GOLDEN=1 pytest tests/cli rewrites it"
