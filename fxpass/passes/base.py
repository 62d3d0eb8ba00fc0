"""What a pass is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from ..ir.edit import Editor
from ..ir.graph import Phase, StepGraph
from .results import Result

aten = torch.ops.aten


@dataclass(frozen=True)
class GraphPass(ABC):
    """One rewrite of the step graph. Its fields are its options; it keeps no state.

    ``run`` makes all its changes through the editor, and calls
    ``edit.decline(reason)`` for what it leaves alone. What it has to say to
    later passes it fills into the result that it ``ensures``.
    """

    name: ClassVar[str]
    requires: ClassVar[tuple[type[Result], ...]] = ()  # left by a pass before it
    uses: ClassVar[tuple[type[Result], ...]] = ()  # if a pass leaves it, then before it
    ensures: ClassVar[tuple[type[Result], ...]] = ()  # what it fills in, be it with nothing

    @abstractmethod
    def run(self, step: StepGraph, edit: Editor) -> None:
        """Rewrite ``step`` in place."""


class Writer:
    """Small arithmetic on the scaler's inputs, for the passes that end a step."""

    def __init__(self, step: StepGraph, edit: Editor, when: Phase, reason: str) -> None:
        self.step, self.edit, self.when, self.reason = step, edit, when, reason
        self.written: dict[str, Node] = {}

    def op(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        return self.edit.call(target, *args, when=self.when, reason=self.reason, **kwargs)

    def cast(self, value: Node, dtype: torch.dtype) -> Node:
        return self.edit.cast(value, dtype, when=self.when, reason=self.reason)

    def select(self, condition: Node, yes: object, no: object) -> Node:
        """``where``; a Python number takes the other side's dtype."""
        if isinstance(yes, Node) and isinstance(no, Node):
            return self.op(aten.where.self, condition, yes, no)
        target = aten.where.ScalarSelf if isinstance(no, Node) else aten.where.ScalarOther
        return self.op(target, condition, yes, no)

    def write(self, field: str, value: Node) -> None:
        """Make ``value`` the scaler's ``field`` after the step, once ``flush`` is called."""
        self.written[field] = value

    def flush(self) -> None:
        """Copy what was written into the scaler's inputs: to be called when nothing reads them any more."""
        for field, value in self.written.items():
            self.op(aten.copy_.default, self.step.scaler[field], value)
