"""From decoded pixels to what a model sees: resize, crop, thumbnails."""

from __future__ import annotations

import hashlib
import io
import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from pd_core.core.errors import UserError
from pd_core.images.decode import BadImage, DecodeLimits, Reason, bad_image, decode

_INTERPOLATION = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_CROP_MODES = ("center", "squash", "border")
# A picture of 1 x 100,000 px grows to 224 x 22,400,000 before its centre is cut out. The bound is on that growth
# alone: aspect ratios up to about 1,300 pass at 224 px.
_MAX_RESIZED_PIXELS = 2**26


@dataclass(frozen=True)
class Preprocess:
    """What happens between an RGB image and the model's input; part of the feature fingerprint.

    The image is resized to `height / crop_pct` x `width / crop_pct` px and its centre `height` x `width` px is kept:
    `squash` ignores the aspect ratio; `center` keeps it and cuts the longer side; `border` keeps it, shows all of the
    image and pads with the mean colour. Then `(pixel / 255 - mean) / std` per channel (done by the extractor).
    The fields mean what they mean in timm's `pretrained_cfg`.
    """

    height: int
    width: int
    interpolation: str
    crop_pct: float
    crop_mode: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise UserError(f"preprocess size {self.height}x{self.width}, expected at least 1x1 px; raise it")
        if self.interpolation not in _INTERPOLATION:
            raise UserError(
                f"interpolation = {self.interpolation!r} in preprocess; use one of {_names(_INTERPOLATION)}"
            )
        if self.crop_mode not in _CROP_MODES:
            raise UserError(f"crop_mode = {self.crop_mode!r} in preprocess; use one of {_names(_CROP_MODES)}")
        if not 0 < self.crop_pct <= 1:
            raise UserError(f"crop_pct = {self.crop_pct} in preprocess; use a value in (0, 1]")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) != 3 or not all(math.isfinite(v) for v in values):
                raise UserError(f"{name} = {values} in preprocess; use three finite values, for R, G, B")
        if min(self.std) <= 0:
            raise UserError(f"std = {self.std} in preprocess; use values above 0")

    @classmethod
    def paper(cls) -> Preprocess:
        """The reference settings of pseudo density (arXiv 2407.08659): squash to 224x224, ImageNet mean and std."""
        return cls(224, 224, "bilinear", 1.0, "squash", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

    @classmethod
    def inception(cls) -> Preprocess:
        """Of the Inception of FID (Heusel et al. 2017): squash to 299x299, (pixel - 128) / 128. Resized with
        antialiasing, by the filter that Parmar et al. (2022, "On aliased resizing") find to be the sound one.
        """
        return cls(299, 299, "bicubic", 1.0, "squash", (128 / 255,) * 3, (128 / 255,) * 3)

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON types; `from_json` gives an equal object back."""
        return asdict(self) | {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Preprocess:
        """The inverse of `to_json`. Missing or unknown fields raise UserError."""
        expected = set(cls.__dataclass_fields__)
        if set(fields) != expected:
            raise UserError(f"preprocess has the fields {_names(sorted(fields))}; give {_names(sorted(expected))}")
        return cls(**fields | {"mean": tuple(fields["mean"]), "std": tuple(fields["std"])})


def _names(names: Any) -> str:
    return ", ".join(names)


def resize(image: Image.Image, preprocess: Preprocess) -> np.ndarray:
    """Resize and crop an RGB image: uint8 [height, width, 3], C-contiguous and writable.

    Bit for bit what `timm.data.create_transform(is_training=False)` does before ToTensor and Normalize; where timm
    cannot go on (a side of less than half a pixel in `border`), the side is 1 px.
    Raises BadImage(TOO_MANY_PIXELS) where keeping an extreme aspect ratio would need an absurd intermediate image.
    """
    height, width = resized_size(image.height, image.width, preprocess)
    if height * width > max(_MAX_RESIZED_PIXELS, 4 * preprocess.height * preprocess.width / preprocess.crop_pct**2):
        raise BadImage(
            Reason.TOO_MANY_PIXELS,
            f"aspect ratio of {image.width}x{image.height} needs an intermediate image of {width}x{height} px",
        )
    if (height, width) != (image.height, image.width):
        image = image.resize((width, height), _INTERPOLATION[preprocess.interpolation])
    return np.array(_center_crop(image, preprocess))


def resized_size(height: int, width: int, preprocess: Preprocess) -> tuple[int, int]:
    """(height, width), px, to which an image is resized before its centre is cut out."""
    scaled_height = math.floor(preprocess.height / preprocess.crop_pct)
    scaled_width = math.floor(preprocess.width / preprocess.crop_pct)
    if preprocess.crop_mode == "squash":
        return scaled_height, scaled_width
    if preprocess.crop_mode == "center" and scaled_height == scaled_width:
        # the shorter side is met exactly, the longer one rounded down
        long = int(scaled_height * max(height, width) / min(height, width))
        return (long, scaled_width) if width <= height else (scaled_height, long)
    ratios = height / scaled_height, width / scaled_width
    ratio = max(ratios) if preprocess.crop_mode == "border" else min(ratios)
    return max(1, round(height / ratio)), max(1, round(width / ratio))


def _center_crop(image: Image.Image, preprocess: Preprocess) -> Image.Image:
    missing_height = max(0, preprocess.height - image.height)
    missing_width = max(0, preprocess.width - image.width)
    if missing_height or missing_width:
        left, top = missing_width // 2, missing_height // 2
        fill = tuple(round(255 * m) for m in preprocess.mean)
        image = ImageOps.expand(image, (left, top, missing_width - left, missing_height - top), fill)
    # round half to even, as timm and torchvision do
    top = round((image.height - preprocess.height) / 2)
    left = round((image.width - preprocess.width) / 2)
    return image.crop((left, top, left + preprocess.width, top + preprocess.height))


@dataclass(frozen=True)
class Prepared:
    """A decoded image: `pixels` uint8 [height, width, 3] as the model wants them, and facts of the source."""

    pixels: np.ndarray
    width: int  # of the source after its orientation is applied, px
    height: int
    content_hash: str  # SHA-256 of the file's bytes, hex


def prepare(data: bytes, limits: DecodeLimits, preprocess: Preprocess) -> Prepared:
    """Decode and resize the bytes of one file. Raises `BadImage` and nothing else."""
    image = decode(data, limits)
    try:
        pixels = resize(image, preprocess)
    except BadImage:
        raise
    except Exception as error:
        raise bad_image(error, data, "resize") from error
    return Prepared(pixels, image.width, image.height, hashlib.sha256(data).hexdigest())


THUMBNAIL_PX = 160


def make_thumbnail(data: bytes, limits: DecodeLimits) -> bytes:
    """`thumbnail` of the bytes of one file. Raises `BadImage` and nothing else."""
    image = decode(data, limits)
    try:
        return thumbnail(image)
    except Exception as error:
        raise bad_image(error, data, "thumbnail") from error


def thumbnail(image: Image.Image, size_px: int = THUMBNAIL_PX) -> bytes:
    """A small picture whose longer side is at most size_px; the ratio of the sides is kept.

    An image that is smaller is enlarged by a whole factor without smoothing, so that pixel art shows its pixels, and
    stored as PNG; a larger one is reduced with a Lanczos filter and stored as JPEG, a tenth of the bytes for
    photographs.
    """
    rgb = image if image.mode in ("L", "RGB") else image.convert("RGB")
    width, height = rgb.size
    longer = max(width, height)
    sink = io.BytesIO()
    if longer <= size_px:
        factor = size_px // longer
        rgb.resize((width * factor, height * factor), Image.Resampling.NEAREST).save(sink, "PNG", optimize=True)
    else:
        smaller = (max(1, round(width * size_px / longer)), max(1, round(height * size_px / longer)))
        rgb.resize(smaller, Image.Resampling.LANCZOS, reducing_gap=3.0).save(sink, "JPEG", quality=85, optimize=True)
    return sink.getvalue()
