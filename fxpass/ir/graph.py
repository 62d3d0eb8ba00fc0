"""The captured training step: one functional ATen graph plus what is known of its values.

What fxpass keeps in the metadata of a node is read here and in ir/provenance.py, and
written by capture and ``Editor`` (ir/edit.py). Roles that live in the middle of
the graph (seeds, gradients, updates) are read off the mark operators (ir/marks.py);
roles of inputs are listed here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeVar

import torch
from torch.fx import GraphModule, Node

from .marks import MARK, SEED
from .shards import Shard
from .slots import Slot

aten = torch.ops.aten
_Left = TypeVar("_Left")

FP32 = "fxpass_fp32"  # autocast is off there
NO_FLASH = "fxpass_no_flash"  # ``sdpa_kernel`` allows no flash attention there


class Phase(str, Enum):
    """When in the step a node runs."""

    INPUT = "input"
    FORWARD = "forward"
    BACKWARD = "backward"
    GRADIENT = "gradient"  # between backward and update: accumulation, the user's own clipping
    CHECK = "check"  # inserted: norms, found_inf, clip coefficient
    UPDATE = "update"
    SCALE = "scale"  # inserted: the scale's own update
    AFTER = "after"  # the user's code after the update, which no later backward or update of the step needs
    OUTPUT = "output"


class Role(str, Enum):
    """What an input of the graph is."""

    PARAMETER = "parameter"
    STATE = "optimizer state"
    LR = "learning rate"
    SCALER = "scaler"
    INPUT = "input"  # data, buffers, frozen weights: everything else


@dataclass(frozen=True)
class Gradient:
    """What leaves a ``backward()``."""

    leaf: Node | None  # the input whose gradient it is, None if it is no input's
    name: str  # of that input, or of another value, in Dynamo's graph
    backward: int | None  # the SEED mark that it comes from; None: nothing scaled led to it


@dataclass(frozen=True)
class Read:
    """A gradient as one ``optimizer.step()`` finds it: the READ mark, and whose gradient it is."""

    mark: Node
    slot: Slot  # the parameter
    event: int


@dataclass(frozen=True)
class Update:
    """A value that one ``optimizer.step()`` replaces: the UPDATE mark, and where the value is kept."""

    mark: Node
    slot: Slot
    event: int


@dataclass
class StepGraph:
    """One training step (or one evaluation) between capture and lowering."""

    gm: GraphModule
    roles: dict[Node, Role] = field(default_factory=dict)
    names: dict[Node, str] = field(default_factory=dict)  # the user's name of an input, e.g. layer.weight
    scaler: dict[str, Node] = field(default_factory=dict)  # scaler input by field name
    # the input that holds a slot's value; of a parameter with two optimizers, both slots have the same one
    slots: dict[Slot, Node] = field(default_factory=dict)
    gradients: dict[Node, Gradient] = field(default_factory=dict)  # by GRAD mark
    reads: list[Read] = field(default_factory=list)
    updates: list[Update] = field(default_factory=list)
    backwards_before: list[int] = field(default_factory=list)  # backward() calls before optimizer event i
    # outputs that are gradients left in .grad for others, each with the .grad it adds to, if there was one
    handed_over: list[tuple[int, Node | None]] = field(default_factory=list)
    shards: dict[Node, Shard] = field(default_factory=dict)  # inputs that are parameters spread over ranks
    outputs: int = 0  # how many outputs are the user's; kept gradients follow them
    # by type, what passes have left for later ones (passes/results.py)
    results: dict[type[Any], Any] = field(default_factory=dict)

    def result(self, kind: type[_Left]) -> _Left:
        """What has been left of this type; to be filled in by the pass that ensures it, empty until then."""
        return self.results.setdefault(kind, kind())

    @property
    def graph(self) -> torch.fx.Graph:
        """For reading; ``Editor`` writes."""
        return self.gm.graph

    def part(self, of: Slot | Node | None) -> Shard | None:
        """How an input, or that of a slot, is spread over ranks that hold different rows; None: it is not."""
        shard = self.shards.get(self.slots[of] if isinstance(of, Slot) else of) if of is not None else None
        return None if shard is None or shard.whole else shard

    @property
    def trains(self) -> bool:
        """Whether an optimizer updates anything here (False for evaluation)."""
        return bool(self.updates)

    def marks(self, role: str) -> list[Node]:
        """The mark nodes of one role, in the order of their index."""
        numbered = self.numbered(role)
        return [numbered[index] for index in sorted(numbered)]

    def numbered(self, role: str) -> dict[int, Node]:
        """The mark nodes of one role by their index."""
        marks = (n for n in self.graph.nodes if n.target is MARK and n.args[1] == role)
        return {int(str(n.args[2])): n for n in marks}

    def inputs(self) -> Iterator[Node]:
        """The placeholders, in order."""
        return (n for n in self.graph.nodes if n.op == "placeholder")

    def nodes(self) -> Iterator[Node]:
        """The computing nodes, in order."""
        return (n for n in self.graph.nodes if n.op == "call_function")


def val(node: Node) -> Any:
    """The fake value of a node: a tensor, a number, or a tuple of them."""
    return node.meta["val"]


def tensor(node: object) -> torch.Tensor:
    """The fake tensor of a single-valued node."""
    assert isinstance(node, Node), f"{node!r} is not a node"
    value = node.meta["val"]
    assert isinstance(value, torch.Tensor), f"{node.name} is not a tensor but {type(value).__name__}"
    return value


def source(node: Node, index: int = 0) -> Node:
    """The node that is argument ``index`` of ``node``."""
    value = node.args[index]
    assert isinstance(value, Node), f"argument {index} of {node.name} is {value!r}, not a node"
    return value


def is_float(node: object) -> bool:
    """Whether a node is one real floating point tensor below float64."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return isinstance(value, torch.Tensor) and value.dtype in (torch.float32, torch.float16, torch.bfloat16)


def seed_losses(step: StepGraph) -> dict[Node, Node | None]:
    """By SEED mark, the loss that its backward() was called on; None if the user gave the gradient."""
    losses: dict[Node, Node | None] = {}
    for mark in step.marks(SEED):
        node: object = mark.args[0]
        while isinstance(node, Node) and node.target in (aten.mul.Tensor, aten._to_copy.default):
            node = node.args[0]
        is_ones = isinstance(node, Node) and node.target is aten.ones_like.default
        loss = node.args[0] if isinstance(node, Node) and is_ones else None
        losses[mark] = loss if isinstance(loss, Node) and loss.op == "call_function" else None
    return losses


def phase(node: Node) -> Phase:
    """When in the step the node runs; capture and the editor keep it."""
    return node.meta["fxpass_phase"]


def is_own(node: Node) -> bool:
    """Whether the node makes a new value for a weight or buffer without autograd: in the user's precision."""
    return bool(node.meta.get("fxpass_own"))


def is_unscaled(node: Node) -> bool:
    """Whether the node computes a gradient that has no loss scale: in float32."""
    return bool(node.meta.get("fxpass_unscaled"))


def is_tagged(node: Node, tag: str) -> bool:
    """Whether the user says how to compute the node: ``FP32`` or ``NO_FLASH``."""
    return bool((node.meta.get("custom") or {}).get(tag))
