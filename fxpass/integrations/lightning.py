"""Lightning's precision plugin: all micro-batches of one update, and the update, in one graph."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..backend import MixedPrecision
from ..errors import FxpassError

# Lightning is published under two names, whose classes do not know each other.
_OLD_NAME = "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules
if TYPE_CHECKING or not _OLD_NAME:
    from lightning.pytorch.loops.optimization.automatic import ClosureResult
    from lightning.pytorch.plugins.precision import Precision
    from lightning.pytorch.utilities.model_helpers import is_overridden
else:
    from pytorch_lightning.loops.optimization.automatic import ClosureResult
    from pytorch_lightning.plugins.precision import Precision
    from pytorch_lightning.utilities.model_helpers import is_overridden

Arguments = tuple[Any, ...]  # of one training_step()


class LightningPrecision(Precision):
    """``Trainer(plugins=LightningPrecision(max_norm=1.0))``: the module's training steps, compiled.

    Takes the options of ``fxpass.MixedPrecision``; ``plugin.mp`` is the
    handle. The module stays as it is, with automatic optimization or manual.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.mp = MixedPrecision(**options)
        self._held: tuple[Arguments, ...] = ()
        self._told: list[tuple[Any, ...]] = []  # what the compiled step tells: values logged, updates made
        self._automatic = torch.compile(self._update, backend=self.mp)
        self._manual = torch.compile(_training_step, backend=self.mp)
        self._module: Any = None
        self._given: _Manual | None = None

    def connect(self, model: nn.Module, optimizers: Any, lr_schedulers: Any) -> Any:
        """Take the place of the loop that calls forward, backward and the optimizer one by one."""
        trainer: Any = model.trainer
        if trainer.world_size > 1:
            hint = "Trainer(devices=1)"
            raise FxpassError("LightningPrecision trains on one device", hint=hint)
        loop = trainer.fit_loop.epoch_loop.automatic_optimization
        loop.run = functools.partial(self._run, loop)
        self._held, self._module, self._given = (), model, None
        return model, optimizers, lr_schedulers

    def state_dict(self) -> dict[str, Any]:
        """Scale and counters, for Lightning's checkpoint."""
        return self.mp.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from ``state_dict``."""
        self.mp.load_state_dict(state_dict)

    # ---------------------------------------------------------------- automatic optimization

    def _run(self, loop: Any, optimizer: Any, batch_idx: int, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """For the loop's ``run()``: hold the micro-batch back; with the last one, run all and update.

        What the loop gives to ``on_train_batch_end`` is empty for a batch that is held.
        """
        trainer = loop.trainer
        if "any" in kwargs:
            hint = "def training_step(self, batch, batch_idx)"
            raise FxpassError("training_step(dataloader_iter) draws its own batches", hint=hint)
        self._held = (*self._held, tuple(kwargs.values()))
        if trainer.fit_loop._should_accumulate():
            return {}
        batches, self._held = self._held, ()
        outputs: list[Any] = []

        def closure() -> Any:
            loop._on_before_zero_grad(optimizer)
            loop.optim_progress.optimizer.zero_grad.increment_completed()
            module = trainer.lightning_module
            at = (trainer.current_epoch, batch_idx)
            with self._recorded(module):
                outputs.extend(self._automatic(module, optimizer, batches, at, _hooks(trainer)))
            self._tell(module, batches)
            return outputs[-1]["loss"] if isinstance(outputs[-1], Mapping) else outputs[-1]

        loop._optimizer_step(batch_idx, closure)
        if not outputs:
            hint = "call optimizer.step(closure=optimizer_closure) in optimizer_step()"
            raise FxpassError("the module's optimizer_step() has not called the closure", hint=hint)
        return ClosureResult.from_training_step_output(outputs[-1], trainer.accumulate_grad_batches).asdict()

    def _update(
        self,
        module: Any,
        optimizer: torch.optim.Optimizer,
        batches: Sequence[Arguments],
        at: tuple[int, int],
        hooks: Mapping[str, Sequence[Callable[..., Any]]],
    ) -> list[Any]:
        """What is compiled: an update in Lightning's order."""
        module.optimizer_zero_grad(*at, optimizer)
        outputs = []
        for number, arguments in enumerate(batches):
            self._told.append(("batch", number))
            output = module.training_step(*arguments)
            outputs.append(output)
            loss = (
                output["loss"] if isinstance(output, Mapping) else output
            ) / module.trainer.accumulate_grad_batches
            for hook in hooks["on_before_backward"]:
                hook(loss)
            module.backward(loss)
            for hook in hooks["on_after_backward"]:
                hook()
        for hook in hooks["on_before_optimizer_step"]:
            hook(optimizer)
        trainer = module.trainer
        if hooks[_CLIP] or trainer.gradient_clip_val:
            module.configure_gradient_clipping(
                optimizer,
                gradient_clip_val=trainer.gradient_clip_val,
                gradient_clip_algorithm=trainer.gradient_clip_algorithm,
            )
        optimizer.step()
        return outputs

    def optimizer_step(self, optimizer: Any, model: Any, closure: Callable[[], Any], **kwargs: Any) -> Any:
        """The closure is the whole update."""
        return closure()

    # ---------------------------------------------------------------- manual optimization

    @contextmanager
    def train_step_context(self) -> Iterator[None]:
        """Around the module's training_step(), which the loop for manual optimization calls."""
        module = self._module
        if module is None or module.automatic_optimization:
            yield
            return
        vars(module)["training_step"] = functools.partial(self._manually, module)
        try:
            yield
        finally:
            del vars(module)["training_step"]

    def _manually(self, module: Any, *arguments: Any) -> Any:
        trainer = module.trainer
        if self._given is None or self._given.trained != trainer.optimizers:
            self._given = _Manual(module, self._told)
        with self._recorded(module, **self._given.replacements()):
            output = self._manual(module, arguments)
        self._tell(module, [arguments])
        return output

    # ---------------------------------------------------------------- what the step tells

    @contextmanager
    def _recorded(self, module: Any, **replaced: Any) -> Iterator[None]:
        """While it lasts, ``self.log()`` of the module is kept for when the graph has run."""
        self._told.clear()
        replaced = {"log": self._log, **replaced}
        vars(module).update(replaced)
        try:
            yield
        finally:
            for name in replaced:
                del vars(module)[name]

    @functools.cached_property
    def _log(self) -> Callable[..., None]:
        told = self._told

        def log(name: str, value: Any, *args: Any, **settings: Any) -> None:
            told.append(("log", name, value, args, settings))

        return log

    def _tell(self, module: Any, batches: Sequence[Arguments]) -> None:
        """Hand what was logged to Lightning, each value as of its own batch."""
        results, name = module.trainer._results, module._current_fx_name
        module._current_fx_name = "training_step"
        for kind, *what in self._told:
            if kind == "batch":
                results.batch, results.batch_size = batches[what[0]][0], None
            elif kind == "log":
                key, value, args, settings = what
                module.log(key, value, *args, **settings)
            else:  # the loop counts in these
                stepped = module.trainer.strategy._lightning_optimizers[what[0]]
                stepped._on_before_step()
                stepped._on_after_step()
        module._current_fx_name = name
        self._told.clear()


def _training_step(module: Any, arguments: Arguments) -> Any:
    return type(module).training_step(module, *arguments)


class _Manual:
    """What a module with manual optimization finds in the compiled step: optimizers, and a backward."""

    def __init__(self, module: Any, told: list[tuple[Any, ...]]) -> None:
        self.module, self.hooks = module, _hooks(module.trainer)
        self.trained = list(module.trainer.optimizers)
        self.fronts = [_Front(self, o, n, told) for n, o in enumerate(self.trained)]
        self.toggled: _Front | None = None  # whose parameters alone get gradients

    def replacements(self) -> dict[str, Callable[..., Any]]:
        """Methods of the module that count, look for a trainer or switch ``requires_grad``."""
        names = ("optimizers", "manual_backward", "toggle_optimizer", "untoggle_optimizer")
        return {name: getattr(self, name) for name in names}

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        return self.fronts[0] if len(self.fronts) == 1 else self.fronts

    def manual_backward(self, loss: Any, *args: Any, **kwargs: Any) -> None:
        for hook in self.hooks["on_before_backward"]:
            hook(loss)
        if self.toggled is not None:
            kwargs = {"inputs": self.toggled.params(), **kwargs}
        self.module.backward(loss, *args, **kwargs)
        for hook in self.hooks["on_after_backward"]:
            hook()

    def toggle_optimizer(self, optimizer: Any) -> None:
        self.toggled = optimizer

    def untoggle_optimizer(self, optimizer: Any) -> None:
        self.toggled = None


class _Front:
    """An optimizer whose steps Lightning counts when the graph has run."""

    def __init__(self, owner: _Manual, optimizer: Any, number: int, told: list[tuple[Any, ...]]) -> None:
        self.owner, self.optimizer, self.number, self.told = owner, optimizer, number, told

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:
        return self.optimizer.state

    def params(self) -> list[Any]:
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        result = closure() if closure is not None else None
        for hook in self.owner.hooks["on_before_optimizer_step"]:
            hook(self.optimizer)
        self.told.append(("step", self.number))
        self.optimizer.step()
        return result

    @contextmanager
    def toggle_model(self, sync_grad: bool = True) -> Iterator[None]:
        self.owner.toggle_optimizer(self)
        yield
        self.owner.untoggle_optimizer(self)


_CLIP = "configure_gradient_clipping"  # the module's alone
_HOOKS = ("on_before_backward", "on_after_backward", "on_before_optimizer_step", _CLIP)


def _hooks(trainer: Any) -> dict[str, list[Callable[..., Any]]]:
    """What callbacks and the module have of their own for inside of an update."""
    module, hooks = trainer.lightning_module, {}
    for name in _HOOKS:
        callbacks = [c for c in trainer.callbacks if name != _CLIP and is_overridden(name, c)]
        hooks[name] = [functools.partial(getattr(c, name), trainer, module) for c in callbacks]
        hooks[name] += [getattr(module, name)] if is_overridden(name, module) else []
    return hooks
