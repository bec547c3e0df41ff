"""Tiny generators with random weights, saved in the formats that pd_core opens; made in a second, of no use but to
tests.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SIZE = 16  # px of every image


def seeded(make: Callable[..., Any]) -> Callable[..., Any]:
    """Weights that are the same in every process, and networks in evaluation mode."""

    def made(*args: Any, **kwargs: Any) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            result = make(*args, **kwargs)
        return result.eval() if isinstance(result, torch.nn.Module) else result

    return made


RATE = 0.5  # of `Bars`


class Bars(torch.nn.Module):
    """4 standard normal latents z; bar k of 4, 4 px wide, has the grey level exp(RATE z_k) / 4 - 1.

    Its Jacobian has the singular values sqrt(192) RATE exp(RATE z_k) / 4: its log-volume at rank 4 is normal.
    """

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        bars = torch.exp(0.5 * z) / 4 - 1
        return bars.repeat_interleave(4, 1)[:, None, None, :].expand(-1, 3, 16, 16)

    @staticmethod
    def log_volume(z: Any) -> Any:
        """Closed form, of latents [B, 4]."""
        return 4 * math.log(math.sqrt(192) * RATE / 4) + RATE * z.sum(1)


def save_bars(path: Path) -> str:
    """TorchScript of `Bars`; --generator.latent_shape [4]."""
    torch.jit.save(torch.jit.script(Bars()), str(path))
    return str(path)


@seeded
def unet(classes: int | None = None, channels: int = 3, out_channels: int | None = None, size: int = SIZE) -> Any:
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=out_channels or channels,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
        num_class_embeds=classes,
    )


@seeded
def vae(channels: int = 4) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=SIZE,
    )


def save_ddpm(folder: Path, classes: int | None = None) -> str:
    """DDPMPipeline; with classes, the U-Net takes class numbers, which diffusers' own pipeline cannot pass on."""
    from diffusers import DDPMPipeline, DDPMScheduler

    return _save(DDPMPipeline(unet(classes), DDPMScheduler()), folder)


def save_ddim(folder: Path) -> str:
    """DDIMPipeline, the unconditional sampler of Song et al. 2020."""
    from diffusers import DDIMPipeline, DDIMScheduler

    return _save(DDIMPipeline(unet(), DDIMScheduler()), folder)


def save_consistency(folder: Path, classes: int | None = 10) -> str:
    """ConsistencyModelPipeline; the parameters of the published ones."""
    from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline

    scheduler = CMStochasticIterativeScheduler(num_train_timesteps=40, sigma_min=0.002, sigma_max=80.0)
    return _save(ConsistencyModelPipeline(unet(classes), scheduler), folder)


@seeded
def save_ldm(folder: Path) -> str:
    """LDMPipeline: a U-Net on the latents of a vector-quantised autoencoder."""
    from diffusers import DDIMScheduler, LDMPipeline, VQModel

    vqvae = VQModel(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=3,
        num_vq_embeddings=32,
        norm_num_groups=4,
        sample_size=SIZE,
    )
    return _save(LDMPipeline(vqvae, unet(size=SIZE // 2), DDIMScheduler(clip_sample=False)), folder)


@seeded
def save_dit(folder: Path, learned_variance: bool = True) -> str:
    """DiTPipeline; 1000 classes, since diffusers' own pipeline holds number 1000 for no class."""
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    transformer = DiTTransformer2DModel(
        sample_size=SIZE // 2,
        num_layers=2,
        patch_size=2,
        attention_head_dim=4,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8 if learned_variance else 4,
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )
    return _save(DiTPipeline(transformer, vae(), DDIMScheduler(clip_sample=False)), folder)


@seeded
def save_stable_diffusion(folder: Path) -> str:
    """StableDiffusionPipeline without safety checker; its tokenizer knows letters."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    network = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=SIZE // 2,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=4,
    )
    tokenizer = _letters(folder)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=network,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1, beta_schedule="scaled_linear"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _save(pipeline, folder)


def _letters(folder: Path) -> Any:
    """A CLIP tokenizer of one token per letter."""
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, merges = folder / "letters.json", folder / "letters.txt"
    vocabulary.write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    merges.write_text("#version: 0.2\n")
    return CLIPTokenizer(str(vocabulary), str(merges), model_max_length=16)


def _save(pipeline: Any, folder: Path) -> str:
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder, safe_serialization=True)
    return str(folder)
