"""How an operator's result grows with the gradient that it reads: the table behind unscale_nonlinear.

The loss scale S is positive and multiplies the seed of backward. A value that
descends from the seed is S times the unscaled one as long as every operator on
the way is positively homogeneous of degree one in it: sums, products with what
does not descend, views, absolute values, maxima. Autograd's own backwards are
all linear in their gradients. A sign or a comparison with zero is free of S.
A clamp, a square, a comparison with 0.1 is neither.
"""

from __future__ import annotations

from enum import Enum
from math import inf

import torch
from torch.fx import Node

from ..ir.alias import is_view
from ..ir.marks import MARK
from .policy import Colour, colour_of, op_name


class Growth(str, Enum):
    """The rule of one operator."""

    SHAPE = "shape"  # reads no values
    JOINT = "joint"  # of degree one in all its floating operands together
    FREE = "free"  # the same result whatever factor all its floating operands have
    PRODUCT = "product"  # degrees of the operands add up
    QUOTIENT = "quotient"  # degrees are subtracted
    GRADS = "grads"  # of degree one in the operands `gradients` names, none in the others
    OTHER = "other"


_SHAPE = """
zero zeros_like ones_like empty_like full_like rand_like randn_like randint_like new_zeros new_ones new_full
new_empty new_empty_strided sym_size sym_stride sym_numel sym_storage_offset
"""

_JOINT = """
add sub rsub neg sum mean nansum nanmean cumsum trace diff cat stack clone contiguous _to_copy lift_fresh_copy
convert_element_type device_put flip roll rot90 repeat repeat_interleave tril triu index index_select gather
take_along_dim take masked_select unfold expand_copy permute_copy constant_pad_nd where masked_fill index_put
_index_put_impl _unsafe_index _unsafe_index_put _unsafe_masked_index _unsafe_masked_index_put_accumulate
index_add index_copy index_fill scatter scatter_add slice_scatter select_scatter as_strided_scatter
diagonal_scatter masked_scatter pixel_shuffle pixel_unshuffle native_channel_shuffle im2col col2im abs relu
leaky_relu threshold clamp clamp_min clamp_max maximum minimum fmax fmin amax amin max min sort msort topk
kthvalue median nanmedian mode cummax cummin aminmax linalg_vector_norm norm std hypot
avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d max_pool2d_with_indices
max_pool3d_with_indices adaptive_max_pool2d reflection_pad1d reflection_pad2d reflection_pad3d
replication_pad1d replication_pad2d replication_pad3d upsample_nearest1d upsample_nearest2d
upsample_nearest3d upsample_bilinear2d upsample_bicubic2d upsample_linear1d upsample_trilinear3d
_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d _fft_r2c _fft_c2c _fft_c2r
_conj resolve_conj complex view_as_complex view_as_real real imag conj_physical resolve_neg _conj_physical
unsafe_split unsafe_chunk broadcast_tensors fill slice_inverse diag_embed copy
all_reduce broadcast all_gather_into_tensor reduce_scatter_tensor all_to_all_single wait_tensor
average gather_rows average_rows
"""

_FREE = """
sign sgn signbit isnan isinf isfinite isneginf isposinf argmax argmin argsort nonzero count_nonzero
logical_not logical_and logical_or logical_xor any all equal eq ne lt le gt ge atan2 cosine_similarity
"""

_PRODUCT = """
mul mm bmm matmul mv dot vdot linear convolution _convolution cudnn_convolution mkldnn_convolution conv_tbc
conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d einsum outer tensordot linalg_cross
linalg_vecdot _trilinear bilinear kron addmm baddbmm addmv addr addbmm addcmul lerp native_dropout dropout
linalg_solve_triangular cholesky_solve _linalg_solve_ex linalg_lu_solve
"""

_QUOTIENT = "div true_divide"

GROWTH: dict[str, Growth] = {
    name: growth
    for growth, names in (
        (Growth.SHAPE, _SHAPE),
        (Growth.JOINT, _JOINT),
        (Growth.FREE, _FREE),
        (Growth.PRODUCT, _PRODUCT),
        (Growth.QUOTIENT, _QUOTIENT),
    )
    for name in names.split()
}

# Operands that products do not multiply, by position: with the others they add up, or divide.
ADDED = {"addmm": (0,), "baddbmm": (0,), "addmv": (0,), "addr": (0,), "addbmm": (0,), "addcmul": (0,)}
DIVISORS = {
    "linalg_solve_triangular": (0,), "_linalg_solve_ex": (0,), "cholesky_solve": (1,), "linalg_lu_solve": (0,)
}  # fmt: skip
# Operators linear in one operand, by position; autograd's backwards name theirs.
_LINEAR_IN = {"xlogy": (0,), "special_xlog1py": (0,)}
# Operands whose values do not matter, by position.
_OVERWRITTEN = {"copy": 0, "fill": 0}

# Numbers that multiply or count: all others are added, compared with or put in place.
_FACTORS = frozenset("alpha beta negative_slope dim dims ord p correction value_factor".split())


def growth_of(node: Node) -> Growth:
    """The rule of a node that reads a descendant of the seed."""
    name = op_name(node.target)
    if node.target is MARK or is_view(node):
        return Growth.JOINT
    if not isinstance(node.target, torch._ops.OpOverload):
        return Growth.OTHER
    if node.target.namespace not in ("aten", "prims", "fxpass"):
        return Growth.OTHER
    if name in _LINEAR_IN or ("backward" in name and name not in GROWTH):
        return Growth.GRADS
    growth = GROWTH.get(name, Growth.OTHER)
    if name == "pow" and node.args[1] == 1:
        return Growth.JOINT
    if growth in (Growth.JOINT, Growth.FREE) and _has_offset(node):
        return Growth.OTHER
    if name == "div" and (node.kwargs.get("rounding_mode") or not isinstance(node.args[0], Node)):
        return Growth.OTHER
    if name == "linalg_vector_norm" and len(node.args) > 1 and node.args[1] == 0:
        return Growth.OTHER
    return growth


def reads_values(node: Node) -> bool:
    """Whether the result depends on more than the shapes of the inputs."""
    return GROWTH.get(op_name(node.target)) is not Growth.SHAPE


def operands(node: Node) -> list[Node]:
    """The values that a node computes with."""
    name = op_name(node.target)
    ignored = node.args[_OVERWRITTEN[name]] if name in _OVERWRITTEN else None
    return [n for n in node.all_input_nodes if n is not ignored]


def gradients(node: Node) -> list[Node]:
    """The operands in which an operator is linear: of autograd's backwards, the gradients."""
    assert isinstance(node.target, torch._ops.OpOverload)
    if op_name(node.target) in _LINEAR_IN:
        return [n for i in _LINEAR_IN[op_name(node.target)] if isinstance(n := node.args[i], Node)]
    values = [a for a, p in zip(node.args, node.target._schema.arguments, strict=False) if _is_grad(p.name)]
    values = [n for a in values for n in (a if isinstance(a, (list, tuple)) else (a,))]
    return [n for n in values or node.args[:1] if isinstance(n, Node)]  # conv_tbc_backward calls it self


def is_product(node: Node) -> bool:
    """Whether a node multiplies in low precision or is one of autograd's backwards: it wants the scale."""
    return colour_of(node.target) is Colour.LOW or "backward" in op_name(node.target)


def is_zero(node: Node) -> bool:
    """Whether a value is zero everywhere, and so the same whatever it is multiplied by."""
    while (is_view(node) or op_name(node.target) in ("_to_copy", "clone")) and isinstance(node.args[0], Node):
        node = node.args[0]
    name = op_name(node.target)
    at = {"full": 1, "full_like": 1, "new_full": 2, "scalar_tensor": 0}.get(name)
    return name in ("zeros", "zeros_like", "new_zeros") or (at is not None and node.args[at] in (0, 0.0))


def _is_grad(name: str) -> bool:
    return name.startswith(("grad", "dY", "dout", "output_grad", "gO", "tangent")) or name == "self_grad"


def _has_offset(node: Node) -> bool:
    """Whether a number other than zero or infinity is added, compared with or put in place."""
    assert isinstance(node.target, torch._ops.OpOverload)
    for position, parameter in enumerate(node.target._schema.arguments):
        given = node.args[position] if position < len(node.args) else node.kwargs.get(parameter.name)
        kind = parameter.type
        if isinstance(kind, torch._C.OptionalType):
            kind = kind.getElementType()
        if kind.kind() not in ("NumberType", "TensorType", "FloatType") or parameter.name in _FACTORS:
            continue
        number = given.meta.get("val") if isinstance(given, Node) else given
        if isinstance(number, (torch.SymInt, torch.SymFloat)):
            return True
        if isinstance(number, (int, float)) and number not in (0, inf, -inf) and not isinstance(number, bool):
            return True
    return False
