"""FXPASS_LOGS and the handle's records: what was compiled, for people who ask."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fxpass import GraphRecord, MixedPrecision
from fxpass.hallway import logs
from tests.support.graphs import training_step


def _record() -> GraphRecord:
    step, args = training_step()
    backend = MixedPrecision(codegen="eager")
    torch.compile(step, backend=backend)(*args)
    return backend.graphs[0]


def test_a_logger_that_listens_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fxpass.passes"):
        record = _record()
    assert [r.name for r in caplog.records] == ["fxpass.passes"]
    assert caplog.records[0].getMessage() == record.summary()
    for p in record.passes:
        assert p.name in record.summary()


@pytest.mark.slow
def test_the_variable_prints_on_stderr(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import torch\n"
        "weight = torch.nn.Parameter(torch.ones(2))\n"
        "optimizer = torch.optim.SGD([weight], lr=0.5)\n"
        "def step():\n"
        "    weight.sum().backward()\n"
        "    optimizer.step()\n"
        "    optimizer.zero_grad()\n"
        "torch.compile(step, backend='mixedprec', options={'codegen': 'eager'})()\n"
    )
    environment = {
        **os.environ,
        "FXPASS_LOGS": "graphs,passes,memory,recompiles",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    command = [sys.executable, str(script)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "[fxpass.graphs] " in found.stderr
    assert "fxpass.mark" not in found.stderr
    assert "[fxpass.passes] pass " in found.stderr
    assert "[fxpass.memory] peak " in found.stderr
    assert "[fxpass.recompiles] step (train.py:4): the first call\n" in found.stderr
    assert found.stdout == ""


def test_an_unknown_name_is_told() -> None:
    with pytest.warns(UserWarning, match="'nonsense' is none of graphs, passes, memory"):
        logs.set_up("nonsense")


def test_print_and_notebook_show_the_passes_and_the_graph(capsys: pytest.CaptureFixture[str]) -> None:
    record = _record()
    record.print()
    printed = capsys.readouterr().out
    assert printed == f"{record.reason()}\n{record.summary()}\n{record.memory_summary()}\n{record.after}\n"
    html = record._repr_html_()
    assert html.count("<tr>") == 1 + len(record.passes)
    assert "aten.mm" in html or "aten.addmm" in html
