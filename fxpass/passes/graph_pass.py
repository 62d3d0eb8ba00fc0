"""What a pass is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..ir.edit import Editor
from ..ir.graph import StepGraph
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
