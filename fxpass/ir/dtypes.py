"""What dtypes are called: by options, in the text of a graph, and in answers."""

from __future__ import annotations

import torch

# what a step may compute in, by torch's names
COMPUTE = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_ALIASES = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32", "float": "float32"}
_IN_GRAPHS = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float64: "f64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "b8",
}
_IN_PROFILES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}


def named(name: str) -> torch.dtype | None:
    """The dtype of ``COMPUTE`` by its name, with or without ``torch.``, or by an alias such as ``fp16``."""
    name = name.removeprefix("torch.")
    return COMPUTE.get(_ALIASES.get(name, name))


def name_of(dtype: torch.dtype) -> str:
    """``float16``: torch's own name."""
    return str(dtype).removeprefix("torch.")


def in_graph(dtype: torch.dtype) -> str:
    """``f16``, as in ``f16[8, 64]``; torch's name of one that steps seldom have."""
    return _IN_GRAPHS.get(dtype, str(dtype))


def in_profile(dtype: torch.dtype) -> str:
    """``fp16``, as in ``fp16 gradient``; ``other`` for what gradients seldom are."""
    return _IN_PROFILES.get(dtype, "other")
