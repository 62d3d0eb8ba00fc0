"""Does an update compute each element from that element alone? Only then may a rank update its own rows."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from ..errors import OptimizerError
from ..ir.graph import Phase, StepGraph, phase, tensor
from ..ir.marks import MARK
from ..ir.sizes import same_shape
from .cost import is_pointwise
from .homogeneous import reads_values
from .policy import op_name

_SAME = frozenset("copy detach alias".split())
# "Was there a step before?", which capture asks of a momentum: the answer is that of any of its rows.
_ALIKE = "all"


def check_by_element(step: StepGraph, optimizers: Sequence[tuple[str, str]]) -> None:
    """Raise ``OptimizerError`` for an update of some rows that reads more than the element it is about.

    ``optimizers``: class name and user line of each ``optimizer.step()``.
    """
    values = {node for slot, node in step.slots.items() if step.part(slot.owner) and tensor(node).ndim}
    values |= {read.mark for read in step.reads if step.part(read.slot)}
    if not values:
        return
    wrong: Node | None = None
    for node in step.graph.nodes:
        read = [value for value in node.all_input_nodes if value in values]
        if phase(node) is not Phase.UPDATE or not read or not reads_values(node):
            continue
        if not _by_element(node, read):
            wrong = node
            break
        if op_name(node.target) != _ALIKE:
            values.add(node)
    if wrong is None:
        return
    name, where = (
        next(iter(optimizers)) if len(optimizers) == 1 else (", ".join(n for n, _ in optimizers), "")
    )
    hint = (
        "use one that treats each element alone (torch.optim.AdamW, SGD), "
        "or data_parallel=mesh in the place of fxpass.shard_"
    )
    what = op_name(wrong.target)
    found = f"{name}.step() computes {what} of a whole parameter, of which each rank has some rows"
    raise OptimizerError(found, where=where, hint=hint)


def _by_element(node: Node, read: list[Node]) -> bool:
    if op_name(node.target) == _ALIKE:
        return True
    known = node.target is MARK or is_pointwise(node) or op_name(node.target) in _SAME
    return known and all(same_shape(tensor(other), tensor(node)) for other in read)
