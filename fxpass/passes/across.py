"""Numbers about this rank's rows of gradients, made numbers about all: for norms and verdicts."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from ..ir.edit import Editor
from ..ir.graph import Phase, tensor
from ..ir.shards import Shard

aten = torch.ops.aten
collectives: Any = torch.ops._c10d_functional
REASON = "of all ranks' rows"


def across(
    edit: Editor, shard: Shard, sums: list[Node], largest: list[Node]
) -> tuple[list[Node], list[Node]]:
    """0-d values of this rank as those of all, equal on each: ``sums`` added up, of ``largest`` the largest.

    One small message, behind the last of the values. Each rank hears the numbers of every other: a
    maximum made on the way would lose nan (gloo's does).
    """

    def call(target: Any, *args: Any) -> Node:
        return edit.call(target, *args, when=Phase.CHECK, reason=REASON)

    values = [*sums, *largest]
    with edit.after(edit.last(values)):
        wide = [edit.cast(value, torch.float64, when=Phase.CHECK, reason=REASON) for value in values]
        sent = call(aten.stack.default, wide)
        started = call(collectives.all_gather_into_tensor.default, sent, shard.ranks, shard.group)
        heard = call(collectives.wait_tensor.default, started)
        heard = call(aten.view.default, heard, [shard.ranks, len(values)])
        total, top = call(aten.sum.dim_IntList, heard, [0]), call(aten.amax.default, heard, [0])
        results = []
        for i, value in enumerate(values):
            one = call(aten.select.int, total if i < len(sums) else top, 0, i)
            results.append(edit.cast(one, tensor(value).dtype, when=Phase.CHECK, reason=REASON))
    return results[: len(sums)], results[len(sums) :]
