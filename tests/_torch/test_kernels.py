"""C++ kernels share programs, equal ones are one, and other sources stay alone."""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

import pytest
import torch
from torch._inductor import config as inductor_config
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import CppPythonBindingsCodeCache

from fxpass import MixedPrecision
from fxpass._torch import few_programs
from fxpass._torch.kernels import _Kernel
from tests.support.graphs import training_step

HEADER = "#include <torch/csrc/inductor/cpp_prefix.h>\n"
TYPES = ["const float*", "float*", "const int64_t"]


def _adds(number: int) -> str:
    parameters = "const float* in_ptr0,\n    float* out_ptr0,\n    const int64_t ks0"
    return (
        f'\n{HEADER}extern "C"  void  kernel({parameters})\n'
        f"{{ for (int64_t i = 0; i < ks0; i++) out_ptr0[i] = in_ptr0[i] + {number}; }}\n"
    )


@pytest.mark.parametrize("threads", [1, 2])
def test_kernels_share_a_program(threads: int) -> None:
    compile_, scope = AsyncCompile(), dict[str, Any]()
    with (
        inductor_config.patch(compile_threads=threads),
        mock.patch.object(
            CppPythonBindingsCodeCache, "load_async", wraps=CppPythonBindingsCodeCache.load_async
        ) as load,
        few_programs(),
    ):
        for n in (1, 2, 3, 1):
            scope[f"add{len(scope)}"] = compile_.cpp_pybinding(TYPES, _adds(n))
        compile_.wait(scope)
        assert load.call_count == 0
    assert load.call_count == 1
    x, out = torch.arange(4.0), torch.zeros(4)
    for name, n in zip(scope, (1, 2, 3, 1), strict=True):
        scope[name](x, out, 4)
        assert torch.equal(out, x + n)
    with pytest.raises(RuntimeError, match="number of arguments"):
        scope["add0"](x, out)
    with pytest.raises(TypeError):
        scope["add0"](x, out, "4")


def test_a_kernel_is_compiled_alone_if_the_compilation_was_given_up() -> None:
    compile_, scope = AsyncCompile(), dict[str, Any]()
    with contextlib.suppress(ZeroDivisionError), few_programs():
        scope["add"] = compile_.cpp_pybinding(TYPES, _adds(5))
        raise ZeroDivisionError
    out = torch.zeros(3)
    scope["add"](torch.ones(3), out, 3)  # pyrefly: ignore[not-callable]
    assert torch.equal(out, torch.full((3,), 6.0))


def test_a_source_of_another_form_stays_alone() -> None:
    assert _Kernel.of(TYPES, _adds(1)) is not None
    assert _Kernel.of([*TYPES, "std::vector<float>"], _adds(1)) is None
    assert _Kernel.of(TYPES, _adds(1).replace('extern "C"', 'struct Own {};\nextern "C"')) is None
    assert _Kernel.of(TYPES, _adds(1) + "\ntemplate <typename T> void own();") is None


def test_a_step_needs_few_programs() -> None:
    step, args = training_step()
    with mock.patch.object(
        CppPythonBindingsCodeCache, "load_async", wraps=CppPythonBindingsCodeCache.load_async
    ) as load:
        torch.compile(step, backend=MixedPrecision())(*args)
    assert 1 <= load.call_count <= 3
