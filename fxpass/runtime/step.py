"""Runs a compiled step: fetches the live tensors it needs, puts gradients where the user looks."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import _torch
from .report import Reporter
from .state import ScalerState
from .watch import Watch


@dataclass
class OptimizerBinding:
    """What one ``optimizer.step()`` of the graph reads: state in input order, then one lr per group."""

    optimizer: Callable[[], Optimizer]
    state: Sequence[tuple[int, int, str]]  # (group, position, key)
    fit: Callable[[Optimizer], None]  # brings state of another origin into the form the graph reads
    holds: Callable[[Optimizer], None]  # raises if something that the graph assumes has changed
    known: list[Tensor] = field(default_factory=list)  # the state tensors of the last call
    lr: list[Tensor] = field(default_factory=list)
    lr_values: list[float] = field(default_factory=list)

    def inputs(self, device: torch.device) -> list[Tensor]:
        """The live tensors, looked up anew: ``load_state_dict`` replaces them."""
        optimizer = self.optimizer()
        self.holds(optimizer)
        tensors = self._read(optimizer)
        if len(tensors) != len(self.known) or any(map(operator.is_not, tensors, self.known)):
            self.fit(optimizer)
            tensors = self.known = self._read(optimizer)
        return tensors + self._learning_rates(optimizer.param_groups, device)

    def _read(self, optimizer: Optimizer) -> list[Any]:
        groups, state = optimizer.param_groups, optimizer.state
        return [state.get(groups[g]["params"][p], {}).get(key) for g, p, key in self.state]

    def _learning_rates(self, groups: list[dict[str, Any]], device: torch.device) -> list[Tensor]:
        values = [0.0 if group.get("lr") is None else group["lr"] for group in groups]
        if not self.lr:
            self.lr = [torch.zeros((), dtype=torch.float64, device=device) for _ in values]
            self.lr_values = [float("nan")] * len(values)
        for index, value in enumerate(values):
            if isinstance(value, Tensor):
                self.lr[index].copy_(value.reshape(()))
                self.lr_values[index] = float("nan")  # unknown: no number equals it
            elif value != self.lr_values[index]:
                self.lr[index].fill_(value)
                self.lr_values[index] = value
        return self.lr


@dataclass
class CompiledStep:
    """One compiled graph of a step, callable with Dynamo's inputs."""

    call: Callable[..., Any]
    scaler: ScalerState
    bindings: list[OptimizerBinding]
    device: torch.device
    outputs: int
    kept: list[int]  # inputs whose .grad receives the outputs after the first `outputs`
    cleared: list[tuple[int, int, int]]  # (binding, group, position) of parameters whose .grad becomes None
    drop_grads: bool
    watch: Watch | None
    reporter: Reporter
    holds: Callable[[], None]  # raises if what the capture took for granted has changed

    def __call__(self, *args: Any) -> Any:
        self.holds()
        extras: list[Tensor] = []
        if self.bindings:
            self.scaler.to(self.device)
            extras += [self.scaler.tensors[name] for name in self.scaler.fields]
            if self.watch is not None:
                extras += [self.watch.table, self.watch.report]
        for binding in self.bindings:
            extras += binding.inputs(self.device)
        results = self.call(*args, *extras)
        self._place_grads(args, results[self.outputs :])
        for binding in self.bindings:
            _torch.note_step(binding.optimizer())
        if self.watch is not None:
            self.reporter.step(self.watch.report, self.watch.names)
        return results[: self.outputs]

    def _place_grads(self, args: Sequence[Any], grads: Sequence[Tensor]) -> None:
        for position, grad in zip(self.kept, grads, strict=True):
            args[position].grad = _as_eager(grad, args[position])
        for binding, group, position in self.cleared:
            self.bindings[binding].optimizer().param_groups[group]["params"][position].grad = None
        if self.drop_grads:
            for binding in self.bindings:
                for group in binding.optimizer().param_groups:
                    for param in group["params"]:
                        if param.grad is not None:
                            param.grad = None


def _as_eager(grad: Tensor, param: Tensor) -> Tensor:
    """``grad`` as autograd would leave it: no view, and laid out like its parameter."""
    if grad.stride() != param.stride():
        return torch.empty_like(param, dtype=grad.dtype, requires_grad=False).copy_(grad)
    return grad.data
