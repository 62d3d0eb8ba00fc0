"""Models of diffusers, trained as its examples do."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.programs.program import CALLS, Training, program


def _noised(model: nn.Module, predict: Any, shape: tuple[int, ...], *more: Any) -> Training:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(num_train_timesteps=100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.95, 0.999), weight_decay=1e-6)

    def step(images: Tensor, noise: Tensor, timesteps: Tensor, *rest: Tensor) -> Tensor:
        noisy = scheduler.add_noise(images, noise, timesteps)
        loss = F.mse_loss(predict(noisy, timesteps, *rest).float(), noise.float())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    def batch() -> tuple[Tensor, ...]:
        rest = [make() for make in more]
        return (torch.randn(shape), torch.randn(shape), torch.randint(100, (shape[0],)), *rest)

    return Training(step, [batch() for _ in range(CALLS)])


@program("diffusion", "diffusers")
def diffusers_unet() -> Training:
    """The unconditional example."""
    from diffusers import UNet2DModel

    model = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        norm_num_groups=4,
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    )
    return _noised(model, lambda x, t: model(x, t, return_dict=False)[0], (2, 1, 8, 8))


@program("diffusion", "diffusers")
def diffusers_conditional_unet() -> Training:
    """The text-to-image example, text as hidden states."""
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        cross_attention_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        attention_head_dim=4,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    text = lambda: torch.randn(2, 4, 8)  # noqa: E731
    return _noised(model, lambda x, t, c: model(x, t, c, return_dict=False)[0], (2, 4, 8, 8), text)


@program("diffusion", "diffusers")
def diffusers_dit() -> Training:
    """A transformer over patches, conditioned on classes."""
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        sample_size=8,
        patch_size=2,
        norm_num_groups=4,
        num_embeds_ada_norm=10,
    )
    for part in model.modules():
        if hasattr(part, "dropout_prob"):
            part.dropout_prob = 0.0
    classes = lambda: torch.randint(10, (2,))  # noqa: E731
    return _noised(model, lambda x, t, c: model(x, timestep=t, class_labels=c).sample, (2, 4, 8, 8), classes)


@program("diffusion", "diffusers")
def diffusers_autoencoder() -> Training:
    """AutoencoderKL: reconstruction and KL, the mode of the posterior."""
    from diffusers import AutoencoderKL

    model = AutoencoderKL(
        in_channels=3, out_channels=3, block_out_channels=(8,), latent_channels=2, norm_num_groups=4
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step(x: Tensor) -> Tensor:
        posterior = model.encode(x).latent_dist
        recon = model.decode(posterior.mode()).sample
        loss = F.l1_loss(recon, x) + 1e-3 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return Training(step, [(torch.rand(2, 3, 8, 8),) for _ in range(CALLS)])
