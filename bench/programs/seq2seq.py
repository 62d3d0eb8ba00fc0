"""Encoder-decoders of transformers, and PyTorch's own Transformer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.programs.program import CALLS, Training, program
from bench.programs.transformers_table import ids, padded, register

BART: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 32,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "use_cache": False,
}
T5: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 1,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "use_cache": False,
}


def _pair() -> dict[str, Any]:
    return {"input_ids": ids(), "attention_mask": padded(), "labels": ids(length=8)}


register("seq2seq", "T5ForConditionalGeneration", _pair, **T5)
register("seq2seq", "MT5ForConditionalGeneration", _pair, **T5)
register("seq2seq", "LongT5ForConditionalGeneration", _pair, local_radius=3, **T5)
register("seq2seq", "BartForConditionalGeneration", _pair, **BART)
register("seq2seq", "PegasusForConditionalGeneration", _pair, **BART)
register("seq2seq", "MarianMTModel", _pair, **BART)
register("seq2seq", "BlenderbotForConditionalGeneration", _pair, **BART)
register("seq2seq", "M2M100ForConditionalGeneration", _pair, **BART)


class Translator(nn.Module):
    """nn.Transformer with its masks."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(40, 32, padding_idx=0), nn.Embedding(40, 32, padding_idx=0)
        self.transformer = nn.Transformer(32, 4, 1, 1, 48, dropout=0.0, batch_first=True)
        self.head = nn.Linear(32, 40)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        h = self.transformer(
            self.source(source),
            self.target(target),
            tgt_mask=causal,
            src_key_padding_mask=source == 0,
            tgt_key_padding_mask=target == 0,
            memory_key_padding_mask=source == 0,
        )
        return self.head(h)


@program("seq2seq", "own, in the shape of PyTorch's translation tutorial")
def translation_transformer() -> Training:
    """Padding masks of both sides, label smoothing, the Noam schedule."""
    model = Translator()
    optimizer = torch.optim.Adam(model.parameters(), lr=1.0, betas=(0.9, 0.98), eps=1e-9)
    noam = lambda step: 32**-0.5 * min((step + 1) ** -0.5, (step + 1) * 100**-1.5)  # noqa: E731
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, noam)
    criterion = nn.CrossEntropyLoss(ignore_index=0, label_smoothing=0.1)

    def step(source: Tensor, target: Tensor) -> Tensor:
        model.train()
        logits = model(source, target[:, :-1])
        optimizer.zero_grad()
        loss = criterion(logits.reshape(-1, logits.shape[-1]), target[:, 1:].reshape(-1))
        loss.backward()
        optimizer.step()
        scheduler.step()
        return loss

    def text() -> Tensor:
        return torch.randint(1, 40, (4, 10)) * padded(4, 10)

    return Training(step, [(text(), text()) for _ in range(CALLS)])


class Attention(nn.Module):
    """A GRU encoder, and a decoder that attends to it word by word."""

    def __init__(self, vocab: int = 30, width: int = 24) -> None:
        super().__init__()
        self.words, self.encoder = nn.Embedding(vocab, width), nn.GRU(width, width, batch_first=True)
        self.cell, self.score = nn.GRUCell(2 * width, width), nn.Linear(2 * width, 1)
        self.head = nn.Linear(width, vocab)

    def forward(self, source: Tensor, target: Tensor, forced: bool) -> Tensor:
        memory, h = self.encoder(self.words(source))
        h, word, logits = h[0], target[:, 0], []
        for i in range(target.shape[1] - 1):
            weights = self.score(torch.cat([memory, h[:, None].expand_as(memory)], -1)).softmax(1)
            h = self.cell(torch.cat([self.words(word), (weights * memory).sum(1)], -1), h)
            logits.append(self.head(h))
            word = target[:, i + 1] if forced else logits[-1].argmax(-1)
        return torch.stack(logits, 1)


@program("seq2seq", "own, in the shape of PyTorch's seq2seq tutorial")
def attention_gru() -> Training:
    """Two optimizers, teacher forcing now and then."""
    model = Attention()
    decoder = [p for n, p in model.named_parameters() if not n.startswith(("words", "encoder"))]
    encoder = [*model.words.parameters(), *model.encoder.parameters()]
    first, second = torch.optim.Adam(encoder, lr=2e-3), torch.optim.Adam(decoder, lr=2e-3)

    def step(source: Tensor, target: Tensor, forced: bool) -> float:
        first.zero_grad()
        second.zero_grad()
        logits = model(source, target, forced)
        loss = F.nll_loss(F.log_softmax(logits, -1).flatten(0, 1), target[:, 1:].flatten())
        loss.backward()
        first.step()
        second.step()
        return loss.item()

    return Training(step, [(ids(4, 6, 30), ids(4, 5, 30), True) for _ in range(CALLS)])
