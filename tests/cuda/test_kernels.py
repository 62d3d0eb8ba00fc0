"""Every kernel of a step, compiled for the capability that this run was started with."""

from __future__ import annotations

import pytest
import torch

from tests.cuda.device import STUB, compiled_kernels
from tests.cuda.models import Training

MOST_REGISTERS = 255  # per thread: what a kernel that spills has reached


@pytest.mark.parametrize(("model", "dtype"), [("conv net", "float16"), ("bert", "bfloat16")])
def test_kernels_do_not_spill(model: str, dtype: str) -> None:
    training = Training(model)
    step, _ = training.compiled({"max_norm": 1.0, "dtype": dtype})
    step(*training.batch)
    kernels = compiled_kernels()
    major, minor = torch.cuda.get_device_capability()
    assert kernels
    assert {kernel.capability for kernel in kernels} == {10 * major + minor}
    assert not [kernel for kernel in kernels if kernel.stack or kernel.registers >= MOST_REGISTERS]
    assert STUB or handle_is_finite(step(*training.batch))


def handle_is_finite(loss: torch.Tensor) -> bool:
    """On a real device the kernels have run, too."""
    return bool(loss.isfinite())
