"""The pipeline, in order."""

from __future__ import annotations

from ..options import Options
from .attention import Attention
from .cast import Cast
from .check_finite import CheckFinite
from .clip import Clip
from .clip_adaptive import ClipAdaptive
from .clip_value import ClipValue
from .data_parallel import DataParallel
from .decompose import Decompose
from .delay_wgrad import DelayWgrad
from .diagnose import Diagnose
from .embedding import Embedding
from .finish import Finish
from .grad_norm import GradNorm
from .graph_pass import GraphPass
from .hand_over import HandOver
from .recompute import Recompute
from .release import Release
from .scale_loss import ScaleLoss
from .second_backward import SecondBackward
from .shard import Shard
from .skip import Skip
from .unscale import Unscale
from .unscale_nonlinear import UnscaleNonlinear
from .update_scale import UpdateScale


def passes_for(options: Options) -> tuple[GraphPass, ...]:
    """The passes, in order, each with the options that it reads."""
    policy, dtype = options.policy, options.compute_dtype
    max_norm, norm_type = options.max_norm, options.norm_type
    return (
        ScaleLoss(),  # seed of each backward * scale
        UnscaleNonlinear(),  # clamps and the like in backward see gradients without the scale
        Cast(dtype=dtype, keep_fp32=options.keep_fp32),  # float16 where the policy says so
        Attention(),  # by the kernel for its dtype
        Embedding(),  # gradients of tables by rows
        # gradients: their mean over the ranks
        DataParallel(bucket_mb=options.bucket_mb, reduce_dtype=options.sum_dtype),
        # weights gathered, gradients reduced to this rank's rows
        Shard(
            dtype=dtype,
            keep_fp32=options.keep_fp32,
            bucket_mb=options.bucket_mb,
            reduce_dtype=options.sum_dtype,
        ),
        Unscale(),  # gradients * 1/scale, in float32
        CheckFinite(),  # one verdict over the gradients as stored
        GradNorm(norm_type=norm_type),  # the reported norm, before clipping
        ClipValue(clip_value=options.clip_value),  # each element
        ClipAdaptive(adaptive_clip=options.adaptive_clip),  # each row, by its parameter's norm
        Clip(max_norm=max_norm, norm_type=norm_type, clip_per=options.clip_per),  # all, or each, by norm
        Skip(skip=options.skip),  # where(found_inf, old, new)
        HandOver(),  # gradients left for others: finite
        UpdateScale(loss_scale=policy, dtype=dtype),  # growth, backoff, counters
        Diagnose(),  # per parameter: first inf or nan, magnitudes, underflow
        Decompose(),  # normalisations and softmax of forward, by their parts
        Recompute(memory_budget=options.memory_budget),  # what costs less again than to keep
        SecondBackward(release=options.release),  # gradients again, after the verdict
        DelayWgrad(),  # input gradients first
        Release(skip=options.skip, release=options.release),  # each update right behind its gradient
        Finish(),  # erase marks and dead nodes
    )


PASSES: tuple[type[GraphPass], ...] = tuple(type(made) for made in passes_for(Options()))
