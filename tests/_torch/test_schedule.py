"""The program of a compiled graph survives Inductor's cache, and is there without compiling a kernel."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from fxpass import _torch
from fxpass._torch.schedule import Allocate, Free, Launch
from fxpass.ir.sizes import numel

SCRIPT = """
import json, sys, torch
from torch._dynamo.utils import counters
import fxpass

NEW = float(sys.argv[1])
mp = fxpass.MixedPrecision(loss_scale=None, dtype="float32", outline="off")
weight = torch.nn.Parameter(torch.ones(16, 16))
optimizer = torch.optim.SGD([weight], lr=0.1)

def step(x):
    (x @ weight * NEW).relu().sum().backward()
    optimizer.step()
    optimizer.zero_grad()

torch.compile(step, backend=mp)(torch.ones(4, 16))
memory = mp.graphs[0].memory
timeline = [[m.name, roles] for m, roles in zip(memory.moments, memory.timeline())]
print(json.dumps({"hits": counters["inductor"]["fxgraph_cache_hit"], "timeline": timeline}))
"""


def graph() -> tuple[GraphModule, list[Tensor]]:
    """exp(x @ y) + 1 as an ATen graph, and inputs for it."""
    with FakeTensorMode():
        inputs = [torch.randn(4, 8), torch.randn(8, 16)]

    def call(x: Tensor, y: Tensor) -> list[Tensor]:
        return [torch.exp(x @ y) + 1]

    return make_fx(call)(*inputs), inputs


def test_a_dry_run_compiles_nothing_and_knows_the_buffers() -> None:
    gm, inputs = graph()
    before = counters["inductor"]["fxgraph_cache_miss"]
    compiled = _torch.compile_graph(gm, inputs, {}, [], lambda node: numel(node.meta["val"]), dry=True)
    assert counters["inductor"]["fxgraph_cache_miss"] == before
    program = compiled.program
    allocated = [line.block for line in program.lines if isinstance(line, Allocate)]
    assert [(int(b.size), b.dtype, b.shape) for b in allocated] == [(256, "float32", "4x16")]
    launches = [line for line in program.lines if isinstance(line, Launch)]
    assert ["mm" in line.kernel for line in launches] == [True, False]
    assert [int(line.scratch) for line in launches] == [64, 0]  # the library call's own node was asked for it
    assert not [line for line in program.lines if isinstance(line, Free) and line.name in program.outputs]
    with pytest.raises(NotImplementedError):
        compiled.call(inputs)


@pytest.mark.slow
def test_a_cache_hit_has_the_same_profile() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    environment["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"  # of whole steps: see tests/test_warm.py
    new = str(1 + random.Random().random())  # in no cache of an earlier run

    def run() -> dict[str, Any]:
        command = [sys.executable, "-W", "ignore", "-c", SCRIPT, new]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    first, second = run(), run()
    assert (first["hits"], second["hits"]) == (0, 1)
    assert len(first["timeline"]) > 1
    assert second["timeline"] == first["timeline"]
