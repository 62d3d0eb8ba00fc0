"""Models of transformers, trained the way its documentation does: `model(**batch).loss`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.programs.program import CALLS, Program, Training, add

Batch = Callable[[], dict[str, Any]]
# dropout draws other random numbers in a compiled step, so the losses would not be the same
QUIET = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "attention_dropout",
    "activation_dropout",
    "dropout",
    "dropout_rate",
    "hidden_dropout",
    "classifier_dropout",
    "classifier_dropout_prob",
    "embedding_dropout",
    "feat_proj_dropout",
    "final_dropout",
    "layerdrop",
    "encoder_layerdrop",
    "decoder_layerdrop",
    "drop_path_rate",
    "mlp_dropout",
    "classifier_dropout_rate",
    "feat_quantizer_dropout",
    "word_embed_proj_dropout",
    "head_dropout",
    "seq_classif_dropout",
    "qa_dropout",
    "embd_pdrop",
    "summary_first_dropout",
    "ff_dropout",
    "path_dropout",
    "positional_dropout",
)

# how large a model of words is, wherever its configuration has these names
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}


def register(
    family: str,
    model: str,
    batch: Batch,
    *,
    name: str = "",
    quick: bool = False,
    lr: float = 1e-3,
    **config: Any,
) -> None:
    """Enter ``model`` of transformers, made from ``config``."""
    build = lambda: fine_tune(model, batch, lr, config)  # noqa: E731
    add(Program(name or model, family, "transformers", build, quick))


def fine_tune(model_name: str, batch: Batch, lr: float, config: dict[str, Any]) -> Training:
    """AdamW, clipping and a linear schedule."""
    model = built(model_name, config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / 100)

    def step(inputs: dict[str, Any]) -> Tensor:
        loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        return loss

    return Training(step, [(batch(),) for _ in range(CALLS)])


def built(model_name: str, config: dict[str, Any]) -> Any:
    """The model with random weights and without dropout."""
    import transformers

    kind = getattr(transformers, model_name)
    config = {key: value() if callable(value) else value for key, value in config.items()}
    settings = kind.config_class(**config)
    for one in (
        settings,
        *(v for v in vars(settings).values() if isinstance(v, transformers.PretrainedConfig)),
    ):
        for key in QUIET:
            if isinstance(getattr(one, key, None), float):
                setattr(one, key, 0.0)
    return kind(settings)


def ids(rows: int = 4, length: int = 12, vocab: int = 64) -> Tensor:
    """Random tokens, without the first few, which are special ones."""
    return torch.randint(5, vocab, (rows, length))


def padded(rows: int = 4, length: int = 12) -> Tensor:
    """An attention mask of rows that end early."""
    return (torch.arange(length) < torch.randint(length // 2, length + 1, (rows, 1))).long()
