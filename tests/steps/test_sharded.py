"""Two processes that each keep some rows of the weights, beside eager DistributedDataParallel; refusals."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.support.ranks import asked_for, results_of
from tests.support.sharded_ranks import CALLS, CHECKPOINT, NAMES, OVERFLOWS, TRAINED, Words
from tests.support.sharded_refused import REFUSED

# of what differs by more in the replicated mode, too: gradients of a tied table, low precision
BOUNDS = {"tied": 3e-6, "tied, float16": 2e-2, "headroom": 1.0, "bfloat16": 2e-2}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoint")


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest, checkpoint: Path) -> dict[str, Any]:
    """All programs in the same two processes."""
    names = asked_for(request, NAMES)
    return results_of("tests.support.sharded_ranks", names, {CHECKPOINT: str(checkpoint)})


@pytest.mark.breadth("first")
@pytest.mark.parametrize("name", TRAINED)
def test_as_eager(found: dict[str, Any], name: str) -> None:
    result = found[name]
    assert "error" not in result, result["error"]
    assert result["steps"] == CALLS + 1
    assert result["scales"] == 1, "all ranks know the same"
    half = TRAINED[name][2].get("dtype") != "float32"
    assert result["difference"] < BOUNDS.get(name, 2e-3 if half else 1.5e-7)


@pytest.mark.breadth("first")
@pytest.mark.parametrize("name", OVERFLOWS)
def test_an_overflow_on_one_rank_skips_the_step_on_all(found: dict[str, Any], name: str) -> None:
    assert found[name]["skipped"] == 2
    assert found[name]["kept"], "every rank's rows are what they were"


@pytest.mark.parametrize("name", ["resumed"])
def test_resumes_bit_for_bit(found: dict[str, Any], name: str) -> None:
    result = found[name]
    assert "error" not in result, result["error"]
    assert result["difference"] == 0.0
    assert result["skipped"][0] == result["skipped"][1]
    assert result["scales"] == 1


@pytest.mark.parametrize("name", ["resumed"])
def test_a_checkpoint_is_read_on_one_device(found: dict[str, Any], checkpoint: Path, name: str) -> None:
    assert "error" not in found[name]
    net = Words()
    before = net.table.weight.detach().clone()
    state = {"model": net.state_dict()}
    with pytest.warns(UserWarning, match="in a single process"):
        dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    assert not torch.equal(state["model"]["table.weight"], before)
    assert torch.equal(state["model"]["table.weight"], state["model"]["last.weight"])


@pytest.mark.breadth(10)
@pytest.mark.parametrize("name", [f"refused: {name}" for name in REFUSED])
def test_refused_by_name(found: dict[str, Any], name: str) -> None:
    message = REFUSED[name.removeprefix("refused: ")][2]
    assert re.search(message, found[name].get("error", "trained"))
