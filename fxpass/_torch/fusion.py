"""What Inductor may fuse in a step: only what the graph's order keeps together.

Written for torch 2.11 to 2.13, against the extension point ``V.choices``.

Fusion moves work: a kernel fused with a later one runs later, and what it reads
lives until then. Inductor fuses what reads the same buffers, up to 64 operations
apart. In a step graph that pairs a weight's cast in forward with the one in
backward, and recomputed values of one layer with those of another: products
wait for the last of them, and the graph's careful order is lost.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch._inductor.choices import InductorChoices
from torch._inductor.scheduler import BaseSchedulerNode, ExternKernelSchedulerNode, Scheduler
from torch._inductor.virtualized import V

# A gradient is read by two products, then summed for the bias: that sum may join the kernel which
# makes the gradient. (On a model of 6 layers: one read of each activation gradient less.)
LIBRARY_CALLS_CROSSED = 2


class KeepOrder(InductorChoices):
    """Refuses to fuse two kernels with library calls between them.

    A consumer may join its producer across ``LIBRARY_CALLS_CROSSED`` calls,
    kernels that merely read the same buffers across none.
    """

    @staticmethod
    def can_fuse(
        scheduler: Scheduler, node1: BaseSchedulerNode, node2: BaseSchedulerNode, shared_data_score: int
    ) -> bool:
        allowed = LIBRARY_CALLS_CROSSED if _consumes(node1, node2) else 0
        if _calls_between(scheduler, node1, node2) > allowed:
            return False
        return InductorChoices.can_fuse(scheduler, node1, node2, shared_data_score)


@contextmanager
def keep_order() -> Iterator[None]:
    """Lower with ``KeepOrder`` inside, unless the user has set choices of their own."""
    if type(V.choices) is not InductorChoices:
        yield
        return
    with V.set_choices_handler(KeepOrder()):
        yield


def _consumes(node1: BaseSchedulerNode, node2: BaseSchedulerNode) -> bool:
    return not node2.ancestors.isdisjoint(node1.get_operation_names()) or not node1.ancestors.isdisjoint(
        node2.get_operation_names()
    )


def _calls_between(scheduler: Scheduler, node1: BaseSchedulerNode, node2: BaseSchedulerNode) -> int:
    calls = _library_calls(scheduler)
    first, second = sorted((node1, node2), key=lambda n: n.min_order)
    return abs(bisect.bisect(calls, second.max_order) - bisect.bisect(calls, first.min_order))


def _library_calls(scheduler: Any) -> list[int]:
    """Positions of library calls in the order before fusion, found once per graph."""
    positions = getattr(scheduler, "_fxpass_library_calls", None)
    if positions is None:
        positions = [n.min_order for n in scheduler.nodes if isinstance(n, ExternKernelSchedulerNode)]
        scheduler._fxpass_library_calls = positions
    return positions
