"""The examples with other libraries' loops, beside the same runs in float32 without fxpass."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fxpass
from tests.support.helpers import same

sys.path.append(str(Path(__file__).parent.parent / "examples"))  # their imports are written for scripts

FAST = {"codegen": "eager"}


def close(actual: list[float], expected: list[float]) -> None:
    """Losses within 2 %."""
    torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), rtol=0.02, atol=0.0)


def test_importing_fxpass_imports_none_of_the_libraries() -> None:
    code = "import sys, fxpass; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    tops = {name.partition(".")[0] for name in loaded.split()}
    assert "fxpass" in tops
    assert not tops & {"transformers", "accelerate", "lightning", "pytorch_lightning"}


# ---------------------------------------------------------------- transformers


@pytest.fixture
def hf() -> Any:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    import hf_trainer

    return hf_trainer


def fast(hf: Any, **options: Any) -> Any:
    """The example's trainer without Inductor."""
    return type("Fast", (hf.MixedPrecisionTrainer,), {"fx_options": {**FAST, **options}})


class Bigrams(torch.nn.Module):
    """A model that Trainer accepts and Inductor compiles in a few seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(32, 16), torch.nn.Linear(16, 32)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.head(self.embed(input_ids))
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"loss": loss, "logits": logits}


def test_trainer_under_the_default_options(hf: Any, tmp_path: Path) -> None:
    settings = {"learning_rate": 0.1, "gradient_accumulation_steps": 1}
    compare_trainers(hf, hf.MixedPrecisionTrainer, tmp_path, Bigrams, **settings)


def compare_trainers(hf: Any, kind: Any, tmp_path: Path, model: Any, **settings: Any) -> None:
    """Accumulation, clipping, warm-up, what is logged, evaluation."""
    plain = hf.train(hf.Trainer, tmp_path / "plain", model=model, **settings)
    ours = hf.train(kind, tmp_path / "ours", model=model, **settings)
    for name in ("loss", "eval_loss", "grad_norm"):
        close(hf.logged(ours, name), hf.logged(plain, name))
    assert hf.logged(ours, "learning_rate") == hf.logged(plain, "learning_rate")
    assert hf.logged(ours, "loss_scale") == [2.0**16] * 8
    stats = ours.mp.stats()
    assert (stats.steps, stats.skipped) == (8, 0)
    assert stats.clipped == sum(norm > 1.0 for norm in hf.logged(ours, "grad_norm"))
    assert len(ours.mp.graphs) == 1
    assert hf.logged(ours, "loss")[-1] < 0.9 * hf.logged(ours, "loss")[0]


def test_trainer_resumes_exactly(hf: Any, tmp_path: Path) -> None:
    kind = fast(hf, loss_scale=fxpass.DynamicLossScale(growth_interval=3))
    whole = hf.train(kind, tmp_path, model=Bigrams)
    again = hf.train(kind, tmp_path / "again", model=Bigrams, resume=tmp_path / "checkpoint-4")
    assert hf.logged(again, "loss") == hf.logged(whole, "loss")
    assert again.mp.state_dict() == whole.mp.state_dict()
    assert again.mp.stats().steps == 8
    assert float(again.mp.scale) == 2.0**18
    same(again.model.state_dict(), whole.model.state_dict(), "model", exact=True)
    saved = torch.load(tmp_path / "checkpoint-4" / "scaler.pt", weights_only=True)
    torch.amp.GradScaler("cpu").load_state_dict(saved)


def test_trainer_skips_and_the_scheduler_waits(hf: Any, tmp_path: Path) -> None:
    overflows = fxpass.DynamicLossScale(init_scale=2.0**127, max_scale=2.0**127, backoff_factor=2.0**-111)
    short = {"max_steps": 4, "eval_strategy": "no", "save_strategy": "no"}
    ours = hf.train(fast(hf, loss_scale=overflows), tmp_path, model=Bigrams, **short)
    stats = ours.mp.stats()
    assert (stats.steps, stats.skipped) == (4, 1)
    rates = hf.logged(ours, "learning_rate")
    assert rates[0] == rates[1] < rates[2]
    assert hf.logged(ours, "loss_scale") == [2.0**16] * 4


@pytest.mark.slow
def test_trainer_takes_settings_from_its_arguments(hf: Any, tmp_path: Path) -> None:
    """bfloat16, label smoothing, a last update of fewer micro-batches, early stopping, the backend's name."""
    from transformers import EarlyStoppingCallback

    settings = {
        "label_smoothing_factor": 0.1,
        "per_device_train_batch_size": 24,
        "num_train_epochs": 3,
        "max_steps": -1,
        "eval_steps": 1,
        "save_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
    }
    callbacks = [EarlyStoppingCallback(2, 100.0)]
    plain = hf.train(hf.Trainer, tmp_path / "plain", callbacks=callbacks, **settings)
    new = {"bf16": True, "torch_compile_backend": "mixedprec"}
    ours = hf.train(fast(hf), tmp_path / "ours", callbacks=callbacks, **settings, **new)
    assert ours.mp.dtype is torch.bfloat16
    assert ours.mp.stats().steps == ours.state.global_step == plain.state.global_step == 3
    assert len(ours.mp.graphs) == 2
    for name in ("loss", "eval_loss", "grad_norm"):
        close(hf.logged(ours, name), hf.logged(plain, name))
    assert not hf.logged(ours, "loss_scale")


def test_trainer_refuses_what_it_cannot_do(hf: Any, tmp_path: Path) -> None:
    with pytest.raises(fxpass.OptionError, match=r"no Trainer stands after HFTrainer"):
        type("Turned", (hf.Trainer, fxpass.integrations.HFTrainer), {})
    with pytest.raises(fxpass.FxpassError, match="torch_empty_cache_steps"):
        hf.train(fast(hf), tmp_path, torch_empty_cache_steps=1)


# ---------------------------------------------------------------- accelerate


@pytest.fixture
def loop() -> Any:
    pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState, GradientState

    import accelerate_loop

    AcceleratorState._reset_state(reset_partial_state=True)  # that of a Trainer before it in this process
    GradientState._reset_state()
    return accelerate_loop


def test_accelerates_loop_follows_float32(loop: Any) -> None:
    plain, ours = loop.train(accumulate=1), loop.train(loop.mixedprec, accumulate=1)
    close(ours.losses, plain.losses)
    assert ours.rate == plain.rate
    stats = ours.handle.stats()
    assert (stats.steps, stats.skipped) == (len(plain.losses), 0) == (12, 0)
    assert len(ours.handle.graphs) == 1


@pytest.mark.breadth("first")
@pytest.mark.parametrize("accumulate", [2, 3])
def test_accelerates_accumulation(loop: Any, accumulate: int) -> None:
    plain = loop.train(accumulate=accumulate, clip=0.3)
    compiled = lambda step: torch.compile(step, backend="mixedprec", options=FAST)  # noqa: E731  # pyrefly: ignore[no-matching-overload]
    ours = loop.train(compiled, accumulate=accumulate, clip=0.3)
    close(ours.losses, plain.losses)
    assert ours.rate == plain.rate
    assert ours.handle.stats().steps == len(plain.losses) == 12 // accumulate
    assert len(ours.handle.graphs) <= 2  # the second for accelerate's count of micro-batches


# ---------------------------------------------------------------- lightning


@pytest.fixture
def pl() -> Any:
    pytest.importorskip("lightning")
    import lightning_module

    return lightning_module


quiet = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*log_every_n_steps",
    "ignore:.*treespec",  # Lightning's own use of torch.utils._pytree
    "ignore:.*LeafSpec",
    "ignore:.*GPU available but not used",
)


def metrics(trainer: Any) -> list[float]:
    return [float(trainer.logged_metrics[name]) for name in sorted(trainer.logged_metrics)]


def rate(trainer: Any) -> list[float]:
    return [o.param_groups[0]["lr"] for o in trainer.optimizers]


def compare_lightning(pl: Any, rows: int, accumulate: int, **options: Any) -> fxpass.MixedPrecision:
    """Accumulation, clipping, what is logged per step and per epoch, validation, the scheduler."""
    settings = {"accumulate_grad_batches": accumulate, "rows": rows}
    plain = pl.train(gradient_clip_val=0.3, **settings)
    plugin = fxpass.integrations.LightningPrecision(max_norm=0.3, **options)
    ours = pl.train(plugin, **settings)
    assert sorted(ours.logged_metrics) == sorted(plain.logged_metrics)
    close(metrics(ours), metrics(plain))
    assert (ours.global_step, rate(ours)) == (plain.global_step, rate(plain))
    stats = plugin.mp.stats()
    assert (stats.steps, stats.skipped) == (ours.global_step, 0)
    assert stats.clipped > 0
    assert ours.logged_metrics["accuracy"] > 0.5
    return plugin.mp


@quiet
def test_lightning_follows_float32(pl: Any) -> None:
    mp = compare_lightning(pl, rows=768, accumulate=2)
    assert len(mp.graphs) == 1


@quiet
def test_lightning_with_a_smaller_last_batch(pl: Any) -> None:
    compare_lightning(pl, rows=690, accumulate=3, **FAST)


@quiet
def test_lightning_resumes_exactly(pl: Any, tmp_path: Path) -> None:
    scale = fxpass.DynamicLossScale(growth_interval=10)
    first = pl.train(fxpass.integrations.LightningPrecision(**FAST, loss_scale=scale), max_epochs=1)
    first.save_checkpoint(tmp_path / "half.ckpt")
    whole = fxpass.integrations.LightningPrecision(**FAST, loss_scale=scale)
    again = fxpass.integrations.LightningPrecision(**FAST, loss_scale=scale)
    expected = pl.train(whole)
    actual = pl.train(again, checkpoint=tmp_path / "half.ckpt")
    assert again.mp.state_dict() == whole.mp.state_dict()
    assert again.mp.stats().steps == actual.global_step == 24
    same(actual.model.state_dict(), expected.model.state_dict(), "model", exact=True)


@quiet
def test_lightning_with_hooks_of_the_module_and_of_callbacks(pl: Any) -> None:
    class Hooked(pl.Digits):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            norms = [p.grad.norm() for p in self.parameters()]
            self.log("norm", torch.stack(norms).norm())

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch) * (1 + batch_idx % 2)
            return {"loss": 2 * loss if self.global_step >= 5 else loss, "extra": loss.detach()}

    class Counter(pl.pl.Callback):
        def __init__(self) -> None:
            self.backwards, self.losses = 0, []

        def on_after_backward(self, trainer: Any, module: Any) -> None:
            self.backwards += 1

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *batch: Any) -> None:
            self.losses += [float(outputs["loss"]), float(outputs["extra"])]

    counters = [Counter(), Counter()]
    settings = {"module": Hooked, "max_epochs": 1, "gradient_clip_val": 0.5}
    plain = pl.train(callbacks=[counters[0]], **settings)
    plugin = fxpass.integrations.LightningPrecision(**FAST)
    ours = pl.train(plugin, callbacks=[counters[1]], **settings)
    close(metrics(ours), metrics(plain))
    close(counters[1].losses, counters[0].losses)
    assert counters[1].backwards == counters[0].backwards == plugin.mp.stats().steps == 12


@quiet
@pytest.mark.parametrize("toggle", ["no", "calls", "context"])
def test_lightning_with_two_optimizers(pl: Any, toggle: str) -> None:
    F = torch.nn.functional

    class Gan(pl.pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.maker = torch.nn.Linear(64, 64)
            self.judge = torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            maker, judge = self.optimizers()
            fake = self.maker(batch[0])
            of_judge = F.softplus(self.judge(fake.detach())).mean() + F.softplus(-self.judge(batch[0])).mean()
            judge.zero_grad()
            self.manual_backward(of_judge)
            self.clip_gradients(judge, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            judge.step()
            if toggle == "context":
                with maker.toggle_model():
                    of_maker = self.make(maker, fake)
            else:
                if toggle == "calls":
                    self.toggle_optimizer(maker)
                of_maker = self.make(maker, fake)
                if toggle == "calls":
                    self.untoggle_optimizer(maker)
            self.log_dict({"judge": of_judge, "maker": of_maker})
            self.lr_schedulers().step()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

        def make(self, maker: Any, fake: Any) -> Any:
            loss = F.softplus(-self.judge(fake)).mean()
            maker.zero_grad()
            self.manual_backward(loss)
            maker.step()
            return loss

        def configure_optimizers(self) -> Any:
            optimizers = [torch.optim.Adam(m.parameters(), lr=1e-2) for m in (self.maker, self.judge)]
            return optimizers, [torch.optim.lr_scheduler.StepLR(optimizers[0], 4, 0.5)]

    plain = pl.train(module=Gan, max_epochs=1)
    plugin = fxpass.integrations.LightningPrecision(**FAST, loss_scale=2.0**10)
    ours = pl.train(plugin, module=Gan, max_epochs=1)
    close(metrics(ours), metrics(plain))
    assert (ours.global_step, rate(ours)) == (plain.global_step, rate(plain))
    assert ours.global_step == 24
    assert plugin.mp.stats().steps == 12


@quiet
def test_lightning_refuses_gradients_that_wait_for_another_batch(pl: Any) -> None:
    class Waits(pl.Digits):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = torch.nn.functional.cross_entropy(self.model(batch[0]), batch[1])
            self.manual_backward(loss)
            if batch_idx % 2:
                self.optimizers().step()
                self.optimizers().zero_grad()

    with pytest.raises(fxpass.CaptureError, match="gradients leave the graph"):
        pl.train(fxpass.integrations.LightningPrecision(**FAST), module=Waits)
