"""Trains the demo's generator: a small unconditional diffusion model of small images, saved as a diffusers pipeline.

    python demo/train_ddpm.py --data runs/demo-data/digits --output runs/generators/ddpm

    runs/generators/ddpm/model_index.json, unet/, scheduler/    a DDPMPipeline, weights as safetensors
    runs/generators/ddpm/train.json                             settings, seed and a hash of the images

A function of images, settings, --seed and --threads alone: the number of steps is fixed, however long they take. The
folder appears when it is complete; one that holds a model of the same settings and images is kept.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder: its modules are demo.X

from demo import training
from pd_core.core.errors import RunError, UserError
from pd_core.engine import console

if TYPE_CHECKING:
    import torch
    from diffusers import DDPMScheduler, UNet2DModel


GROUPS = 8  # of channels, each normalised alone
HEAD = 16  # channels of an attention head


@dataclass(frozen=True)
class Recipe:
    """What decides the weights beside the images and the number of threads.

    Attributes:
        channels: of the U-Net, at the images' own resolution, at half of it, and so on.
        learning_rate: peak, after `warmup_steps`; falls to 0 along a cosine.
        ema_decay: of the average of the weights over steps, which is what is saved.
    """

    seed: int = 0
    steps: int = 900
    batch_size: int = 64
    channels: tuple[int, ...] = (32, 64)
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    ema_decay: float = 0.998


def train(images: np.ndarray, recipe: Recipe) -> tuple[UNet2DModel, DDPMScheduler]:
    """The averaged weights after `recipe.steps`, and the noise schedule they were trained with.

    DDPM (Ho et al. 2020, Algorithm 1) with the cosine schedule (Nichol & Dhariwal 2021, eq. 17) and the target
    v = alpha eps - sigma x (Salimans & Ho 2022, appendix D). images: uint8 [N, S, S] or [N, S, S, 3].

    Raises:
        RunError: the loss is not finite.
    """
    import torch
    from diffusers.optimization import get_cosine_schedule_with_warmup
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    scheduler = noise_schedule()
    model = unet(recipe, images.shape[1], training.colors_of(images))
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema_decay))
    optimizer = torch.optim.AdamW(
        model.parameters(), recipe.learning_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True
    )
    rate = get_cosine_schedule_with_warmup(optimizer, recipe.warmup_steps, recipe.steps)
    random = torch.Generator().manual_seed(recipe.seed)
    batches = training.shuffled_batches(torch.from_numpy(images), recipe.batch_size, random)
    with console.progress("training", recipe.steps, "steps") as bar:
        for step in range(recipe.steps):
            loss = v_loss(model, scheduler, next(batches), random)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rate.step()
            averaged.update_parameters(model)
            if not torch.isfinite(loss):
                raise RunError(f"training: loss {loss.item()} at step {step}; try another --seed")
            bar.update()
    return averaged.module.eval(), scheduler


def unet(recipe: Recipe, sample_size: int, colors: int = 1) -> UNet2DModel:
    """The network with the first weights of the recipe's seed; attention at the lowest resolution only."""
    import torch
    from diffusers import UNet2DModel

    with torch.random.fork_rng(devices=[]):  # layers draw from the global generator, which is left as it was
        torch.manual_seed(recipe.seed)
        return UNet2DModel(
            sample_size=sample_size,
            in_channels=colors,
            out_channels=colors,
            block_out_channels=recipe.channels,
            down_block_types=("DownBlock2D",) * len(recipe.channels),
            up_block_types=("UpBlock2D",) * len(recipe.channels),
            layers_per_block=1,
            norm_num_groups=GROUPS,
            attention_head_dim=HEAD,
            resnet_time_scale_shift="scale_shift",
        )


def check_channels(channels: tuple[int, ...]) -> None:
    """Raises UserError unless the groups of its norms and the heads of its attention divide the channels of the
    U-Net.
    """
    if any(count % GROUPS for count in channels) or channels[-1] % HEAD:
        given = " ".join(map(str, channels))
        raise UserError(f"--channels {given}: must be multiples of {GROUPS}, and the last one of {HEAD}; change them")


def noise_schedule() -> DDPMScheduler:
    """1,000 steps that end in pure noise, where every sampler then starts ("trailing": Lin et al. 2023, section
    3.3).
    """
    from diffusers import DDPMScheduler

    return DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing")


def v_loss(model: UNet2DModel, scheduler: DDPMScheduler, images: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Mean squared error of the predicted velocity at random time steps. images: float32 [B, C, S, S] in [-1, 1]."""
    import torch

    batch = images.shape[0]
    # one draw, evenly spread over the batch: less variance than B draws (Kingma et al. 2021, appendix I.1)
    times = (torch.rand(1, generator=random) + torch.arange(batch) / batch) % 1
    steps = (times * scheduler.config.num_train_timesteps).long()
    noise = torch.randn(images.shape, generator=random)
    predicted = model(scheduler.add_noise(images, noise, steps), steps).sample
    return torch.nn.functional.mse_loss(predicted, scheduler.get_velocity(images, noise, steps))


def make_generator(data: Path, output: Path, recipe: Recipe, threads: int, overwrite: bool) -> None:
    """Trains the model of `recipe` on the images under `data` and saves it in `output`, unless it is there.

    Raises:
        UserError: of `read_images`, `check_side` and `is_finished`, or channels that the U-Net cannot have.
    """
    output = output.absolute()
    check_channels(recipe.channels)
    images = training.read_images(data)
    training.check_side(images, len(recipe.channels) - 1, data)
    identity = training.identity_of(images, recipe)

    def write(folder: Path) -> None:
        from diffusers import DDPMPipeline

        model, scheduler = train(images, recipe)
        DDPMPipeline(unet=model, scheduler=scheduler).save_pretrained(folder)
        mode = (folder / "model_index.json").stat().st_mode
        for weights in folder.rglob("*.safetensors"):
            weights.chmod(mode)  # as written, only their owner can read them

    training.make_model("demo generator", output, images, identity, threads, overwrite, write)


def main(arguments: list[str] | None = None) -> int:
    """Parses the arguments and trains; returns the exit code."""
    args = training.parser(
        "Train a small diffusion model.", "runs/generators/ddpm", Recipe, "the images' own resolution, half of it, ..."
    ).parse_args(arguments)
    recipe = Recipe(seed=args.seed, steps=args.steps, channels=tuple(args.channels))
    return training.exit_code(lambda: make_generator(args.data, args.output, recipe, args.threads, args.overwrite))


if __name__ == "__main__":
    sys.exit(main())
