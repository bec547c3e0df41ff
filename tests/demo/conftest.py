"""What the tests of both training programs share."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from demo import train_ddpm, train_gan


@pytest.fixture(autouse=True)
def _alone(one_thread: None) -> None:
    """Every test here trains on one thread."""


def pixels(colors: int, count: int = 20, side: int = 8) -> np.ndarray:
    """Random uint8 [count, side, side] or [count, side, side, colors]."""
    shape = (count, side, side) if colors == 1 else (count, side, side, colors)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def write(folder: Path, images: np.ndarray) -> Path:
    """As PNG files under two labels."""
    for index, image in enumerate(images):
        path = folder / str(index % 2) / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in model.state_dict().values()])


def run(program: ModuleType, data: Path, output: Path, *more: str) -> int:
    """A training of two steps; of settings given twice the last counts."""
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
    code: int = program.main([*arguments, *more])
    return code


@pytest.fixture(params=[train_ddpm, train_gan], ids=["ddpm", "gan"])
def program(request: pytest.FixtureRequest) -> ModuleType:
    """Both."""
    module: ModuleType = request.param
    return module


@pytest.fixture(params=[1, 3], ids=["grey", "colour"])
def colors(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """20 images of 8x8 random grey pixels."""
    return write(tmp_path / "data", pixels(1))
