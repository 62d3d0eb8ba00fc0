"""Which kernel attention is traced to: that of its dtype, as torch itself would choose it."""

from __future__ import annotations

import contextlib
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn.attention import SDPBackend, sdpa_kernel

import fxpass
from tests.cuda.device import COUNTS_ONLY

FLASH, EFFICIENT = "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention"


class Attend:
    """Attention of a projection's result, whose heads have so many elements."""

    def __init__(
        self, layout: str = "bshd", heads: int = 16, kernel: SDPBackend | None = None, **options: Any
    ) -> None:
        self.layout, self.heads, self.kernel, self.options = layout, heads, kernel, options

    def __call__(self, x: Tensor) -> Tensor:
        q, k, v = x.unflatten(-1, (3, 2, self.heads)).permute(2, 0, 3, 1, 4).unbind(0)
        if self.layout == "bhsd":
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        with sdpa_kernel(self.kernel) if self.kernel is not None else contextlib.nullcontext():
            mixed = F.scaled_dot_product_attention(q, k, v, **self.options)
        return mixed.transpose(1, 2).flatten(2)


def kernels(attention: Attend, **options: Any) -> tuple[str, list[str]]:
    """Train two steps; the kernel of forward, and the lines of the graph that call one."""
    model = nn.Linear(8, 6 * attention.heads).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mp = fxpass.MixedPrecision(**options)

    @torch.compile(backend=mp)
    def step(x: Tensor) -> None:
        attention(model(x)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):
        step(torch.randn(2, 32, 8, device="cuda"))
    assert COUNTS_ONLY or mp.stats().steps == 2
    assert len(mp.graphs) == 1
    found = [line for line in mp.graphs[0].after.splitlines() if "aten._scaled_dot_product" in line]
    forward, backward = (line.split("aten.")[1].split(".default")[0] for line in found)
    assert backward == f"{forward}_backward"
    return forward, found


@pytest.mark.breadth
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    "attention",
    [
        Attend(),
        Attend(is_causal=True, dropout_p=0.1),
        Attend(scale=0.5),
        Attend("bhsd"),
        Attend(heads=12),
        Attend(kernel=SDPBackend.FLASH_ATTENTION),
    ],
    ids=["plain", "causal, dropout", "scale", "other strides", "padded", "asked for"],
)
def test_flash_attention_in_half_precision(attention: Attend, dtype: str) -> None:
    name, _ = kernels(attention, dtype=dtype, codegen="eager")
    assert name == FLASH


@pytest.mark.parametrize(
    ("attention", "options"),
    [
        (Attend(), {"dtype": "float32"}),
        (Attend(attn_mask=torch.ones(32, 32, dtype=torch.bool, device="cuda")), {}),
        (Attend(heads=12, attn_mask=torch.ones(32, 32, dtype=torch.bool, device="cuda")), {}),
        (Attend(kernel=SDPBackend.EFFICIENT_ATTENTION), {}),
    ],
    ids=["float32", "mask", "mask, padded", "asked for"],
)
def test_the_other_kernel_where_torch_would_use_it(attention: Attend, options: dict[str, Any]) -> None:
    name, _ = kernels(attention, codegen="eager", **options)
    assert name == EFFICIENT


def test_the_arguments_are_those_of_torchs_own_trace() -> None:
    """Traced in half precision, the same attention has the same constants in the same places."""
    _, found = kernels(Attend(is_causal=True, dropout_p=0.1), codegen="eager")
    x = torch.randn(2, 32, 96, device="cuda", dtype=torch.float16, requires_grad=True)
    seen: list[str] = []

    def keep(gm: Any, inputs: Any) -> Any:
        seen.extend(
            line for line in str(gm.graph).splitlines() if "target=torch.ops.aten._scaled_dot_product" in line
        )
        return make_boxed_func(gm.forward)

    backend = aot_autograd(fw_compiler=keep)
    torch.compile(Attend(is_causal=True, dropout_p=0.1), backend=backend)(x).sum().backward()
    assert [_constants(line) for line in found] == [_constants(line) for line in seen]


def _constants(line: str) -> list[str]:
    """The numbers, truths and Nones among a call's arguments, as text."""
    arguments = line.split(".default", 1)[1].split("  # ")[0]
    return re.findall(r"(?<![\w%.])(?:\d+(?:\.\d+)?|None|True|False)(?![\w.])", arguments)


class Shared(Attend):
    """Four query heads share a key and a value."""

    def __call__(self, x: Tensor) -> Tensor:
        q, k, v = x.unflatten(-1, (6, self.heads)).transpose(1, 2).split((4, 1, 1), 1)
        mixed = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **self.options)
        return mixed.transpose(1, 2).flatten(2)


@pytest.mark.parametrize(("dtype", "expected"), [("float16", FLASH), ("float32", EFFICIENT)])
def test_query_heads_that_share_keys(dtype: str, expected: str) -> None:
    """In float32 torch takes such attention apart; here it stays whole, whatever the dtype."""
    name, _ = kernels(Shared(is_causal=True), dtype=dtype, codegen="eager")
    assert name == expected
