"""Every kernel of a step, compiled for the capability that this run was started with."""

from __future__ import annotations

import pytest
import torch

from tests.cuda.device import STUB, compiled_kernels, spilling
from tests.cuda.models import Training


@pytest.mark.breadth("first")
@pytest.mark.parametrize("model", ["mlp", "bert"])
def test_kernels_do_not_spill(model: str) -> None:
    training = Training(model)
    step, _ = training.compiled({"max_norm": 1.0, "dtype": "bfloat16"})
    loss = step(*training.batch)
    major, minor = torch.cuda.get_device_capability()
    built = {size.capability for sizes in compiled_kernels().values() for size in sizes}
    assert built == {10 * major + minor}
    assert not spilling()
    assert STUB or loss.isfinite()
