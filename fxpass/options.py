"""The options of the backend: one frozen dataclass, checked field by field."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .errors import OptionError, nearest
from .ir.dtypes import COMPUTE, named
from .scaling import NAMED, LossScale, policy_of


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _quoted(text: str) -> str:
    return f'"{text}"'


def _choice(*allowed: Any) -> tuple[Callable[[Any], bool], str]:
    return (lambda v: type(v) in map(type, allowed) and v in allowed, " or ".join(map(repr, allowed)))


_positive: tuple[Callable[[Any], bool], str] = (
    lambda v: v is None or (_number(v) and v > 0),
    "None or a finite number > 0",
)

_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "dtype": (lambda v: v in COMPUTE.values(), "float16, bfloat16 or float32, as a torch dtype or its name"),
    "loss_scale": (
        lambda v: v is None or isinstance(v, LossScale),
        f'{", ".join(map(_quoted, NAMED))}, a number > 0 (static; also "128.0" or "2**7"), '
        "None or a LossScale object",
    ),
    "max_norm": _positive,
    "norm_type": (lambda v: v == math.inf or (_number(v) and v == 2.0), "2.0 or inf"),
    "clip_per": _choice("global", "optimizer", "group", "parameter"),
    "clip_value": _positive,
    "adaptive_clip": _positive,
    "grads": _choice("drop", "keep"),
    "skip": _choice("step", "tensor"),
    "release": _choice(False, True),
    "memory_budget": (
        lambda v: v is None or (_number(v) and 0 <= v <= 1),
        "None or a number from 0 to 1: the share of activation bytes that may stay alive",
    ),
    "outline": _choice("auto", "off"),
    "keep_fp32": (
        lambda v: isinstance(v, tuple) and all(isinstance(p, str) for p in v),
        "a tuple of fnmatch patterns over module names",
    ),
    "data_parallel": (
        lambda v: v is None or _is_group(v),
        "None, a torch.distributed.ProcessGroup or a DeviceMesh of one dimension",
    ),
    "reduce_dtype": (
        lambda v: v is None or v is torch.float32,
        "None (the gradient's own) or float32, as a torch dtype or its name",
    ),
    "bucket_mb": (lambda v: _number(v) and v >= 0, "a number >= 0: MiB of gradients reduced together"),
    "verify": _choice(True, False),
    "progress": _choice(True, False),
    "inductor": (
        lambda v: isinstance(v, Mapping) and all(isinstance(k, str) for k in v),
        "a dict of torch._inductor.config settings",
    ),
    "codegen": _choice("inductor", "eager"),
}


@dataclass(frozen=True, eq=False)
class Options:
    """The settings of one compiled step; see README for the table of what each does.

    Raises:
        OptionError: a value of the wrong type or out of range.
    """

    dtype: torch.dtype | str = torch.float16
    loss_scale: LossScale | str | float | None = "auto"
    max_norm: float | None = None
    norm_type: float = 2.0
    clip_per: str = "global"
    clip_value: float | None = None
    adaptive_clip: float | None = None
    grads: str = "drop"
    skip: str = "step"
    release: bool = False
    memory_budget: float | None = None
    outline: str = "auto"
    keep_fp32: tuple[str, ...] = ()
    data_parallel: Any = None
    reduce_dtype: torch.dtype | str | None = None
    bucket_mb: float = 25.0
    verify: bool = True
    progress: bool = True
    inductor: Mapping[str, Any] = field(default_factory=dict)
    codegen: str = "inductor"

    def __post_init__(self) -> None:
        dtype = _dtype(self.dtype)
        object.__setattr__(self, "dtype", dtype)
        object.__setattr__(self, "reduce_dtype", _dtype(self.reduce_dtype))
        patterns = self.keep_fp32
        if isinstance(patterns, list):
            object.__setattr__(self, "keep_fp32", tuple(patterns))
        if isinstance(self.loss_scale, str) and self.loss_scale == "auto":
            object.__setattr__(self, "loss_scale", "dynamic" if dtype is torch.float16 else None)
        object.__setattr__(self, "loss_scale", policy_of(self.loss_scale))
        for name, (ok, allowed) in _RULES.items():
            value = getattr(self, name)
            if not ok(value):
                raise OptionError(f"option {name}={value!r}: allowed is {allowed}")
        _check_clipping(self)
        self._check_together()

    def _check_together(self) -> None:
        """Raise for settings that contradict each other."""
        if self.skip == "tensor" and self.max_norm is not None and self.clip_per != "parameter":
            found = f"option skip='tensor' with max_norm={self.max_norm:g}: a common norm is known only when "
            found += "all gradients are there, and skip='tensor' frees each before the next is computed"
            hint = (
                "use release=True (exact norm and skip, a second backward), skip='step', or a clip that "
                "looks at one gradient: clip_per='parameter', clip_value or adaptive_clip"
            )
            raise OptionError(found, hint=hint)
        if self.inductor and self.codegen == "eager":
            hint = "drop one of them: codegen='eager' runs the graph without Inductor"
            raise OptionError(f"option inductor={dict(self.inductor)!r} with codegen='eager'", hint=hint)
        if self.release and self.skip == "tensor":
            hint = "drop release: skip='tensor' already frees each gradient at once"
            raise OptionError("option release=True with skip='tensor'", hint=hint)
        if self.release and self.grads == "keep":
            hint = "drop one of them: gradients that are kept for the user cannot be released"
            raise OptionError("option release=True with grads='keep'", hint=hint)

    def check_sharded(self) -> None:
        """Raise for settings that a step with parameters of ``fxpass.shard_`` does not know."""
        known = {
            "skip": "step",
            "release": False,
            "grads": "drop",
            "adaptive_clip": None,
            "memory_budget": None,
        }
        for name, only in known.items():
            if (value := getattr(self, name)) != only:
                found = f"option {name}={value!r} with parameters of fxpass.shard_"
                hint = f"leave it at {only!r}, or train with data_parallel=mesh in the place of fxpass.shard_"
                raise OptionError(found, hint=hint)

    @property
    def group(self) -> Any:
        """The process group of ``data_parallel``, None without."""
        mesh = self.data_parallel
        return mesh.get_group() if hasattr(mesh, "get_group") else mesh

    @property
    def compute_dtype(self) -> torch.dtype:
        """``dtype`` as the dtype it stands for."""
        assert isinstance(self.dtype, torch.dtype), "dtype is resolved in __post_init__"
        return self.dtype

    @property
    def sum_dtype(self) -> torch.dtype | None:
        """``reduce_dtype`` as the dtype it stands for; None for the gradient's own."""
        assert not isinstance(self.reduce_dtype, str), "reduce_dtype is resolved in __post_init__"
        return self.reduce_dtype

    @property
    def policy(self) -> LossScale | None:
        """``loss_scale`` as the object it stands for."""
        assert not isinstance(self.loss_scale, (str, float, int)), "loss_scale is resolved in __post_init__"
        return self.loss_scale


def _dtype(value: Any) -> Any:
    """A dtype by its name; anything else as it is."""
    return (named(value) or value) if isinstance(value, str) else value


def _is_group(value: Any) -> bool:
    return hasattr(value, "group_name") or getattr(value, "ndim", None) == 1


def _check_clipping(options: Options) -> None:
    """Raise for clip options that contradict each other."""
    if options.max_norm is None and options.clip_per != "global":
        hint = "give max_norm, or leave clip_per alone"
        raise OptionError(f"option clip_per={options.clip_per!r} without max_norm clips nothing", hint=hint)
    others = [name for name in ("max_norm", "clip_value") if getattr(options, name) is not None]
    if options.adaptive_clip is not None and others:
        hint = "adaptive_clip takes its thresholds from the parameters; give one of the two"
        raise OptionError(
            f"options adaptive_clip and {others[0]} are two thresholds for one gradient", hint=hint
        )


def check_names(options: Mapping[str, Any]) -> None:
    """Raise ``OptionError`` for names that are no options, with the nearest that are."""
    known = [f.name for f in dataclasses.fields(Options)]
    for name in options:
        if name not in known:
            hint = nearest(name, known) or f"the options are {', '.join(known)}"
            raise OptionError(f"option {name!r} does not exist", hint=hint)


def check_inductor(settings: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise ``OptionError`` for names that are no settings of Inductor's."""
    for name in settings:
        if name not in known:
            hint = nearest(name, known) or "see torch._inductor.config for the names"
            raise OptionError(f"option inductor: {name!r} is no setting of torch._inductor.config", hint=hint)
