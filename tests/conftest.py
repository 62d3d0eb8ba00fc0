"""Every test starts with no compiled code and the same random numbers, and compiles anew."""

from __future__ import annotations

from collections import Counter
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


@pytest.hookimpl(tryfirst=True)  # before -m is looked at
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of the rows of a test marked ``breadth``, every sixth (n-th) is in `make test`; the others are slow."""
    seen: Counter[str] = Counter()
    for item in items:
        if mark := item.get_closest_marker("breadth"):
            test = item.nodeid.partition("[")[0]
            every = mark.args[0] if mark.args else 6
            if seen[test] if every == "first" else seen[test] % every:
                item.add_marker(pytest.mark.slow)
            seen[test] += 1
