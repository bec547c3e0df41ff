"""From the bytes of a file to the pixels a model sees: decode, validate, resize.

`decode` returns the RGB picture a careful viewer would show; a file that cannot give one raises `BadImage` with a
`Reason` from a closed list, which is what the quarantine table stores. The content decides, never the file name.

What is decided here, so that the same bytes always give the same picture:

- Formats: PNG, JPEG (and the first picture of MPO), WebP, GIF, BMP, TIFF, PNM (P1 to P6), JPEG 2000, AVIF. No other
  parser of Pillow ever sees the bytes; in particular EPS never starts Ghostscript.
- Animations and multi-page files give their first frame. EXIF orientation is applied; EXIF that cannot be parsed
  states no orientation.
- Alpha, palette transparency and colour keys are composited over `DecodeLimits.background`.
- 16-bit grey becomes 8-bit by dropping the low byte (`Image.convert` would clip at 255 and give white). 32-bit
  integers are read as 16-bit where all values lie in 0..65535. Other integers, and floats, do not say which value is
  white; a guess per image would change brightness from one image to the next, so they are `UNSUPPORTED_FORMAT`.
- ICC profiles are ignored: samples are taken as sRGB, as torchvision, timm and the published extractors do. CMYK goes
  through Pillow's plain conversion, Adobe's inverted JPEGs included.

Only Pillow and numpy are imported: decode workers stay light. Bytes of strangers go through `child`, whose process
has limits of time and memory and may die; here are the rules of what it makes of them.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
    features,
)

from pd_core.core.errors import UserError
from pd_core.images import declared

if TYPE_CHECKING:
    from pd_core.core.settings.data import DataSettings


class Reason(StrEnum):
    """Why an image is in quarantine; the closed list."""

    EMPTY = "empty"
    TRUNCATED = "truncated"
    NOT_AN_IMAGE = "not_an_image"
    UNSUPPORTED_FORMAT = "unsupported_format"
    TOO_MANY_BYTES = "too_many_bytes"
    TOO_MANY_PIXELS = "too_many_pixels"
    TOO_EXPENSIVE = "too_expensive"
    UNREADABLE = "unreadable"
    CORRUPT = "corrupt"
    FEATURE_NOT_FINITE = "feature_not_finite"


_MAX_DETAIL_CHARS = 300


class BadImage(Exception):
    """One image that cannot be used; the run goes on without it.

    `detail` is one printable line of at most 300 characters that depends on the image's bytes alone.
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        line = re.sub(r" at 0x[0-9a-fA-F]+", "", " ".join(detail.split()))
        self.reason = reason
        self.detail = "".join(c if c.isprintable() else "?" for c in line)[:_MAX_DETAIL_CHARS]
        super().__init__(reason, self.detail)  # both in args: the exception crosses process borders by pickle

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


# The dearest of the formats takes 24 bytes a pixel (JPEG 2000 with four components, measured); what it is resized to is
# bounded by itself (_MAX_RESIZED_PIXELS), and a codec may copy the file.
_BYTES_PER_PIXEL, _BYTES_PER_BYTE, _LEAST_MEMORY_BYTES = 28, 4, 768 << 20


@dataclass(frozen=True)
class DecodeLimits:
    """What decoding one image may take, and the RGB colour (0..255) behind transparent pixels.

    Bytes and pixels are checked before any pixel is decoded. CPU seconds and memory bound the process that decodes
    (`child`), whatever a codec does; the same file exceeds them in the end, or does not.

    shows_bytes: whether the first bytes of what is no image may be told; not of files that lie anywhere, as links lead.
    """

    max_bytes: int
    max_pixels: int
    background: tuple[int, int, int]
    max_cpu_s: int
    shows_bytes: bool = True

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_pixels", "max_cpu_s"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)}, expected at least 1; raise it")
        if not all(0 <= c <= 255 for c in self.background):
            raise UserError(f"background = {self.background}, expected three values in 0..255; give R, G, B")

    @property
    def memory_bytes(self) -> int:
        """What decoding one image may take: 768 MiB, 28 bytes for each pixel it may have, 4 for each of its bytes."""
        return _LEAST_MEMORY_BYTES + _BYTES_PER_PIXEL * self.max_pixels + _BYTES_PER_BYTE * self.max_bytes


def limits_of(data: DataSettings) -> DecodeLimits:
    """The limits that the settings state."""
    return DecodeLimits(
        data.max_image_bytes,
        data.max_image_pixels,
        data.background,
        data.max_image_cpu_s,
        shows_bytes=not data.follow_links,
    )


# ---------------------------------------------------------------------------------------------------------- recognise
_DECODERS: dict[str, type[ImageFile.ImageFile]] = {
    "PNG": PngImagePlugin.PngImageFile,
    "JPEG": JpegImagePlugin.JpegImageFile,
    "WebP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "PNM": PpmImagePlugin.PpmImageFile,
    "JPEG 2000": Jpeg2KImagePlugin.Jpeg2KImageFile,
    "AVIF": AvifImagePlugin.AvifImageFile,
}
_OPTIONAL_CODECS = {"WebP": "webp", "AVIF": "avif", "JPEG 2000": "jpg_2000"}  # names of PIL.features
_SIGNATURES: tuple[tuple[str, bytes], ...] = (
    ("PNG", b"\x89PNG\r\n\x1a\n"),
    ("JPEG", b"\xff\xd8\xff"),
    ("GIF", b"GIF87a"),
    ("GIF", b"GIF89a"),
    ("Canon RAW", b"II*\0\x10\0\0\0CR"),  # before TIFF, which it would pass for
    ("TIFF", b"II*\0"),
    ("TIFF", b"MM\0*"),
    ("TIFF", b"II+\0"),
    ("TIFF", b"MM\0+"),
    ("JPEG 2000", b"\0\0\0\x0cjP  \r\n\x87\n"),
    ("JPEG 2000", b"\xff\x4f\xff\x51"),
    # Pictures, but not ones that are decoded here: the user is told what they are.
    ("PSD", b"8BPS"),
    ("EPS", b"%!PS"),
    ("EPS", b"\xc5\xd0\xd3\xc6"),
    ("ICO", b"\0\0\1\0"),
    ("ICNS", b"icns"),
    ("JPEG XL", b"\xff\x0a"),
    ("JPEG XL", b"\0\0\0\x0cJXL \r\n\x87\n"),
    ("JPEG XR", b"II\xbc\1"),
    ("QOI", b"qoif"),
    ("DDS", b"DDS "),
    ("OpenEXR", b"\x76\x2f\x31\x01"),
    ("Radiance HDR", b"#?RADIANCE"),
    ("FITS", b"SIMPLE  ="),
    ("PFM", b"PF\n"),
    ("PFM", b"Pf\n"),
    ("SGI", b"\x01\xda"),
    ("Sun raster", b"\x59\xa6\x6a\x95"),
    ("WMF", b"\xd7\xcd\xc6\x9a"),
    ("XPM", b"/* XPM */"),
    ("DjVu", b"AT&TFORM"),
    ("Fuji RAW", b"FUJIFILMCCD-RAW"),
    ("Panasonic RAW", b"IIU\0"),
    ("Olympus RAW", b"IIRO"),
)
_BMP_HEADER_BYTES = {12, 16, 40, 52, 56, 64, 108, 124}
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}


def _container(data: bytes) -> str | None:
    """The format that the first bytes announce, or None where they announce no picture."""
    for name, signature in _SIGNATURES:
        if data.startswith(signature):
            return name
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WebP"
    if data[4:8] == b"ftyp":
        brands = {data[i : i + 4] for i in range(8, min(int.from_bytes(data[:4], "big"), len(data), 256), 4)}
        return "AVIF" if brands & {b"avif", b"avis"} else "HEIF" if brands & _HEIF_BRANDS else None
    if data.startswith(b"BM") and int.from_bytes(data[14:18], "little") in _BMP_HEADER_BYTES:
        return "BMP"
    if re.match(rb"P[1-6][\s#]", data):
        return "PNM"
    text = data[:1024].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<svg", b"<?xml", b"<!--", b"<!doctype svg")) and b"<svg" in text and b"<html" not in text:
        return "SVG"
    return None


def _reject_unusable(data: bytes, limits: DecodeLimits) -> str:
    """The name of a container that may be decoded; everything else raises before a parser is called."""
    if not data:
        raise BadImage(Reason.EMPTY, "0 bytes")
    if len(data) > limits.max_bytes:
        raise BadImage(Reason.TOO_MANY_BYTES, f"{len(data)} bytes, the limit is {limits.max_bytes}")
    container = _container(data)
    if container is None:
        if any(signature.startswith(data) for name, signature in _SIGNATURES if name in _DECODERS):
            raise BadImage(Reason.TRUNCATED, f"only {len(data)} bytes")
        told = f"starts with {data[:24]!r}" if limits.shows_bytes else f"{len(data)} bytes of no known format"
        raise BadImage(Reason.NOT_AN_IMAGE, told)
    if container not in _DECODERS:
        raise BadImage(Reason.UNSUPPORTED_FORMAT, f"{container}; convert it to one of {', '.join(_DECODERS)}")
    if container in _OPTIONAL_CODECS and not features.check(_OPTIONAL_CODECS[container]):
        raise BadImage(Reason.UNSUPPORTED_FORMAT, f"{container}: this Pillow is built without it")
    return container


# ------------------------------------------------------------------------------------------------------------- decode
def decode(data: bytes, limits: DecodeLimits) -> Image.Image:
    """Decode the bytes of one file into an RGB image, upright, transparency composited (rules: module docstring).

    Raises `BadImage` and nothing else. A file longer than `limits.max_bytes`, or whose header declares more than
    `limits.max_pixels`, is refused before its pixels are decoded; so is one whose codec would make room for more, or
    repeat its work without end (`declared`).
    """
    container = _reject_unusable(data, limits)
    _silence_pillow()
    image: ImageFile.ImageFile | None = None
    try:
        _check_areas(declared.areas(container, data), limits)
        _check_counts(container, declared.counts(container, data))
        # The plugin itself and not Image.open: that one checks the size against a global that belongs to the whole
        # process, and hides why a header could not be read.
        image = _DECODERS[container](io.BytesIO(data))
        _check_pixels(image.size, limits)
        _check_tiff(image, limits)
        color_key = _color_key(image, data)
        image.load()
        _check_pixels(image.size, limits)
        return _upright(_to_rgb(image, color_key, limits.background), _orientation(image))
    except BadImage:
        raise
    except Exception as error:  # hostile bytes make Pillow raise nearly anything; see the fuzz test
        raise bad_image(error, data, container, image) from error


def _silence_pillow() -> None:
    """Drop Pillow's warnings about odd files: what matters of them comes out as `BadImage`.

    The filter stays. `warnings.catch_warnings` around each image would save and restore state of the whole process,
    and so lose what other threads set in the meantime.
    """
    if not warnings.filters or warnings.filters[0] != _PILLOW_FILTER:
        warnings.filterwarnings("ignore", module=_PILLOW_MODULES)


_PILLOW_MODULES = r"PIL\."
_PILLOW_FILTER = ("ignore", None, Warning, re.compile(_PILLOW_MODULES), 0)


def _check_pixels(size: tuple[int, int], limits: DecodeLimits, what: str = "") -> None:
    width, height = size
    if width * height > limits.max_pixels:
        raise BadImage(
            Reason.TOO_MANY_PIXELS,
            f"{what}{width}x{height} = {width * height} pixels, the limit is {limits.max_pixels}",
        )


def _check_areas(areas: Iterable[declared.Area], limits: DecodeLimits) -> None:
    for area in areas:
        _check_pixels((area.width, area.height), limits, area.what)


def _check_counts(container: str, counts: Iterable[declared.Count]) -> None:
    for work in counts:
        if work.count > work.most:
            raise BadImage(Reason.TOO_EXPENSIVE, f"{container}: more than {work.most} {work.what}")


def _check_tiff(image: ImageFile.ImageFile, limits: DecodeLimits) -> None:
    """Tiles, and whether it is a camera's RAW file (DNG, NEF, ARW), whose first page is but a thumbnail."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return
    subfile_type = image.tag_v2.get(_NEW_SUBFILE_TYPE, 0)
    if isinstance(subfile_type, int) and subfile_type & 1:  # TIFF 6.0, NewSubfileType: bit 0, reduced resolution
        raise BadImage(Reason.UNSUPPORTED_FORMAT, "TIFF: the first page is a thumbnail (a camera RAW file?)")
    _check_areas(declared.tiff_areas(image.tag_v2), limits)
    _check_counts("TIFF", declared.tiff_counts(image.tag_v2, image.size, limits.max_pixels))


_NEW_SUBFILE_TYPE = 254


def _cause(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


_SAYS_TRUNCATED = re.compile(r"truncated|EOF|end of file|not enough image data|Expected to read", re.IGNORECASE)
_SAYS_UNSUPPORTED = re.compile(r"unsupported|unknown pixel mode|decoder .* not available|not installed", re.IGNORECASE)


def bad_image(error: Exception, data: bytes, container: str, image: ImageFile.ImageFile | None = None) -> BadImage:
    """What an exception while an image was decoded says of the image; whatever it is, it is that image's."""
    if isinstance(error, MemoryError):
        return BadImage(Reason.TOO_EXPENSIVE, f"{container}: not enough memory")
    if isinstance(error, Image.DecompressionBombError):
        return BadImage(Reason.TOO_MANY_PIXELS, f"{container}: {error}")
    return BadImage(_failure_reason(error, data, container, image), f"{container}: {_cause(error)}")


def _failure_reason(error: Exception, data: bytes, container: str, image: ImageFile.ImageFile | None) -> Reason:
    try:
        if _SAYS_TRUNCATED.search(str(error)) or _ends_early(data, container, image):
            return Reason.TRUNCATED
    except Exception:  # what is damaged enough to mislead Pillow misleads the explanation too
        return Reason.CORRUPT
    if container in {"TIFF", "BMP", "JPEG 2000"} and _SAYS_UNSUPPORTED.search(str(error)):
        return Reason.UNSUPPORTED_FORMAT  # containers with many legal layouts, of which Pillow knows the usual ones
    return Reason.CORRUPT


def _ends_early(data: bytes, container: str, image: ImageFile.ImageFile | None) -> bool:
    """Does the container say that it is longer than `data`? Asked only once decoding has failed."""
    match container:
        case "PNG":
            return b"IEND" not in data
        case "JPEG":
            return b"\xff\xd9" not in data[-1024:]  # not the whole file: an EXIF thumbnail ends with it too
        case "GIF":
            return not data.rstrip(b"\0").endswith(b";")
        case "WebP":
            return len(data) < 12 or int.from_bytes(data[4:8], "little") + 8 > len(data)
        case "BMP":
            return int.from_bytes(data[2:6], "little") > len(data)
        case "TIFF":
            return _tiff_ends_early(data, image)
        case "JPEG 2000" if data.startswith(b"\xff\x4f"):
            return not data.endswith(b"\xff\xd9")
        case "JPEG 2000" | "AVIF":
            return _box_ends_early(data)
    return False


def _tiff_ends_early(data: bytes, image: ImageFile.ImageFile | None) -> bool:
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        big = data[2:4] in (b"+\0", b"\0+")
        offset = data[8:16] if big else data[4:8]
        entry_bytes, count_bytes = (20, 8) if big else (12, 2)
        order: Any = "little" if data[:2] == b"II" else "big"
        start = int.from_bytes(offset, order)
        entries = int.from_bytes(data[start : start + count_bytes], order)
        return start + count_bytes + entries * entry_bytes > len(data)
    tags = image.tag_v2
    starts = tags.get(TiffImagePlugin.STRIPOFFSETS) or tags.get(TiffImagePlugin.TILEOFFSETS) or ()
    sizes = tags.get(TiffImagePlugin.STRIPBYTECOUNTS) or tags.get(TiffImagePlugin.TILEBYTECOUNTS) or ()
    return any(start + size > len(data) for start, size in zip(starts, sizes, strict=False))


def _box_ends_early(data: bytes) -> bool:
    """Walk the top-level boxes of an ISO base media file (ISO/IEC 14496-12, section 4.2)."""
    position = 0
    while position < len(data):
        size = int.from_bytes(data[position : position + 4], "big")
        if size == 1:  # a 64-bit size follows the type
            size = int.from_bytes(data[position + 8 : position + 16], "big")
        if size < 8:  # 0: to the end of the file; 2..7 are not legal
            return size == 0 and not data.endswith(b"\xff\xd9")
        position += size
    return position > len(data)


# -------------------------------------------------------------------------------------------------------- to RGB
_Key = int | tuple[int, int, int]


def _color_key(image: ImageFile.ImageFile, data: bytes) -> _Key | None:
    """The one grey or RGB value that a PNG declares transparent, in the units of Pillow's samples.

    The file states it in its own bit depth (PNG specification, tRNS); Pillow scales the samples but not the key.
    """
    key = image.info.get("transparency")
    if image.mode in {"P", "PA"} or key is None or isinstance(key, bytes):
        return None
    depth = data[24] if data[12:16] == b"IHDR" else 8
    if image.mode == "RGB" and depth == 16:
        return tuple(c >> 8 for c in key)  # the low bytes of the samples are gone
    if image.mode == "L" and depth in (2, 4):
        return key * (255 // (2**depth - 1))
    return key


def _to_rgb(image: Image.Image, color_key: _Key | None, background: tuple[int, int, int]) -> Image.Image:
    if image.mode == "F":
        raise BadImage(Reason.UNSUPPORTED_FORMAT, "float samples do not say which value is white; convert to 8 bit")
    if image.mode == "I" or image.mode.startswith("I;16"):
        samples = _grey16(image)
        grey = Image.fromarray((samples >> 8).astype(np.uint8))
        if color_key is None:
            return grey.convert("RGB")
        alpha = Image.fromarray(np.where(samples == color_key, 0, 255).astype(np.uint8))
        return _composite(Image.merge("LA", (grey, alpha)), background)
    if color_key is not None:
        image.info["transparency"] = color_key
    if image.has_transparency_data:
        return _composite(image, background)
    return image.convert("RGB")


def _grey16(image: Image.Image) -> np.ndarray:
    """Grey samples as int32 [height, width] in 0..65535, 0 = black."""
    samples = np.asarray(image).astype(np.int32)
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.mode.startswith("I;16"):
        bits = image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0]
        samples <<= 16 - bits  # 12-bit scanners; Pillow unpacks but does not scale them
        if image.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:  # WhiteIsZero, which Pillow ignores here
            samples = 65535 - samples
    low, high = int(samples.min()), int(samples.max())
    if low < 0 or high > 65535:
        raise BadImage(
            Reason.UNSUPPORTED_FORMAT,
            f"integer samples in {low}..{high} do not say which value is white; convert to 8 or 16 bit",
        )
    return samples


def _composite(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    backdrop = Image.new("RGBA", image.size, (*background, 255))
    return Image.alpha_composite(backdrop, image.convert("RGBA")).convert("RGB")


_ORIENTATION_TAG = 0x0112
# EXIF 2.32, section 4.6.4: the value names where row 0 and column 0 of the stored picture belong.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_UNPARSABLE_EXIF = (SyntaxError, ValueError, TypeError, LookupError, OverflowError, OSError, EOFError, struct.error)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8 of a loaded image (a PNG may carry it after its pixels; TIFF has applied it by then)."""
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except _UNPARSABLE_EXIF:  # it states no orientation; the pixels are whole
        return 1
    return orientation if orientation in _UPRIGHT else 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image
