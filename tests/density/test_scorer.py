"""Batches on their device against Pillow, image by image."""

import numpy as np
import pytest
import torch
from PIL import Image

from pd_core.core.errors import UserError
from pd_core.density import scorer
from pd_core.images import resize
from pd_core.images.resize import Preprocess

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
    """Both round between the two passes, in another order of axes, and once more: less than 2 steps of 255.

    An error of 0.5 between them grows by the sum of the absolute weights of the second (1.5 for bicubic at most).
    """
    preprocess = Preprocess(64, 64, interpolation, crop_pct, crop_mode, MEAN, STD)
    batch = np.stack([smooth(size[0], size[1], seed) for seed in range(5)])
    expected = np.stack([resize.resize(Image.fromarray(p), preprocess) for p in batch]).astype(int)
    found = scorer.resize_batch(torch.from_numpy(batch), preprocess).permute(0, 2, 3, 1).numpy().astype(int)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 2
    assert (found != expected).mean() < 0.05


@pytest.mark.parametrize("size", [(8, 8), (32, 32), (64, 48), (65, 131)])
@pytest.mark.parametrize(
    ("interpolation", "crop_pct", "crop_mode"),
    [("bicubic", 0.875, "center"), ("bilinear", 1.0, "squash"), ("bicubic", 0.95, "border")],
)
def test_without_rounding_a_batch_is_resized_to_the_same_within_the_rounding(size, interpolation, crop_pct, crop_mode):
    """The bytes are rounded between the passes and after them: 0.5 * 1.5 + 0.5 = 1.25 steps of 255.

    1.5: the largest sum of the absolute weights of the second pass, bicubic. `rounded`, the way of a GPU, does the same
    in another arithmetic, and may take a half to the other side: one step, which grows by 1.5 and is rounded: 2.
    """
    preprocess = Preprocess(64, 64, interpolation, crop_pct, crop_mode, MEAN, STD)
    batch = torch.from_numpy(np.stack([smooth(size[0], size[1], seed) for seed in range(5)]))
    expected = scorer.resize_batch(batch, preprocess).float()
    planes = batch.permute(0, 3, 1, 2).float()
    found = scorer.resize_images(planes / 127.5 - 1, preprocess)
    assert found.dtype == torch.float32 and found.shape == expected.shape
    assert (found - expected).abs().max() <= 1.25 + 1e-3  # float32 sums of values up to 255
    target = resize.resized_size(size[0], size[1], preprocess)
    if target != size:
        rounded = scorer._center_crop(scorer._resized(planes, target, interpolation, rounded=True), preprocess)
        assert (rounded - expected).abs().max() <= 2
        assert (rounded != expected).float().mean() < 0.05


def test_gradients_of_a_resized_image_are_its_differences():
    """Central differences: in float32 a step of 1/64 of values about 100 leaves 4 digits."""
    preprocess = Preprocess(12, 12, "bicubic", 0.9, "center", MEAN, STD)
    generator = torch.Generator().manual_seed(0)
    image = (torch.rand(1, 3, 8, 8, generator=generator) - 0.5).requires_grad_()
    weights = torch.randn(1, 3, 12, 12, generator=generator)
    value = lambda x: (scorer.resize_images(x, preprocess) * weights).sum()  # noqa: E731
    (gradient,) = torch.autograd.grad(value(image), image)
    for place in [(0, 0, 0, 0), (0, 1, 3, 4), (0, 2, 7, 2)]:
        step = torch.zeros_like(image)
        step[place] = 1 / 64
        with torch.no_grad():
            difference = float(value(image + step) - value(image - step)) * 32
        assert difference == pytest.approx(float(gradient[place]), rel=2e-3, abs=0.05)


def test_what_is_clamped_in_the_saved_image_has_no_gradient_and_grey_counts_in_all_channels():
    preprocess = Preprocess(8, 8, "bicubic", 1.0, "center", MEAN, STD)
    image = torch.full((1, 1, 8, 8), 0.25)
    image[..., 0] = 1.5
    image[..., 1] = -1.5
    image.requires_grad_()
    resized = scorer.resize_images(image, preprocess)
    assert resized.shape == (1, 3, 8, 8)
    assert resized[0, :, 0, 0].tolist() == [255.0] * 3 and resized[0, :, 0, 1].tolist() == [0.0] * 3
    (gradient,) = torch.autograd.grad(resized.sum(), image)
    assert (gradient[..., :2] == 0).all() and (gradient[..., 2:] == 3 * 127.5).all()


def test_an_image_of_the_right_size_is_left_alone():
    preprocess = Preprocess(32, 32, "bicubic", 1.0, "center", MEAN, STD)
    batch = torch.from_numpy(np.stack([smooth(32, 32, seed) for seed in range(3)]))
    torch.testing.assert_close(scorer.resize_batch(batch, preprocess).permute(0, 2, 3, 1), batch, rtol=0, atol=0)


def test_an_interpolation_without_a_batched_form_is_refused():
    preprocess = Preprocess(32, 32, "lanczos", 1.0, "center", MEAN, STD)
    with pytest.raises(UserError, match="lanczos"):
        scorer.resize_batch(torch.zeros(1, 8, 8, 3, dtype=torch.uint8), preprocess)
