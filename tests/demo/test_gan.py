"""The demo's GAN: what is trained, and what is saved."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from demo import gan, train_gan, training
from demo.train_gan import Recipe
from pd_core.core.errors import EXIT_DONE
from pd_core.core.settings.generate import GeneratorSettings
from pd_core.generators.open import open_generator
from pd_core.generators.protocol import Conditions, LatentGenerator, generate_checked
from tests.demo.conftest import pixels, run, write

TINY = Recipe(steps=3, batch_size=4, channels=(8, 16), latent_dim=6, augment=train_gan.AUGMENTATIONS, r1_interval=2)


# --- what is trained --------------------------------------------------------------------------------------------------


def test_the_penalty_is_r1_of_a_known_discriminator() -> None:
    """D(x) = sum of a x²/2 has the gradient a x: the mean over images of sum a² x²."""
    images = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    factor = torch.tensor(3.0, requires_grad=True)

    class Quadratic(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (factor * x.square() / 2).sum(dim=(1, 2, 3))

    penalty = train_gan.squared_gradient(Quadratic(), images)
    expected = 9 * images.square().sum() / 5
    assert penalty.item() == pytest.approx(expected.item(), rel=1e-5)  # float32 sums of 240 terms
    penalty.backward()  # what training needs: d/da of a² s is 2 a s
    assert factor.grad is not None and factor.grad.item() == pytest.approx(2 / 3 * expected.item(), rel=1e-5)


def test_the_discriminators_loss_is_that_of_known_logits() -> None:
    """Logits are pixel sums: -log sigmoid(real) - log(1 - sigmoid(fake)), and the gradient of a sum of 4 pixels is 4
    ones.
    """
    real, fake = torch.full((2, 1, 2, 2), 0.5), torch.full((2, 1, 2, 2), -0.25)

    class Sum(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sum(dim=(1, 2, 3))

    expected = np.log1p(np.exp(-2.0)) + np.log1p(np.exp(-1.0))
    assert train_gan.discriminator_loss(Sum(), real, fake, 0.0).item() == pytest.approx(expected, rel=1e-6)
    assert train_gan.discriminator_loss(Sum(), real, fake, 0.3).item() == pytest.approx(expected + 0.6, rel=1e-6)


def test_every_augmentation_can_be_chosen() -> None:
    assert sorted(train_gan.AUGMENTATIONS) == sorted(gan.AUGMENTATIONS)


def test_deviation_is_that_of_groups_of_four() -> None:
    x = torch.rand(8, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    groups = x.reshape(4, 2, -1).numpy().astype(np.float64)  # image i is in group i % 2
    expected = np.sqrt(groups.var(axis=0) + 1e-8).mean(axis=1)
    found = gan.deviation(x)
    assert found.shape == (8, 1, 2, 2)
    # float32, a mean of 12 values of about 0.3
    np.testing.assert_allclose(found[:, 0, 0, 0], np.tile(expected, 4), rtol=1e-5)
    assert gan.deviation(torch.ones(4, 3, 2, 2)).max() < 1e-3


def test_moved_images_are_shifts_within_an_eighth() -> None:
    images = torch.rand(200, 1, 16, 16, generator=torch.Generator().manual_seed(0)) + 1
    shifted = gan.moved(images, torch.Generator().manual_seed(1))
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    seen = set()
    for before, after in zip(padded, shifted, strict=True):
        matches = [
            (y, x)
            for y, x in itertools.product(range(5), range(5))
            if torch.equal(after, before[:, y : y + 16, x : x + 16])
        ]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) == 25  # 200 draws of 25 shifts miss one with probability 25 (24/25)^200 < 1%; the seed is fixed


def test_the_hole_is_half_a_side_wide_and_anywhere() -> None:
    holes = gan.cut_out(torch.ones(300, 2, 16, 16), torch.Generator().manual_seed(0)) == 0
    assert torch.equal(holes[:, 0], holes[:, 1])
    for hole in holes[:, 0]:
        rows, columns = hole.any(dim=1), hole.any(dim=0)
        assert torch.equal(hole, rows[:, None] & columns[None, :])  # a rectangle
        for side in (rows, columns):
            width = int(side.sum())
            assert 4 <= width <= 8 and (width == 8 or side[0] or side[-1])  # smaller only where the edge cuts it
    assert holes.any(dim=0).all()


def test_recolouring_keeps_the_order_of_grey_levels() -> None:
    """An affine map of each image with a slope in [0.5, 1.5] on grey pixels; three equal channels stay equal."""
    grey = torch.rand(50, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    found = gan.recoloured(grey.expand(-1, 3, -1, -1), torch.Generator().manual_seed(1))
    assert torch.allclose(found[:, 0], found[:, 2], atol=1e-5)
    x, y = grey.flatten(1), found[:, 0].flatten(1)
    slope = (y - y.mean(dim=1, keepdim=True)).norm(dim=1) / (x - x.mean(dim=1, keepdim=True)).norm(dim=1)
    assert torch.allclose(
        y - y.mean(dim=1, keepdim=True), slope[:, None] * (x - x.mean(dim=1, keepdim=True)), atol=1e-5
    )
    assert slope.min() >= 0.499 and slope.max() <= 1.501 and slope.std() > 0.2  # 0.29 for a uniform slope
    moved = y.mean(dim=1) - x.mean(dim=1)
    assert moved.abs().max() <= 0.501 and moved.std() > 0.2


def test_augmentation_lets_gradients_through() -> None:
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    gan.augmented(images, train_gan.AUGMENTATIONS, torch.Generator().manual_seed(0)).sum().backward()
    assert images.grad is not None and bool((images.grad != 0).flatten(1).any(dim=1).all())


def test_samples_take_on_the_colour_of_the_images() -> None:
    """Trained on images of plain colours from blue to green, most samples have no red, as all images."""
    images = np.zeros((64, 8, 8, 3), np.uint8)
    images[..., 1], images[..., 2] = (255 - 4 * np.arange(64))[:, None, None], (4 * np.arange(64))[:, None, None]
    recipe = dataclasses.replace(TINY, augment=(), steps=100, batch_size=16, ema_decay=0.9, learning_rate=2e-3)
    start, _ = train_gan.networks(recipe, 8, 3)
    latents = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    after_training = train_gan.train(images, recipe)[0]
    with torch.inference_mode():
        before, after = (network(latents).mean(dim=(2, 3)) for network in (start, after_training))
    distance = ((after[:, 1] + after[:, 2]).abs() + (after[:, 0] + 1)).mean()  # real ones: green + blue = 0, red = -1
    assert distance < 0.5 * ((before[:, 1] + before[:, 2]).abs() + (before[:, 0] + 1)).mean()
    assert after[:, 1].std() > 0.1  # 0.58 in the images; 0 where all samples are one colour


# --- what is saved ----------------------------------------------------------------------------------------------------


def test_the_file_opens_in_pd_core_with_gradients(
    colors: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, output = write(tmp_path / "data", pixels(colors)), tmp_path / "generators" / "gan"
    assert run(train_gan, data, output) == EXIT_DONE
    options = capsys.readouterr().out.split("; ")[-1].split(" (")[0].split()
    values = dict(zip(options[::2], options[1::2], strict=True))
    assert values["--generator.latent_shape"] == "[64]" and values["--generator.kind"] == "torchscript"
    settings = GeneratorSettings(kind="torchscript", path=values["--generator.path"], latent_shape=(64,))
    generator = open_generator(settings)
    assert isinstance(generator, LatentGenerator)
    images = generate_checked(generator, [3, 8, 9], Conditions(), "it", "cpu")
    assert images.shape == (3, 8, 8, 3)
    again = generate_checked(generator, [9], Conditions(), "it", "cpu")
    assert (again.int() - images[2:].int()).abs().max() <= 1  # whatever else is in the batch
    latents = generator.latents([3]).requires_grad_()
    generator.decode(latents, Conditions()).square().sum().backward()
    assert latents.grad is not None and bool((latents.grad != 0).all())
    again_trained, _ = train_gan.train(training.read_images(data), Recipe(steps=2, channels=(8, 16)))
    with torch.no_grad():
        assert torch.equal(again_trained(latents), generator.decode(latents, Conditions()))
    assert [path.name for path in output.parent.iterdir()] == ["gan"]


def test_jacobians_agree_with_differences(tmp_path: Path) -> None:
    """What Polarity sampling needs: products with the Jacobian, forward and backward, of the saved file."""
    data = write(tmp_path / "data", pixels(3))
    assert run(train_gan, data, tmp_path / "gan") == EXIT_DONE
    settings = GeneratorSettings(kind="torchscript", path=str(tmp_path / "gan" / train_gan.FILE), latent_shape=(64,))
    generator = open_generator(settings)
    assert isinstance(generator, LatentGenerator)
    latents = generator.latents([1])
    direction = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))

    def decode(z: torch.Tensor) -> torch.Tensor:
        return generator.decode(z, Conditions())

    _, forward = torch.autograd.functional.jvp(decode, latents, direction)
    h = 1e-2  # central differences are off by h² times third derivatives, and by float32's 1e-7 / h = 1e-5
    differences = (decode(latents + h * direction) - decode(latents - h * direction)) / (2 * h)
    assert (forward - differences).norm() < 1e-2 * differences.norm()
