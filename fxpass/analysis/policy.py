"""Which precision each ATen operator runs in: the op policy, as data.

Colours (docs/op-policy.md explains each row and compares it with torch.amp):

- LOW: float16/bfloat16 inputs; the kernel accumulates in float32 itself.
- HIGH: float32 inputs.
- NORM: follows its ``input``; statistics, weight and bias stay float32.
- FOLLOW: the operands' own type promotion decides; no cast is inserted.
- BACKWARD_FOLLOW: like FOLLOW, gradient operands take the dtype of what forward saved.
- WIDEST: all floating operands in the widest of their dtypes.

An operator in no list is HIGH, and reported.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from enum import Enum
from math import frexp, inf, isnan, ldexp, log2, nan

import torch
from torch.fx import Node

from ..ir.alias import VIEWS as VIEWS


class Colour(str, Enum):
    """The precision rule of an operator."""

    LOW = "low"
    HIGH = "high"
    NORM = "norm"
    FOLLOW = "follow"
    BACKWARD_FOLLOW = "backward_follow"
    WIDEST = "widest"


# Arguments (by schema name) that keep their dtype whatever the colour.
PINNED_ARGUMENTS = frozenset(
    {"logsumexp", "running_mean", "running_var", "save_mean", "save_invstd", "save_var"}
)

# Arguments of NORM operators that follow the activations.
ACTIVATIONS = frozenset({"input", "grad_out", "grad_output", "X", "dY"})

# Arguments (by schema name) that only the kernel which made them can read.
_SAVED = frozenset("logsumexp philox_seed philox_offset rng_state reserve reserveSpace workspace".split())

# Operators that add: a small operand counts by its size beside values near 1.
SUMS = frozenset("add sub rsub".split())
# Operators that bound their operand.
_BOUNDS = frozenset("maximum minimum clamp clamp_min clamp_max".split())
_PRODUCTS = frozenset("mul div".split())

# Operators that fill a tensor with one number, and where it stands among their arguments.
_NUMBER_AT = {"scalar_tensor": 0, "full": 1, "full_like": 1, "new_full": 2}
# Operators whose result is full of the number that their input is full of.
_SAME_NUMBER = VIEWS | frozenset("lift_fresh_copy _to_copy clone".split())

# Functions that are infinite at zero: what they read keeps float32's digits (1 - p, an epsilon).
LOGARITHMS = frozenset(
    "log log1p log2 log10 logit xlogy special_entr atanh erfinv logaddexp binary_cross_entropy".split()
)
# Functions of single elements in HIGH, which arithmetic goes through.
POINTWISE_HIGH = frozenset(
    "exp expm1 exp2 pow float_power reciprocal rsqrt erf erfc tan acos asin atan sinh cosh asinh acosh sin "
    "cos softplus log log1p log2 log10".split()
)

_LOW = """
mm addmm bmm baddbmm mv addmv addr addbmm linear _addmm_activation convolution convolution_backward
_convolution cudnn_convolution mkldnn_convolution conv_tbc _scaled_dot_product_flash_attention
_scaled_dot_product_flash_attention_backward _scaled_dot_product_efficient_attention
_scaled_dot_product_efficient_attention_backward _scaled_dot_product_cudnn_attention
_scaled_dot_product_cudnn_attention_backward _scaled_dot_product_flash_attention_for_cpu
_scaled_dot_product_flash_attention_for_cpu_backward _scaled_dot_product_fused_attention_overrideable
_scaled_dot_product_fused_attention_overrideable_backward _thnn_fused_lstm_cell _thnn_fused_gru_cell
mkldnn_rnn_layer mkldnn_rnn_layer_backward _cudnn_rnn _cudnn_rnn_backward _trilinear prelu _prelu_kernel
conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d cudnn_convolution_transpose matmul
einsum chain_matmul linalg_vecdot linalg_multi_dot lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell
scaled_dot_product_attention _native_multi_head_attention
"""

_NORM = """
native_layer_norm native_layer_norm_backward native_group_norm native_group_norm_backward _fused_rms_norm
_fused_rms_norm_backward _native_batch_norm_legit_functional _native_batch_norm_legit
_native_batch_norm_legit_no_training native_batch_norm native_batch_norm_backward cudnn_batch_norm
cudnn_batch_norm_backward _batch_norm_with_update_functional _batch_norm_with_update batch_norm_backward
layer_norm group_norm rms_norm
"""

_FOLLOW = """
add sub mul div neg abs rsub sqrt tanh sigmoid gelu silu relu leaky_relu elu hardtanh hardsigmoid hardswish
relu6 celu selu mish log_sigmoid_forward clamp clamp_min clamp_max maximum minimum where masked_fill square
sign floor ceil round trunc remainder fmod floor_divide positive view _unsafe_view reshape _reshape_alias
permute transpose t expand unsqueeze squeeze select slice unbind split split_with_sizes chunk narrow diagonal
as_strided alias detach lift_fresh_copy flip roll repeat cat stack constant_pad_nd clone contiguous copy index
index_select gather take_along_dim masked_select unfold pixel_shuffle pixel_unshuffle native_dropout dropout
bernoulli rand_like randn_like max_pool2d_with_indices max_pool3d_with_indices avg_pool2d avg_pool1d
_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d reflection_pad1d reflection_pad2d
replication_pad1d replication_pad2d embedding amax amin max min argmax argmin topk sort tril triu eq ne lt le
gt ge isnan isinf isfinite logical_not logical_and logical_or any all zeros_like ones_like full_like
empty_like new_zeros new_ones new_full new_empty new_empty_strided _to_copy to type_as getitem sym_size fill
zero bitwise_not bitwise_and bitwise_or nonzero slice_backward select_backward unfold_backward
diagonal_backward unsafe_split unsafe_chunk broadcast_tensors view_as _conj resolve_conj empty_strided
convert_element_type device_put kthvalue median nanmedian mode cummax cummin aminmax argsort msort rot90
movedim repeat_interleave isneginf isposinf signbit heaviside sgn frac copysign nan_to_num logical_xor isin
count_nonzero unique_consecutive hardshrink softshrink threshold 
native_channel_shuffle im2col col2im max_unpool2d max_unpool3d fractional_max_pool2d fractional_max_pool3d
adaptive_max_pool3d reflection_pad3d replication_pad3d max_pool1d max_pool2d max_pool3d adaptive_avg_pool1d
adaptive_avg_pool2d adaptive_avg_pool3d normal_functional uniform exponential geometric multinomial
randint_like expand_copy permute_copy equal item _local_scalar_dense
all_reduce broadcast all_gather_into_tensor reduce_scatter_tensor all_to_all_single wait_tensor
"""

_BACKWARD_FOLLOW = """
gelu_backward silu_backward sigmoid_backward tanh_backward threshold_backward leaky_relu_backward elu_backward
hardtanh_backward hardsigmoid_backward hardswish_backward mish_backward native_dropout_backward
log_sigmoid_backward softplus_backward max_pool2d_with_indices_backward max_pool3d_with_indices_backward
avg_pool2d_backward _adaptive_avg_pool2d_backward _adaptive_avg_pool3d_backward
adaptive_max_pool2d_backward reflection_pad1d_backward reflection_pad2d_backward glu_backward
_prelu_kernel_backward hardshrink_backward softshrink_backward 
reflection_pad3d_backward replication_pad1d_backward replication_pad2d_backward replication_pad3d_backward
adaptive_max_pool3d_backward fractional_max_pool2d_backward fractional_max_pool3d_backward
"""

_WIDEST = """
dot vdot tensordot linalg_cross isclose lerp addcmul addcdiv atan2 cross bilinear index_put _index_put_impl
index_add index_copy scatter scatter_add scatter_reduce slice_scatter select_scatter as_strided_scatter
diagonal_scatter masked_scatter masked_scatter_backward hypot glu
"""

_HIGH = """
_log_softmax _log_softmax_backward_data log_softmax nll_loss_forward nll_loss_backward nll_loss2d_forward
nll_loss2d_backward mse_loss mse_loss_backward smooth_l1_loss smooth_l1_loss_backward huber_loss
huber_loss_backward kl_div binary_cross_entropy binary_cross_entropy_backward binary_cross_entropy_with_logits
soft_margin_loss soft_margin_loss_backward _ctc_loss _ctc_loss_backward multi_margin_loss
multi_margin_loss_backward multilabel_margin_loss_forward multilabel_margin_loss_backward l1_loss
cosine_embedding_loss xlogy exp expm1 exp2 log log1p log2 log10 pow reciprocal rsqrt erf erfc erfinv tan acos
asin atan sinh cosh asinh acosh atanh sin cos softplus logsumexp digamma lgamma logit sinc sum mean var
var_mean std std_mean prod cumsum cumprod logcumsumexp linalg_vector_norm norm _cdist_forward _cdist_backward
_pdist_forward dist logaddexp logaddexp2 renorm nansum upsample_nearest1d upsample_nearest2d
upsample_nearest3d upsample_bilinear2d upsample_bicubic2d upsample_linear1d upsample_trilinear3d
upsample_nearest1d_backward upsample_nearest2d_backward upsample_nearest3d_backward
upsample_bilinear2d_backward upsample_bicubic2d_backward upsample_linear1d_backward
upsample_trilinear3d_backward grid_sampler_2d grid_sampler_2d_backward grid_sampler_3d _upsample_bilinear2d_aa
_upsample_bilinear2d_aa_backward embedding_dense_backward _embedding_bag _embedding_bag_backward
_unsafe_masked_index_put_accumulate _unsafe_index _unsafe_index_put _unsafe_masked_index _softmax
_softmax_backward_data _safe_softmax _fft_r2c _fft_c2c _fft_c2r histc bucketize searchsorted softmax
frobenius_norm nuclear_norm linalg_matrix_norm cosine_similarity cdist pdist _pdist_backward nll_loss
nll_loss2d poisson_nll_loss hinge_embedding_loss margin_ranking_loss multilabel_margin_loss
triplet_margin_loss ctc_loss cross_entropy_loss grid_sampler grid_sampler_3d_backward
_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d _upsample_bicubic2d_aa
_upsample_nearest_exact1d_backward _upsample_nearest_exact2d_backward _upsample_nearest_exact3d_backward
_upsample_bicubic2d_aa_backward erfcx special_entr special_log1p i0 igamma polygamma mvlgamma float_power
ldexp logit_backward _weight_norm_interface _weight_norm_interface_backward trace quantile nanquantile nanmean
polar complex view_as_complex linalg_cholesky_ex linalg_inv_ex _linalg_svd linalg_qr _linalg_eigh
_linalg_solve_ex _linalg_det _linalg_slogdet linalg_lu_factor_ex linalg_solve_triangular linalg_lstsq
linalg_pinv fake_quantize_per_tensor_affine _masked_softmax avg_pool3d avg_pool3d_backward
rrelu_with_noise_functional rrelu_with_noise_backward packed_rnn packed_rnn_backward ctc_loss_backward
linear_sum_assignment
"""

COLOURS: dict[str, Colour] = {
    name: colour
    for colour, names in (
        (Colour.LOW, _LOW),
        (Colour.NORM, _NORM),
        (Colour.FOLLOW, _FOLLOW),
        (Colour.BACKWARD_FOLLOW, _BACKWARD_FOLLOW),
        (Colour.WIDEST, _WIDEST),
        (Colour.HIGH, _HIGH),
    )
    for name in names.split()
}


_NAMESPACES = ("aten", "prims", "_c10d_functional")


def op_name(target: object) -> str:
    """The policy's name of an operator: ``aten.add.Tensor`` is ``add``."""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[-1]
    return getattr(target, "__name__", str(target))


def colour_of(target: object) -> Colour | None:
    """The colour of an operator; None if the policy does not know it."""
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "fxpass":
        return COLOURS.get(op_name(target), Colour.FOLLOW)
    if isinstance(target, torch._ops.OpOverload) and target.namespace not in _NAMESPACES:
        return None
    return COLOURS.get(op_name(target))


def has_saved_state(node: Node) -> bool:
    """Whether a backward reads what one kernel has saved for it, in the dtype that it ran in."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(a.name in _SAVED for a in schema.arguments)


def read_by_low_only(node: Node, kept: AbstractSet[Node]) -> bool:
    """Whether all readers, through views and dropout, are LOW and not ``kept``, or softmax's own backward."""
    passing = VIEWS | {"native_dropout", "native_dropout_backward", "clone", "mul", "_to_copy"}
    pending, seen = list(node.users), set(node.users)
    while pending:
        user = pending.pop()
        name = op_name(user.target)
        if user in kept:
            return False
        if colour_of(user.target) is Colour.LOW or name == "_softmax_backward_data":
            continue
        if name not in passing or not user.users:
            return False
        pending += [n for n in user.users if n not in seen]
        seen.update(user.users)
    return bool(node.users)


def has_number_beyond(node: Node, limit: float) -> bool:
    """Whether a number among the arguments exceeds ``limit`` and is finite: a mask of -1e9, say."""
    return any(isnan(v) or limit < abs(v) < inf for v in _numbers(node))


def has_number_lost(node: Node, low: torch.dtype) -> bool:
    """Whether ``low`` loses a number among the arguments.

    A term of a sum is lost beside values near 1 (an epsilon of 1e-8), a bound or
    a factor below the normal numbers, and any but a factor if it becomes a small
    whole number (a bound of 1 - 1e-7).
    """
    info, name = torch.finfo(low), op_name(node.target)
    smallest = info.eps / 2 if name in SUMS else info.tiny
    numbers = _numbers(node)
    if any(isnan(v) or 0 < abs(v) < smallest for v in numbers):
        return True
    return name not in _PRODUCTS and any(
        abs(v) < 16 and v % 1 != 0 and _rounded(v, info.eps) % 1 == 0 for v in numbers
    )


def _rounded(value: float, eps: float) -> float:
    """``value`` with as many digits as a dtype with that ``eps`` has."""
    fraction, exponent = frexp(value)
    bits = 1 - round(log2(eps))
    return ldexp(round(ldexp(fraction, bits)), exponent - bits)


def _numbers(node: Node) -> list[float]:
    """The numbers that take part in the node's arithmetic; nan for one that cannot be known here."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return []
    given = {**dict(zip((a.name for a in schema.arguments), node.args, strict=False)), **node.kwargs}
    values = [given.get(a.name) for a in schema.arguments if _is_number(a.type)]
    values += [_constant(n, op_name(node.target)) for n in node.all_input_nodes]
    return [float(v) for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]


def _is_number(kind: torch._C.JitType) -> bool:
    if isinstance(kind, torch._C.OptionalType):
        kind = kind.getElementType()
    return kind.kind() in ("NumberType", "FloatType", "TensorType")  # add.Tensor(x, 1e-8): a number as tensor


def _constant(node: Node, user: str) -> object:
    """The number that a tensor is full of; one without dimensions does not widen what it meets."""
    while op_name(node.target) in _SAME_NUMBER and isinstance(node.args[0], Node):
        node = node.args[0]
    name = op_name(node.target)
    if name in _NUMBER_AT:
        return node.args[_NUMBER_AT[name]]
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.ndim > 0 or not value.is_floating_point():
        return None
    unknown = node.op == "get_attr" or (node.op == "placeholder" and user in SUMS | _BOUNDS)
    return nan if unknown else None
