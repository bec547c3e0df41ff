"""What an image file declares before its pixels are decoded: areas that a codec makes room for, and work that it
repeats.

A codec takes memory and time by what is declared here, not by the size of the picture: a picture of 10 x 10 px may lie
in one tile of 46,336 x 46,336. Whatever cannot be parsed declares nothing; the codec then refuses it. Sizes of 1 x 1
that are declared wrongly inside a codec's own bit stream are left to the limits of the decoding process (`child`).
"""

from __future__ import annotations

import itertools
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# of clean files: libjpeg's own progression has 10 scans and mozjpeg's up to 20; libtiff allows 100 too
MOST_SCANS = 100
MOST_CHUNKS = 100_000  # of a PNG beside its pixels; Pillow takes some microseconds for each
MOST_COMMENTS = 1_000  # of a plain PNM: Pillow copies up to 1 MiB for each
MOST_CODE_BLOCKS = 1 << 22  # of JPEG 2000, some 200 bytes each: 400 Mpx of the usual 64 x 64 px blocks have 1/32 of it
MOST_PADDING = 4  # area of all tiles of a TIFF over the limit of pixels, for the parts of tiles outside of the picture


@dataclass(frozen=True)
class Area:
    """Room for width x height px. `what` is empty where it is the picture's own."""

    what: str
    width: int
    height: int


@dataclass(frozen=True)
class Count:
    """So many pieces of work, of which `most` are acceptable."""

    what: str
    count: int
    most: int


def areas(container: str, data: bytes) -> Iterator[Area]:
    """Areas that a codec makes room for. Those of TIFF are in its tags: `tiff_areas`."""
    try:
        match container:
            case "WebP":
                yield from _webp_areas(data)
            case "GIF":
                yield from _gif_areas(data)
            case "JPEG 2000":
                yield from _jpeg2000_areas(data)
            case "AVIF":
                yield from _avif_areas(data)
    except (struct.error, IndexError):  # it ends within its header
        return


def counts(container: str, data: bytes) -> Iterator[Count]:
    """Work that a codec repeats as often as the file says."""
    try:
        match container:
            case "JPEG":
                yield Count("scans", _scans(data), MOST_SCANS)
            case "PNG":
                yield Count("chunks beside the pixels", _chunks(data), MOST_CHUNKS)
            case "PNM" if data[1:2] in b"123":
                yield Count("comments", data.count(b"#"), MOST_COMMENTS)
            case "JPEG 2000":
                yield Count("code-blocks", _code_blocks(data), MOST_CODE_BLOCKS)
    except (struct.error, IndexError):
        return


# ---- TIFF ------------------------------------------------------------------------------------------------------------

_TILE_WIDTH, _TILE_LENGTH = 322, 323


def tiff_areas(tags: Mapping[int, Any]) -> Iterator[Area]:
    """The tile of a TIFF, from the tags of its first page. Strips take no more room than the picture has."""
    if tile := _tile(tags):
        yield Area("a tile of ", *tile)


def tiff_counts(tags: Mapping[int, Any], size: tuple[int, int], max_pixels: int) -> Iterator[Count]:
    """Pixels of all tiles that a picture of this size lies in; long ones side by side may be thousands of pictures."""
    if tile := _tile(tags):
        across, down = (-(-side // length) for side, length in zip(size, tile, strict=True))
        yield Count("pixels in tiles", across * tile[0] * down * tile[1], MOST_PADDING * max_pixels)


def _tile(tags: Mapping[int, Any]) -> tuple[int, int] | None:
    width, length = tags.get(_TILE_WIDTH), tags.get(_TILE_LENGTH)
    if not isinstance(width, int) or not isinstance(length, int) or min(width, length) < 1:
        return None
    return width, length


# ---- WebP, GIF, AVIF -------------------------------------------------------------------------------------------------


def _webp_areas(data: bytes) -> Iterator[Area]:
    """RFC 9649: the canvas of VP8X, or the frame of a simple file."""
    kind = data[12:16]
    if kind == b"VP8X":
        yield Area("", int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1)
    elif kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", data, 26)
        yield Area("", width & 0x3FFF, height & 0x3FFF)
    elif kind == b"VP8L" and data[20] == 0x2F:
        (bits,) = struct.unpack_from("<I", data, 21)
        yield Area("", (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)


def _gif_areas(data: bytes) -> Iterator[Area]:
    """The canvas, and the first frame where it reaches over it: Pillow enlarges the canvas then."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    yield Area("", width, height)
    at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    while data[at] == 0x21:  # extensions: sub-blocks to the first empty one
        at += 2
        while data[at]:
            at += 1 + data[at]
        at += 1
    if data[at] == 0x2C:
        left, top, frame_width, frame_height = struct.unpack_from("<HHHH", data, at + 1)
        yield Area("", max(width, left + frame_width), max(height, top + frame_height))


def _avif_areas(data: bytes) -> Iterator[Area]:
    """Every image of the file: picture, tiles, alpha plane (ISO/IEC 23008-12, ImageSpatialExtentsProperty)."""
    for found in itertools.islice(re.finditer(rb"\0\0\0\x14ispe\0\0\0\0", data), 1000):
        yield Area("", *struct.unpack_from(">II", data, found.end()))


# ---- JPEG 2000 (ISO/IEC 15444-1, annex A) ----------------------------------------------------------------------------


def _jpeg2000_areas(data: bytes) -> Iterator[Area]:
    """The reference grid; four components of it are what a picture may have."""
    at = data.find(b"\xff\x4f\xff\x51")
    if at >= 0:
        width, height, components = _grid(data, at)
        yield Area("a codestream of ", width, height * -(-components // 4))


def _grid(data: bytes, at: int) -> tuple[int, int, int]:
    """Width, height and components of the codestream that starts at `at`."""
    x1, y1, x0, y0 = struct.unpack_from(">4I", data, at + 8)
    (components,) = struct.unpack_from(">H", data, at + 40)
    return max(0, x1 - x0), max(0, y1 - y0), components


def _code_blocks(data: bytes) -> int:
    """Blocks that a codec keeps books of, by the smallest that the main header names; 4 x 4 px is legal."""
    at = data.find(b"\xff\x4f\xff\x51")
    if at < 0:
        return 0
    width, height, components = _grid(data, at)
    exponents = [_block_exponent(*segment) for segment in _segments(data, at + 2) if segment[0] in (0x52, 0x53)]
    # a pyramid of resolutions has 4/3 of the blocks of its largest
    return (width * height * components >> min(exponents)) * 4 // 3 if exponents else 0


def _block_exponent(marker: int, body: bytes, components: int) -> int:
    """log2 of the pixels of the smallest code-block in COD or COC, which the smallest precinct bounds."""
    style, rest = (
        (body[0], body[5:]) if marker == 0x52 else (body[1 + (components > 256)], body[2 + (components > 256) :])
    )
    across, down = (rest[1] & 15) + 2, (rest[2] & 15) + 2
    precincts = rest[5 : 6 + rest[0]] if style & 1 else b""
    return min([across + down, *(min(across, size & 15) + min(down, size >> 4) for size in precincts)])


def _segments(data: bytes, at: int) -> Iterator[tuple[int, bytes, int]]:
    """Marker, body and number of components, for every segment of the main header."""
    (components,) = struct.unpack_from(">H", data, at + 38)
    while data[at] == 0xFF and data[at + 1] != 0x90:  # SOT: tiles begin
        (length,) = struct.unpack_from(">H", data, at + 2)
        yield data[at + 1], data[at + 4 : at + 2 + length], components
        at += 2 + max(2, length)


# ---- JPEG, PNG -------------------------------------------------------------------------------------------------------

_AFTER_ENTROPY = re.compile(rb"\xff[^\0\xd0-\xd7\xff]")  # a marker that is neither a stuffed byte nor a restart


def _scans(data: bytes) -> int:
    """Scans up to the end of the first picture (ITU-T T.81, annex B). Counting stops where there are too many."""
    if (
        data.count(b"\xff\xda") <= MOST_SCANS
    ):  # thumbnails and profiles may hold these bytes too, so it is an upper bound
        return 0
    at, scans = 2, 0
    while scans <= MOST_SCANS and (found := _AFTER_ENTROPY.search(data, at)):
        at, marker = found.end(), data[found.end() - 1]
        if marker == 0xD9:
            break
        scans += marker == 0xDA
        if marker != 0x01:
            at += struct.unpack_from(">H", data, at)[0]
    return scans


def _chunks(data: bytes) -> int:
    """Chunks beside the pixels. Counting stops where there are too many."""
    at, chunks = 8, 0
    while at + 8 <= len(data) and chunks <= MOST_CHUNKS:
        length, kind = struct.unpack_from(">I4s", data, at)
        chunks += kind != b"IDAT"
        at += 12 + length
    return chunks
