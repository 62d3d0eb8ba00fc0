"""What the ranks tell each other while they compile: what each will reduce, or that it can't.

Written for torch 2.11 to 2.13. All goes through the store that set up the processes, so that no
collective of a step gets mixed up with it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from itertools import zip_longest
from typing import Any

from torch import distributed

_PAUSE = 0.02  # seconds between two looks at the store
_WITHDRAWN = "fxpass/withdrawn"
_counts: Counter[str] = Counter()  # plans compared, by process group; attempts given up


def agree(plan: Sequence[str], group: Any) -> str:
    """Tell the other ranks of a group what this one will reduce, and hear what they will.

    Returns what differs, or why another one has no plan; empty if all go on.
    """
    from torch.distributed import distributed_c10d as c10d  # not in every build of torch

    store, rank = c10d._get_default_store(), distributed.get_rank()
    ranks = distributed.get_process_group_ranks(c10d._resolve_process_group(group))
    key = f"fxpass/plan/{group}/{_counts[group]}"
    own = "\n".join(plan)
    store.delete_key(f"{_WITHDRAWN}/{rank}")
    store.set(f"{key}/{rank}", own)
    for other in ranks:
        if reason := _withdrawn(store, f"{key}/{other}", other):
            store.delete_key(f"{key}/{rank}")
            return f"rank {other} has none: {reason}"
    _counts[group] += 1
    for other in ranks:
        theirs = store.get(f"{key}/{other}").decode()
        if theirs != own:
            pairs = zip_longest(plan, theirs.split("\n"), fillvalue="nothing")
            here, there = next((a, b) for a, b in pairs if a != b)
            return f"rank {rank} reduces {here} where rank {other} reduces {there}"
    return ""


def withdraw(error: Exception) -> None:
    """Tell the ranks that wait for this one's plan that there is none: its step could not be compiled.

    A store that is gone (the process that kept it has ended) raises nothing: ``error`` is what the
    user has to read, and the others see for themselves that the store is gone.
    """
    if distributed.is_available() and distributed.is_initialized():
        from torch.distributed import distributed_c10d as c10d

        attempt, text = _counts[_WITHDRAWN], str(error).split("\n", 1)[0]
        _counts[_WITHDRAWN] += 1
        with suppress(distributed.DistError):
            c10d._get_default_store().set(f"{_WITHDRAWN}/{distributed.get_rank()}", f"{attempt} {text}")


def _withdrawn(store: Any, plan: str, rank: int) -> str:
    """Wait until a rank has said what its plan is; why it has none, or empty.

    An attempt that this rank has given up, too, is over: what was said of it is not meant.
    """
    failed, deadline = f"{_WITHDRAWN}/{rank}", time.monotonic() + store.timeout.total_seconds()
    while not store.check([plan]):
        if store.check([failed]):
            attempt, _, text = store.get(failed).decode().partition(" ")
            if int(attempt) >= _counts[_WITHDRAWN]:
                return text
        if time.monotonic() > deadline:
            return f"it said nothing for {store.timeout}"
        time.sleep(_PAUSE)
    return ""
