"""What a legal step graph looks like; run after every pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch.fx import Graph, Node
from torch.utils._pytree import tree_flatten, tree_map_only

from ..errors import VerifyError
from .alias import hazards
from .graph import Phase, StepGraph, phase, tensor
from .sizes import same_shape
from .unbacked import recompute

aten = torch.ops.aten
Fail = Callable[[Node, str], VerifyError]
VERIFIED = ("val", "fxpass_phase", "fxpass_origin")  # what is looked at of a node's metadata


def verify(step: StepGraph, pass_name: str, touched: Iterable[Node] = ()) -> None:
    """Raise ``VerifyError`` unless the graph is well-formed.

    Every node has a value, a phase and, if inserted, an origin; nothing is used
    before it is computed; each input is written at most once; an optimizer's
    value has the dtype of what it replaces; nothing reads a storage of the
    user's after the write that ends its old value; and each node in ``touched``
    has the value its inputs give.
    """

    fail = failure(f"pass {pass_name!r}")
    seen: set[Node] = set()
    written: set[Node] = set()
    for node in step.graph.nodes:
        for source in node.all_input_nodes:
            if source not in seen:
                raise fail(node, f"{source.name} is used before it is computed")
        seen.add(node)
        _check_metadata(node, fail)
        if node.target is aten.copy_.default:
            _check_write(node, written, fail)
    check_hazards(step.graph, fail)
    for node in touched:
        if node.op == "call_function" and node in seen and phase(node) is not Phase.OUTPUT:
            _check_value(node, fail)


def failure(who: str) -> Fail:
    """Makes the error that says what ``who`` did to a node."""

    def fail(node: Node, what: str) -> VerifyError:
        hint = "this is a bug of fxpass, please report it; verify=False runs the graph all the same"
        return VerifyError(f"{who} broke the graph at {node.format_node()}: {what}", hint=hint)

    return fail


def check_hazards(graph: Graph, fail: Fail) -> None:
    """Raise unless every read of an input sees the value that the input had when the step began."""
    for hazard in hazards(graph):
        write = hazard.write
        what = f"{hazard.value.name} looks at an input that {write.name} has overwritten before"
        raise fail(hazard.reader, what)


def _check_metadata(node: Node, fail: Fail) -> None:
    if node.op in ("output", "get_attr"):  # a get_attr may be a graph: the branch of a cond
        return
    if "val" not in node.meta:
        raise fail(node, "it has no value")
    if not isinstance(node.meta.get("fxpass_phase"), Phase):
        raise fail(node, "it has no phase")


def _check_write(node: Node, written: set[Node], fail: Fail) -> None:
    target = node.args[0]
    if not isinstance(target, Node) or target.op != "placeholder":
        raise fail(node, "copy_ to something that is not an input")
    if target in written:
        raise fail(node, f"input {target.name} is written twice")
    written.add(target)
    new, old = tensor(node.args[1]), tensor(target)
    if new.dtype != old.dtype:
        raise fail(node, f"input {target.name} is {old.dtype} and would be written {new.dtype}")


def _check_value(node: Node, fail: Fail) -> None:
    args, kwargs = tree_map_only(Node, lambda n: n.meta["val"], (node.args, node.kwargs))
    fakes = [a for a in tree_flatten((args, kwargs))[0] if hasattr(a, "fake_mode")]
    if not fakes or not callable(node.target) or node.target is aten.copy_.default:
        return
    target = node.target
    try:
        computed = recompute(node, fakes[0].fake_mode, lambda: target(*args, **kwargs))
    except Exception as error:
        raise fail(node, f"it cannot be computed from its inputs: {error}") from error
    for new, old in zip(tree_flatten(computed)[0], tree_flatten(node.meta["val"])[0], strict=True):
        if isinstance(new, torch.Tensor) and (new.dtype != old.dtype or not same_shape(new, old)):
            raise fail(
                node, f"its value is {new.dtype} {tuple(new.shape)}, recorded {old.dtype} {tuple(old.shape)}"
            )
