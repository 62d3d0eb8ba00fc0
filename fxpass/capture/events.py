"""What each ``optimizer.step()`` of a frame reads and replaces, as slots: made here, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .. import _torch
from ..ir.slots import Slot
from .assumptions import Assumptions
from .optim_state import Habits


@dataclass
class Event:
    """One ``optimizer.step()``."""

    index: int
    number: int  # of the optimizer, as in its slots
    optimizer: Callable[[], Optimizer]
    params: dict[Slot, str]  # those that have a gradient, each with its placeholder in Dynamo's graph
    reads: dict[Slot, int]  # by parameter, the READ mark of its gradient
    without: dict[Slot, str]  # parameters without a gradient, likewise
    lr: list[Slot]  # one for each param group
    dynamic: list[Slot]  # settings that Dynamo's graph computes, in the order of the node's arguments
    where: str
    backwards: int = 0  # what comes before it: calls of backward() and of others that take scaled gradients
    # what it adds to the graph's inputs, beside what an earlier step() of the optimizer has added
    state: dict[Slot, Tensor] = field(default_factory=dict)  # each with its form: see optim_state.state_of
    settings: list[Slot] = field(default_factory=list)
    counters: dict[Slot, Any] = field(default_factory=dict)  # numbers it keeps, with what they start from
    habits: Habits = field(default_factory=Habits)
    assumed: Assumptions | None = None  # known when the update is traced

    @property
    def all_params(self) -> dict[Slot, str]:
        """Every parameter of the optimizer, with its placeholder."""
        return {**self.params, **self.without}

    @property
    def inputs(self) -> list[Slot]:
        """What the runtime fetches for it, in the order of the graph's inputs: state, then settings."""
        return [*self.state, *self.settings]


def events_of(record: _torch.FrameRecord, names: Mapping[str, str]) -> list[Event]:
    """The events of a frame; ``names`` are the user's, by Dynamo input."""
    return [_event(traced, names) for traced in record.events]


def _event(traced: _torch.StepEvent, names: Mapping[str, str]) -> Event:
    nodes: dict[Slot, str] = {}
    reads: dict[Slot, int] = {}
    for param in traced.params:
        slot = param.slot
        name = names.get(param.node) or f"parameter {slot.position} of param group {slot.group}"
        slot = replace(slot, name=name)
        nodes[slot] = param.node
        if param.read is not None:
            reads[slot] = param.read
    rates = [Slot(traced.number, g, key="lr") for g in range(len(traced.live().param_groups))]
    return Event(
        index=traced.index,
        number=traced.number,
        optimizer=traced.live,
        params={slot: node for slot, node in nodes.items() if slot in reads},
        reads=reads,
        without={slot: node for slot, node in nodes.items() if slot not in reads},
        lr=[lr for lr in rates if lr not in traced.counters],
        dynamic=traced.dynamic,
        where=traced.where,
        counters=traced.counters,
    )
