"""Generated images to features and predicted densities on the device that made them, with gradients on request."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from pd_core.core.errors import UserError
from pd_core.images.resize import Preprocess, resized_size
from pd_core.index.extractor import Extractor, ExtractorSpec

if TYPE_CHECKING:
    import torch

    from pd_core.density.network import DensityPredictor

# names of timm's interpolations that torch has with antialiasing, as Pillow does it
_MODES = {"bilinear": "bilinear", "bicubic": "bicubic"}


class Scorer:
    """F and the predictor f on one device.

    Args:
        spec: the extractor that the index was made with.
        predictor: of its densities, or None where only features are wanted.
        device: `cpu`, `cuda`, `cuda:1`.
        threads: of the CPU arithmetic.

    Raises:
        UserError: the weights or the timm version are not those of the index.
    """

    def __init__(
        self,
        spec: ExtractorSpec,
        predictor: DensityPredictor | None,
        device: str = "cpu",
        threads: int = 1,
    ) -> None:
        self.extractor = Extractor(spec, device, threads)
        self.predictor = predictor if predictor is None else predictor.to(self.extractor.device)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """float32 [B, D] of uint8 images [B, H, W, 3] on the device."""
        import torch

        with torch.inference_mode():
            resized = resize_batch(pixels, self.extractor.spec.preprocess)
            return self.extractor.forward(self.extractor.normalize(resized))

    def log_density(self, features: torch.Tensor) -> torch.Tensor:
        """Predicted log pseudo density of features [B, D], float64 [B]."""
        import torch

        assert self.predictor is not None
        with torch.inference_mode():
            out: torch.Tensor = self.predictor(features)
            return out.double()

    def score(self, images: torch.Tensor) -> torch.Tensor:
        """What the predictor was trained on (log rho or rho), float32 [B], of float images; differentiable.

        Args:
            images: [B, 1 or 3, H, W] in [-1, 1], as `LatentGenerator.decode` gives them. What lies outside is clamped,
                as it is when the image is saved, and has no gradient.
        """
        assert self.predictor is not None
        resized = resize_images(images, self.extractor.spec.preprocess)
        return self.predictor.score(self.extractor.forward(self.extractor.normalize(resized)))


def resize_batch(pixels: torch.Tensor, preprocess: Preprocess) -> torch.Tensor:
    """What `resize.resize` does to one image, for a batch on its device: uint8 [B, H, W, 3] to uint8 [B, 3, h, w].

    Antialiased as Pillow does it, and within two steps of 255 of it (both round between their two passes).

    Raises:
        UserError: an interpolation that torch has no antialiased form of.
    """
    import torch

    _, height, width, _ = pixels.shape
    planes = pixels.permute(0, 3, 1, 2)
    target = resized_size(height, width, preprocess)
    if target != (height, width):
        mode = _mode(preprocess)
        if planes.device.type == "cpu":  # torch has integer kernels for the CPU only
            planes = torch.nn.functional.interpolate(
                planes, size=target, mode=mode, antialias=True, align_corners=False
            )
        else:
            planes = _resized(planes.float(), target, mode, rounded=True).to(torch.uint8)
    return _center_crop(planes, preprocess)


def resize_images(images: torch.Tensor, preprocess: Preprocess) -> torch.Tensor:
    """`resize_batch` without rounding, differentiable: float [B, 1 or 3, H, W] in [-1, 1] to float32 [B, 3, h, w].

    The result is in 0..255.

    Two products with the matrices of torch's own antialiased resize, since the backward pass of that adds in no fixed
    order on a GPU, and the sign of a gradient that is nearly zero must not depend on who computes it.

    Raises:
        UserError: an interpolation that torch has no antialiased form of.
    """
    batch, _, height, width = images.shape
    planes = ((images.float() + 1) * 127.5).clamp(0, 255).expand(batch, 3, height, width)
    target = resized_size(height, width, preprocess)
    if target != (height, width):
        planes = _resized(planes, target, _mode(preprocess))
    return _center_crop(planes, preprocess)


def _resized(planes: torch.Tensor, target: tuple[int, int], mode: str, rounded: bool = False) -> torch.Tensor:
    """float [B, C, H, W] in 0..255 to [B, C, h, w]: across, then down, held in 0..255 after each pass as Pillow does.

    rounded: after each pass, too. Not held after the first, a bicubic edge comes out up to 11 steps of 255 away.
    """
    height, width = planes.shape[2:]
    across = _resize_matrix(width, target[1], mode).to(planes.device)
    down = _resize_matrix(height, target[0], mode).to(planes.device)
    planes = (planes @ across.T).clamp(0, 255)
    if not rounded:
        return (down @ planes).clamp(0, 255)
    return (down @ (planes + 0.5).floor()).add(0.5).floor().clamp(0, 255)  # halves go up


@functools.lru_cache(maxsize=16)
def _resize_matrix(old: int, new: int, mode: str) -> torch.Tensor:
    """float32 [new, old]: torch's antialiased resize of a column of `old` px, found by resizing the identity."""
    import torch

    with torch.inference_mode(False):  # kept for later calls, which may want gradients
        return torch.nn.functional.interpolate(
            torch.eye(old)[None, None], size=(new, old), mode=mode, antialias=True, align_corners=False
        )[0, 0]


def _mode(preprocess: Preprocess) -> str:
    """torch's name of the interpolation."""
    mode = _MODES.get(preprocess.interpolation)
    if mode is None:
        raise UserError(
            f"the index's extractor resizes with {preprocess.interpolation!r}, which has no form on batches; "
            "build the index with a model that uses bilinear or bicubic"
        )
    return mode


def _center_crop(planes: torch.Tensor, preprocess: Preprocess) -> torch.Tensor:
    """The centre of [B, 3, H, W]; what is missing is filled with the mean colour, as `resize.resize` does."""
    batch, channels, height, width = planes.shape
    more_height, more_width = max(0, preprocess.height - height), max(0, preprocess.width - width)
    if more_height or more_width:
        fill = planes.new_tensor([round(255 * m) for m in preprocess.mean]).view(1, 3, 1, 1)
        padded = fill.expand(batch, channels, height + more_height, width + more_width).clone()
        top, left = more_height // 2, more_width // 2
        padded[:, :, top : top + height, left : left + width] = planes
        planes = padded
    top = round((planes.shape[2] - preprocess.height) / 2)
    left = round((planes.shape[3] - preprocess.width) / 2)
    return planes[:, :, top : top + preprocess.height, left : left + preprocess.width]
