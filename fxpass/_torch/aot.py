"""AOTAutograd: from Dynamo's graph of a whole step to one functional ATen graph.

Written for torch 2.11 to 2.13. ``keep_inference_input_mutations`` keeps the
updates of parameters and state in the graph as ``copy_`` nodes at its end;
``decompositions={}`` keeps layer norm, softmax, losses and their backwards
whole, so that dtypes can be decided on operators people know.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import torch.compiler
from torch._dynamo.backends.common import aot_autograd
from torch._functorch import config as functorch_config
from torch._guards import TracingContext
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from ..errors import FxpassError
from ..ir.unbacked import Asker, asked_by
from . import warm as warm_start
from .dtensors import part_of, shard_of
from .eager import running

Compiler = Callable[[GraphModule, list[Any]], Callable[..., Any]]


def trace(
    gm: GraphModule,
    inputs: Sequence[Any],
    extras: Sequence[torch.Tensor],
    *,
    compiler: Compiler,
    not_inference: FxpassError,
    warm: warm_start.Warm | None = None,
) -> Callable[..., Any]:
    """Hand ``gm`` as one ATen inference graph to ``compiler``; returns a callable of flat inputs.

    ``inputs`` are Dynamo's; ``extras`` are ours, with shapes that never change.
    With ``warm``, a step that another process has compiled is taken from torch's cache, and kept there.

    Raises:
        FxpassError: ``not_inference``, if something still requires grad when the graph is over.
    """

    def refuse(*_: Any) -> Any:
        raise not_inference

    def compile_inner(*args: Any) -> Any:
        with asked_by(Asker.USER):
            return compiler(*args)

    as_compiler = warm_start.compiler if warm else lambda function: function
    aot = aot_autograd(
        fw_compiler=as_compiler(refuse),
        inference_compiler=as_compiler(compile_inner),
        decompositions={},
        keep_inference_input_mutations=True,
    )
    fake_mode = TracingContext.get().fake_mode
    # torch.utils.checkpoint: capture/activation_checkpoint.py recomputes, for several backward()
    # and random numbers too
    own = functorch_config.patch(remat_using_tags_for_fwd_loss_bwd_graph=False, unlift_effect_tokens=True)
    assert fake_mode is not None, "Dynamo traces under a fake mode"
    ours = [fake_mode.from_tensor(x, static_shapes=True) for x in extras]
    # oneDNN's whole-layer RNN has no workspace for backward unless autograd itself runs it
    keeping = warm_start.kept(warm) if warm else contextlib.nullcontext()
    with own, _without_onednn(), asked_by(Asker.TRACE), keeping:
        return running(aot(gm, [*_as_traced(gm, inputs), *ours]))


def is_recorded() -> bool:
    """Whether what runs becomes nodes of a graph.

    AOTAutograd runs a graph twice, and the first time only to see which inputs are written.
    """
    return get_proxy_mode() is not None


@contextlib.contextmanager
def _without_onednn() -> Iterator[None]:
    """``torch.backends.mkldnn.flags(enabled=False)`` without its look at TF32, which warns the user."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


def _as_traced(gm: GraphModule, inputs: Sequence[Any]) -> Iterator[Any]:
    """``inputs``, but the fake one for a parameter that the step itself lets require grad, or is a part."""
    placeholders = (n for n in gm.graph.nodes if n.op == "placeholder")
    for node, real in zip(placeholders, inputs, strict=False):
        fake = node.meta.get("example_value")
        both = isinstance(real, torch.Tensor) and isinstance(fake, torch.Tensor)
        if both and shard_of(real) is not None:
            yield _part(real, fake)
        else:
            yield fake if both and fake.requires_grad and not real.requires_grad else real


def _part(real: torch.Tensor, whole: Any) -> torch.Tensor:
    """Fake, what this rank holds of a parameter."""
    part = part_of(real)
    with whole.fake_mode:
        made = torch.empty_strided(part.shape, part.stride(), dtype=part.dtype, device=part.device)
    return made.requires_grad_(whole.requires_grad)


def boxed(run: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    """Tell AOTAutograd that ``run`` takes its inputs as one list, which it empties."""
    run._boxed_call = True  # pyrefly: ignore[missing-attribute]
    return run


@contextlib.contextmanager
def compiling_flag() -> Iterator[None]:
    """Make ``torch.compiler.is_compiling()`` true: optimizers then use tensor maths for their step counts.

    Profiler ranges, which ``super().step()`` of an optimizer opens, stay out of the graph.
    """
    with (
        mock.patch.object(torch.compiler, "_is_compiling_flag", True),
        mock.patch.object(torch.autograd.profiler, "record_function", contextlib.nullcontext),
    ):
        yield


@contextlib.contextmanager
def python_values(truth: Callable[[torch.Tensor], bool]) -> Iterator[None]:
    """While tracing, ``bool(tensor)`` is ``truth(tensor)`` and a tensor converts to no number.

    FunctionalTensor's own methods go through ``item()``, where the two cannot be told apart.
    """

    def refuse(tensor: torch.Tensor) -> Any:
        raise TypeError("a tensor's value is read by float() or int()")

    methods = {"__bool__": lambda tensor: truth(tensor)}
    methods |= dict.fromkeys(("__float__", "__int__", "__index__"), refuse)
    with contextlib.ExitStack() as stack:
        for name, method in methods.items():
            stack.enter_context(mock.patch.object(FunctionalTensor, name, method))
        yield
