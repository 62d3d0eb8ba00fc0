"""Ranks that are not there: a process group in which a step is captured, and nothing is sent.

Written for torch 2.11 to 2.13.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextlib.contextmanager
def fake_ranks(count: int) -> Iterator[Any]:
    """This process as the first of ``count`` ranks, without the others; the group of all of them."""
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield distributed.group.WORLD
    finally:
        distributed.destroy_process_group()
