"""Audio: models of transformers, CTC and spectrograms of our own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.programs.program import CALLS, Training, program
from bench.programs.transformers_table import ids, register

WAVE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 16,
    "conv_dim": [8, 8],
    "conv_kernel": [8, 4],
    "conv_stride": [4, 4],
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "num_feat_extract_layers": 2,
    "classifier_proj_size": 16,
    "num_labels": 4,
    "apply_spec_augment": False,
    "mask_time_prob": 0.0,
    "pad_token_id": 0,
}


def _speech() -> dict[str, Any]:
    return {"input_values": torch.randn(2, 400), "labels": torch.randint(1, 16, (2, 5))}


def _words() -> dict[str, Any]:
    return {"input_values": torch.randn(2, 400), "labels": torch.randint(4, (2,))}


register("audio", "Wav2Vec2ForCTC", _speech, **WAVE)
register("audio", "Wav2Vec2ForSequenceClassification", _words, **WAVE)
register("audio", "HubertForSequenceClassification", _words, **WAVE)
register("audio", "WavLMForSequenceClassification", _words, **WAVE)
register(
    "audio",
    "WhisperForConditionalGeneration",
    lambda: {"input_features": torch.randn(2, 8, 24), "labels": ids(2, 6, 60)},
    vocab_size=64,
    num_mel_bins=8,
    d_model=32,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    max_source_positions=12,
    max_target_positions=16,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=1,
    use_cache=False,
    suppress_tokens=None,
    begin_suppress_tokens=None,
)
register(
    "audio",
    "ASTForAudioClassification",
    lambda: {"input_values": torch.randn(2, 24, 16), "labels": torch.randint(4, (2,))},
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
    patch_size=4,
    frequency_stride=4,
    time_stride=4,
    max_length=24,
    num_mel_bins=16,
    num_labels=4,
)


class Listener(nn.Module):
    """Convolutions over a spectrogram, a bidirectional LSTM, one distribution per frame."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv1d(8, 16, 3, 2, 1), nn.BatchNorm1d(16), nn.Hardtanh(0, 20))
        self.rnn, self.head = nn.LSTM(16, 16, bidirectional=True, batch_first=True), nn.Linear(32, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.conv(x).transpose(1, 2))[0]).log_softmax(-1)


@program("audio", "own, in the shape of deepspeech.pytorch")
def deep_speech() -> Training:
    """CTC over frames, with lengths as tensors; a loss that is not finite counts as zero."""
    model = Listener()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    criterion = nn.CTCLoss(reduction="sum", zero_infinity=True)

    def step(x: Tensor, targets: Tensor, lengths: Tensor, target_lengths: Tensor) -> Tensor:
        out = model(x).transpose(0, 1)
        loss = criterion(out, targets, lengths, target_lengths) / x.shape[0]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 400.0)
        optimizer.step()
        return loss

    def batch() -> tuple[Tensor, ...]:
        return (
            torch.randn(3, 8, 40),
            torch.randint(1, 12, (3, 5)),
            torch.tensor([20, 18, 16]),
            torch.tensor([5, 4, 3]),
        )

    return Training(step, [batch() for _ in range(CALLS)])


@program("audio", "own, in the shape of a keyword spotter on torchaudio")
def m5_speech_commands() -> Training:
    """One-dimensional convolutions over raw sound, StepLR."""

    def conv(a: int, b: int, k: int, s: int) -> nn.Module:
        return nn.Sequential(nn.Conv1d(a, b, k, s), nn.BatchNorm1d(b), nn.ReLU(), nn.MaxPool1d(2))

    model = nn.Sequential(
        conv(1, 8, 16, 4), conv(8, 16, 3, 1), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(16, 6)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=4, gamma=0.1)

    def step(data: Tensor, target: Tensor) -> float:
        output = F.log_softmax(model(data), dim=-1)
        loss = F.nll_loss(output, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        return loss.item()

    return Training(step, [(torch.randn(8, 1, 400), torch.randint(6, (8,))) for _ in range(CALLS)])


@program("audio", "own, in the shape of a vocoder's spectral loss", quick=True)
def multi_resolution_stft() -> Training:
    """A net on samples, with a loss on spectra of several resolutions."""
    model = nn.Sequential(
        nn.Conv1d(1, 8, 9, padding=4), nn.LeakyReLU(0.2), nn.Conv1d(8, 1, 9, padding=4), nn.Tanh()
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.8, 0.99))

    def spectrum(x: Tensor, size: int) -> Tensor:
        window = torch.hann_window(size)
        return (
            torch.stft(x.float(), size, size // 4, window=window, return_complex=True).abs().clamp(min=1e-3)
        )

    def step(x: Tensor, y: Tensor) -> Tensor:
        out = model(x[:, None])[:, 0]
        loss = torch.zeros(())
        for size in (32, 64):
            ours, theirs = spectrum(out, size), spectrum(y, size)
            loss = loss + (theirs - ours).norm() / theirs.norm() + F.l1_loss(ours.log(), theirs.log())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return Training(step, [(torch.randn(4, 256), torch.randn(4, 256).tanh()) for _ in range(CALLS)])
