"""Every test starts with no compiled code and the same random numbers, and compiles anew."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch._functorch.config as functorch_config  # noqa: TID251


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    torch.manual_seed(0)
    with functorch_config.patch(enable_autograd_cache=False):  # tests/test_warm.py: with it
        yield
    torch.compiler.reset()
