"""Which kernels of a step Inductor may join in one launch (its combo kernels): those whose place is free.

Written for torch 2.11 to 2.13, against the hook that chooses the groups.

A joined kernel allocates at once what its members would have allocated one
after the other, and runs when the last of them may. Inductor would join all
that is equally deep in the graph, such as the casts of all weights. Here only
neighbours are joined, kernels with no library call between them: a product's
operands are still made right before it, and a gradient still dies at its
update. What follows the last library call is one neighbourhood: with a verdict
over all gradients, that is every update. So small numbers that are read there
alone, the sums and magnitudes of gradients, wait for it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch._inductor import config as inductor_config
from torch._inductor.codegen import triton_combo_kernel
from torch._inductor.scheduler import (
    BaseSchedulerNode,
    ExternKernelSchedulerNode,
    ForeachKernelSchedulerNode,
    Scheduler,
)
from torch._inductor.virtualized import V

JOINED = 64  # kernels in one launch: each block asks which of them it belongs to
Users = dict[BaseSchedulerNode, list[BaseSchedulerNode]]
SMALL = 2**14  # bytes that may wait: a row of partial sums, not a gradient


@contextmanager
def join_neighbours() -> Iterator[None]:
    """Join what ``neighbours`` says, wherever ``combo_kernels`` is on."""
    group = mock.patch.object(
        ForeachKernelSchedulerNode, "group_algorithm_for_combo_kernels", staticmethod(neighbours)
    )
    # large loops are kept apart by default; but a launch for each weight is what is to be saved
    large = mock.patch.object(triton_combo_kernel, "LARGE_NUMELS", float("inf"))
    with group, large:
        yield


def neighbours(scheduler: Scheduler) -> list[list[BaseSchedulerNode]]:
    """Groups of kernels to join, in the order in which the graph computes them.

    A place is (library calls before it, kernels that have to follow before the
    next one). Along a dependency it only advances, so that no two groups wait
    for each other; and a weight's cast stays next to its product.
    """
    nodes = list(scheduler.nodes)
    users = _users(nodes)
    section = _sections(nodes, users)
    left: dict[BaseSchedulerNode, int] = {}
    places: dict[tuple[int, int, bool, str], list[BaseSchedulerNode]] = defaultdict(list)
    for node in reversed(nodes):
        near = [left[user] for user in users[node] if section[user] == section[node]]
        left[node] = max(near, default=-1) + 1
        device = node.get_device()
        if device is not None and device.type != "cpu" and not isinstance(node, ExternKernelSchedulerNode):
            # loops and reductions would be two kernels all the same, with the memory of both
            places[section[node], -left[node], node.is_reduction(), str(device)].append(node)
    groups = [group[::-1] for _, group in sorted(places.items())]
    return [group[i : i + JOINED] for group in groups for i in range(0, len(group), JOINED)]


def _users(nodes: list[BaseSchedulerNode]) -> Users:
    """Who has to run after each node."""
    writer = {name: node for node in nodes for name in node.get_buffer_names()}
    users: Users = {node: [] for node in nodes}
    for node in nodes:
        for other in {writer[dep.name] for dep in node.unmet_dependencies if dep.name in writer} - {node}:
            users[other].append(node)
    return users


def _sections(nodes: list[BaseSchedulerNode], users: Users) -> dict[BaseSchedulerNode, int]:
    """How many library calls come before each node; small ones that only the end reads are put there."""
    section: dict[BaseSchedulerNode, int] = {}
    calls = 0
    for node in nodes:
        calls += isinstance(node, ExternKernelSchedulerNode)
        section[node] = calls
    for node in reversed(nodes):
        waits = users[node] and all(section[user] == calls for user in users[node])
        if section[node] < calls and waits and _is_small(node):
            section[node] = calls
            node.min_order += len(nodes)
            node.max_order += len(nodes)
    return section


def _is_small(node: BaseSchedulerNode) -> bool:
    """Whether a kernel can wait at no cost: it writes nothing in place and keeps few bytes alive."""
    if (
        isinstance(node, ExternKernelSchedulerNode)
        or node.has_side_effects()
        or node.has_aliasing_or_mutation()
    ):
        return False
    return sum(map(_bytes, _read(node))) + _allocated(node) <= SMALL


def _read(node: BaseSchedulerNode) -> list[str]:
    """The buffers a node reads that the step computes."""
    names = {dep.name for dep in node.read_writes.reads}
    return [
        name for name in names if name in node.scheduler.name_to_buf and name not in node.get_buffer_names()
    ]


def _allocated(node: BaseSchedulerNode) -> int:
    """Bytes of what a node writes that is not written in place and is read by others."""
    own = set(node.get_operation_names())
    return sum(
        _bytes(buffer.get_name())
        for buffer in node.get_outputs()
        if not buffer.get_mutations() and any(user.get_name() not in own for user in buffer.users)
    )


def _bytes(name: str) -> int:
    buffer = V.graph.get_buffer(name)
    if buffer is None:
        return 0
    try:
        size = V.graph.sizevars.optimization_hint(buffer.get_numel(), fallback=SMALL)
    except NotImplementedError:  # of a call without a result
        return 0
    return int(size) * buffer.get_dtype().itemsize


def combo_settings() -> dict[str, Any]:
    """Inductor's settings for joined kernels, those that this torch has."""
    wanted = {
        "combo_kernels": True,
        "combo_kernel_max_num_nodes": JOINED,
        "combo_kernel_peak_memory_pct_threshold": None,  # asked of each group, at an estimate that is off
    }
    known = inductor_config.get_config_copy()
    return {name: value for name, value in wanted.items() if name in known}
