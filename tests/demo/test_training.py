"""The programs that train the demo's generators: their images, the folder of a model, and what a user is told."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from demo import train_ddpm, train_gan, training
from pd_core.core.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_INTERRUPTED
from tests.demo.conftest import pixels, run, weights, write


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that was said of it."""
    (line,) = capsys.readouterr().err.splitlines()
    return line


# ---- images ----------------------------------------------------------------------------------------------------------


def test_batches_show_every_image_once_before_any_again() -> None:
    images = torch.arange(10, dtype=torch.uint8).reshape(10, 1, 1)
    batches = training.shuffled_batches(images, 4, torch.Generator().manual_seed(0))
    shown = torch.cat(list(itertools.islice(batches, 5))).flatten()
    values = ((shown + 1) * 127.5).round().int().reshape(2, 10)
    assert values.sort(dim=1).values.tolist() == [list(range(10))] * 2
    assert values[0].tolist() != values[1].tolist()


def test_batches_are_the_images_channels_first() -> None:
    """The first batch of all images holds each once: pixel values [-1, 1], red in channel 0."""
    images = pixels(3)
    batch = next(training.shuffled_batches(torch.from_numpy(images), 20, torch.Generator().manual_seed(0)))
    back = ((batch + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert sorted(image.tobytes() for image in back) == sorted(image.tobytes() for image in images)


def spoiled(kind: str, data: Path) -> None:
    """Makes one mistake in the images."""
    first, *others = sorted(data.glob("*/*.png"))
    if kind == "absent":
        shutil.rmtree(data)
    elif kind == "no png":
        for path in (first, *others):
            path.rename(path.with_suffix(".jpg"))
    elif kind == "cut off":
        first.write_bytes(first.read_bytes()[:60])
    elif kind == "odd side":
        for path in (first, *others):
            Image.new("L", (7, 7)).save(path)
    else:
        mode, size = {"other mode": ("RGB", (8, 8)), "alpha": ("RGBA", (8, 8)), "other size": ("L", (6, 8))}[kind]
        Image.new(mode, size).save(first)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("absent", "demo/make_digits.py"),
        ("no png", "demo/make_digits.py"),
        ("cut off", "not a readable image"),
        ("other mode", "mode RGB"),
        ("alpha", "mode RGBA, neither"),
        ("other size", "px"),
        ("odd side", "7x7 px"),
    ],
)
def test_bad_images_are_named(
    kind: str, says: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoiled(kind, data)
    assert run(train_ddpm, data, tmp_path / "out") == EXIT_BAD_INPUT
    assert says in (line := refused(capsys)) and str(data) in line
    assert not (tmp_path / "out").exists()


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
    program: ModuleType, channels: list[str], says: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(program, data, tmp_path / "out", "--channels", *channels) == EXIT_BAD_INPUT
    assert says in refused(capsys)
    assert not (tmp_path / "out").exists()


# ---- a model ---------------------------------------------------------------------------------------------------------


def test_a_model_is_a_function_of_images_and_seed(program: ModuleType, colors: int) -> None:
    more = {"augment": train_gan.AUGMENTATIONS, "r1_interval": 2} if program is train_gan else {}
    images, recipe = pixels(colors), program.Recipe(steps=3, batch_size=4, channels=(8, 16), **more)
    first = program.train(images, recipe)[0]
    torch.manual_seed(5)  # the state of the process must not matter
    state = torch.get_rng_state()
    again = program.train(images, recipe)[0]
    assert torch.equal(weights(first), weights(again))
    assert torch.equal(torch.get_rng_state(), state)
    other = program.train(images, dataclasses.replace(recipe, seed=1))[0]
    assert not torch.allclose(weights(first), weights(other), atol=1e-2)


def test_a_finished_model_is_kept_and_another_replaces_it_only_on_request(
    program: ModuleType, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "model"
    assert run(program, data, output) == EXIT_DONE
    before = files(output)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(program, "train", lambda *_: pytest.fail("trained again"))
        for more in ([], ["--overwrite"]):  # it is what was asked for
            assert run(program, data, output, *more) == EXIT_DONE
            assert "kept" in (said := capsys.readouterr().out) and str(output) in said
        assert run(program, data, output, "--seed", "3") == EXIT_BAD_INPUT
        assert "seed: 0 -> 3" in (line := refused(capsys)) and "--overwrite" in line
        first = next(data.glob("*/*.png"))
        Image.fromarray(np.array(Image.open(first)) ^ 1).save(first)
        assert run(program, data, output) == EXIT_BAD_INPUT
        assert "images.sha256" in refused(capsys)
    assert files(output) == before
    assert run(program, data, output, "--steps", "1", "--overwrite") == EXIT_DONE
    assert files(output)["train.json"] != before["train.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "model"]


@pytest.mark.parametrize("where", ["train", "rename"])
def test_an_interrupted_replacement_keeps_the_old_model(
    where: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "gan"
    assert run(train_gan, data, output) == EXIT_DONE
    before = files(output)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    rename = Path.rename
    if where == "train":
        monkeypatch.setattr(train_gan, "train", interrupt)
    else:  # the old model is out of the way, the new one not yet there
        monkeypatch.setattr(
            Path, "rename", lambda self, to: interrupt() if ".partial" in self.name else rename(self, to)
        )
    with pytest.raises(SystemExit, match=str(EXIT_INTERRUPTED)):
        run(train_gan, data, output, "--seed", "1", "--overwrite")
    assert files(output) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "gan"]


@pytest.mark.slow
def test_an_interrupted_run_leaves_nothing(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "generators" / "ddpm"
    command = [sys.executable, str(train_ddpm.__file__), "--data", str(data), "--output", str(output)]
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
    before = files(tmp_path)
    there = output / "deeper" if kind == "below a file" else output
    assert run(train_ddpm, data, there, "--overwrite") == EXIT_BAD_INPUT
    assert str(output) in refused(capsys)
    assert files(tmp_path) == before


def test_colour_images_are_read_with_their_channels(tmp_path: Path) -> None:
    assert training.read_images(write(tmp_path / "data", pixels(3, 12, 16))).shape == (12, 16, 16, 3)
