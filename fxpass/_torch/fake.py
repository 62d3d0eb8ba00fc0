"""Fake tensors: a step built and captured without memory for its weights, or the device it will run on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode


@contextlib.contextmanager
def fake_tensors() -> Iterator[None]:
    """Within it, tensors have a dtype, a shape and a device, but no values."""
    with FakeTensorMode(allow_non_fake_inputs=True), mock.patch.object(nn.Module, "_apply", _applier()):
        yield


def is_fake(value: Any) -> bool:
    """Whether ``value`` is a tensor without values."""
    return issubclass(type(value), FakeTensor)  # isinstance would wake torch's lazy modules


def is_virtual(value: torch.Tensor) -> bool:
    """Whether a tensor has no values: a fake one, or one of the meta device."""
    return value.is_meta or is_fake(value)


def _applier() -> Callable[..., nn.Module]:
    """``nn.Module._apply``, behind ``to``, ``half``, ``cuda``, for fake parameters.

    torch swaps the contents of a fake parameter with its new value, which
    fails: the fake mode holds weak references to both. Here the module gets a
    new parameter, and so does every other that shares it.
    """
    made: dict[int, tuple[Any, nn.Parameter]] = {}  # by id; the old one is kept so that no other gets its id

    def _apply(self: nn.Module, fn: Callable[[Any], Any], recurse: bool = True) -> nn.Module:
        for child in self.children() if recurse else ():
            child._apply(fn)
        for key, param in self._parameters.items():
            if param is None:
                continue
            with torch.no_grad():
                value = fn(param)
            if value is not param:
                new = nn.Parameter(value, param.requires_grad)
                self._parameters[key] = made.setdefault(id(param), (param, new))[1]
        for key, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[key] = fn(buffer)
        return self

    return _apply
