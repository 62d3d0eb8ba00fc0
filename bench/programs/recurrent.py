"""Recurrent nets over sequences of different lengths, tagging, tables."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

from bench.programs.blocks import mlp
from bench.programs.program import CALLS, Training, program


class Tagger(nn.Module):
    def __init__(self, kind: Callable[..., nn.RNNBase], out: int) -> None:
        super().__init__()
        self.words = nn.Embedding(30, 16, padding_idx=0)
        self.rnn = kind(16, 12, bidirectional=True, batch_first=True)
        self.head = nn.Linear(24, out)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.words(x), lengths.cpu(), batch_first=True, enforce_sorted=False)
        return self.head(pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0])


def _sentences(tags: int) -> tuple[Tensor, Tensor, Tensor]:
    lengths = torch.randint(3, 9, (4,))
    lengths[0] = 8
    inside = torch.arange(8) < lengths[:, None]
    return (
        torch.randint(1, 30, (4, 8)) * inside,
        lengths,
        torch.randint(tags, (4, 8)).masked_fill(~inside, -100),
    )


@program("recurrent", "own, in the shape of a BiLSTM tagger", quick=True)
def packed_tagger() -> Training:
    """Packed sequences, padding ignored by the loss."""
    model = Tagger(nn.LSTM, 5)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def step(x: Tensor, lengths: Tensor, tags: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x, lengths).flatten(0, 1), tags.flatten())
        loss.backward()
        optimizer.step()
        return loss

    return Training(step, [_sentences(5) for _ in range(CALLS)])


@program("recurrent", "pytorch-crf")
def crf_tagger() -> Training:
    """A conditional random field over emissions of a packed GRU."""
    from torchcrf import CRF

    model, crf = Tagger(nn.GRU, 5), CRF(5, batch_first=True)
    optimizer = torch.optim.SGD([*model.parameters(), *crf.parameters()], lr=0.01, weight_decay=1e-4)

    def step(x: Tensor, lengths: Tensor, tags: Tensor) -> Tensor:
        model.zero_grad()
        crf.zero_grad()
        loss = -crf(model(x, lengths), tags.clamp(min=0), mask=tags >= 0, reduction="mean")
        loss.backward()
        optimizer.step()
        return loss

    return Training(step, [_sentences(5) for _ in range(CALLS)])


@program("recurrent", "own, in the shape of PyTorch's char-RNN tutorial", quick=True)
def name_classifier() -> Training:
    """A character at a time through linear layers, sentences of changing length."""
    i2h, i2o = nn.Linear(20 + 16, 16), nn.Linear(20 + 16, 4)
    model = nn.ModuleList([i2h, i2o])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def train(category: Tensor, line: Tensor) -> Tensor:
        hidden = torch.zeros(1, 16)
        model.zero_grad()
        for i in range(line.size(0)):
            combined = torch.cat((line[i], hidden), 1)
            hidden, output = torch.tanh(i2h(combined)), F.log_softmax(i2o(combined), dim=1)
        loss = F.nll_loss(output, category)
        loss.backward()
        optimizer.step()
        return loss

    line = lambda n: F.one_hot(torch.randint(20, (n, 1)), 20).float()  # noqa: E731
    return Training(train, [(torch.randint(4, (1,)), line(4 + i % 2)) for i in range(CALLS)])


@program("recurrent", "own, in the shape of torchtext's sentiment example")
def bag_of_words() -> Training:
    """EmbeddingBag with offsets, texts of any length in one tensor."""
    bag, fc = nn.EmbeddingBag(40, 16, sparse=False), nn.Linear(16, 3)
    model = nn.ModuleList([bag, fc])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4, gamma=0.5)

    def step(label: Tensor, text: Tensor, offsets: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(fc(bag(text, offsets)), label)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        scheduler.step()
        return loss

    def batch(n: int) -> tuple[Tensor, Tensor, Tensor]:
        return torch.randint(3, (4,)), torch.randint(40, (n,)), torch.tensor([0, 5, 9, 14])

    return Training(step, [batch(18 + i % 3) for i in range(CALLS)])


@program("recurrent", "own, in the shape of a padded batch of series")
def ragged_series() -> Training:
    """A list of tensors of different lengths, padded in the step."""
    rnn, head = nn.GRU(3, 12, 2, batch_first=True), nn.Linear(12, 1)
    model = nn.ModuleList([rnn, head])
    optimizer = torch.optim.NAdam(model.parameters(), lr=1e-2)

    def step(series: list[Tensor], goal: Tensor) -> Tensor:
        out, _ = rnn(pad_sequence(series, batch_first=True))
        last = torch.stack([out[i, len(s) - 1] for i, s in enumerate(series)])
        loss = F.huber_loss(head(last).squeeze(1), goal)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return Training(step, [([torch.randn(n, 3) for n in (4, 6, 5)], torch.randn(3)) for _ in range(CALLS)])


@program("recurrent", "own, in the shape of N-BEATS")
def n_beats() -> Training:
    """Blocks that take what they explain out of the input."""
    blocks = nn.ModuleList(mlp(12, 24, 16) for _ in range(3))
    optimizer = torch.optim.Adam(blocks.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)

    def step(x: Tensor, y: Tensor) -> Tensor:
        forecast, rest = torch.zeros_like(y), x
        for block in blocks:
            theta = block(rest)
            rest, forecast = rest - theta[:, :12], forecast + theta[:, 12:]
        loss = (200 * (forecast - y).abs() / (forecast.abs() + y.abs() + 1e-3)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        return loss

    return Training(step, [(torch.rand(8, 12) + 1, torch.rand(8, 4) + 1) for _ in range(CALLS)])


@program("recurrent", "own, in the shape of DeepFM")
def deep_fm() -> Training:
    """Categories by offsets into one table, Adagrad, AUC's logits kept for later."""
    table, linear, deep = nn.Embedding(50, 8), nn.Embedding(50, 1), mlp(24, 16, 1)
    model = nn.ModuleList([table, linear, deep])
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.02)
    offsets, seen = torch.tensor([0, 20, 40]), []

    def step(x: Tensor, y: Tensor) -> Tensor:
        e = table(x + offsets)
        fm = 0.5 * (e.sum(1).pow(2) - e.pow(2).sum(1)).sum(1, keepdim=True)
        logit = (linear(x + offsets).sum(1) + fm + deep(e.flatten(1))).squeeze(1)
        loss = F.binary_cross_entropy_with_logits(logit, y)
        model.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(logit.detach())
        return loss

    return Training(step, [(torch.randint(10, (8, 3)), torch.randint(2, (8,)).float()) for _ in range(CALLS)])


@program("recurrent", "own, in the shape of word2vec", quick=True)
def word2vec() -> Training:
    """Skip-grams with negative samples."""
    center, context = nn.Embedding(50, 16), nn.Embedding(50, 16)
    optimizer = torch.optim.Adam([*center.parameters(), *context.parameters()], lr=1e-2)

    def step(word: Tensor, near: Tensor, far: Tensor) -> Tensor:
        c = center(word)
        positive = F.logsigmoid((c * context(near)).sum(-1))
        negative = F.logsigmoid(-torch.bmm(context(far), c.unsqueeze(-1)).squeeze(-1)).sum(-1)
        loss = -(positive + negative).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    draw = lambda *shape: torch.randint(50, shape)  # noqa: E731
    return Training(step, [(draw(16), draw(16), draw(16, 4)) for _ in range(CALLS)])
