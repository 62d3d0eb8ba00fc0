"""A mix-in for transformers' ``Trainer``: all micro-batches of one update, and the update, in one graph."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..backend import MixedPrecision
from ..errors import FxpassError, OptionError

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object  # fxpass imports no library of others: a subclass names Trainer after the mix-in

SCALER = "scaler.pt"  # the file that Trainer keeps a GradScaler's state in
NEEDED = ("training_step", "_get_grad_norm", "_clip_grad_norm", "_save_scaler", "_load_scaler")


class HFTrainer(_Trainer):
    """``class MyTrainer(HFTrainer, Trainer)``: a Trainer whose steps fxpass compiles.

    ``TrainingArguments`` says the rest: ``max_grad_norm`` and
    ``gradient_accumulation_steps`` act inside the compiled step, ``bf16=True``
    computes in bfloat16. Further options of ``fxpass.MixedPrecision``, by
    name, in the class attribute ``fx_options``.
    """

    fx_options: Mapping[str, Any] = {}
    optimizer: Any  # accelerate's, in front of the one that is compiled

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        after = cls.__mro__[cls.__mro__.index(HFTrainer) + 1 :]
        missing = [name for name in NEEDED if not any(name in vars(base) for base in after)]
        if len(missing) == len(NEEDED):
            hint = f"class {cls.__name__}(fxpass.integrations.HFTrainer, Trainer)"
            raise OptionError(f"no Trainer stands after HFTrainer in {cls.__name__}'s bases", hint=hint)
        if missing:
            found = f"this version of transformers has no Trainer.{missing[0]}(), which HFTrainer needs"
            raise OptionError(found, hint="pip install 'fxpass[hf]'")

    @functools.cached_property
    def mp(self) -> MixedPrecision:
        """The handle: scale, statistics, graphs."""
        given: dict[str, Any] = {"max_norm": self.args.max_grad_norm or None}
        if self.args.bf16:
            given["dtype"] = torch.bfloat16
        return MixedPrecision(**{**given, **self.fx_options})

    # ---------------------------------------------------------------- the step

    _held: tuple[Any, ...] = ()  # the micro-batches of the update that is to come

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's: the micro-batches of a new update. Any still held are of one that was given up."""
        self._held = ()
        return super().get_batch_samples(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Hold the micro-batch back; with the last one, run all of them and update.

        Gives the loss of the whole batch with the last micro-batch, zero with the others.
        """
        step, optimizer = self._compiled, self._stand_in()
        self._held = (*self._held, self._prepare_inputs(inputs))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        batches, self._held = self._held, ()
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        skipped = self._skipped()
        loss = step(model, optimizer, batches, num_items_in_batch)
        self.optimizer._is_overflow = self._skipped() > skipped  # accelerate tells the scheduler
        return loss

    @functools.cached_property
    def _compiled(self) -> Callable[..., Tensor]:
        self._check_setting()
        of_batch = super().training_step  # forward and backward, as Trainer or the user has written them

        def step(model: nn.Module, optimizer: Any, batches: tuple[Any, ...], num_items: Any) -> Any:
            total: Any = 0.0
            for batch in batches:
                total = total + of_batch(model, batch, num_items)
            optimizer.step()
            optimizer.zero_grad()
            return total

        return torch.compile(step, backend=self.mp)

    def _stand_in(self) -> torch.optim.Optimizer:
        """The optimizer that is compiled; Trainer's own call of ``step()`` shall find it stepped."""
        held = self.optimizer.optimizer
        if not isinstance(held, _Stepped):
            self.optimizer.optimizer = held = _Stepped(held)
        return held.stepped

    def _check_setting(self) -> None:
        """Raise for what trains in a way of its own, around the compiled step."""
        one = "train on one device: set CUDA_VISIBLE_DEVICES to one, and drop deepspeed and fsdp"
        refused = {
            "DataParallel over several GPUs": (self.args.n_gpu > 1, one),
            "DeepSpeed": (self.is_deepspeed_enabled, one),
            "FSDP": (self.is_fsdp_enabled, one),
            "torch_empty_cache_steps": (
                self.args.torch_empty_cache_steps is not None,
                "drop it: the compiled step frees each activation at its last use",
            ),
        }
        for what, (used, hint) in refused.items():
            if used:
                raise FxpassError(f"HFTrainer does not go together with {what}", hint=hint)

    def _skipped(self) -> int:
        # nothing overflows without a scale but what overflows in eager too, which steps its scheduler
        return 0 if self.mp.policy is None else int(self.mp.state_dict()["skipped"])

    # ---------------------------------------------------------------- what Trainer does around it

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """No autocast, no GradScaler, no compiled model: that is the step's business."""
        named = self.args.torch_compile_backend
        if named == "mixedprec":
            self.args.torch_compile_backend = "no"
        try:
            return super()._build_accelerator_args(**{**kwargs, "mixed_precision": "no"})
        finally:
            self.args.torch_compile_backend = named

    def create_accelerator_and_postprocess(self) -> None:
        """Trainer's; a new accelerator, as each trial of a search has one, is a new scaler."""
        for name in ("mp", "_compiled"):
            self.__dict__.pop(name, None)
        super().create_accelerator_and_postprocess()

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return None  # clipped inside the step

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return self.mp.grad_norm

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """With the loss scale beside the loss."""
        if "loss" in logs and self.mp.policy is not None:
            logs["loss_scale"] = float(self.mp.scale)
        super().log(logs, *args, **kwargs)

    def _save_scaler(self, output_dir: str) -> None:
        if self.args.should_save:
            torch.save(self.mp.state_dict(), os.path.join(output_dir, SCALER))

    def _load_scaler(self, checkpoint: str | None) -> None:
        path = checkpoint and os.path.join(checkpoint, SCALER)
        if path and os.path.isfile(path):
            self.mp.load_state_dict(torch.load(path, weights_only=True))


class _Stepped:
    """An optimizer whose ``step()`` has been made already, inside the compiled step."""

    def __init__(self, stepped: torch.optim.Optimizer) -> None:
        self.stepped = stepped

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["stepped"], name)

    def step(self, closure: Any = None) -> None:
        """Nothing: the compiled step has done it."""
