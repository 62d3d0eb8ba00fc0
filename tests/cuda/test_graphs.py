"""Under ``mode="reduce-overhead"`` the whole step is one CUDA graph."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch._inductor.config as inductor_config

from tests.cuda.device import STUB, recorded
from tests.cuda.models import Training


@pytest.fixture(autouse=True)
def _one_stream_captures() -> Iterator[None]:
    """The stub tells of every stream that it captures while one does, which torch's own checks take ill."""
    checks = {f"triton.{speed}_path_cudagraph_asserts": not STUB for speed in ("slow", "fast")}
    with inductor_config.patch(checks):
        yield


@pytest.mark.breadth("first")
@pytest.mark.parametrize("model", ["mlp", "tiny gpt"])
def test_the_whole_step_is_one_cuda_graph(model: str) -> None:
    training = Training(model)
    step, handle = training.compiled({"max_norm": 1.0}, mode="reduce-overhead")
    for _ in range(4):  # compile, warm up, capture, replay
        step(*training.batch)
    with recorded() as log:
        step(*training.batch)
    assert log.graphs == 1
    assert not log.waits
    assert log.allocations == 0
    assert [way for way, _ in log.copies].count("DtoH") == 1  # the report
    # and the batch into the graph's own inputs, one by one or, of one dtype, by one kernel
    assert len(log.copies) + len(log.launches) <= len(training.batch) + 1
    assert STUB or handle.stats().steps == 5
