"""What a pass is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from ..ir.edit import Editor
from ..ir.graph import StepGraph


@dataclass(frozen=True)
class GraphPass(ABC):
    """One rewrite of the step graph. Its fields are its options; it keeps no state.

    ``run`` makes all its changes through the editor, and calls
    ``edit.decline(reason)`` for what it leaves alone.
    """

    name: ClassVar[str]

    @abstractmethod
    def run(self, step: StepGraph, edit: Editor) -> None:
        """Rewrite ``step`` in place."""

    @property
    def summary(self) -> str:
        """The first line of the pass's docstring."""
        return (type(self).__doc__ or "").strip().splitlines()[0]
