"""Decoders of transformers, next-token loss; shapes of nanoGPT and minGPT; x-transformers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.programs.blocks import Gpt
from bench.programs.program import CALLS, Training, program
from bench.programs.transformers_table import SIZES, ids, padded, register


def _tokens() -> dict[str, Any]:
    tokens = ids()
    return {"input_ids": tokens, "labels": tokens}


def _masked() -> dict[str, Any]:
    tokens, mask = ids(), padded()
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}


LLAMA: dict[str, Any] = {
    **SIZES,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "use_cache": False,
}
EXPERTS: dict[str, Any] = {"moe_intermediate_size": 16, "num_experts_per_tok": 2, "head_dim": 8}


def _decoder(model: str, batch: Any = _tokens, **config: Any) -> None:
    register("language", model, batch, **{**LLAMA, **config})


register("language", "GPT2LMHeadModel", _tokens, quick=True, vocab_size=64, n_embd=32, n_layer=1, n_head=4)
_decoder("LlamaForCausalLM", _masked)
_decoder("MistralForCausalLM", sliding_window=4)
_decoder("Qwen3ForCausalLM", head_dim=8)
_decoder("Gemma2ForCausalLM", head_dim=8, sliding_window=4)
_decoder("PhiForCausalLM", _masked)
_decoder("GPTNeoXForCausalLM")
_decoder("CohereForCausalLM")
_decoder("MixtralForCausalLM", num_local_experts=4, output_router_logits=True)
_decoder("Qwen2MoeForCausalLM", num_experts=4, shared_expert_intermediate_size=16, **EXPERTS)
register(
    "language",
    "OPTForCausalLM",
    _masked,
    vocab_size=64,
    hidden_size=32,
    ffn_dim=48,
    num_hidden_layers=1,
    num_attention_heads=4,
    max_position_embeddings=32,
    word_embed_proj_dim=32,
)
register("language", "BloomForCausalLM", _masked, vocab_size=64, hidden_size=32, n_layer=1, n_head=4)
register("language", "GPTJForCausalLM", _tokens, vocab_size=64, n_embd=32, n_layer=1, n_head=4, rotary_dim=4)
register(
    "language",
    "GPTNeoForCausalLM",
    _tokens,
    vocab_size=64,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    attention_types=[[["global", "local"], 1]],
    window_size=4,
    max_position_embeddings=32,
)
register(
    "language",
    "FalconForCausalLM",
    _tokens,
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=4,
)
register("language", "MptForCausalLM", _tokens, vocab_size=64, d_model=32, n_layers=1, n_heads=4)
register(
    "language",
    "MambaForCausalLM",
    _tokens,
    vocab_size=64,
    hidden_size=16,
    num_hidden_layers=1,
    state_size=4,
    use_cache=False,
)
register(
    "language",
    "RwkvForCausalLM",
    _tokens,
    vocab_size=64,
    hidden_size=16,
    num_hidden_layers=2,
    context_length=16,
)


@program("language", "own, in the shape of nanoGPT")
def nano_gpt() -> Training:
    """Two groups by weight decay, a warmup set by hand, micro-batches, clipping, fused AdamW."""
    model = Gpt()
    decay = [p for p in model.parameters() if p.dim() >= 2]
    plain = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
    accumulation = 2

    def train_step(micro_batches: Any, lr: float) -> Any:
        for group in optimizer.param_groups:
            group["lr"] = lr
        for x, y in micro_batches:
            _, loss = model(x, y)
            loss = loss / accumulation
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss * accumulation

    pair = lambda: (ids(), ids())  # noqa: E731
    return Training(train_step, [([pair(), pair()], 1e-3 * (i + 1) / CALLS) for i in range(CALLS)])


@program("language", "own, in the shape of minGPT")
def min_gpt() -> Training:
    """A Trainer class whose loop body is the step: callbacks, counters, gradients zeroed first."""

    class Trainer:
        def __init__(self) -> None:
            self.model = Gpt()
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=5e-4)
            self.iter_num = 0
            self.callbacks: list[Any] = []
            self.loss: Any = None

        def run_step(self, x: Tensor, y: Tensor) -> Tensor:
            self.model.train()
            _, self.loss = self.model(x, y)
            self.model.zero_grad(set_to_none=True)
            self.loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            for callback in self.callbacks:
                callback(self)
            self.iter_num += 1
            return self.loss

    trainer = Trainer()
    seen: list[int] = []
    trainer.callbacks.append(lambda t: seen.append(t.iter_num))
    return Training(trainer.run_step, [(ids(), ids()) for _ in range(CALLS)])


@program("language", "own, in the shape of minGPT's adder", quick=True)
def adder() -> Training:
    """Sums of digits: the question's tokens carry no loss (-1 as the ignored index)."""
    model = Gpt(vocab=10)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step(x: Tensor, y: Tensor) -> Tensor:
        logits, _ = model(x, None)
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)), y.view(-1), ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    def sums() -> tuple[Tensor, Tensor]:
        digits = torch.randint(10, (8, 8))
        target = digits.roll(-1, 1)
        target[:, :4] = -1
        return digits, target

    return Training(step, [sums() for _ in range(CALLS)])


@program("language", "x-transformers", quick=False)
def x_transformers_gpt() -> Training:
    """The README's autoregressive example."""
    from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

    layers = Decoder(dim=32, depth=2, heads=2, attn_dim_head=16, rotary_pos_emb=True, attn_flash=True)
    model = AutoregressiveWrapper(TransformerWrapper(num_tokens=64, max_seq_len=16, attn_layers=layers))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step(x: Tensor) -> Tensor:
        loss = model(x)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return Training(step, [(ids(),) for _ in range(CALLS)])
