"""The pipeline, in order."""

from __future__ import annotations

from ..options import Options
from .attention import Attention
from .base import GraphPass
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
from .hand_over import HandOver
from .recompute import Recompute
from .release import Release
from .scale_loss import ScaleLoss
from .second_backward import SecondBackward
from .skip import Skip
from .unscale import Unscale
from .unscale_nonlinear import UnscaleNonlinear
from .update_scale import UpdateScale

PASSES: tuple[type[GraphPass], ...] = (
    ScaleLoss,  # seed of each backward * scale
    UnscaleNonlinear,  # clamps and the like in backward see gradients without the scale
    Cast,  # float16 where the policy says so
    Attention,  # by the kernel for its dtype
    Embedding,  # gradients of tables by rows
    DataParallel,  # gradients: their mean over the ranks
    Unscale,  # gradients * 1/scale, in float32
    CheckFinite,  # one verdict over the gradients as stored
    GradNorm,  # the reported norm, before clipping
    ClipValue,  # each element
    ClipAdaptive,  # each row, by its parameter's norm
    Clip,  # all gradients, or each, by norm
    Skip,  # where(found_inf, old, new)
    HandOver,  # gradients left for others: finite
    UpdateScale,  # growth, backoff, counters
    Diagnose,  # per parameter: first inf or nan, magnitudes, underflow
    Decompose,  # normalisations and softmax of forward, by their parts
    Recompute,  # what costs less again than to keep
    SecondBackward,  # gradients again, after the verdict
    DelayWgrad,  # input gradients first
    Release,  # each update right behind its gradient
    Finish,  # erase marks and dead nodes
)


def passes_for(options: Options) -> list[GraphPass]:
    """``PASSES`` with their fields taken from the options of the same name."""
    return [
        cls(**{name: getattr(options, name) for name in cls.__dataclass_fields__ if hasattr(options, name)})
        for cls in PASSES
    ]
