"""Adapters of PEFT on models of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.programs.program import CALLS, Program, Training, add
from bench.programs.transformers_table import SIZES, built, ids

LLAMA: dict[str, Any] = {
    **SIZES,
    "num_key_value_heads": 2,
    "use_cache": False,
}


def _register(name: str, config: str, **settings: Any) -> None:
    add(Program(name, "tuning", "peft", lambda: _training(config, settings)))


def _training(config: str, settings: dict[str, Any]) -> Training:
    import peft

    base = built("LlamaForCausalLM", LLAMA)
    adapter = getattr(peft, config)(task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(base, adapter).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 20)

    def step(batch: dict[str, Tensor]) -> Tensor:
        outputs = model(**batch)
        loss = outputs.loss
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        return loss

    def batch() -> dict[str, Tensor]:
        tokens = ids()
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}

    return Training(step, [(batch(),) for _ in range(CALLS)])


_register("lora", "LoraConfig", r=4, target_modules=["q_proj", "v_proj"])
_register("dora", "LoraConfig", r=4, target_modules=["q_proj", "v_proj"], use_dora=True)
_register("ia3", "IA3Config", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
_register("loha", "LoHaConfig", r=4, target_modules=["q_proj"])
_register("oft", "OFTConfig", oft_block_size=4, r=0, target_modules=["q_proj"])
_register("prompt_tuning", "PromptTuningConfig", num_virtual_tokens=4)
_register("prefix_tuning", "PrefixTuningConfig", num_virtual_tokens=4)
