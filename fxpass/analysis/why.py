"""Why a node has the dtype it has: the op policy's rule in words, for people who ask about one node."""

from __future__ import annotations

from .policy import Colour
from .view import INPUT, OUTPUT, GraphView, NodeView

_HIGH = (
    (("softmax", "logsumexp"), "its sum of exponentials loses digits in low precision"),
    (("loss", "nll", "entropy", "kl_div"), "a loss: it is one number that every gradient starts from"),
    (("norm", "dist", "linalg", "fft"), "squares and sums overflow or lose digits in low precision"),
    (("upsample", "grid_sampler"), "its weights and its atomic sums lose digits in low precision"),
    (("embedding", "index"), "a sum over tokens, rounded once at the end"),
    (("sum", "mean", "var", "std", "prod", "cum"), "a sum of many terms loses digits in low precision"),
    (
        ("exp", "log", "pow", "rsqrt", "reciprocal"),
        "ordinary inputs take it out of the range of low precision",
    ),
)
_LOW = {"float16", "bfloat16"}
_FLOATS = _LOW | {"float32"}


def why_float32(node: NodeView) -> str:
    """Why an operation of forward or backward computes in float32."""
    if node.made_by:
        return f"{node.made_by}: {node.reason}"
    if node.phase in ("gradient", "update"):
        return "the optimizer's arithmetic runs as in the uncompiled step"
    if node.colour == "":
        return "not in the op policy: it runs as in the uncompiled step"
    if node.colour == Colour.HIGH:
        reason = next((text for words, text in _HIGH if any(w in node.short for w in words)), "")
        return f"policy high: {reason or 'the policy gives it float32 inputs'}"
    if node.colour == Colour.LOW:
        return "kept: its module matches keep_fp32, or it is in a region with autocast off"
    if node.colour == Colour.NORM:
        return "policy norm: its input is float32, and it follows its input"
    return f"policy {node.colour}: a float32 operand decides"


def why_dtype(graph: GraphView, node: NodeView) -> str:
    """Why ``node`` has its dtype, naming the operands that decided."""
    if node.op == INPUT:
        return f"an input: {node.dtype or 'as'} as the step was given it"
    if node.op == OUTPUT:
        return "outputs keep the dtype of the uncompiled step"
    if node.dtype not in _FLOATS:
        return "not a floating point tensor below float64: the policy leaves it alone" if node.dtype else ""
    if node.made_by:
        return f"chosen by {node.made_by}: {node.reason}"
    if node.colour in (Colour.FOLLOW, Colour.BACKWARD_FOLLOW, Colour.WIDEST, Colour.NORM) and node.phase in (
        "forward",
        "backward",
    ):
        read = [graph.by_name[n] for n in node.inputs if n in graph.by_name]
        same = [n for n in read if n.dtype == node.dtype]
        operands = ", ".join(f"{n.name} ({n.dtype or n.type})" for n in same or read)
        return f"policy {node.colour}: it follows {operands or 'its operands'}"
    if node.dtype in _LOW and node.colour == Colour.LOW:
        return f"policy low: {node.dtype} operands, float32 accumulation inside the kernel, rounded once"
    if node.dtype in _LOW and "softmax" in node.short:
        return "only products read it: stored low, its input's dtype, while the kernel computes in float32"
    if node.dtype in _LOW:
        return "as in the uncompiled step"
    return why_float32(node)
