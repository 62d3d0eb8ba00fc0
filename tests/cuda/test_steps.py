"""A step in its steady state: what it launches, copies, allocates, and that the host never waits."""

from __future__ import annotations

import pytest
import torch

from tests.cuda.budgets import CASES, Case
from tests.cuda.device import STUB, recorded, spilling
from tests.cuda.models import Training

REPORT = 256  # bytes: what the host is told of a step


@pytest.mark.breadth(4)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_in_its_steady_state(case: Case) -> None:
    training = Training(case.model)
    step, handle = training.compiled(dict(case.options))
    for _ in range(3):  # compile, allocate, and once more with all pools filled
        step(*training.batch)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with recorded() as log:
        step(*training.batch)
    assert not log.waits
    assert log.allocations == 0
    assert [way for way, _ in log.copies] == ["DtoH"]
    assert log.copies[0][1] <= REPORT
    assert len(log.launches) <= case.launches, len(log.launches)
    assert len(handle.graphs) == 1
    assert STUB or handle.stats().steps == 4
    generated = sum(moment.generated for moment in handle.graphs[-1].memory.moments)
    assert log.count("triton_") == generated  # what ``fxpass inspect --launches`` says
    _memory_is_what_the_profile_says(handle.graphs[-1].memory, before)
    if STUB:
        assert not spilling()


def _memory_is_what_the_profile_says(profile, before: int) -> None:
    """The allocator is the real one: what it held at most is no more than the program's profile says."""
    assert not profile.missing
    added = torch.cuda.max_memory_allocated() - before
    # every allocation is rounded up to 512 bytes, which can move the peak to where more small tensors live
    rounding = 2 * 512 * len(profile.peak.live)
    assert added <= profile.transient + rounding
