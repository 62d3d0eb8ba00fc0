"""What the Dynamo hooks saw while one frame was traced: plain data, no Dynamo types."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import torch

from ..errors import FxpassError
from ..ir.slots import Slot


@dataclass
class LeafGrad:
    """One gradient leaving one ``backward()``: which leaf it belongs to."""

    backward: int | None  # by its SEED mark; None: no backward() with a scale led to it
    leaf: str  # name of the leaf's placeholder in Dynamo's graph


@dataclass
class StepParam:
    """One parameter of an optimizer at the moment ``step()`` was traced."""

    slot: Slot  # without a name: it is known when the whole frame has been traced
    node: str  # its placeholder in Dynamo's graph
    read: int | None  # the READ mark of its gradient; None: it has none


@dataclass
class StepEvent:
    """One ``optimizer.step()`` call of the frame."""

    index: int
    number: int  # of the optimizer, as in its slots
    optimizer: weakref.ref[torch.optim.Optimizer]
    params: list[StepParam]
    dynamic: list[Slot]  # settings passed as tensors, or set by the step
    where: str
    counters: dict[Slot, Any]  # numbers that its step keeps in groups and attributes, and their start

    def live(self) -> torch.optim.Optimizer:
        """The optimizer object; Dynamo guards on its identity, so it is alive when this is called."""
        optimizer = self.optimizer()
        assert optimizer is not None, "the optimizer of a compiled step was garbage collected"
        return optimizer


@dataclass(frozen=True)
class Change:
    """What makes a call of a frame another one than the graph that ran last is for."""

    guard: str  # in Dynamo's words
    text: str  # in the user's
    where: str  # line of the user's that needs to know


@dataclass
class FrameRecord:
    """Everything the hooks learnt from one frame."""

    backend: Any
    code: CodeType | None = None
    count: Callable[[torch.optim.Optimizer, int], dict[Slot, Any]] = lambda *_: {}
    limit: int = 8  # how often one code may be compiled for the same objects: torch's setting
    graph: weakref.ref[torch.fx.Graph] | None = None  # that Dynamo writes
    changed: Change | None = None  # since the graph that ran last, if the frame was compiled before
    backwards: list[str] = field(default_factory=list)  # user line of each backward()
    leaf_grads: list[LeafGrad] = field(default_factory=list)
    reached: bool = False  # a backward() led to a leaf
    reads: int = 0  # READ marks: gradients that an optimizer reads
    optimizers: list[weakref.ref[torch.optim.Optimizer]] = field(default_factory=list)  # by their number
    events: list[StepEvent] = field(default_factory=list)
    kept: list[tuple[str, str]] = field(default_factory=list)  # (parameter node, gradient node)
    cleared: set[str] = field(default_factory=set)  # parameter nodes whose .grad ends as None
    escaping: dict[str, str] = field(
        default_factory=dict
    )  # leaf -> its gradient, which leaves without a step
    earlier_grads: dict[str, str] = field(
        default_factory=dict
    )  # leaf -> what its .grad held before the first backward()
    # as they were met, outermost first, each with the expression that reached it
    modules: list[tuple[str, torch.nn.Module]] = field(default_factory=list)
    real: dict[str, Any] = field(default_factory=dict)  # placeholder -> the optimizer's parameter
    hooked: list[tuple[Any, Any]] = field(default_factory=list)  # handle -> node of a tensor of the step's
    unhooked: list[Any] = field(default_factory=list)  # nodes whose hook has been removed
    traversed: set[Any] = field(default_factory=set)  # nodes of autograd that a backward() went through
    replicas: dict[int, Any] = field(default_factory=dict)  # id of a DistributedDataParallel -> Replica
    replicated: dict[int, Any] = field(default_factory=dict)  # id of a parameter -> its Replica
    owed: set[str] = field(default_factory=set)  # leaves whose .grad is this rank's alone: no_sync()
    toggled: dict[Any, Any] = field(default_factory=dict)  # variable of a parameter -> its graph input
    set_up: list[Any] = field(default_factory=list)  # calls made while tracing
    told: list[Any] = field(default_factory=list)  # calls to make when the graph has run, in order
    by_attributes: dict[int, tuple[Any, Any]] = field(default_factory=dict)  # id -> object, source
    dicts: dict[int, str] = field(default_factory=dict)  # id -> the line that reads it
    unseen: str = ""  # line of a call for later that may read and change anything
    settled: str = ""  # line of a call for later that changes what optimizers read
    declined: dict[Any, str] = field(default_factory=dict)  # branch on data -> why not both sides
    forking: list[Any] = field(default_factory=list)  # branches whose sides are being traced
    selected: list[tuple[torch.Tensor, str]] = field(default_factory=list)  # what joins sides, and its line
    consumed: set[str] = field(default_factory=set)  # outputs whose graph backward() consumed
    break_reason: str = ""
    break_where: str = ""
    broke: Exception | None = None  # the last graph break, by which Dynamo has started anew
    break_inside: bool = False  # in a function that the frame calls
    given_up: bool = False  # Dynamo leaves the frame uncompiled
    will_train: bool = False  # a backward comes in what Dynamo leaves uncompiled
    error: FxpassError | None = None
    at_end: list[Callable[[], None]] = field(default_factory=list)  # calls for when the frame is compiled

    def number_of(self, optimizer: torch.optim.Optimizer) -> int:
        """What tells the optimizer from the others of the frame, in slots."""
        known = [number for number, ref in enumerate(self.optimizers) if ref() is optimizer]
        if not known:
            self.optimizers.append(weakref.ref(optimizer))
        return known[0] if known else len(self.optimizers) - 1

    def counters_of(self, optimizer: torch.optim.Optimizer) -> dict[Slot, Any]:
        """What the optimizer's step counts with in groups and attributes, and what each starts from."""
        return self.count(optimizer, self.number_of(optimizer))

    def counts(self) -> tuple[int, ...]:
        """How much was seen of what has an effect when the graph has run."""
        seen = (self.backwards, self.events, self.told, self.set_up, self.kept, self.cleared, self.toggled)
        return (*map(len, seen), self.reads)

    def restart(self) -> None:
        """Forget what was seen: Dynamo traces the frame again from its start."""
        kept = FrameRecord(self.backend, self.code, self.count, self.limit, error=self.error)
        kept.changed = self.changed
        kept.set_up, kept.broke, kept.declined = self.set_up, self.broke, self.declined
        for call in kept.set_up:
            call.shown = call.entered = False
        vars(self).update(vars(kept))
