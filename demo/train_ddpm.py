"""Trains the demo's generator: a small unconditional diffusion model of the digits, saved as a diffusers pipeline.

    python demo/train_ddpm.py --data runs/demo-data/digits --output runs/generators/ddpm

    runs/generators/ddpm/model_index.json, unet/, scheduler/    a DDPMPipeline, weights as safetensors
    runs/generators/ddpm/train.json                             settings, seed and a hash of the images

A function of images, settings, --seed and --threads alone: the number of steps is fixed, however long they take. The folder
appears when it is complete; one that holds a model of the same settings and images is kept.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pd_core import cluster, errors, storage
from pd_core.errors import RunError, UserError

if TYPE_CHECKING:
    import torch
    from diffusers import DDPMScheduler, UNet2DModel

RECORD = "train.json"
LEVELS = 2  # resolutions of the U-Net: images are halved once


@dataclass(frozen=True)
class Recipe:
    """What decides the weights beside the images and the number of threads.

    Attributes:
        channels: of the U-Net, at the images' own resolution and at half of it.
        learning_rate: peak, after `warmup_steps`; falls to 0 along a cosine.
        ema_decay: of the average of the weights over steps, which is what is saved.
    """

    seed: int = 0
    steps: int = 900
    batch_size: int = 64
    channels: tuple[int, int] = (32, 64)
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    ema_decay: float = 0.998


def read_images(folder: Path) -> np.ndarray:
    """uint8 [N, S, S]: the grey PNGs in the label folders of `folder`, by name.

    Raises:
        UserError: no such folder, no PNG in it, or an image that is unreadable, not grey or of another size.
    """
    from PIL import Image

    paths = sorted(folder.glob("*/*.png"))
    if not paths:
        raise UserError(f"--data {folder}: no <label>/*.png there; write the images with demo/make_digits.py")
    images = []
    for path in paths:
        try:
            with Image.open(path) as image:
                mode, pixels = image.mode, np.asarray(image)
        except OSError as error:  # what Pillow raises for files that are no images, or not whole
            raise UserError(f"{path}: not a readable image ({error}); remove it or write it again") from None
        if mode != "L":
            raise UserError(f"{path}: mode {mode}, not 8-bit grey (L); convert it")
        images.append(pixels)
        if pixels.shape != images[0].shape:
            raise UserError(f"{path}: {pixels.shape[::-1]} px, others have {images[0].shape[::-1]}; use one size")
    height, width = images[0].shape
    if height != width or height % 2 ** (LEVELS - 1):
        raise UserError(f"--data {folder}: images of {width}x{height} px; they must be square with an even side")
    return np.stack(images)


def identity_of(images: np.ndarray, recipe: Recipe) -> dict[str, Any]:
    """JSON-able: the recipe and the images, by which a finished model is known. images: uint8 [N, S, S]."""
    data = {"shape": images.shape, "sha256": hashlib.sha256(images.tobytes()).hexdigest()}
    identity: dict[str, Any] = json.loads(json.dumps({"recipe": asdict(recipe), "images": data}))
    return identity


def train(images: np.ndarray, recipe: Recipe) -> tuple[UNet2DModel, DDPMScheduler]:
    """The averaged weights after `recipe.steps`, and the noise schedule they were trained with.

    DDPM (Ho et al. 2020, Algorithm 1) with the cosine schedule (Nichol & Dhariwal 2021, eq. 17) and the target
    v = alpha eps - sigma x (Salimans & Ho 2022, appendix D). images: uint8 [N, S, S].

    Raises:
        RunError: the loss is not finite.
    """
    import torch
    from diffusers.optimization import get_cosine_schedule_with_warmup
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    scheduler = noise_schedule()
    model = unet(recipe, sample_size=images.shape[1])
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema_decay))
    optimizer = torch.optim.AdamW(
        model.parameters(), recipe.learning_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True
    )
    rate = get_cosine_schedule_with_warmup(optimizer, recipe.warmup_steps, recipe.steps)
    random = torch.Generator().manual_seed(recipe.seed)
    batches = shuffled_batches(torch.from_numpy(images), recipe.batch_size, random)
    with cluster.progress("training", recipe.steps, "steps") as bar:
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


def unet(recipe: Recipe, sample_size: int) -> UNet2DModel:
    """The network with the first weights of the recipe's seed; attention at the lowest resolution only."""
    import torch
    from diffusers import UNet2DModel

    with torch.random.fork_rng(devices=[]):  # layers draw from the global generator, which is left as it was
        torch.manual_seed(recipe.seed)
        return UNet2DModel(
            sample_size=sample_size,
            in_channels=1,
            out_channels=1,
            block_out_channels=recipe.channels,
            down_block_types=("DownBlock2D",) * LEVELS,
            up_block_types=("UpBlock2D",) * LEVELS,
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=16,
            resnet_time_scale_shift="scale_shift",
        )


def noise_schedule() -> DDPMScheduler:
    """1,000 steps that end in pure noise, where every sampler then starts ("trailing": Lin et al. 2023, section 3.3)."""
    from diffusers import DDPMScheduler

    return DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing")


def v_loss(model: UNet2DModel, scheduler: DDPMScheduler, images: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Mean squared error of the predicted velocity at random time steps. images: float32 [B, 1, S, S] in [-1, 1]."""
    import torch

    batch = images.shape[0]
    # one draw, evenly spread over the batch: less variance than B draws (Kingma et al. 2021, appendix I.1)
    times = (torch.rand(1, generator=random) + torch.arange(batch) / batch) % 1
    steps = (times * scheduler.config.num_train_timesteps).long()
    noise = torch.randn(images.shape, generator=random)
    predicted = model(scheduler.add_noise(images, noise, steps), steps).sample
    return torch.nn.functional.mse_loss(predicted, scheduler.get_velocity(images, noise, steps))


def shuffled_batches(images: torch.Tensor, batch_size: int, random: torch.Generator) -> Iterator[torch.Tensor]:
    """float32 [batch_size, 1, S, S] in [-1, 1] without end; each image once before any comes again.

    images: uint8 [N, S, S].
    """
    import torch

    order = torch.empty(0, dtype=torch.long)
    while True:
        while len(order) < batch_size:
            order = torch.cat([order, torch.randperm(len(images), generator=random)])
        chosen, order = order[:batch_size], order[batch_size:]
        yield images[chosen].unsqueeze(1).float() / 127.5 - 1


def is_finished(output: Path, identity: dict[str, Any], overwrite: bool) -> bool:
    """Whether `output` holds the model of this identity.

    Raises:
        UserError: it holds another one and `overwrite` is off, or something that is not of this program.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    try:
        found = json.loads((output / RECORD).read_text())
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"--output {output}: holds what is not of this program; choose another")
    if found == identity:
        return True
    if not overwrite:
        what = "; ".join(storage.differences(found, identity))
        raise UserError(f"--output {output}: holds a model of other settings ({what}); choose another or --overwrite")
    return False


@contextlib.contextmanager
def moved_into_place(output: Path) -> Iterator[Path]:
    """An empty folder beside `output` that takes its place as a whole; after an error it is gone, and `output` as it was."""
    partial, replaced = (output.with_name(f".{kind}-{output.name}-{os.getpid()}") for kind in ("partial", "replaced"))
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error}); choose another") from None
    try:
        yield partial
        if output.exists():
            output.rename(replaced)
        partial.rename(output)
    finally:
        if replaced.exists() and not output.exists():
            replaced.rename(output)
        for folder in (partial, replaced):
            shutil.rmtree(folder, ignore_errors=True)


def make_generator(data: Path, output: Path, recipe: Recipe, threads: int, overwrite: bool) -> None:
    """Trains the model of `recipe` on the images under `data` and saves it in `output`, unless it is there.

    Raises:
        UserError: of `read_images` and `is_finished`.
    """
    output = output.absolute()
    images = read_images(data)
    identity = identity_of(images, recipe)
    if is_finished(output, identity, overwrite):
        cluster.say(f"demo generator: {output} (kept, it is of these settings and images)")
        return
    with moved_into_place(output) as partial:
        import torch
        from diffusers import DDPMPipeline

        torch.set_num_threads(threads)
        start = time.perf_counter()
        model, scheduler = train(images, recipe)
        DDPMPipeline(unet=model, scheduler=scheduler).save_pretrained(partial)
        mode = (partial / "model_index.json").stat().st_mode
        for weights in partial.rglob("*.safetensors"):
            weights.chmod(mode)  # as written, only their owner can read them
        (partial / RECORD).write_text(json.dumps(identity, indent=2) + "\n")
    seconds = time.perf_counter() - start
    cluster.say(f"demo generator: {output} ({len(images)} images, {recipe.steps} steps, {seconds:.0f} s)")


def positive(text: str) -> int:
    """The number, for argparse."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def main(arguments: list[str] | None = None) -> int:
    """Parses the arguments and trains; returns the exit code."""
    parser = argparse.ArgumentParser(description="Train the demo's diffusion model.")
    parser.add_argument("--data", type=Path, default=Path("runs/demo-data/digits"), help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("runs/generators/ddpm"), help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=Recipe.seed, help="default: %(default)s")
    parser.add_argument("--steps", type=positive, default=Recipe.steps, help="default: %(default)s")
    parser.add_argument("--threads", type=positive, default=2, help="default: %(default)s")
    parser.add_argument("--overwrite", action="store_true", help="replace a model of other settings or images")
    args = parser.parse_args(arguments)
    recipe = Recipe(seed=args.seed, steps=args.steps)

    def program() -> None:
        try:
            make_generator(args.data, args.output, recipe, args.threads, args.overwrite)
        except KeyboardInterrupt:
            # a line of its own: the progress bar may not have ended its
            print("\ninterrupted: nothing is written; the same command starts anew", file=sys.stderr)
            raise SystemExit(errors.EXIT_INTERRUPTED) from None

    return errors.exit_code(program)


if __name__ == "__main__":
    sys.exit(main())
