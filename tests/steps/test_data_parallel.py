"""Two processes: averaged gradients beside eager DistributedDataParallel, one verdict, refusals."""

from __future__ import annotations

import re
from typing import Any

import pytest

from fxpass import MixedPrecision, OptionError
from tests.support.ranks import CALLS, OVERFLOWS, PROGRAMS, asked_for, results_of

REFUSED = {
    "other ways": "the ranks would train different steps(?s:.*)reduces",
    "alone": "train different steps: rank 1 has none: a GradScaler is used inside the step",
    "comm hook": "DistributedDataParallel with a communication hook",
    "sharded": "FSDPModule inside the step",
    "tensor parallel": "a parameter that is a DTensor",
    "zero": "ZeroRedundancyOptimizer, which sends parameters",
}
TRAINED = [name for name in PROGRAMS if name not in REFUSED]


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest) -> dict[str, Any]:
    """All programs in the same two processes."""
    return results_of("tests.support.ranks", asked_for(request, PROGRAMS))


@pytest.mark.breadth("first")
@pytest.mark.parametrize("name", TRAINED)
def test_as_eager(found: dict[str, Any], name: str) -> None:
    result = found[name]
    assert "error" not in result, result["error"]
    assert result["steps"] == CALLS + 1
    assert result["ranks"] == 0.0
    half = PROGRAMS[name][1].get("dtype") != "float32"
    assert result["difference"] < (2e-3 if half else 3e-7)


@pytest.mark.breadth("first")
@pytest.mark.parametrize("name", OVERFLOWS)
def test_an_overflow_on_one_rank_skips_the_step_on_all(found: dict[str, Any], name: str) -> None:
    assert found[name]["skipped"] == 2


@pytest.mark.breadth("first")
@pytest.mark.parametrize("name", ["replicated", "accumulated", "small buckets"])
def test_reductions_are_bucketed(found: dict[str, Any], name: str) -> None:
    """``no_sync``: one reduction at the end."""
    reductions = found[name]["reductions"]
    assert reductions > 1 if name == "small buckets" else reductions == 1


@pytest.mark.breadth
@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(found: dict[str, Any], name: str) -> None:
    assert re.search(REFUSED[name], found[name].get("error", "trained"))


@pytest.mark.parametrize("name", ["data_parallel", "reduce_dtype", "bucket_mb"])
def test_options_are_checked(name: str) -> None:
    with pytest.raises(OptionError, match=f"option {name}='much'"):
        MixedPrecision(**{name: "much"})  # pyrefly: ignore[bad-argument-type]
