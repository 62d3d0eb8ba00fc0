"""What passes leave for later ones: a type per pass, empty where the pass found nothing to do.

A pass names in ``ensures`` what it fills in, in ``requires`` what must have been filled in before it, and in
``uses`` what it looks at where a pass has; the runner holds it to that (pipeline.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch.fx import Node

from ..ir.graph import StepGraph, tensor


class Result:
    """Base of what a pass leaves."""

    def faults(self, step: StepGraph) -> Iterator[str]:
        """What is wrong with it, right behind the pass that has filled it in."""
        yield from ()


@dataclass
class ScaledSeeds(Result):
    """The seeds of backward, scaled: of ``scale_loss``."""

    wide: dict[Node, Node] = field(
        default_factory=dict
    )  # by seed in the loss's dtype: the product in float32

    def faults(self, step: StepGraph) -> Iterator[str]:
        for seed, product in self.wide.items():
            if tensor(product).dtype is not torch.float32:
                yield f"{seed.name} was scaled in {tensor(product).dtype}"


@dataclass
class Reductions(Result):
    """The collectives for gradients and weights: of ``data_parallel`` and ``shard``."""

    buckets: dict[Node, tuple[str, ...]] = field(default_factory=dict)  # by collective: whose it sends

    def plan(self, step: StepGraph) -> dict[str, list[str]]:
        """What is sent, in order, by the name of the process group: the same on every rank, or else."""
        plan: dict[str, list[str]] = {str(node.args[-1]): [] for node in self.buckets}
        for node in step.graph.nodes:
            group = str(node.args[-1]) if node.args else ""
            if node in self.buckets:
                value = node.meta["val"]
                dtype = (value[0] if isinstance(value, (list, tuple)) else value).dtype
                plan[group].append(f"{', '.join(self.buckets[node])} in {dtype}")
        return plan


@dataclass
class Unscaled(Result):
    """The gradients without the scale, as they are read: of ``unscale``."""

    values: set[Node] = field(default_factory=set)  # products with 1/scale


@dataclass
class Checked(Result):
    """The verdicts, and the numbers that each gradient was reduced to: of ``check_finite``."""

    # by optimizer event: a 0-d bool, true if the event must be skipped
    found_inf: dict[int, Node] = field(default_factory=dict)
    gradients: list[Node] = field(default_factory=list)  # GRAD marks, in backward's order
    # by GRAD mark: the 0-d float64 sum of squares, and the 0-d largest magnitude, of the stored gradient
    square_sums: dict[Node, Node] = field(default_factory=dict)
    largest: dict[Node, Node] = field(default_factory=dict)
    # by GRAD mark in float16, of a sample of its elements: how many are below float16's normal numbers,
    # how many of those are zero (both 0-d float32), and the sample's size
    tiny: dict[Node, tuple[Node, Node, int]] = field(default_factory=dict)
    sources: dict[Node, set[Node]] = field(default_factory=dict)  # by READ mark: the GRAD marks behind it
    # by READ mark: the 0-d values whose finiteness decides about its update
    deciding: dict[Node, list[Node]] = field(default_factory=dict)

    @property
    def last(self) -> Node:
        """The verdict over the whole step: that of its last optimizer."""
        return self.found_inf[max(self.found_inf)]

    def faults(self, step: StepGraph) -> Iterator[str]:
        if step.trains and len(self.found_inf) != len(step.backwards_before):
            yield f"{len(self.found_inf)} verdicts for {len(step.backwards_before)} optimizer steps"
        for event, overflow in self.found_inf.items():
            if tensor(overflow).dtype is not torch.bool or tensor(overflow).ndim:
                yield f"the verdict of optimizer step {event} is no single bool"


@dataclass
class GlobalNorm(Result):
    """The norm before clipping: of ``grad_norm``."""

    norm: Node | None = None  # 0-d, float32 (float64 with float64 gradients)
    of: dict[Node, Node] = field(default_factory=dict)  # by READ mark: the value that was read
    norm_type: float = 2.0

    def faults(self, step: StepGraph) -> Iterator[str]:
        if self.norm is not None and tensor(self.norm).ndim:
            yield "the norm is no single number"


@dataclass
class Clipped(Result):
    """Whether gradients were clipped: of the clip passes together."""

    acted: Node | None = None  # a 0-d bool: whether one of them changed a gradient

    def faults(self, step: StepGraph) -> Iterator[str]:
        if self.acted is not None and (tensor(self.acted).dtype is not torch.bool or tensor(self.acted).ndim):
            yield "whether a clip acted is no single bool"


@dataclass
class NextScale(Result):
    """The scale and the counters after the step: of ``update_scale``."""

    written: dict[str, Node] = field(default_factory=dict)  # by scaler input: its value after the step
