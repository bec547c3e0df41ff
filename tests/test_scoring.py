"""Batches on their device against Pillow, image by image."""

import numpy as np
import pytest
import torch
from PIL import Image

from pd_core import images, scoring
from pd_core.errors import UserError
from pd_core.images import Preprocess

MEAN = STD = (0.5, 0.5, 0.5)


def smooth(height: int, width: int, seed: int) -> np.ndarray:
    """A picture with edges and gradients, and the full range of values."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    planes = [np.sin(x / rng.uniform(2, 9)) * np.cos(y / rng.uniform(2, 9)) for _ in range(3)]
    pixels = np.stack(planes, axis=2) * 127.5 + 127.5
    pixels[rng.integers(height) :, rng.integers(width) :] = rng.integers(0, 256, 3)
    return pixels.astype(np.uint8)


@pytest.mark.parametrize("size", [(8, 8), (32, 32), (64, 48), (256, 256), (65, 131)])
@pytest.mark.parametrize(
    ("interpolation", "crop_pct", "crop_mode"),
    [
        ("bicubic", 0.875, "center"),
        ("bilinear", 1.0, "squash"),
        ("bicubic", 0.95, "border"),
        ("bicubic", 1.0, "center"),
    ],
)
def test_a_batch_is_resized_as_pillow_resizes_each(size, interpolation, crop_pct, crop_mode):
    """Both round to whole steps between the two passes, in another order of axes: an error of 0.5 there grows by the sum
    of the absolute weights of the second (1.5 for bicubic at most), and each rounds once more: less than 2 steps of 255."""
    preprocess = Preprocess(64, 64, interpolation, crop_pct, crop_mode, MEAN, STD)
    batch = np.stack([smooth(size[0], size[1], seed) for seed in range(5)])
    expected = np.stack([images.resize(Image.fromarray(p), preprocess) for p in batch]).astype(int)
    found = scoring.resize_batch(torch.from_numpy(batch), preprocess).permute(0, 2, 3, 1).numpy().astype(int)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 2
    assert (found != expected).mean() < 0.05


def test_an_image_of_the_right_size_is_left_alone():
    preprocess = Preprocess(32, 32, "bicubic", 1.0, "center", MEAN, STD)
    batch = torch.from_numpy(np.stack([smooth(32, 32, seed) for seed in range(3)]))
    torch.testing.assert_close(scoring.resize_batch(batch, preprocess).permute(0, 2, 3, 1), batch, rtol=0, atol=0)


def test_an_interpolation_without_a_batched_form_is_refused():
    preprocess = Preprocess(32, 32, "lanczos", 1.0, "center", MEAN, STD)
    with pytest.raises(UserError, match="lanczos"):
        scoring.resize_batch(torch.zeros(1, 8, 8, 3, dtype=torch.uint8), preprocess)
