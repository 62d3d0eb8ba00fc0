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

from enum import Enum

import torch


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

# Operators whose result shares its input's storage.
VIEWS = frozenset(
    "view _unsafe_view reshape _reshape_alias permute transpose t expand unsqueeze squeeze select slice alias "
    "detach split split_with_sizes unbind as_strided getitem".split()
)

_LOW = """
mm addmm bmm baddbmm mv addmv addr addbmm dot vdot linear _addmm_activation
convolution convolution_backward _convolution cudnn_convolution mkldnn_convolution conv_tbc
_scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_backward
_scaled_dot_product_efficient_attention _scaled_dot_product_efficient_attention_backward
_scaled_dot_product_cudnn_attention _scaled_dot_product_cudnn_attention_backward
_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention_for_cpu_backward
_scaled_dot_product_fused_attention_overrideable _scaled_dot_product_fused_attention_overrideable_backward
_thnn_fused_lstm_cell _thnn_fused_gru_cell mkldnn_rnn_layer mkldnn_rnn_layer_backward _cudnn_rnn
_cudnn_rnn_backward _trilinear prelu _prelu_kernel
"""

_NORM = """
native_layer_norm native_layer_norm_backward native_group_norm native_group_norm_backward
_fused_rms_norm _fused_rms_norm_backward
_native_batch_norm_legit_functional _native_batch_norm_legit _native_batch_norm_legit_no_training
native_batch_norm native_batch_norm_backward cudnn_batch_norm cudnn_batch_norm_backward
_batch_norm_with_update_functional _batch_norm_with_update batch_norm_backward
"""

_FOLLOW = """
add sub mul div neg abs rsub sqrt tanh sigmoid gelu silu relu leaky_relu elu hardtanh hardsigmoid hardswish
relu6 celu selu mish log_sigmoid_forward clamp clamp_min clamp_max maximum minimum where masked_fill
square sign floor ceil round trunc remainder fmod floor_divide positive
view _unsafe_view reshape _reshape_alias permute transpose t expand unsqueeze squeeze select slice
unbind split split_with_sizes chunk narrow diagonal as_strided alias detach lift_fresh_copy flip roll repeat
cat stack constant_pad_nd clone contiguous copy index index_select gather take_along_dim
masked_select unfold pixel_shuffle pixel_unshuffle native_dropout dropout bernoulli rand_like randn_like
max_pool2d_with_indices max_pool3d_with_indices avg_pool2d avg_pool1d avg_pool3d
_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d
reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d
embedding amax amin max min argmax argmin topk sort tril triu
eq ne lt le gt ge isnan isinf isfinite logical_not logical_and logical_or any all
zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty new_empty_strided
_to_copy to type_as getitem sym_size fill zero bitwise_not bitwise_and bitwise_or nonzero
slice_backward select_backward unfold_backward diagonal_backward unsafe_split unsafe_chunk
broadcast_tensors view_as _conj resolve_conj empty_strided
"""

_BACKWARD_FOLLOW = """
gelu_backward silu_backward sigmoid_backward tanh_backward threshold_backward leaky_relu_backward elu_backward
hardtanh_backward hardsigmoid_backward hardswish_backward mish_backward native_dropout_backward
log_sigmoid_backward softplus_backward
max_pool2d_with_indices_backward max_pool3d_with_indices_backward avg_pool2d_backward avg_pool3d_backward
_adaptive_avg_pool2d_backward _adaptive_avg_pool3d_backward adaptive_max_pool2d_backward
reflection_pad1d_backward reflection_pad2d_backward glu_backward _prelu_kernel_backward
"""

_WIDEST = """
lerp addcmul addcdiv atan2 cross bilinear index_put _index_put_impl index_add index_copy
scatter scatter_add scatter_reduce slice_scatter select_scatter as_strided_scatter diagonal_scatter
masked_scatter masked_scatter_backward hypot glu
"""

_HIGH = """
_log_softmax _log_softmax_backward_data log_softmax nll_loss_forward nll_loss_backward
nll_loss2d_forward nll_loss2d_backward mse_loss mse_loss_backward smooth_l1_loss smooth_l1_loss_backward
huber_loss huber_loss_backward kl_div binary_cross_entropy binary_cross_entropy_backward
binary_cross_entropy_with_logits soft_margin_loss soft_margin_loss_backward _ctc_loss _ctc_loss_backward
multi_margin_loss multi_margin_loss_backward multilabel_margin_loss_forward multilabel_margin_loss_backward
l1_loss cosine_embedding_loss xlogy
exp expm1 exp2 log log1p log2 log10 pow reciprocal rsqrt erf erfc erfinv tan acos asin atan sinh cosh asinh acosh
atanh sin cos softplus logsumexp digamma lgamma logit sinc
sum mean var var_mean std std_mean prod cumsum cumprod logcumsumexp linalg_vector_norm norm _cdist_forward
_cdist_backward _pdist_forward dist logaddexp logaddexp2 renorm nansum
upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d upsample_bicubic2d
upsample_linear1d upsample_trilinear3d upsample_nearest1d_backward upsample_nearest2d_backward
upsample_nearest3d_backward upsample_bilinear2d_backward upsample_bicubic2d_backward upsample_linear1d_backward
upsample_trilinear3d_backward grid_sampler_2d grid_sampler_2d_backward grid_sampler_3d
_upsample_bilinear2d_aa _upsample_bilinear2d_aa_backward
embedding_dense_backward _embedding_bag _embedding_bag_backward _unsafe_masked_index_put_accumulate
_unsafe_index _unsafe_index_put _unsafe_masked_index
_softmax _softmax_backward_data _safe_softmax
_fft_r2c _fft_c2c _fft_c2r histc bucketize
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


def op_name(target: object) -> str:
    """The policy's name of an operator: ``aten.add.Tensor`` is ``add``."""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[-1]
    return getattr(target, "__name__", str(target))


def colour_of(target: object) -> Colour | None:
    """The colour of an operator; None if the policy does not know it."""
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "fxpass":
        return Colour.FOLLOW
    if isinstance(target, torch._ops.OpOverload) and target.namespace not in ("aten", "prims"):
        return None
    return COLOURS.get(op_name(target))
