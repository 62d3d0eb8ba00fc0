"""Small arithmetic on the scaler's inputs at the end of a step."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from ..ir.edit import Editor
from ..ir.graph import Phase, StepGraph

aten = torch.ops.aten


class Writer:
    """Small arithmetic on the scaler's inputs, for the passes that end a step."""

    def __init__(self, step: StepGraph, edit: Editor, when: Phase, reason: str) -> None:
        self.step, self.edit, self.when, self.reason = step, edit, when, reason
        self.read = step.scaler  # a field's value before the step
        self.written: dict[str, Node] = {}

    def op(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """``Editor.call`` in the phase of the pass, for its reason."""
        return self.edit.call(target, *args, when=self.when, reason=self.reason, **kwargs)

    def cast(self, value: Node, dtype: torch.dtype) -> Node:
        """``Editor.cast`` likewise."""
        return self.edit.cast(value, dtype, when=self.when, reason=self.reason)

    def select(self, condition: Node, yes: object, no: object) -> Node:
        """``where``; a Python number takes the other side's dtype."""
        if isinstance(yes, Node) and isinstance(no, Node):
            return self.op(aten.where.self, condition, yes, no)
        target = aten.where.ScalarSelf if isinstance(no, Node) else aten.where.ScalarOther
        return self.op(target, condition, yes, no)

    def zero(self, field: str) -> Node:
        """0, of a field's dtype, where the field is."""
        return self.op(aten.mul.Tensor, self.read[field], 0)

    def write(self, field: str, value: Node) -> None:
        """Make ``value`` the scaler's ``field`` after the step, once ``flush`` is called."""
        self.written[field] = value

    def flush(self) -> None:
        """Copy what was written into the scaler's inputs: to be called when nothing reads them any more."""
        for field, value in self.written.items():
            self.op(aten.copy_.default, self.read[field], value)
