"""The op policy: its lists, torch.amp's lists, and the page that explains them."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from fxpass.analysis import policy
from fxpass.analysis.policy import COLOURS, Colour, colour_of, op_name

aten = torch.ops.aten
PAGE = Path(__file__).parents[2] / "docs" / "op-policy.md"

# torch.amp's lists for CUDA, torch 2.13 (banned: binary_cross_entropy)
AMP_LOW = """
_convolution conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d conv_transpose3d convolution
cudnn_convolution cudnn_convolution_transpose prelu addmm addmv addr matmul einsum mm mv linalg_vecdot linear
addbmm baddbmm bmm chain_matmul linalg_multi_dot _thnn_fused_lstm_cell _thnn_fused_gru_cell lstm_cell gru_cell
rnn_tanh_cell rnn_relu_cell _scaled_dot_product_flash_attention scaled_dot_product_attention
"""
AMP_HIGH = """
acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow softplus frobenius_norm
nuclear_norm cosine_similarity poisson_nll_loss cosine_embedding_loss nll_loss nll_loss2d hinge_embedding_loss
kl_div l1_loss smooth_l1_loss huber_loss mse_loss margin_ranking_loss multilabel_margin_loss soft_margin_loss
triplet_margin_loss multi_margin_loss binary_cross_entropy_with_logits dist pdist cdist renorm logsumexp
upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d
_upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d _upsample_bilinear2d_aa upsample_trilinear3d
upsample_bicubic2d _upsample_bicubic2d_aa prod softmax log_softmax cumprod cumsum linalg_vector_norm
linalg_matrix_norm sum norm
"""
AMP_NORM = "layer_norm native_layer_norm rms_norm group_norm"
AMP_WIDEST = "addcdiv addcmul atan2 bilinear cross dot vdot index_put tensordot scatter_add"


@pytest.mark.parametrize(
    ("names", "colour"),
    [
        (AMP_LOW, Colour.LOW),
        (AMP_HIGH, Colour.HIGH),
        (AMP_NORM, Colour.NORM),
        (AMP_WIDEST, Colour.WIDEST),
    ],
    ids=["low", "high", "norm", "widest"],
)
def test_agrees_with_torch_amp(names: str, colour: Colour) -> None:
    assert {name: COLOURS.get(name) for name in names.split()} == dict.fromkeys(names.split(), colour)


def test_each_operator_has_one_colour() -> None:
    lists = [getattr(policy, f"_{colour.name}") for colour in Colour]
    counts = Counter(name for names in lists for name in names.split())
    assert [name for name, count in counts.items() if count > 1] == []
    assert set(counts) == set(COLOURS)


def test_every_name_is_an_operator_of_torch() -> None:
    homes = (aten, torch.ops.prims, torch.ops.fxpass, torch.ops._c10d_functional)
    known = lambda name: any(hasattr(home, name) for home in homes) or name == "getitem"  # noqa: E731
    assert [name for name in COLOURS if not known(name)] == []


@pytest.mark.parametrize("colour", Colour)
def test_the_page_names_the_operators_of_the_code(colour: Colour) -> None:
    (section,) = re.findall(rf"^## {colour.name}$(.*?)(?=^## |\Z)", PAGE.read_text(), re.S | re.M)
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| ")]
    written = Counter(name for row in rows for name in re.findall(r"`(\w+)`", row))
    assert written == Counter(name for name, its in COLOURS.items() if its is colour)


def test_the_page_names_the_pinned_arguments() -> None:
    text = PAGE.read_text()
    assert [name for name in policy.PINNED_ARGUMENTS | policy.ACTIVATIONS if name not in text] == []


def test_names_and_colours_of_targets() -> None:
    assert op_name(aten.add.Tensor) == op_name(aten.add.Scalar) == "add"
    assert colour_of(aten.mm.default) is Colour.LOW
    assert colour_of(aten.exp.default) is Colour.HIGH
    assert colour_of(torch.ops.fxpass.mark.default) is Colour.FOLLOW
    assert colour_of(torch.ops.quantized.add.default) is None
