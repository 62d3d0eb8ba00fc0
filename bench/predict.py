"""Compare predicted with measured peak memory of a step: `python -m bench.predict [--quick] [--json PATH]`.

Predicted is `GraphRecord.memory` of the compiled step; measured, on a CPU, the integral of the
profiler's memory events. Both count what one step adds to what is there before it. Beside them is
what Inductor's own model (`torch._inductor.memory.estimate_peak_memory`) says of the main graph.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import fxpass
from bench import measure, models
from bench.peers import Recipe, ours

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

Case = tuple[nn.Module, list[models.Batch]]


@dataclass(frozen=True)
class Prediction:
    """One model's peak: bytes beyond what is there before the step."""

    name: str
    parameters: int
    predicted: int
    measured: int
    inductor: int
    moment: str
    phase: str
    compile_s: float
    dry_s: float  # seconds of building the profile alone, the program's replay and its peak

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return self.predicted / self.measured

    @property
    def inductor_ratio(self) -> float:
        """Inductor's estimate over measured."""
        return self.inductor / self.measured


class MaskedLM(nn.Module):
    """BERT as people use it, from transformers, behind the (inputs, targets) call of the others."""

    def __init__(self, width: int, layers: int, vocab: int) -> None:
        super().__init__()
        from transformers import BertConfig, BertForMaskedLM

        config = BertConfig(
            vocab_size=vocab,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=max(1, width // 64),
            intermediate_size=4 * width,
            max_position_embeddings=256,
        )
        self.model = BertForMaskedLM(config)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.model(input_ids=x, labels=y).loss


def gpt(quick: bool, tokens: int) -> Case:
    """Return a GPT; the smallest for --quick."""
    torch.manual_seed(0)
    small = models.GPTConfig(width=64, layers=2, heads=2, vocab=512)
    config = small if quick else models.GPTConfig(width=256, layers=3, heads=4)
    return models.GPT(config), models.token_batches(2, tokens, vocab=config.vocab)


def convnet(quick: bool) -> Case:
    """Return the BatchNorm conv net."""
    torch.manual_seed(0)
    width, images = (16, 8) if quick else (64, 64)
    return models.ConvNet(width=width), models.image_batches(2, images)


def lstm(quick: bool) -> Case:
    """Return the LSTM language model: its time loop is unrolled, so rows of 16 tokens."""
    torch.manual_seed(0)
    width, vocab = (64, 512) if quick else (256, 2048)
    model = models.LSTMModel(width=width, layers=1, vocab=vocab)
    return model, models.token_batches(2, 32 if quick else 64, vocab=vocab, context=16)


def bert(quick: bool, tokens: int) -> Case:
    """Return BERT, with dropout."""
    torch.manual_seed(0)
    width, layers, vocab = (64, 2, 512) if quick else (256, 3, 2048)
    return MaskedLM(width, layers, vocab), models.token_batches(2, tokens, vocab=vocab, context=128)


CASES: dict[str, Callable[[bool], Case]] = {
    "GPT, 64 tokens": partial(gpt, tokens=64),
    "GPT, 2048 tokens": partial(gpt, tokens=2048),
    "conv net": convnet,
    "LSTM": lstm,
    "BERT, 64 tokens": partial(bert, tokens=64),
    "BERT, 2048 tokens": partial(bert, tokens=2048),
}


def predict(name: str, case: Case, recipe: Recipe) -> Prediction:
    """Compile one step, measure a call of it, and read its profile."""
    model, batches = case
    contender = ours(model.to(recipe.device), recipe)
    moved = [(x.to(recipe.device), y.to(recipe.device)) for x, y in batches]
    began = time.perf_counter()
    for x, y in moved:
        contender.step(x, y)
    compile_s = time.perf_counter() - began
    peak = measure.peak_of_call(lambda: contender.step(*moved[0]), recipe.device)
    record = fxpass.of(contender.step).graphs[-1]
    memory = record.memory
    return Prediction(
        name,
        memory.parameters,
        memory.transient,
        peak.bytes,
        memory.estimate,
        memory.peak.moment.name,
        memory.peak.moment.phase,
        compile_s,
        record.seconds["memory"],
    )


def table(found: list[Prediction], title: str) -> Table:
    """Lay the predictions out, one model a row."""
    shown = Table(title=title, title_justify="left", caption_justify="left")
    shown.caption = "Bytes that a step adds at its peak. Ratios are to measured."
    shown.add_column("model")
    for heading in "parameters|measured|predicted|ratio|Inductor's|ratio|peak in|compile s|profile s".split(
        "|"
    ):
        shown.add_column(heading, justify="right")
    for p in found:
        shown.add_row(
            p.name,
            f"{p.parameters:,}",
            f"{p.measured:,}",
            f"{p.predicted:,}",
            f"{p.ratio:.4f}",
            f"{p.inductor:,}",
            f"{p.inductor_ratio:.3f}",
            p.phase,
            f"{p.compile_s:.1f}",
            f"{p.dry_s:.2f}",
        )
    return shown


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.predict", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="models that compile in a minute each")
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="NAME", help=f"of: {'; '.join(CASES)}")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all numbers here")
    return parser.parse_args()


def main() -> None:
    """Print the table of predictions."""
    given = arguments()
    device = torch.device(given.device)
    recipe = Recipe(device=device, dtype=getattr(torch, given.dtype))
    console = Console(width=None if Console().is_terminal else 130)
    where: dict[str, Any] = measure.machine(device)
    found: list[Prediction] = []
    with measure.no_compile_caches():
        measure.warm_compiler(device)
        for name in given.only or CASES:
            torch.compiler.reset()
            with console.status(name):
                found.append(predict(name, CASES[name](given.quick), recipe))
            if given.json:
                rows = [{**asdict(p), "ratio": p.ratio, "inductor_ratio": p.inductor_ratio} for p in found]
                settings = {"quick": given.quick, "dtype": given.dtype}
                record = {"machine": where, "settings": settings, "results": rows}
                given.json.write_text(json.dumps(record, indent=2) + "\n")
    console.print(table(found, ", ".join(f"{key} {value}" for key, value in where.items())))


if __name__ == "__main__":
    main()
