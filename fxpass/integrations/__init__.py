"""Other libraries' training loops, one file per library; each is imported when it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .transformers import HFTrainer as HFTrainer

if TYPE_CHECKING:
    from .lightning import LightningPrecision as LightningPrecision


def __getattr__(name: str) -> Any:
    if name == "LightningPrecision":  # a subclass of Lightning's: made when Lightning is wanted
        from .lightning import LightningPrecision

        return LightningPrecision
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
