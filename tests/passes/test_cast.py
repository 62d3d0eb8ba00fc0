"""The cast pass on graphs captured from real steps."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

from fxpass import MixedPrecision
from fxpass.ir.graph import Phase, StepGraph, phase, tensor
from fxpass.ir.marks import GRAD
from fxpass.ir.text import to_text
from fxpass.passes.cast import Cast
from tests.support.graphs import graph_of, inserted_by, training_step
from tests.support.helpers import Mlp

LOW = torch.float16
aten = torch.ops.aten


def cast(
    model: nn.Module | None = None, *, keep_fp32: tuple[str, ...] = (), x: Tensor | None = None
) -> StepGraph:
    """The graph of a training step of ``model`` after the pass."""
    step, (default, y) = training_step(model)
    return graph_of(step, (default if x is None else x, y), [Cast(keep_fp32=keep_fp32)])[0]


def nodes(step: StepGraph, name: str, when: Phase | None = None) -> list[Node]:
    """The nodes of one ATen operator, of one phase."""
    found = [n for n in step.nodes() if str(n.target).startswith(f"aten.{name}.")]
    return [n for n in found if when in (None, phase(n))]


def dtypes(found: list[Node]) -> set[torch.dtype]:
    return {tensor(n).dtype for n in found}


def casts_of(step: StepGraph) -> Counter[tuple[Node, torch.dtype, Phase]]:
    return Counter(
        (n.all_input_nodes[0], tensor(n).dtype, phase(n))
        for n in inserted_by(step, "cast")
        if n in nodes(step, "_to_copy")
    )


def test_products_run_low_and_losses_high() -> None:
    step = cast()
    assert dtypes(nodes(step, "addmm")) == dtypes(nodes(step, "mm")) == {LOW}
    assert dtypes(nodes(step, "relu")) == {LOW}
    assert dtypes(nodes(step, "mse_loss")) == {torch.float32}
    assert LOW not in dtypes([n for n in step.nodes() if phase(n) is Phase.UPDATE])


def test_leaves_alone_what_has_nothing_to_cast() -> None:
    step, args = training_step()
    graph, (record,) = graph_of(step, args, [Cast(dtype=torch.float32)])
    assert record.inserted == 0
    assert not inserted_by(graph, "cast")
    _, (record,) = graph_of(lambda x: x * 2 + 1, (torch.arange(3),), [Cast()])
    assert record.inserted == 0
    assert not record.declined
    _, (record,) = graph_of(lambda x: x @ x, (torch.ones(3, 3, dtype=torch.float64),), [Cast()])
    assert record.inserted == 0


def test_applied_twice_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 2), nn.Softmax(-1))
    texts: list[str] = []

    class Look(Cast):
        def run(self, step: StepGraph, edit: Any) -> None:
            texts.append(to_text(step))

    step, args = training_step(model)
    _, records = graph_of(step, args, [Cast(), Look(), Cast(), Look()])
    assert records[2].inserted == records[2].removed == 0
    assert texts[0] == texts[1]


def test_a_value_with_many_users_is_cast_once_and_a_weight_once_per_direction() -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.tied = nn.Linear(4, 4), nn.Linear(4, 4)
            self.last = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.exp(self.first(x))
            return self.last(self.tied(h) + self.tied(h * 2) + h @ self.tied.weight)

    step = cast(Many())
    counts = casts_of(step)
    assert max(counts.values()) == 1
    (weight,) = (n for n, name in step.names.items() if name.endswith("tied.weight"))
    assert [key[2] for key in counts if key[0] is weight] == [Phase.FORWARD, Phase.BACKWARD]


def test_recurrent_weights_are_cast_once_not_once_per_time_step() -> None:
    class Rnn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.GRU(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x.expand(5, 6, 4))[0].sum(0))

    counts = casts_of(cast(Rnn()))
    assert max(counts.values()) == 1
    assert Counter(key[0].op for key in counts)["placeholder"] <= 2 * 6 + 2


def test_nothing_is_narrowed_only_to_be_widened() -> None:
    step = cast(
        nn.Sequential(nn.Linear(4, 8), nn.Softmax(-1), nn.LayerNorm(8), nn.Linear(8, 2), nn.Softplus())
    )
    made = nodes(step, "_to_copy")
    assert not [n for n in made if n.args[0] in made and tensor(n.args[0].args[0]).dtype == tensor(n).dtype]  # pyrefly: ignore[missing-attribute]


def test_casting_back_reads_the_value_it_was_widened_from() -> None:
    def step(x: Tensor) -> Tensor:
        h = x @ x
        return h.half().float() @ torch.exp(h)

    graph, _ = graph_of(step, (torch.randn(4, 4),), [Cast()])
    last = nodes(graph, "mm")[-1]
    assert last.all_input_nodes[0].kwargs["dtype"] is torch.float16, "the user's own half() feeds the product"


def test_user_casts_are_respected() -> None:
    def step(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return (x @ w).bfloat16() + 1, (x @ w).double() * 2

    graph, _ = graph_of(step, (torch.randn(4, 4), torch.randn(4, 4)), [Cast()])
    assert {tensor(n).dtype for n in graph.graph.output_node().all_input_nodes} == {
        torch.bfloat16,
        torch.float64,
    }
    assert dtypes(nodes(graph, "mm")) == {LOW}


def test_outputs_keep_their_dtype() -> None:
    graph, _ = graph_of(
        lambda x, w: (x @ w, (x @ w).half()), (torch.randn(4, 4), torch.randn(4, 4)), [Cast()]
    )
    assert [tensor(n).dtype for n in graph.graph.output_node().all_input_nodes] == [
        torch.float32,
        torch.float16,
    ]


def test_inputs_that_the_step_writes_are_not_cast() -> None:
    step = cast(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)))
    (norm,) = nodes(step, "_native_batch_norm_legit_functional")
    assert [tensor(n).dtype for n in norm.args[:5]] == [LOW, *[torch.float32] * 4]
    written = {n.all_input_nodes[0] for n in nodes(step, "copy_")}
    read_by = {u for n in inserted_by(step, "cast") for u in n.all_input_nodes if u in written}
    assert all(step.names[n].endswith(("weight", "bias")) for n in read_by)


def test_weight_gradients_are_stored_low_and_vectors_in_float32() -> None:
    step = cast(Mlp())
    assert {(tensor(n).ndim, tensor(n).dtype) for n in step.marks(GRAD)} == {(2, LOW), (1, torch.float32)}


class Tokens(nn.Module):
    """A class token and positions for all rows of the batch, zero at first as transformers' DeiT has them."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.places = nn.Parameter(torch.zeros(1, 1, 4)), nn.Parameter(torch.zeros(1, 7, 4))
        self.norm, self.head = nn.LayerNorm(4, eps=1e-12), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([self.token.expand(6, -1, -1), x[:, None].expand(-1, 6, -1)], 1) + self.places
        return self.head(self.norm(h))[:, 0]


def test_gradients_summed_over_a_batch_stay_in_float32() -> None:
    grads = [
        n for n in cast(Tokens()).nodes() if n.target is torch.ops.fxpass.mark.default and n.args[1] == GRAD
    ]
    assert {tuple(tensor(n).shape): tensor(n).dtype for n in grads} == {
        **dict.fromkeys([(1, 1, 4), (1, 7, 4), (4,), (2,)], torch.float32),
        (2, 4): LOW,
    }


@pytest.mark.parametrize("masked", [False, True])
def test_attention_weights_are_stored_low(masked: bool) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.v = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            scores = self.q(x) @ x.T
            scores = (
                scores + torch.zeros(6, 6).masked_fill(torch.ones(6, 6).triu() > 1, -1e9)
                if masked
                else scores
            )
            return scores.softmax(-1) @ self.v(x)

    step = cast(Attention())
    (backward,) = nodes(step, "_softmax_backward_data")
    assert [tensor(n).dtype for n in backward.args[:2]] == [LOW, LOW]
    assert backward.args[3] is LOW


def test_a_softmax_that_is_the_result_runs_in_float32() -> None:
    step = cast(nn.Sequential(nn.Linear(4, 2), nn.Softmax(-1)))
    assert dtypes(nodes(step, "_softmax")) == dtypes(nodes(step, "_softmax_backward_data")) == {torch.float32}


def test_numbers_beyond_float16_widen() -> None:
    graph, _ = graph_of(lambda x: (x @ x).masked_fill(x > 0, -1e9), (torch.randn(4, 4),), [Cast()])
    assert dtypes(nodes(graph, "masked_fill")) == {torch.float32}
    graph, _ = graph_of(lambda x: (x @ x).masked_fill(x > 0, float("-inf")), (torch.randn(4, 4),), [Cast()])
    assert dtypes(nodes(graph, "masked_fill")) == {LOW}


@torch.library.custom_op("fxpass_test::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return x * 2


@twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_an_unknown_operator_runs_in_float32_and_is_reported() -> None:
    graph, (record,) = graph_of(lambda x: twice(x @ x), (torch.randn(4, 4),), [Cast()])
    (node,) = (n for n in graph.nodes() if "twice" in str(n.target))
    assert tensor(node.args[0]).dtype is torch.float32
    assert [r for r in record.declined if "fxpass_test.twice" in r and "not in the op policy" in r]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_same_numbers(dtype: str) -> None:
    ours, (x, y) = Mlp(), (torch.randn(6, 4), torch.randn(6, 2))
    theirs = copy.deepcopy(ours)
    mp = MixedPrecision(dtype=dtype, codegen="eager", loss_scale=256.0)
    compiled, eager = torch.compile(training_step(ours)[0], backend=mp), training_step(theirs)[0]
    for _ in range(3):
        torch.testing.assert_close(compiled(x, y), eager(x, y), rtol=2e-2, atol=2e-3)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-2, atol=5e-3)
