"""The demo's diffusion model: what is trained, and what is saved."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from demo import train_ddpm, training
from demo.train_ddpm import Recipe
from pd_core.core.errors import EXIT_DONE
from pd_core.core.settings.generate import GeneratorSettings
from pd_core.generators.open import open_generator
from pd_core.generators.protocol import Conditions, generate_checked
from tests.demo.conftest import pixels, run, weights, write

TINY = Recipe(steps=4, batch_size=8, channels=(8, 16), warmup_steps=1)


def test_the_loss_is_zero_for_the_velocity_of_a_known_image() -> None:
    """With one image x0 the answer is known: eps = (x_t - alpha x0) / sigma, v = alpha eps - sigma x0."""
    scheduler = train_ddpm.noise_schedule()
    images = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8).repeat(32, 1, 1, 1)
    seen = []

    def knows(noisy: torch.Tensor, steps: torch.Tensor) -> SimpleNamespace:
        alpha_bar = scheduler.alphas_cumprod[steps].double().reshape(-1, 1, 1, 1)
        alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        noise = (noisy - alpha * images) / sigma
        seen.append(steps)
        return SimpleNamespace(sample=(alpha * noise - sigma * images).float())

    loss = train_ddpm.v_loss(knows, scheduler, images, torch.Generator().manual_seed(0))
    # float32 x_t carries 6e-8 relative error, divided by sigma >= 6e-3 at the first step: 1e-5, squared
    assert loss.item() < 1e-9
    steps = seen[0].sort().values
    assert steps.diff().max() <= 32 and steps.diff().min() >= 31  # 1000 / 32 apart: all noise levels in every batch


def test_samples_are_of_the_images_and_of_all_of_them() -> None:
    """Trained on two images, DDIM gives near copies of both and, but for one in ten at most, nothing in between."""
    from diffusers import DDIMScheduler

    images = np.zeros((2, 8, 8), np.uint8)
    images[0, :, :4] = images[1, :, 4:] = 255
    recipe = Recipe(steps=200, batch_size=8, channels=(16, 16), warmup_steps=20, ema_decay=0.95, learning_rate=5e-3)
    model, schedule = train_ddpm.train(images, recipe)
    sampler = DDIMScheduler.from_config(schedule.config)
    sampler.set_timesteps(10)
    samples = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for step in sampler.timesteps:
            samples = sampler.step(model(samples, step).sample, step, samples).prev_sample
    distances = (samples[:, 0, None] - (torch.from_numpy(images) / 127.5 - 1)).abs().mean(dim=(2, 3))  # [32, 2], of 2
    assert (distances.min(dim=1).values < 0.3).sum() >= 29
    assert 4 <= (distances[:, 0] < distances[:, 1]).sum() <= 28  # of 32 fair draws: p < 1e-5


def test_averaged_weights_are_kept() -> None:
    """Decay 0 is the last step's weights, decay 1 the first step's: the latter have moved by at most one step's
    rate.
    """
    images = pixels(1)
    start = weights(train_ddpm.unet(TINY, 8))
    last, _ = train_ddpm.train(images, dataclasses.replace(TINY, ema_decay=0.0))
    first, _ = train_ddpm.train(images, dataclasses.replace(TINY, ema_decay=1.0))
    assert (weights(first) - start).abs().max() <= 1.01 * TINY.learning_rate  # Adam's first step is the rate's size
    assert (weights(last) - start).abs().max() > 1.5 * TINY.learning_rate


def test_the_folder_opens_as_a_diffusers_pipeline(data: Path, tmp_path: Path) -> None:
    from diffusers import DDIMScheduler, DDPMPipeline, DiffusionPipeline

    output = tmp_path / "generators" / "ddpm"
    assert run(train_ddpm, data, output) == EXIT_DONE
    pipeline = DiffusionPipeline.from_pretrained(output)
    assert isinstance(pipeline, DDPMPipeline)
    trained, _ = train_ddpm.train(training.read_images(data), Recipe(steps=2, channels=(8, 16)))
    assert torch.equal(weights(pipeline.unet), weights(trained))
    assert not pipeline.unet.training
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.scheduler.set_timesteps(10)
    assert pipeline.scheduler.timesteps[0] == 999 and pipeline.scheduler.config.prediction_type == "v_prediction"
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(batch_size=2, num_inference_steps=2, output_type="np").images.shape == (2, 8, 8, 1)
    assert [path.suffix for path in output.rglob("*model.*")] == [".safetensors"]  # nothing that needs pickle
    modes = {path.stat().st_mode & 0o777 for path in output.rglob("*") if path.is_file()}
    mask = os.umask(0)
    os.umask(mask)
    assert modes == {0o666 & ~mask}  # another user may read what other files of this user he may read
    assert [path.name for path in output.parent.iterdir()] == ["ddpm"]


def test_a_colour_diffusion_model_samples_colour_images(tmp_path: Path) -> None:
    """Twelve of 16 pixels a side through three resolutions."""
    data, output = write(tmp_path / "data", pixels(3, 12, 16)), tmp_path / "ddpm"
    assert run(train_ddpm, data, output, "--channels", "8", "8", "16") == EXIT_DONE
    settings = GeneratorSettings(path=str(output), scheduler="DDIMScheduler", steps=2)
    images = generate_checked(open_generator(settings), [1, 2], Conditions(), "it", "cpu")
    assert images.shape == (2, 16, 16, 3) and images.float().std(dim=3).max() > 0
