"""``--device cuda`` with a CUDA build of torch: what it traces, and what it says where there is no GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cuda.device import STUB

TARGET = f"{Path(__file__).parents[1]}/cli/targets.py:mlp"


@pytest.mark.parametrize("gpu", [True, False], ids=["a device", "no device"])
def test_inspect_says_what_it_traced(gpu: bool) -> None:
    if not gpu and not STUB:
        pytest.skip("the device is real")
    environment = {name: value for name, value in os.environ.items() if gpu or name != "LD_PRELOAD"}
    code = "from fxpass.cli import main; main()"
    command = [sys.executable, "-c", code, "inspect", TARGET, "--device", "cuda", "--launches"]
    said = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert f"device {'cuda' if gpu else 'cpu'}" in said.stdout
    assert ("traced with the CPU's operators: no GPU is here" in said.stdout) is not gpu
    assert f"generated {'Triton' if gpu else 'C++'} kernels" in said.stdout
    assert bool(re.search(r"kernels compiled for sm_\d+: \d+ to \d+ registers", said.stdout)) is gpu
    assert ("registers and spills are known where" in said.stdout) is not gpu
