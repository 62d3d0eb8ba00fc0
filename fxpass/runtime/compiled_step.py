"""Runs a compiled step: fetches the live tensors it needs, puts gradients where the user looks."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import _torch
from ..ir.slots import Slot
from .reporter import Reporter
from .state import ScalerState
from .watch import REPORT, WATCH, Watch

_NOTHING: dict[str, Any] = {}


@dataclass
class OptimizerBinding:
    """What one ``optimizer.step()`` of the graph reads: state, then settings."""

    optimizer: Callable[[], Optimizer]
    state: Sequence[Slot]  # tensors of the optimizer's own
    settings: Sequence[Slot]  # numbers, each in a tensor made here
    fit: Callable[[Optimizer], None]  # brings state of another origin into the form the graph reads
    holds: Callable[[Optimizer], None]  # raises if something that the graph assumes has changed
    known: list[Tensor] = field(default_factory=list)  # the state tensors of the last call
    parts: list[Tensor] = field(default_factory=list)  # what this rank holds of each
    numbers: list[Tensor] = field(default_factory=list)  # of the settings, 0-d float64
    written: list[float] = field(default_factory=list)  # what they hold

    def inputs(self, device: torch.device) -> list[Tensor]:
        """The live tensors, looked up anew: ``load_state_dict`` replaces them."""
        optimizer = self.optimizer()
        self.holds(optimizer)
        tensors = self._read(optimizer)
        if len(tensors) != len(self.known) or any(map(operator.is_not, tensors, self.known)):
            self.fit(optimizer)
            self.known = self._read(optimizer)
            self.parts = [_torch.part_of(tensor) for tensor in self.known]
        return self.parts + self._numbers(optimizer, device)

    def _read(self, optimizer: Optimizer) -> list[Any]:
        """The state, by parameter: hashing a tensor is what costs here."""
        if self._places is None:
            return [slot.read(optimizer) for slot in self.state]
        groups, state, values = optimizer.param_groups, optimizer.state, []
        for group, position, keys in self._places:
            own = state.get(groups[group]["params"][position], _NOTHING)
            values += [own.get(key) for key in keys]
        return values

    @cached_property
    def _places(self) -> list[tuple[int, int, list[str]]] | None:
        """The slots of the state, in order, as group and position of a parameter with its keys.

        None if there are others among them.
        """
        places: list[tuple[int, int, list[str]]] = []
        for slot in self.state:
            if slot.group is None or slot.position is None or slot.key is None or slot.item is not None:
                return None
            if not places or places[-1][:2] != (slot.group, slot.position):
                places.append((slot.group, slot.position, []))
            places[-1][2].append(slot.key)
        return places

    def _numbers(self, optimizer: Optimizer, device: torch.device) -> list[Tensor]:
        if not self.numbers:
            self.numbers = [torch.zeros((), dtype=torch.float64, device=device) for _ in self.settings]
            self.written = [float("nan")] * len(self.settings)
        for index, slot in enumerate(self.settings):
            value = slot.read(optimizer)
            if isinstance(value, Tensor):
                self.numbers[index].copy_(value.reshape(()))
                self.written[index] = float("nan")  # unknown: no number equals it
                continue
            value = 0.0 if value is None else value
            if value != self.written[index]:
                self.numbers[index].fill_(value)
                self.written[index] = value
        return self.numbers


def fields_of(scaler: ScalerState) -> list[str]:
    """What each tensor is that a graph with an optimizer reads of the scaler and the watch."""
    return [*scaler.fields, WATCH, REPORT]


@dataclass
class Extras:
    """What a graph reads beyond Dynamo's inputs: the scaler and the watch, then what each binding has.

    In that order, which is that of the graph's inputs.
    """

    scaler: ScalerState
    watch: Watch | None  # None: no optimizer steps, and nothing is read
    device: torch.device
    bindings: list[OptimizerBinding] = field(default_factory=list)

    def tensors(self) -> list[Tensor]:
        """The live tensors."""
        if self.watch is None:
            return []
        self.scaler.to(self.device)
        live = [self.scaler.tensors[name] for name in self.scaler.fields]
        live += [self.watch.table, self.watch.report]
        for binding in self.bindings:
            live += binding.inputs(self.device)
        return live


@dataclass
class CompiledStep:
    """One compiled graph of a step, callable with Dynamo's inputs."""

    call: Callable[..., Any]
    extras: Extras
    optimizers: Mapping[int, Callable[[], Optimizer]]  # by their number in slots
    outputs: int
    numbers: list[int]  # outputs that the caller gets as Python numbers
    kept: list[Slot]  # parameters whose .grad receives the outputs after the first `outputs`
    cleared: list[Slot]  # parameters whose .grad becomes None
    dropped: list[Slot]  # of those whose .grad becomes None if there is one
    reporter: Reporter
    holds: Callable[[], None]  # raises if what the capture took for granted has changed
    parts: list[int] = field(default_factory=list)  # inputs of which the graph reads this rank's part

    def __call__(self, *args: Any) -> Any:
        self.holds()
        if self.parts:
            inputs = list(args)
            for index in self.parts:
                inputs[index] = _torch.part_of(inputs[index])
            args = tuple(inputs)
        results = self.call(*args, *self.extras.tensors())
        self._place_grads(results[self.outputs :])
        for binding in self.extras.bindings:
            _torch.note_step(binding.optimizer())
        if (watch := self.extras.watch) is not None and watch.columns:  # else no pass writes a report
            self.reporter.step(watch.report, watch.columns)
        outputs = list(results[: self.outputs])
        for index in self.numbers:
            outputs[index] = outputs[index].item()
        return outputs

    def _place_grads(self, grads: Sequence[Tensor]) -> None:
        for slot, grad in zip(self.kept, grads, strict=True):
            param = self._read(slot)
            param.grad = _as_eager(grad, param)
        for optimizer, places in self._without:
            groups = optimizer().param_groups
            for group, position in places:
                param = groups[group]["params"][position]
                if param.grad is not None:
                    param.grad = None

    @cached_property
    def _without(self) -> list[tuple[Callable[[], Optimizer], list[tuple[Any, Any]]]]:
        """The parameters whose ``.grad`` ends as None: group and position, by optimizer."""
        slots = dict.fromkeys([*self.cleared, *self.dropped])
        return [
            (optimizer, [(s.group, s.position) for s in slots if s.optimizer == number])
            for number, optimizer in self.optimizers.items()
        ]

    def _read(self, slot: Slot) -> Tensor:
        return slot.read(self.optimizers[slot.optimizer]())


def _as_eager(grad: Tensor, param: Tensor) -> Tensor:
    """``grad`` as autograd would leave it: no view, and laid out like its parameter."""
    if grad.stride() != param.stride():
        return torch.empty_like(param, dtype=grad.dtype, requires_grad=False).copy_(grad)
    return grad.data
