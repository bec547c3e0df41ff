"""The demo's GAN: what is trained, what is saved, and that colour images train a diffusion model as well."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from demo import gan, train_ddpm, train_gan, training
from demo.train_gan import Recipe
from pd_core.core.errors import EXIT_BAD_INPUT, EXIT_DONE
from pd_core.core.settings.generate import GeneratorSettings
from pd_core.generators.open import open_generator
from pd_core.generators.protocol import Conditions, LatentGenerator, generate_checked

TINY = Recipe(steps=3, batch_size=4, channels=(8, 16), latent_dim=6, augment=train_gan.AUGMENTATIONS, r1_interval=2)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pixels(colors: int, count: int = 20, side: int = 8) -> np.ndarray:
    """Random uint8 [count, side, side] or [count, side, side, 3]."""
    shape = (count, side, side) if colors == 1 else (count, side, side, colors)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def write(folder: Path, images: np.ndarray) -> Path:
    """As PNG files under two labels."""
    for index, image in enumerate(images):
        path = folder / str(index % 2) / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


@pytest.fixture(params=[1, 3])
def data(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    return write(tmp_path / "data", pixels(request.param))


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in model.state_dict().values()])


def trained(images: np.ndarray, recipe: Recipe) -> torch.nn.Module:
    generator, _ = train_gan.train(images, recipe)
    return generator


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(data: Path, output: Path, *more: str) -> int:
    arguments = [
        "--data",
        str(data),
        "--output",
        str(output),
        "--steps",
        "2",
        "--threads",
        "1",
        "--channels",
        "8",
        "16",
    ]
    return train_gan.main([*arguments, *more])


# --- images -----------------------------------------------------------------------------------------------------------


def test_batches_are_the_images_channels_first() -> None:
    """The first batch of all images holds each once: pixel values [-1, 1], red in channel 0."""
    images = pixels(3)
    batch = next(training.shuffled_batches(torch.from_numpy(images), 20, torch.Generator().manual_seed(0)))
    back = ((batch + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert sorted(image.tobytes() for image in back) == sorted(image.tobytes() for image in images)


@pytest.mark.parametrize("first", ["L", "RGB"])
def test_grey_among_colour_is_refused(first: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "data", pixels(1 if first == "L" else 3))
    Image.new("RGB" if first == "L" else "L", (8, 8)).save(data / "1" / "0001.png")
    assert run(data, tmp_path / "gan") == EXIT_BAD_INPUT
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "0001.png" in said[0] and "mode RGB" in said[0] and "mode L" in said[0]


def test_alpha_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "data", pixels(4))
    assert run(data, tmp_path / "gan") == EXIT_BAD_INPUT
    assert "mode RGBA, neither" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("program", "channels", "says"),
    [
        (train_gan, ["12"], "multiples of 8"),
        (train_gan, ["8", "8", "8", "8"], "cannot be halved"),
        (train_ddpm, ["12", "16"], "multiples of 8"),
        (train_ddpm, ["8", "24"], "the last one of 16"),
        (train_ddpm, ["8", "8", "8", "8", "16"], "cannot be halved"),
    ],
)
def test_channels_that_do_not_fit_are_refused(
    program: object, channels: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "data", pixels(1))
    arguments = ["--data", str(data), "--output", str(tmp_path / "out"), "--steps", "1", "--channels", *channels]
    assert program.main(arguments) == EXIT_BAD_INPUT  # type: ignore[attr-defined]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and says in said[0]
    assert not (tmp_path / "out").exists()


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
    """Logits are pixel sums: -log sigmoid(real) - log(1 - sigmoid(fake)), and the gradient of a sum of 4 pixels is 4 ones."""
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
    assert (
        len(seen) == 25
    )  # 200 draws of 25 shifts miss one with probability 25 (24/25)^200 < 1%, and the seed is fixed


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


@pytest.mark.parametrize("colors", [1, 3])
def test_a_model_is_a_function_of_images_and_seed(colors: int) -> None:
    images = pixels(colors)
    first = trained(images, TINY)
    torch.manual_seed(5)  # the state of the process must not matter
    state = torch.get_rng_state()
    again = trained(images, TINY)
    assert torch.equal(weights(first), weights(again))
    assert torch.equal(torch.get_rng_state(), state)
    other = trained(images, dataclasses.replace(TINY, seed=1))
    assert not torch.allclose(weights(first), weights(other), atol=1e-2)


def test_samples_take_on_the_colour_of_the_images() -> None:
    """Trained on images of plain colours from blue to green, most samples have no red, as all images."""
    images = np.zeros((64, 8, 8, 3), np.uint8)
    images[..., 1], images[..., 2] = (255 - 4 * np.arange(64))[:, None, None], (4 * np.arange(64))[:, None, None]
    recipe = dataclasses.replace(TINY, augment=(), steps=100, batch_size=16, ema_decay=0.9, learning_rate=2e-3)
    start, _ = train_gan.networks(recipe, 8, 3)
    latents = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    after_training = trained(images, recipe)
    with torch.inference_mode():
        before, after = (network(latents).mean(dim=(2, 3)) for network in (start, after_training))
    distance = ((after[:, 1] + after[:, 2]).abs() + (after[:, 0] + 1)).mean()  # real ones: green + blue = 0, red = -1
    assert distance < 0.5 * ((before[:, 1] + before[:, 2]).abs() + (before[:, 0] + 1)).mean()
    assert after[:, 1].std() > 0.1  # 0.58 in the images; 0 where all samples are one colour


def test_a_colour_diffusion_model_samples_colour_images(tmp_path: Path) -> None:
    """Twelve of 16 pixels a side through three resolutions; the images go into the identity with their channels."""
    data = write(tmp_path / "data", pixels(3, 12, 16))
    output = tmp_path / "ddpm"
    arguments = ["--data", str(data), "--output", str(output), "--steps", "2", "--threads", "1"]
    assert train_ddpm.main([*arguments, "--channels", "8", "8", "16"]) == EXIT_DONE
    settings = GeneratorSettings(path=str(output), scheduler="DDIMScheduler", steps=2)
    images = generate_checked(open_generator(settings), [1, 2], Conditions(), "it", "cpu")
    assert images.shape == (2, 16, 16, 3) and images.float().std(dim=3).max() > 0
    assert training.read_images(data).shape == (12, 16, 16, 3)


# --- what is saved ----------------------------------------------------------------------------------------------------


def test_the_file_opens_in_pd_core_with_gradients(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "generators" / "gan"
    assert run(data, output) == EXIT_DONE
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
    again_trained = trained(training.read_images(data), Recipe(steps=2, channels=(8, 16)))
    with torch.no_grad():
        assert torch.equal(again_trained(latents), generator.decode(latents, Conditions()))
    assert [path.name for path in output.parent.iterdir()] == ["gan"]


def test_jacobians_agree_with_differences(tmp_path: Path) -> None:
    """What Polarity sampling needs: products with the Jacobian, forward and backward, of the saved file."""
    data = write(tmp_path / "data", pixels(3))
    assert run(data, tmp_path / "gan") == EXIT_DONE
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


def test_a_finished_model_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, output = write(tmp_path / "data", pixels(3)), tmp_path / "gan"
    assert run(data, output) == EXIT_DONE
    before = files(output)
    assert set(before) == {train_gan.FILE, train_gan.DISCRIMINATOR, "train.json"}
    monkeypatch.setattr(train_gan, "train", lambda *_: pytest.fail("trained again"))
    capsys.readouterr()
    assert run(data, output) == EXIT_DONE
    assert "kept" in (said := capsys.readouterr().out) and "--generator.latent_shape [64]" in said
    assert files(output) == before


@pytest.mark.parametrize("change", ["seed", "channels"])
def test_another_model_is_replaced_only_on_request(
    change: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, output = write(tmp_path / "data", pixels(1)), tmp_path / "gan"
    assert run(data, output) == EXIT_DONE
    before = files(output)
    more = {"seed": ["--seed", "3"], "channels": ["--channels", "16", "16"]}[change]
    capsys.readouterr()
    assert run(data, output, *more) == EXIT_BAD_INPUT
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "--overwrite" in said[0] and f"recipe.{change}" in said[0]
    assert files(output) == before
    assert run(data, output, *more, "--overwrite") == EXIT_DONE
    assert files(output)["train.json"] != before["train.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "gan"]


def test_an_error_in_training_keeps_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, output = write(tmp_path / "data", pixels(1)), tmp_path / "gan"
    assert run(data, output) == EXIT_DONE
    before = files(output)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train_gan, "train", interrupt)
    with pytest.raises(SystemExit):
        run(data, output, "--seed", "1", "--overwrite")
    assert files(output) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "gan"]
