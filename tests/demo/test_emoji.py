"""The demo's colour images: which emoji, where, and what becomes of their transparency."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from demo import make_emoji
from pd_core.core.errors import EXIT_BAD_INPUT, EXIT_DONE


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A package of two emoji, one of which has a skin tone more."""
    folder = tmp_path / "package"
    (folder / make_emoji.IMAGES).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("1f600.png", "1f44b.png", "1f44b-1f3fb.png"):
        Image.fromarray(rng.integers(0, 256, (64, 64, 4), dtype=np.uint8)).save(folder / make_emoji.IMAGES / name)
    wave = {
        "image": "1f44b.png",
        "category": "People & Body",
        "skin_variations": {"1F3FB": {"image": "1f44b-1f3fb.png"}},
    }
    smile = {"image": "1f600.png", "category": "Smileys & Emotion"}
    (folder / "emoji.json").write_text(json.dumps([wave, smile]))
    return folder


def run(source: Path, output: Path, *more: str) -> int:
    return make_emoji.main(["--source", str(source), "--output", str(output), *more])


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))


def test_each_emoji_once_under_its_category(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "runs" / "emoji"
    assert run(source, output) == EXIT_DONE
    assert "2 images of 32 px" in capsys.readouterr().out
    assert names(output) == ["people-body/1f44b.png", "smileys-emotion/1f600.png"]
    assert [path.name for path in output.parent.iterdir()] == ["emoji"]


def test_pixels_are_means_over_white(source: Path, tmp_path: Path) -> None:
    assert run(source, tmp_path / "out") == EXIT_DONE
    rgba = np.asarray(Image.open(source / make_emoji.IMAGES / "1f600.png")).astype(np.float64)
    alpha = rgba[..., 3:] / 255
    over_white = rgba[..., :3] * alpha + 255 * (1 - alpha)
    expected = over_white.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
    with Image.open(tmp_path / "out" / "smileys-emotion" / "1f600.png") as image:
        assert image.mode == "RGB"
        # each of two roundings is off by up to a half, blending in 8 bits by one at most
        assert np.abs(np.asarray(image) - expected).max() <= 2


def test_what_is_there_is_kept_or_refused(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    assert run(source, output) == EXIT_DONE
    made = {path: path.stat().st_mtime_ns for path in output.rglob("*.png")}
    assert run(source, output) == EXIT_DONE
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*.png")} == made
    assert run(source, output, "--size", "16") == EXIT_BAD_INPUT
    (output / "people-body" / "mine.png").write_bytes(b"")
    assert run(source, output) == EXIT_BAD_INPUT
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "images of 32 px, not 16" in said[0] and "something else" in said[1]


@pytest.mark.parametrize("kind", ["absent", "not json", "other json", "an image absent", "an image cut off"])
def test_a_bad_package_is_named(kind: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = source / make_emoji.IMAGES / "1f600.png"
    if kind == "absent":
        source = tmp_path / "nowhere"
    elif kind == "an image absent":
        image.unlink()
    elif kind == "an image cut off":
        image.write_bytes(image.read_bytes()[:100])
    else:
        (source / "emoji.json").write_text({"not json": "<", "other json": '["a"]'}[kind])
    assert run(source, tmp_path / "out") == EXIT_BAD_INPUT
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and str(source) in said[0]
    assert not (tmp_path / "out").exists()
