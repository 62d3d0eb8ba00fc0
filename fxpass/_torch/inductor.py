"""Lowering an ATen graph with Inductor.

Written for torch 2.11 to 2.13. The graph is already functional and of inference
kind, so compile_fx's own AOTAutograd round is skipped: decompose, run the joint
graph passes, compile the inside. The FX graph cache keys on the graph that
arrives here, after all rewrites, so options need not be in the key twice.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._guards import TracingContext
from torch._inductor import config as inductor_config
from torch._inductor.codecache import PyCodeCache
from torch._inductor.codegen.cpp import CppScheduling
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.dtype_propagation import DtypePropagationOpsHandler
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._inductor.graph import GraphLowering
from torch._inductor.output_code import CompiledFxGraph
from torch._inductor.virtualized import V
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import has_free_unbacked_symbols
from torch.fx.traceback import preserve_node_meta
from torch.utils._pytree import tree_map_only

from ..ir.alias import hint_of, layout_is_read, lie_alike
from ..ir.unbacked import Asker, asked_by, keep_sizes
from ..timing.clock import charged, stage
from .combos import join_neighbours
from .fusion import keep_order
from .order import keep_old_values
from .schedule import Program, Scratch, program_of, recording, tag_nodes

CPU_KERNEL_ARGUMENTS = 12
aten = torch.ops.aten


@dataclass(frozen=True)
class Compiled:
    """What Inductor made of a graph: a callable of one list of inputs, which it empties, and its program."""

    call: Callable[..., Any]
    program: Program


def compile_graph(
    gm: GraphModule,
    inputs: Sequence[Any],
    settings: Mapping[str, Any],
    static: Sequence[int],
    scratch: Scratch,
    *,
    dry: bool = False,
) -> Compiled:
    """Compile ``gm`` for fake ``inputs``; ``static`` are positions whose address never changes.

    ``scratch`` says how many bytes a library call needs while it runs. With
    ``dry`` no kernel is compiled: the program alone is of use.
    """
    fake_mode = next((x.fake_mode for x in inputs if hasattr(x, "fake_mode")), None)
    with (
        inductor_config.patch(dict(settings)),
        small_cpu_kernels(),
        keep_order(),
        join_neighbours(),
        keep_old_values(),
        no_output_strides(),
        dtype_rules_once(),
        stages(),
        asked_by(Asker.TRACE),
        inductor_config.patch(fx_graph_cache=False) if dry else contextlib.nullcontext(),
        V.set_fake_mode(fake_mode) if fake_mode else contextlib.nullcontext(),
    ):
        tag_nodes(gm)
        lowered = decompose(gm, inputs)
        joint_graph_passes(lowered)
        _plain_messages(lowered)
        from torch._inductor.utils import BoxedBool

        call: Any = _not_compiled
        with recording(scratch, dry=dry) as recorder:
            call = compile_fx_inner(
                lowered,
                list(inputs),
                cudagraphs=BoxedBool(bool(inductor_config.triton.cudagraphs)),
                static_input_idxs=list(static),
                is_inference=True,
                boxed_forward_device_index=None,
            )
        return Compiled(call, recorder.program or program_of(call))


def bare_call(compiled: Any) -> Callable[..., Any]:
    """A compiled graph without what torch does around each call (profiler ranges, autotuning's notes)."""
    call = compiled.current_callable if isinstance(compiled, CompiledFxGraph) else None
    return call if call is not None and all(d == "cpu" for d in compiled.device_types) else compiled


@contextlib.contextmanager
def stages() -> Iterator[None]:
    """Charge Inductor's time to its stages."""
    parts = (
        (GraphLowering, "_update_scheduler", "scheduler"),
        (GraphLowering, "_compile_to_module", "codegen"),
        (PyCodeCache, "load_by_key_path", "compiler"),
    )
    with stage("inductor"), contextlib.ExitStack() as stack:
        for owner, name, part in parts:
            stack.enter_context(mock.patch.object(owner, name, charged(part, getattr(owner, name))))
        yield


def _plain_messages(gm: GraphModule) -> None:
    """Take out of assertions' texts what Inductor would write into a C++ literal as it is."""
    for node in gm.graph.nodes:
        if node.target in (aten._assert_async.msg, aten._functional_assert_async.msg):
            condition, text, *rest = node.args
            plain = re.sub(r"\s+", " ", str(text)).replace('"', "'").replace("\\", "/")
            node.args = (condition, plain, *rest)


def _not_compiled(inputs: list[Any]) -> Any:
    """Stands for the program of a dry run, which nobody may call."""
    raise NotImplementedError("only the program was asked for")


def decompose(gm: GraphModule, inputs: Sequence[Any]) -> GraphModule:
    """Inductor's decompositions applied to ``gm``."""
    fake_mode = next((x.fake_mode for x in inputs if hasattr(x, "fake_mode")), None)
    interpreter = _AsTraced(gm, fake_mode)
    asked = asked_by(Asker.TRACE)
    with fake_mode or contextlib.nullcontext(), torch.no_grad(), preserve_node_meta(), asked:
        return make_fx(interpreter.run, _table(), tracing_mode="real", pre_dispatch=False)(*inputs)


class _AsTraced(torch.fx.Interpreter):
    """Runs a graph again; the sizes that it makes from data stay those they were, and layouts that are read.

    A decomposition's result may have other strides than the operator's: a concatenation with
    nothing is the other tensor as it lies. Where ``view`` or ``as_strided`` follows, traced for the
    operator's own, the result gets those.
    """

    def __init__(self, gm: GraphModule, fake_mode: Any) -> None:
        super().__init__(gm)
        self.sizes = getattr(fake_mode, "shape_env", None)

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        keep_sizes(n, self.sizes, value)
        traced = n.meta.get("val")
        if n.op != "call_function" or not isinstance(value, Tensor) or not isinstance(traced, Tensor):
            return value
        return value if lie_alike(value, traced) or not layout_is_read(n) else _laid_out_as(value, traced)


def _laid_out_as(value: Tensor, traced: Tensor) -> Tensor:
    """A copy with the order of strides that ``traced`` has: fresh results are dense."""
    strides = [hint_of(s) or 0 for s in traced.stride()]
    order = sorted(range(value.ndim), key=lambda dim: (-strides[dim], dim))
    back = sorted(range(value.ndim), key=order.__getitem__)
    return value.permute(order).clone(memory_format=torch.contiguous_format).permute(back)


def _table() -> dict[Any, Callable[..., Any]]:
    """Inductor's decompositions, and some for places that depend on data.

    It has no kernel that writes there, and loses the offset of a view of a view.
    """
    table = select_decomp_table()
    mine = {
        aten.slice_backward.default: _slice_backward,
        aten.slice_scatter.default: _slice_scatter,
        aten.select.int: _select,
        aten.select_backward.default: _select_backward,
        aten.select_scatter.default: _select_scatter,
    }
    return {**table, **{op: _first(f, table.get(op, _as_it_is)) for op, f in mine.items()}}


def _as_it_is(*_: Any) -> Any:
    return NotImplemented


def _first(mine: Callable[..., Any], theirs: Callable[..., Any]) -> Callable[..., Any]:
    """``mine`` if a place depends on data, else ``theirs``."""

    def decompose(*args: Any) -> Any:
        on_data = any(isinstance(a, torch.SymInt) and has_free_unbacked_symbols(a) for a in args)
        return mine(*args) if on_data else theirs(*args)

    return decompose


def _slice_backward(grad: Any, sizes: Any, dim: int, start: Any, end: Any, step: Any) -> Any:
    return _slice_scatter(grad.new_zeros(sizes), grad, dim, start, end, step)


def _slice_scatter(to: Any, src: Any, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1) -> Any:
    places = torch.arange(src.shape[dim], device=src.device) * step
    places = places + _place(0 if start is None else start, to.shape[dim], src.device)
    return aten.index_copy.default(to, dim, places, src)


def _select(x: Any, dim: int, index: Any) -> Any:
    return x.index_select(dim, _place(index, x.shape[dim], x.device)).squeeze(dim)


def _select_backward(grad: Any, sizes: Any, dim: int, index: Any) -> Any:
    return _select_scatter(grad.new_zeros(sizes), grad, dim, index)


def _select_scatter(to: Any, src: Any, dim: int, index: Any) -> Any:
    src = src.unsqueeze(dim).expand([1 if i == dim % to.ndim else n for i, n in enumerate(to.shape)])
    return aten.index_copy.default(to, dim, _place(index, to.shape[dim], src.device), src)


def _place(index: Any, size: Any, device: torch.device) -> Any:
    """A number that may count from the end, as the index of one place."""
    at = torch.ops.fxpass.number(index).to(device).reshape(1)
    return torch.where(at < 0, at + size, at)


def decomposition(node: Node) -> GraphModule:
    """Inductor's decomposition of one node, as a graph over ``node.all_input_nodes``."""
    inputs = node.all_input_nodes
    values = [n.meta["val"] for n in inputs]
    fake_mode = next((v.fake_mode for v in values if hasattr(v, "fake_mode")), None)

    def call(*given: Any) -> Any:
        by_node = dict(zip(inputs, given, strict=True))
        args, kwargs = tree_map_only(Node, by_node.__getitem__, (node.args, node.kwargs))
        assert callable(node.target), f"{node.name} is not a call"
        return node.target(*args, **kwargs)

    with fake_mode or contextlib.nullcontext(), torch.no_grad(), asked_by(Asker.TRACE):
        return make_fx(call, select_decomp_table(), tracing_mode="real", pre_dispatch=False)(*values)


@contextlib.contextmanager
def no_output_strides() -> Iterator[None]:
    """Keep Inductor from reporting output strides to AOTAutograd: one step may be several Inductor graphs."""
    context = TracingContext.try_get()
    if context is None:
        yield
        return
    with mock.patch.object(context, "output_strides", None):
        yield


@contextlib.contextmanager
def dtype_rules_once() -> Iterator[None]:
    """Make Inductor's table of dtype rules once, not for every operation of every kernel.

    It is one object for all, but Python initialises it each time that it is asked for.
    """
    DtypePropagationOpsHandler()
    with mock.patch.object(DtypePropagationOpsHandler, "__init__", return_value=None):
        yield


@contextlib.contextmanager
def small_cpu_kernels() -> Iterator[None]:
    """Let Inductor's C++ backend close a kernel after a few arguments instead of 500.

    By default all loops between two library calls share one C++ function: for a
    step that is one function for all parameter updates, which takes a minute to
    compile. Small functions of repeated layers are textually equal and compiled
    once, and their buffers are freed earlier.
    """
    with mock.patch.object(CppScheduling, "MAX_FUSED_KERNEL_ARGS_NUM", CPU_KERNEL_ARGUMENTS):
        yield


def cpu_has_half_gemm() -> bool:
    """Whether this CPU multiplies float16 matrices in hardware."""
    return (
        bool(torch.ops.mkldnn._is_mkldnn_fp16_supported()) if torch.backends.mkldnn.is_available() else False
    )


def mode_settings(mode: str | None) -> dict[str, Any]:
    """Inductor's settings of a ``torch.compile(mode=...)``."""
    return dict(torch._inductor.list_mode_options(mode)) if mode else {}


def inductor_settings() -> frozenset[str]:
    """The names of Inductor's settings, such as ``triton.cudagraphs``."""
    return frozenset(inductor_config.get_config_copy())
