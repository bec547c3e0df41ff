"""Trains a small GAN on small images and saves both networks as TorchScript: an image is one pass from a latent.

    python demo/train_gan.py --data runs/demo-data/digits --output runs/generators/gan

    runs/generators/gan/generator.pt    float32 [B, 64], standard normal, to images [B, 1 or 3, S, S] in [-1, 1]
    runs/generators/gan/discriminator.pt    such images, B a multiple of 4, to logits [B]; what fine-tuning goes on from
    runs/generators/gan/train.json      settings, seed and a hash of the images

A function of images, settings, --seed and --threads alone, as demo/train_ddpm.py's models are.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
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

    from demo.gan import Discriminator, Generator

FILE, DISCRIMINATOR = "generator.pt", "discriminator.pt"
AUGMENTATIONS = ("color", "translation", "cutout")  # of demo/gan.py


@dataclass(frozen=True)
class Recipe:
    """What decides the weights beside the images and the number of threads.

    Attributes:
        channels: of both networks, at half of the images' resolution, at a quarter, and so on.
        latent_dim: of the standard normal latents.
        learning_rate: of both networks, constant.
        augment: how all images are changed before the discriminator sees them, of AUGMENTATIONS.
        ema_decay: of the average of the generator's weights over steps, which is what is saved.
        r1_weight: gamma of the gradient penalty.
        r1_interval: steps between two penalties, each `r1_interval` times as heavy (Karras et al. 2020, appendix B).
    """

    seed: int = 0
    steps: int = 6000
    batch_size: int = 32
    channels: tuple[int, ...] = (32, 64)
    latent_dim: int = 64
    learning_rate: float = 1e-3
    augment: tuple[str, ...] = ()
    ema_decay: float = 0.998
    r1_weight: float = 0.5
    r1_interval: int = 8


def train(images: np.ndarray, recipe: Recipe) -> tuple[Generator, Discriminator]:
    """The generator with its averaged weights, and the discriminator, after `recipe.steps`.

    The non-saturating logistic loss (Goodfellow et al. 2014, section 3) with R1 (Mescheder et al. 2018, equation 9), on
    images that are all augmented alike (Zhao et al. 2020, equations 4 and 5). images: uint8 [N, S, S] or [N, S, S, 3].

    Raises:
        RunError: a loss is not finite.
    """
    import torch
    from torch.nn.functional import softplus
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    from demo.gan import Generator, augmented

    generator, discriminator = networks(recipe, images.shape[1], training.colors_of(images))
    averaged = AveragedModel(generator, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema_decay))
    g_step, d_step = (
        torch.optim.Adam(network.parameters(), recipe.learning_rate, betas=(0.0, 0.99), fused=True)
        for network in (generator, discriminator)
    )
    random = torch.Generator().manual_seed(recipe.seed)
    batches = training.shuffled_batches(torch.from_numpy(images), recipe.batch_size, random)
    latents = _latents(recipe, random)
    seen = partial(augmented, how=recipe.augment, random=random)
    with console.progress("training", recipe.steps, "steps") as bar:
        for step in range(recipe.steps):
            with torch.no_grad():
                fake = generator(next(latents))
            penalty = recipe.r1_weight * recipe.r1_interval if step % recipe.r1_interval == 0 else 0.0
            d_loss = discriminator_loss(discriminator, seen(next(batches)), seen(fake), penalty)
            d_step.zero_grad()
            d_loss.backward()
            d_step.step()

            discriminator.requires_grad_(False)
            g_loss = softplus(-discriminator(seen(generator(next(latents))))).mean()
            g_step.zero_grad()
            g_loss.backward()
            g_step.step()
            discriminator.requires_grad_(True)
            averaged.update_parameters(generator)
            if not torch.isfinite(d_loss + g_loss):
                raise RunError(f"training: loss {(d_loss + g_loss).item()} at step {step}; try another --seed")
            bar.update()
    trained = averaged.module.eval()
    assert isinstance(trained, Generator), "what it averages"
    return trained, discriminator.eval()


def networks(recipe: Recipe, side: int, colors: int) -> tuple[Generator, Discriminator]:
    """Both with the first weights of the recipe's seed."""
    import torch

    from demo.gan import Discriminator, Generator

    with torch.random.fork_rng(devices=[]):  # layers draw from the global generator, which is left as it was
        torch.manual_seed(recipe.seed)
        generator = Generator(recipe.latent_dim, recipe.channels, colors, side)
        return generator, Discriminator(recipe.channels, colors, side)


def _latents(recipe: Recipe, random: torch.Generator) -> Iterator[torch.Tensor]:
    """float32 [batch_size, latent_dim], standard normal, without end."""
    import torch

    while True:
        yield torch.randn(recipe.batch_size, recipe.latent_dim, generator=random)


def discriminator_loss(
    discriminator: torch.nn.Module, real: torch.Tensor, fake: torch.Tensor, penalty: float
) -> torch.Tensor:
    """Cross entropy of the logits with real and fake, plus R1: penalty / 2 times the squared gradient on real
    images.
    """
    from torch.nn.functional import softplus

    loss = softplus(discriminator(fake)).mean() + softplus(-discriminator(real)).mean()
    return loss + penalty / 2 * squared_gradient(discriminator, real) if penalty else loss


def squared_gradient(discriminator: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Mean over images of the squared norm of the logit's gradient with respect to the image; differentiable."""
    import torch

    images = images.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(discriminator(images).sum(), images, create_graph=True)
    return gradient.square().sum(dim=(1, 2, 3)).mean()


def save(network: torch.nn.Module, path: Path) -> None:
    """Writes a network as TorchScript."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch.export, which pd_core does not read
        torch.jit.save(torch.jit.script(network.requires_grad_(False)), str(path))


def check_channels(channels: tuple[int, ...]) -> None:
    """Raises UserError unless the groups of the generator's norms divide its channels."""
    from demo.gan import GROUPS

    if any(count % GROUPS for count in channels):
        raise UserError(f"--channels {' '.join(map(str, channels))}: must be multiples of {GROUPS}; change them")


def make_generator(data: Path, output: Path, recipe: Recipe, threads: int, overwrite: bool) -> None:
    """Trains the GAN of `recipe` on the images under `data` and saves its networks in `output`, unless they are there.

    Raises:
        UserError: of `read_images`, `check_side`, `check_channels` and `is_finished`.
    """
    output = output.absolute()
    images = training.read_images(data)
    training.check_side(images, len(recipe.channels), data)
    check_channels(recipe.channels)
    # with what is written: a folder of an earlier version of this program lacks the discriminator
    identity = training.identity_of(images, recipe) | {"files": [FILE, DISCRIMINATOR]}

    def write(folder: Path) -> None:
        for network, file in zip(train(images, recipe), (FILE, DISCRIMINATOR), strict=True):
            save(network, folder / file)

    said = f"; {options(output, recipe)}"
    training.make_model("GAN", output, images, identity, threads, overwrite, write, said)


def options(output: Path, recipe: Recipe) -> str:
    """How workflows/finetune.py opens it; the other workflows do so without the discriminator."""
    return (
        f"--generator.kind torchscript --generator.path {output / FILE} --generator.latent_shape [{recipe.latent_dim}] "
        f"(to fine-tune it also --discriminator {output / DISCRIMINATOR})"
    )


def main(arguments: list[str] | None = None) -> int:
    """Parses the arguments and trains; returns the exit code."""
    parser = training.parser(
        "Train a small GAN.", "runs/generators/gan", Recipe, "half of the images' resolution, a quarter, ..."
    )
    parser.add_argument(
        "--augment", nargs="+", choices=AUGMENTATIONS, default=(), help="for few images (default: none)"
    )
    parser.add_argument("--r1", type=float, default=Recipe.r1_weight, help="gradient penalty (default: %(default)s)")
    args = parser.parse_args(arguments)
    recipe = Recipe(
        seed=args.seed, steps=args.steps, channels=tuple(args.channels), augment=tuple(args.augment), r1_weight=args.r1
    )
    return training.exit_code(lambda: make_generator(args.data, args.output, recipe, args.threads, args.overwrite))


if __name__ == "__main__":
    sys.exit(main())
