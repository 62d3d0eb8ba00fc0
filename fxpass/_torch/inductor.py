"""Lowering an ATen graph with Inductor.

Written for torch 2.11 to 2.13. The graph is already functional and of inference
kind, so compile_fx's own AOTAutograd round is skipped: decompose, run the joint
graph passes, compile the inside. The FX graph cache keys on the graph that
arrives here, after all rewrites, so options need not be in the key twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._inductor.virtualized import V
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx


def compile_graph(
    gm: GraphModule, inputs: Sequence[Any], settings: Mapping[str, Any], static: Sequence[int]
) -> Callable[..., Any]:
    """Compile ``gm`` for fake ``inputs``; ``static`` are positions whose address never changes.

    The result takes one list of inputs, and empties it.
    """
    fake_mode = next((x.fake_mode for x in inputs if hasattr(x, "fake_mode")), None)
    with inductor_config.patch(dict(settings)), V.set_fake_mode(fake_mode) if fake_mode else contextlib.nullcontext():
        lowered = decompose(gm, inputs)
        joint_graph_passes(lowered)
        from torch._inductor.utils import BoxedBool

        return compile_fx_inner(
            lowered,
            list(inputs),
            cudagraphs=BoxedBool(bool(inductor_config.triton.cudagraphs)),
            static_input_idxs=list(static),
            is_inference=True,
            boxed_forward_device_index=None,
        )


def decompose(gm: GraphModule, inputs: Sequence[Any]) -> GraphModule:
    """Inductor's decompositions applied to ``gm``."""
    fake_mode = next((x.fake_mode for x in inputs if hasattr(x, "fake_mode")), None)
    interpreter = torch.fx.Interpreter(gm)
    with fake_mode or contextlib.nullcontext(), torch.no_grad(), torch.fx.traceback.preserve_node_meta():
        return make_fx(interpreter.run, select_decomp_table(), tracing_mode="real", pre_dispatch=False)(*inputs)


def mode_settings(mode: str | None) -> dict[str, Any]:
    """Inductor's settings of a ``torch.compile(mode=...)``."""
    return dict(torch._inductor.list_mode_options(mode)) if mode else {}
