"""The demo's generator: what is trained, what is saved, and what a user is told."""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from demo import train_ddpm
from demo.train_ddpm import Recipe
from pd_core.core.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_INTERRUPTED

SCRIPT = Path(train_ddpm.__file__)
TINY = Recipe(steps=4, batch_size=8, channels=(8, 16), warmup_steps=1)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """20 images of 8x8 random grey pixels under two labels."""
    folder = tmp_path / "data"
    pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8)
    for index, image in enumerate(pixels):
        path = folder / str(index % 2) / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in model.state_dict().values()])


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(data: Path, output: Path, *more: str) -> int:
    arguments = ["--data", str(data), "--output", str(output), "--steps", "2", "--threads", "1", *more]
    return train_ddpm.main(arguments)


# --- what is trained --------------------------------------------------------------------------------------------------


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


def test_batches_show_every_image_once_before_any_again() -> None:
    images = torch.arange(10, dtype=torch.uint8).reshape(10, 1, 1)
    batches = train_ddpm.shuffled_batches(images, 4, torch.Generator().manual_seed(0))
    shown = torch.cat(list(itertools.islice(batches, 5))).flatten()
    values = ((shown + 1) * 127.5).round().int().reshape(2, 10)
    assert values.sort(dim=1).values.tolist() == [list(range(10))] * 2
    assert values[0].tolist() != values[1].tolist()


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


def test_a_model_is_a_function_of_images_and_seed(data: Path) -> None:
    images = train_ddpm.read_images(data)
    first, _ = train_ddpm.train(images, TINY)
    torch.manual_seed(5)  # the state of the process must not matter
    state = torch.get_rng_state()
    again, _ = train_ddpm.train(images, TINY)
    assert torch.equal(weights(first), weights(again))
    assert torch.equal(torch.get_rng_state(), state)
    other, _ = train_ddpm.train(images, dataclasses.replace(TINY, seed=1))
    assert not torch.allclose(weights(first), weights(other), atol=1e-2)


def test_averaged_weights_are_kept(data: Path) -> None:
    """Decay 0 is the last step's weights, decay 1 the first step's: the latter have moved by at most one step's rate."""
    images = train_ddpm.read_images(data)
    start = weights(train_ddpm.unet(TINY, 8))
    last, _ = train_ddpm.train(images, dataclasses.replace(TINY, ema_decay=0.0))
    first, _ = train_ddpm.train(images, dataclasses.replace(TINY, ema_decay=1.0))
    assert (weights(first) - start).abs().max() <= 1.01 * TINY.learning_rate  # Adam's first step is the rate's size
    assert (weights(last) - start).abs().max() > 1.5 * TINY.learning_rate


# --- what is saved ----------------------------------------------------------------------------------------------------


def test_the_folder_opens_as_a_diffusers_pipeline(data: Path, tmp_path: Path) -> None:
    from diffusers import DDIMScheduler, DDPMPipeline, DiffusionPipeline

    output = tmp_path / "generators" / "ddpm"
    assert run(data, output) == EXIT_DONE
    pipeline = DiffusionPipeline.from_pretrained(output)
    assert isinstance(pipeline, DDPMPipeline)
    trained, _ = train_ddpm.train(train_ddpm.read_images(data), Recipe(steps=2))
    assert torch.equal(weights(pipeline.unet), weights(trained))
    assert not pipeline.unet.training
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.scheduler.set_timesteps(10)
    assert pipeline.scheduler.timesteps[0] == 999 and pipeline.scheduler.config.prediction_type == "v_prediction"
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(batch_size=2, num_inference_steps=2, output_type="np").images.shape == (2, 8, 8, 1)
    assert [path.suffix for path in output.rglob("*model.*")] == [".safetensors"]  # nothing that needs pickle
    modes = {path.stat().st_mode & 0o777 for path in output.rglob("*") if path.is_file()}
    assert modes == {0o666 & ~umask()}  # another user may read what other files of this user he may read
    assert [path.name for path in output.parent.iterdir()] == ["ddpm"]


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_finished_model_is_kept(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "ddpm"
    assert run(data, output) == EXIT_DONE
    before = files(output)
    monkeypatch.setattr(train_ddpm, "train", lambda *_: pytest.fail("trained again"))
    capsys.readouterr()
    assert run(data, output) == EXIT_DONE
    assert run(data, output, "--overwrite") == EXIT_DONE  # it is what was asked for
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all("kept" in line and str(output) in line for line in lines)
    assert files(output) == before


@pytest.mark.parametrize("change", ["seed", "steps", "a pixel"])
def test_another_model_is_replaced_only_on_request(
    change: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "ddpm"
    assert run(data, output) == EXIT_DONE
    before = files(output)
    more = {"seed": ["--seed", "3"], "steps": ["--steps", "3"], "a pixel": []}[change]
    if change == "a pixel":
        path = next(data.glob("*/*.png"))
        pixels = np.array(Image.open(path))
        pixels[0, 0] ^= 1
        Image.fromarray(pixels).save(path)
    capsys.readouterr()
    assert run(data, output, *more) == EXIT_BAD_INPUT
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "--overwrite" in said[0]
    assert {"seed": "seed: 0 -> 3", "steps": "steps: 2 -> 3", "a pixel": "images.sha256"}[change] in said[0]
    assert files(output) == before
    assert run(data, output, *more, "--overwrite") == EXIT_DONE
    assert files(output)["train.json"] != before["train.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "ddpm"]


# --- what a user is told ----------------------------------------------------------------------------------------------


def test_an_interrupted_run_leaves_nothing(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "generators" / "ddpm"
    command = [sys.executable, str(SCRIPT), "--data", str(data), "--output", str(output)]
    # where the tests run in the background, SIGINT may be ignored, which children inherit
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed) as process:
        assert process.stderr is not None
        assert "training" in process.stderr.readline() + process.stderr.read(20)
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == EXIT_INTERRUPTED
    assert rest.splitlines()[-1].startswith("interrupted") and "Traceback" not in rest
    assert list(output.parent.iterdir()) == []


@pytest.mark.parametrize("where", ["train", "rename"])
def test_an_interrupted_replacement_keeps_the_old_model(
    where: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "ddpm"
    assert run(data, output) == EXIT_DONE
    before = files(output)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    rename = Path.rename
    if where == "train":
        monkeypatch.setattr(train_ddpm, "train", interrupt)
    else:  # the old model is out of the way, the new one not yet there
        monkeypatch.setattr(
            Path, "rename", lambda self, to: interrupt() if ".partial" in self.name else rename(self, to)
        )
    with pytest.raises(SystemExit, match=str(EXIT_INTERRUPTED)):
        run(data, output, "--seed", "1", "--overwrite")
    assert files(output) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "ddpm"]


def _spoil(kind: str, data: Path) -> None:
    """Makes one mistake in the images."""
    first = sorted(data.glob("*/*.png"))[0]
    if kind == "absent":
        shutil.rmtree(data)
    elif kind == "no png":
        for path in data.glob("*/*.png"):
            path.rename(path.with_suffix(".jpg"))
    elif kind == "cut off":
        first.write_bytes(first.read_bytes()[:60])
    elif kind == "rgb":
        Image.new("RGB", (8, 8)).save(first)
    elif kind == "other size":
        Image.new("L", (6, 8)).save(first)
    elif kind == "odd side":
        for path in data.glob("*/*.png"):
            Image.new("L", (7, 7)).save(path)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("absent", "demo/make_digits.py"),
        ("no png", "demo/make_digits.py"),
        ("cut off", "not a readable image"),
        ("rgb", "mode RGB"),
        ("other size", "px"),
        ("odd side", "7x7 px"),
    ],
)
def test_bad_images_are_named(
    kind: str, says: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _spoil(kind, data)
    assert run(data, tmp_path / "ddpm") == EXIT_BAD_INPUT
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and says in said[0] and str(data) in said[0]
    assert not (tmp_path / "ddpm").exists()


@pytest.mark.parametrize("kind", ["a file", "other files", "below a file"])
def test_an_output_in_the_way_is_left_alone(
    kind: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "ddpm"
    if kind == "other files":
        output.mkdir()
        (output / "thesis.txt").write_text("mine")
    else:
        output.write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert run(data, output / "deeper" if kind == "below a file" else output, "--overwrite") == EXIT_BAD_INPUT
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and str(output) in said[0]
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
