"""Train a small Llama with transformers' Trainer: in float32, and with its steps compiled by fxpass."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import fxpass
from _show import print_table


class MixedPrecisionTrainer(fxpass.integrations.HFTrainer, Trainer):
    """The one line."""


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def counting(rows: int, length: int = 16) -> list[dict[str, torch.Tensor]]:
    """Sequences that count upwards, each from a number and by a step of its own."""
    generator = torch.Generator().manual_seed(1)
    starts = torch.randint(32, (rows,), generator=generator).tolist()
    steps = torch.randint(1, 4, (rows,), generator=generator).tolist()
    texts = [(a + b * torch.arange(length)) % 32 for a, b in zip(starts, steps, strict=True)]
    return [{"input_ids": text, "labels": text} for text in texts]


def arguments(output: Path, **changes: Any) -> TrainingArguments:
    """What a run is told, mixed precision or not."""
    settings: dict[str, Any] = {
        "output_dir": str(output),
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 1.0,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "max_steps": 8,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "save_steps": 4,
        "report_to": [],
        "use_cpu": not torch.cuda.is_available(),
        "disable_tqdm": True,
    }
    return TrainingArguments(**{**settings, **changes})


def train(
    kind: type[Trainer],
    output: Path,
    *,
    model: Callable[[], nn.Module] = llama,
    resume: Path | None = None,
    callbacks: Any = None,
    **changes: Any,
) -> Trainer:
    """A trainer of ``kind`` after its training."""
    torch.manual_seed(0)
    data = counting(80)
    trainer = kind(
        model=model(),
        args=arguments(output, **changes),
        train_dataset=data[:64],
        eval_dataset=data[64:],
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def logged(trainer: Trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--output", type=Path, default=Path("out/hf_trainer"))
    given = parser.parse_args()
    kinds: list[type[Trainer]] = [Trainer, MixedPrecisionTrainer]
    runs = [train(kind, given.output / kind.__name__, max_steps=given.steps) for kind in kinds]
    rows = [
        ["loss", *(f"{logged(t, 'loss')[-1]:.4f}" for t in runs)],
        ["evaluation loss", *(f"{logged(t, 'eval_loss')[-1]:.4f}" for t in runs)],
        ["norm of the gradient", *(f"{logged(t, 'grad_norm')[-1]:.3f}" for t in runs)],
        ["loss scale", "-", f"{logged(runs[1], 'loss_scale')[-1]:g}"],
    ]
    print_table(f"A Llama, {given.steps} steps", [kind.__name__ for kind in kinds], rows)


if __name__ == "__main__":
    main()
