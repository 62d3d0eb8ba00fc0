"""The program Inductor wrote: which buffers it allocates, frees, reuses, and between which launches.

Written for torch 2.11 to 2.13. Not the FX graph decides what is alive when, but
the lines of the wrapper that Inductor generates; this reads them, after buffer
reuse is planned, into a ``Program`` of plain values. The program travels
with the compiled graph into Inductor's cache, so a cache hit has one too.
"""

from __future__ import annotations

import contextlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import sympy
import torch
import torch.compiler.config as compiler_config
from torch._inductor import config as inductor_config
from torch._inductor import ir
from torch._inductor.codegen import wrapper as lines
from torch._inductor.codegen.cpp import CppScheduling
from torch._inductor.codegen.triton import TritonScheduling
from torch._inductor.compile_fx import _InProcessFxCompile
from torch._inductor.memory import (
    assign_memory_planning_info_for_scheduler_buffers,
    estimate_peak_memory,
    get_freeable_input_buf,
)
from torch._inductor.scheduler import BaseSchedulerNode
from torch._inductor.utils import get_dtype_size
from torch._inductor.virtualized import V
from torch.fx import GraphModule, Node
from torch.utils._ordered_set import OrderedSet

from ..timing.clock import stage

ATTRIBUTE = "_fxpass_program"  # where a compiled graph carries its program
# Part of Inductor's cache key: raise it when Program changes, or what inductor.py, order.py, fusion.py,
# combos.py, stored.py change, or what lower() is given as ``Scratch`` says of a call.
FORMAT = "fxpass-program-9"
NODE = "fxpass_node"  # key in a node's "custom" metadata: the step's node it was decomposed from

Scratch = Callable[[Node], sympy.Expr]
_OUT_KERNELS = ("ExternKernelOut", "ExternKernelMultiOut")  # the second since torch 2.12
_WRITES_OUT = tuple(getattr(ir, name) for name in _OUT_KERNELS if hasattr(ir, name))


@dataclass(frozen=True)
class Block:
    """One buffer: bytes of its storage, and the step's node that it is the value of ("" if unknown)."""

    name: str
    size: sympy.Expr
    dtype: str
    shape: str
    node: str


@dataclass(frozen=True)
class Allocate:
    """A new storage."""

    block: Block


@dataclass(frozen=True)
class Alias:
    """``new`` is another name of ``old``'s storage; ``block`` is the value it is reused for, if it is."""

    new: str
    old: str
    frees_old: bool
    block: Block | None = None


@dataclass(frozen=True)
class Free:
    """A name is deleted; its storage goes with its last name."""

    name: str


@dataclass(frozen=True)
class Launch:
    """One kernel or library call; it allocates ``results`` itself, and ``scratch`` bytes while it runs.

    ``node`` is the step's node that a library is called for, ``nodes`` are all that the launch computes.
    """

    kernel: str
    reads: tuple[str, ...]
    node: str
    results: tuple[Block, ...] = ()
    holder: str = ""  # the name of the tuple of results, if it is one
    scratch: sympy.Expr = field(default_factory=lambda: sympy.Integer(0))
    nodes: tuple[str, ...] = ()
    generated: bool = False  # by Inductor: one launch; a library's call may be several, or none


Line = Allocate | Alias | Free | Launch


@dataclass(frozen=True)
class Program:
    """The lines in order; inputs by position; what is returned; Inductor's own estimate of its peak."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    lines: tuple[Line, ...]
    estimate: int  # bytes beyond the inputs, at the sizes of the example
    error: str = ""  # why it could not be read


EMPTY = Program((), (), (), 0)  # of a graph without anything to compute: Inductor makes no program


class _Recorded(BaseException):
    """Ends a compilation once the program is known; no Exception, which Inductor would wrap."""


@dataclass
class _Recorder:
    scratch: Scratch
    dry: bool
    program: Program | None = None
    # by kernel, what each of its launches computes, in their order: the wrapper's lines do not say
    computed: dict[str, list[tuple[str, ...]]] = field(default_factory=lambda: defaultdict(list))

    def computes(self, scheduling: type[Any]) -> Any:
        """A patch of ``scheduling``: it notes what each kernel computes, right before it writes the call."""
        comment = scheduling.codegen_comment

        def codegen_comment(own: Any, node_schedule: Any, kernel_name: str | None = None) -> None:
            if kernel_name:
                self.computed[kernel_name].append(_computed(node_schedule))
            comment(own, node_schedule, kernel_name)

        return mock.patch.object(scheduling, "codegen_comment", codegen_comment)


_recorder: ContextVar[_Recorder | None] = ContextVar("fxpass_recorder", default=None)


def tag_nodes(gm: GraphModule) -> None:
    """Write every node's name where it survives decomposition and Inductor's own passes."""
    for node in gm.graph.nodes:
        node.meta["custom"] = {**(node.meta.get("custom") or {}), NODE: node.name}


@contextlib.contextmanager
def recording(scratch: Scratch, *, dry: bool = False) -> Iterator[_Recorder]:
    """Record the program of the graph that is compiled inside; ``dry``: stop there, compile nothing."""
    recorder = _Recorder(scratch, dry)
    token = _recorder.set(recorder)
    tag = compiler_config.cache_key_tag
    passes, compile_ = (
        lines.PythonWrapperCodegen.run_wrapper_ir_passes,
        _InProcessFxCompile.codegen_and_compile,
    )

    def run_wrapper_ir_passes(self: Any, is_inference: bool) -> None:
        if inductor_config.combo_kernels:  # they came after what is known of each buffer's readers
            _find_readers()
        passes(self, is_inference)
        if recorder.program is None:
            with stage("profile"):
                recorder.program = _read_or_not(self, recorder)
            if recorder.dry:
                raise _Recorded

    def codegen_and_compile(self: Any, *args: Any, **kwargs: Any) -> Any:
        compiled = compile_(self, *args, **kwargs)
        setattr(compiled, ATTRIBUTE, recorder.program)
        return compiled

    try:
        with (
            mock.patch.object(lines.PythonWrapperCodegen, "run_wrapper_ir_passes", run_wrapper_ir_passes),
            mock.patch.object(_InProcessFxCompile, "codegen_and_compile", codegen_and_compile),
            mock.patch.object(compiler_config, "cache_key_tag", f"{tag} {FORMAT}"),
            recorder.computes(TritonScheduling),
            recorder.computes(CppScheduling),
        ):
            yield recorder
    except _Recorded:
        pass
    finally:
        _recorder.reset(token)


def program_of(compiled: Any) -> Program:
    """The program of what Inductor compiled under ``recording``, fresh or from its cache."""
    return getattr(compiled, ATTRIBUTE, EMPTY)


def _computed(node_schedule: Any) -> tuple[str, ...]:
    """The step's nodes that were fused into a kernel; its schedule has markers between the nodes, too."""
    parts = [part for n in node_schedule if isinstance(n, BaseSchedulerNode) for part in n.get_nodes()]
    origins = (origin for part in parts if part.node is not None for origin in part.node.get_origins())
    return tuple(dict.fromkeys(name for origin in origins if (name := _step_node(origin))))


def _read_or_not(wrapper: Any, recorder: _Recorder) -> Program:
    """The program; an empty one that says why, if it cannot be read: it is not worth a failed compilation."""
    try:
        return _read(wrapper, recorder)
    except Exception as error:
        return Program((), (), (), 0, f"{type(error).__name__}: {error}")


def _read(wrapper: Any, recorder: _Recorder) -> Program:
    graph = V.graph
    read = [line for source in wrapper.lines if (line := _line(source, recorder)) is not None]
    return Program(tuple(graph.graph_input_names), tuple(graph.get_output_names()), tuple(read), _estimate())


def _estimate() -> int:
    """What Inductor's own model says the peak is, as its reordering pass would ask."""
    scheduler, outputs = V.graph.scheduler, OrderedSet(V.graph.get_output_names())
    freeable = get_freeable_input_buf(scheduler.nodes, OrderedSet(V.graph.graph_inputs))
    _find_readers()
    return int(estimate_peak_memory(scheduler.nodes, freeable, outputs)[0])


def _find_readers() -> None:
    """Let Inductor note again, for its estimates, which of the kernels read each buffer."""
    scheduler = V.graph.scheduler
    assign_memory_planning_info_for_scheduler_buffers(scheduler.nodes, scheduler.name_to_buf)
    if inductor_config.combo_kernels:
        for name in V.graph.removed_buffers & scheduler.name_to_buf.keys():  # stay in a kernel's registers
            planned = scheduler.name_to_buf[name].mpi_buffer
            planned.size_alloc = planned.size_free = 0


def _line(line: Any, recorder: _Recorder) -> Line | None:
    """One line of the wrapper; None if it touches no memory."""
    if isinstance(line, lines.AllocateLine):
        return Allocate(_block(line.node))
    if isinstance(line, lines.ReuseLine):
        return Alias(line.reused_as.get_name(), line.node.get_name(), _deletes(line), _block(line.reused_as))
    if isinstance(line, lines.ReinterpretLine):
        return Alias(line.reused_as.get_name(), line.node.get_name(), False)
    if isinstance(line, lines.FreeIfNotReusedLine):
        return None if line.is_reused else Free(line.node.get_name())
    if isinstance(line, lines.FreeLine):
        return Free(line.node.get_name())
    if isinstance(line, lines.MultiOutputLine):
        return Alias(line.result_name, line.arg_name, False)
    if isinstance(line, lines.KernelCallLine):
        computed = recorder.computed[line.kernel_name]
        nodes = computed.pop(0) if computed else ()
        return Launch(line.kernel_name, _names(line.call_args), "", nodes=nodes, generated=True)
    if isinstance(line, lines.WrapperLine):
        node = getattr(line, "node", None)
        return _call(node, recorder.scratch) if isinstance(node, ir.ExternKernel) else None
    return _text(line)


def _deletes(line: Any) -> bool:
    return bool(line.delete_old) and line.node.get_name() not in V.graph.get_output_names()


def _call(node: Any, scratch: Scratch) -> Launch:
    """A library call: what it returns, it allocates, unless an ``out=`` was allocated before."""
    target = getattr(node, "op_overload", None)
    origins = [n for n in (node.origin_node, *node.origins) if isinstance(n, Node)]
    # origin_node may be the node that later wrote into the result in place
    origin = max((n for n in origins if n.target is target), default=next(iter(origins), None))
    name = node.get_name()
    if isinstance(node, _WRITES_OUT):
        results: tuple[Block, ...] = ()
    elif isinstance(node.layout, ir.MultiOutputLayout):
        results = tuple(_block(o) for o in getattr(node, "outputs", ()) if isinstance(o, ir.MultiOutput))
    elif isinstance(node, ir.ExternKernelAlloc) and not isinstance(node.layout, ir.NoneLayout):
        results = (_block(node),)
    else:
        results = ()
    kernel = str(target or node.python_kernel_name or type(node).__name__)
    extra = scratch(origin) if isinstance(origin, Node) and origin.op == "call_function" else sympy.Integer(0)
    reads = tuple(dep.name for dep in node.get_read_writes().reads)
    nodes = tuple(dict.fromkeys(made for n in origins if (made := _step_node(n))))
    return Launch(
        kernel=kernel,
        reads=reads,
        node=_step_node(origin),
        results=results,
        holder=name,
        scratch=extra,
        nodes=nodes,
    )


def _text(line: Any) -> Launch | None:
    """A call that was written as text: its result is a known buffer."""
    match = re.match(r"(\w+) = (\w[\w.]*)\(", line) if isinstance(line, str) else None
    buffer = V.graph.name_to_buffer.get(match[1]) if match else None
    if match is None or buffer is None:
        return None
    return Launch(match[2], _names(line), _step_node(buffer.origin_node), (_block(buffer),), match[1])


def _names(call_args: Sequence[Any] | str) -> tuple[str, ...]:
    text = call_args if isinstance(call_args, str) else " ".join(map(str, call_args))
    return tuple(dict.fromkeys(re.findall(r"\b(?:buf\d+|arg\d+_1|primals_\d+|fxpass_\w+)\b", text)))


def _block(buffer: Any) -> Block:
    dtype = buffer.get_dtype()
    size = V.graph.get_allocation_storage_size(buffer) * get_dtype_size(dtype)
    shape = getattr(buffer.get_layout(), "size", ())
    text = "x".join(map(str, shape)) or "scalar"
    node = _step_node(_origin(buffer))
    return Block(buffer.get_name(), sympy.sympify(size), str(dtype).removeprefix("torch."), text, node)


def _origin(buffer: Any) -> Node | None:
    """The node whose value the buffer is: of all that were fused into it the last of its dtype and size."""
    if getattr(buffer, "origin_node", None) is not None:
        return buffer.origin_node
    origins = [n for n in getattr(buffer, "origins", ()) or () if isinstance(n, Node)]
    numel = sympy.prod(getattr(buffer.get_layout(), "size", ()))

    def matches(node: Node) -> bool:
        value = node.meta.get("val")
        return (
            isinstance(value, torch.Tensor)
            and value.dtype == buffer.get_dtype()
            and sympy.prod(_expression(s) for s in value.shape) == numel
        )

    return max(filter(matches, origins), default=None) or max(origins, default=None)


def _expression(size: int | torch.SymInt) -> sympy.Expr:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def _step_node(origin: Any) -> str:
    return (origin.meta.get("custom") or {}).get(NODE, "") if isinstance(origin, Node) else ""
