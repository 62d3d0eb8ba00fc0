"""C++ kernels are compiled several to a program.

Written for torch 2.11 to 2.13. Inductor gives each kernel a program of its own, and most of
the compiler's time goes into starting it, reading torch's headers (precompiled as they are) and
linking: 0.7 of 1 s for a kernel of a training step. Here the kernels of all graphs of a step
wait until the last is known; equal ones are one, and several share a program. The
functions are Inductor's, under other names: the same text, flags and bits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from torch._inductor.async_compile import AsyncCompile, get_compile_threads
from torch._inductor.codecache import CppPythonBindingsCodeCache

from ..timing.clock import stage, tell

# At most: a change in one kernel compiles its neighbours again. At least, where there are
# enough workers for less: what sharing saves is saved with few.
MOST, LEAST = 32, 4
_SOURCE = re.compile(r'\s*((?:#include\s*[<"][^>"]+[>"]\s*)+)extern "C"\s+void\s+kernel\((.*)\Z', re.DOTALL)
_TYPES = re.compile(r"(?:const )?[\w:]+\s*\*|(?:const )?int64_t")


@dataclass(frozen=True)
class _Kernel:
    """A function that Inductor has written, and nothing beside it."""

    includes: tuple[str, ...]
    rest: str  # from its parameters on
    types: tuple[str, ...]  # of the parameters

    @classmethod
    def of(cls, types: list[str], source: str) -> _Kernel | None:
        """None if it is another kind of source, which stays on its own."""
        match = _SOURCE.match(source)
        plain = match is not None and not re.search(r"^(?:#|template|static|inline|struct)", match[2], re.M)
        if match is None or not plain or not all(_TYPES.fullmatch(t.strip()) for t in types):
            return None
        return cls(
            tuple(line.strip() for line in match[1].splitlines() if line.strip()), match[2], tuple(types)
        )


@dataclass(eq=False)
class _Pending:
    """Stands for a kernel in the module that calls it, until it is compiled."""

    kernel: _Kernel

    def __call__(self, *args: Any) -> Any:
        """Compile it alone: the compilation that it was part of was given up."""
        return _build([self.kernel])()[self.kernel](*args)


@dataclass
class _Batch:
    pending: dict[_Kernel, _Pending] = field(default_factory=dict)
    scopes: list[dict[str, Any]] = field(default_factory=list)  # of the modules that call them

    def add(self, kernel: _Kernel) -> _Pending:
        return self.pending.setdefault(kernel, _Pending(kernel))

    def finish(self) -> None:
        """Compile what waits, and put it where it is called."""
        kernels = list(self.pending)
        size = max(LEAST, min(MOST, -(-len(kernels) // max(1, get_compile_threads()))))
        started = [_build(kernels[first : first + size]) for first in range(0, len(kernels), size)]
        built: dict[_Kernel, Callable[..., Any]] = {}
        for number, finish in enumerate(started, 1):
            tell(f"program {number} of {len(started)}")
            built |= finish()
        for scope in self.scopes:
            for name, value in scope.items():
                if isinstance(value, _Pending):
                    scope[name] = built[value.kernel]


@contextmanager
def few_programs() -> Iterator[None]:
    """The kernels of all graphs that are compiled or loaded inside are there when it ends, not before."""
    batch, alone, wait = _Batch(), AsyncCompile.cpp_pybinding, AsyncCompile.wait

    def cpp_pybinding(self: Any, types: list[str], source: str, *rest: Any, **more: Any) -> Any:
        kernel = None if rest or more else _Kernel.of(types, source)
        return alone(self, types, source, *rest, **more) if kernel is None else batch.add(kernel)

    def wait_for(self: Any, scope: dict[str, Any]) -> None:
        batch.scopes.append(scope)
        wait(self, scope)

    with (
        mock.patch.object(AsyncCompile, "cpp_pybinding", cpp_pybinding),
        mock.patch.object(AsyncCompile, "wait", wait_for),
    ):
        yield
    with stage("compiler"):
        batch.finish()


def _build(kernels: list[_Kernel]) -> Callable[[], dict[_Kernel, Callable[..., Any]]]:
    """Start to compile ``kernels`` as one program; what is returned waits for it."""
    includes = dict.fromkeys(line for kernel in kernels for line in kernel.includes)
    bodies = [f'extern "C" void kernel{n}({kernel.rest}' for n, kernel in enumerate(kernels)]
    source = "\n".join((*includes, *bodies, _bindings(kernels)))
    submit = AsyncCompile.submit if get_compile_threads() > 1 else None
    load = CppPythonBindingsCodeCache.load_async(source, "cpu", submit_fn=submit)

    def finish() -> dict[_Kernel, Callable[..., Any]]:
        module = load()
        return {kernel: getattr(module, f"kernel{n}") for n, kernel in enumerate(kernels)}

    return finish


def _bindings(kernels: list[_Kernel]) -> str:
    """What makes a Python module of the kernels."""
    calls = "".join(_binding(n, kernel) for n, kernel in enumerate(kernels))
    table = "".join(
        f'    {{"kernel{n}", (PyCFunction)(void (*)(void))call{n}, METH_FASTCALL, ""}},\n'
        for n in range(len(kernels))
    )
    return f"{_HEAD}{calls}static PyMethodDef methods[] = {{\n{table}    {{NULL, NULL, 0, NULL}}}};\n{_TAIL}"


def _binding(number: int, kernel: _Kernel) -> str:
    values = ", ".join(_argument(n, type_) for n, type_ in enumerate(kernel.types))
    return f"""
static PyObject* call{number}(PyObject*, PyObject* const* args, Py_ssize_t count) {{
    try {{
        expect(count, {len(kernel.types)});
        kernel{number}({values});
        Py_RETURN_NONE;
    }} catch (std::exception const& error) {{
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_RuntimeError, error.what());
        return nullptr;
    }}
}}
"""


def _argument(number: int, type_: str) -> str:
    if type_.strip().endswith("*"):
        return f"static_cast<{type_}>(data_of(args[{number}]))"
    return f"number(args[{number}])"


_HEAD = """
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <cstdlib>
#include <stdexcept>

static void* (*data_of)(PyObject*);

static inline void expect(Py_ssize_t count, Py_ssize_t wanted) {
    if (count != wanted) throw std::runtime_error("another number of arguments than the kernel has");
}

static inline int64_t number(PyObject* value) {
    auto result = PyLong_AsLongLong(value);
    if (result == -1 && PyErr_Occurred()) throw std::runtime_error("expected an int");
    return result;
}
"""
# torch hands out the address of its function that reads a tensor's address
_TAIL = """
static struct PyModuleDef module_of_kernels = {PyModuleDef_HEAD_INIT, "kernel", NULL, -1, methods};

PyMODINIT_FUNC PyInit_kernel(void) {
    const char* text = std::getenv("_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR");
    auto address = text ? std::strtoull(text, nullptr, 10) : 0;
    if (!address) {
        PyErr_SetString(PyExc_RuntimeError, "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR must be set");
        return nullptr;
    }
    data_of = reinterpret_cast<decltype(data_of)>(static_cast<uintptr_t>(address));
    return PyModule_Create(&module_of_kernels);
}
"""
