"""images.py against the file formats' own definitions (files written byte by byte here), timm, and hostile bytes."""

from __future__ import annotations

import io
import json
import pickle
import struct
import subprocess
import sys
import warnings
import zlib
from functools import cache

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, UnidentifiedImageError

from pd_core.core.errors import UserError
from pd_core.images import decode as images_decode
from pd_core.images import resize as images_resize
from pd_core.images.decode import BadImage, DecodeLimits, Reason, decode
from pd_core.images.resize import Preprocess, prepare, resize

LIMITS = DecodeLimits(max_bytes=2**22, max_pixels=2**20, background=(200, 100, 50), max_cpu_s=60)


# ------------------------------------------------------------------------- files, written without Pillow's encoders


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width, height, depth, color_type, rows, *extra: bytes) -> bytes:
    """`rows`: packed samples of each row, as the PNG specification lays them out; filter 0."""
    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = [png_chunk(b"IHDR", header), *extra, png_chunk(b"IDAT", body), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def tiff(width, height, pixels: bytes, bits, photometric=1, sample_format=1, order="<", extra=()) -> bytes:
    """One uncompressed strip; every tag is a SHORT or LONG with one value, but BitsPerSample of RGB (TIFF 6.0)."""
    channels = len(bits)
    tags = {256: width, 257: height, 259: 1, 262: photometric, 273: 8, 277: channels, 278: height, 279: len(pixels)}
    tags |= {339: sample_format, **dict(extra)}
    ifd_at = 8 + len(pixels)
    bits_at = ifd_at + 2 + 12 * (len(tags) + 1) + 4
    rows = [(tag, struct.pack(order + "HHII", tag, 4, 1, value)) for tag, value in tags.items()]
    bits_value = struct.pack(order + "HH", bits[0], 0) if channels == 1 else struct.pack(order + "I", bits_at)
    rows.append((258, struct.pack(order + "HHI", 258, 3, channels) + bits_value))
    ifd = struct.pack(order + "H", len(rows)) + b"".join(row for _, row in sorted(rows)) + b"\0\0\0\0"
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", ifd_at)
    return start + pixels + ifd + struct.pack(f"{order}{channels}H", *bits)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rgb(data: bytes, limits: DecodeLimits = LIMITS) -> list:
    image = decode(data, limits)
    assert image.mode == "RGB"
    return np.asarray(image).tolist()


def reason_of(data: bytes, limits: DecodeLimits = LIMITS) -> Reason:
    with pytest.raises(BadImage) as caught:
        decode(data, limits)
    return caught.value.reason


def picture(width=31, height=24, seed=0) -> Image.Image:
    """Smooth enough for lossy formats, with no symmetry."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [x * 255 / width, y * 255 / height, (x * 3 + y * 5 + seed * 40) % 256]
    return Image.fromarray(np.stack(planes, -1).astype(np.uint8))


# --------------------------------------------------------------------------------------------------- modes, to RGB

BLACK, WHITE, BACK = [0, 0, 0], [255, 255, 255], list(LIMITS.background)
PALETTE = png_chunk(b"PLTE", bytes([10, 20, 30, 40, 50, 60, 70, 80, 90]))


def over(color, alpha):
    """Porter-Duff `over` an opaque background, alpha in 0..255."""
    return [(c * alpha + b * (255 - alpha)) / 255 for c, b in zip(color, LIMITS.background, strict=True)]


# name: (file, expected pixels of its one row)
PNG_CASES: dict[str, tuple[bytes, list]] = {
    "1-bit": (png(3, 1, 1, 0, [b"\x40"]), [BLACK, WHITE, BLACK]),
    "1-bit key": (png(2, 1, 1, 0, [b"\x40"], png_chunk(b"tRNS", b"\0\1")), [BLACK, BACK]),
    "2-bit": (png(4, 1, 2, 0, [b"\x1b"]), [[v] * 3 for v in (0, 85, 170, 255)]),
    "2-bit key": (png(4, 1, 2, 0, [b"\x1b"], png_chunk(b"tRNS", b"\0\2")), [BLACK, [85] * 3, BACK, WHITE]),
    "4-bit key": (png(2, 1, 4, 0, [b"\x1f"], png_chunk(b"tRNS", b"\0\x01")), [BACK, WHITE]),
    "grey": (png(2, 1, 8, 0, [b"\x07\xc8"]), [[7] * 3, [200] * 3]),
    "grey key": (png(2, 1, 8, 0, [b"\x07\xc8"], png_chunk(b"tRNS", b"\0\x07")), [BACK, [200] * 3]),
    "grey 16": (png(3, 1, 16, 0, [struct.pack(">3H", 255, 0x1234, 65535)]), [BLACK, [0x12] * 3, WHITE]),
    "grey 16 key": (
        png(2, 1, 16, 0, [struct.pack(">2H", 0x1234, 0x1235)], png_chunk(b"tRNS", b"\x12\x34")),
        [BACK, [0x12] * 3],
    ),
    "RGB": (png(1, 1, 8, 2, [b"\1\2\3"]), [[1, 2, 3]]),
    "RGB key": (png(2, 1, 8, 2, [b"\1\2\3\1\2\4"], png_chunk(b"tRNS", b"\0\1\0\2\0\3")), [BACK, [1, 2, 4]]),
    "RGB 16": (png(1, 1, 16, 2, [struct.pack(">3H", 255, 0x1234, 65535)]), [[0, 0x12, 255]]),
    "RGB 16 key": (
        png(
            2,
            1,
            16,
            2,
            [struct.pack(">6H", 0x1234, 0x5678, 0x9ABC, 0, 0, 0)],
            png_chunk(b"tRNS", b"\x12\x34Vx\x9a\xbc"),
        ),
        [BACK, BLACK],
    ),
    "palette": (png(3, 1, 2, 3, [b"\x18"], PALETTE), [[10, 20, 30], [40, 50, 60], [70, 80, 90]]),
    "palette one alpha": (
        png(3, 1, 2, 3, [b"\x18"], PALETTE, png_chunk(b"tRNS", b"\xff\x00")),
        [[10, 20, 30], BACK, [70, 80, 90]],
    ),
    "palette alphas": (
        png(3, 1, 2, 3, [b"\x18"], PALETTE, png_chunk(b"tRNS", b"\x80\x00\x40")),
        [over([10, 20, 30], 128), BACK, over([70, 80, 90], 64)],
    ),
    "LA": (png(2, 1, 8, 4, [b"\xc8\xff\xc8\x40"]), [[200] * 3, over([200] * 3, 64)]),
    "LA 16": (png(1, 1, 16, 4, [struct.pack(">2H", 0xC812, 0x4034)]), [over([200] * 3, 64)]),
    "RGBA": (png(2, 1, 8, 6, [b"\1\2\3\0\1\2\3\x80"]), [BACK, over([1, 2, 3], 128)]),
    "RGBA 16": (png(1, 1, 16, 6, [struct.pack(">4H", 256, 512, 768, 0xFFFF)]), [[1, 2, 3]]),
}
GREY16 = struct.pack("<3H", 255, 0x1234, 65535)
OTHER_CASES: dict[str, tuple[bytes, list]] = {
    "PBM": (b"P4 3 1\n\xbf", [BLACK, WHITE, BLACK]),  # 1 is black; the last five bits are padding
    "PGM 16": (b"P5 3 1 65535\n" + struct.pack(">3H", 255, 0x1234, 65535), [BLACK, [0x12] * 3, WHITE]),
    "PGM text": (b"P2\n# a comment\n2 1\n255\n7 200\n", [[7] * 3, [200] * 3]),
    "TIFF 16": (tiff(3, 1, GREY16, [16]), [BLACK, [0x12] * 3, WHITE]),
    "TIFF 16 big-endian": (
        tiff(3, 1, struct.pack(">3H", 255, 0x1234, 65535), [16], order=">"),
        [BLACK, [0x12] * 3, WHITE],
    ),
    "TIFF 16 WhiteIsZero": (tiff(3, 1, GREY16, [16], photometric=0), [[255] * 3, [0xED] * 3, BLACK]),
    "TIFF 8 WhiteIsZero": (tiff(2, 1, b"\x00\xc8", [8], photometric=0), [WHITE, [55] * 3]),
    "TIFF 12": (tiff(2, 1, b"\xff\xf1\x23", [12]), [WHITE, [0x12] * 3]),
    "TIFF 32 in 16 bits": (tiff(2, 1, struct.pack("<2I", 0x1234, 65535), [32]), [[0x12] * 3, WHITE]),
    "TIFF CMYK": (
        tiff(2, 1, bytes([255, 0, 0, 0, 10, 20, 30, 40]), [8] * 4, photometric=5),
        [[0, 255, 255], [(255 - v) * (255 - 40) / 255 for v in (10, 20, 30)]],
    ),
    "TIFF L*a*b*": (tiff(2, 1, b"\xff\0\0\0\0\0", [8] * 3, photometric=8), [WHITE, BLACK]),
}


@pytest.mark.parametrize("name", [*PNG_CASES, *OTHER_CASES])
def test_every_mode_arrives_as_the_rgb_its_specification_means(name):
    data, expected = (PNG_CASES | OTHER_CASES)[name]
    assert decode(data, LIMITS).size == (len(expected), 1)
    # 1: Pillow composites and converts CMYK in integers, the expectation is exact
    assert np.abs(np.array(rgb(data)[0], float) - np.array(expected, float)).max() <= 1
    if name == "TIFF L*a*b*":  # LittleCMS rounds
        return
    exact = [i for i, color in enumerate(expected) if all(float(c).is_integer() for c in color)]
    assert [rgb(data)[0][i] for i in exact] == [expected[i] for i in exact]


@pytest.mark.parametrize(
    ("cmyk", "expected"),
    [((0, 0, 0, 0), WHITE), ((0, 0, 0, 255), BLACK), ((255, 0, 0, 0), [0, 255, 255]), ((0, 255, 0, 0), [255, 0, 255])],
)
def test_adobe_cmyk_jpeg_is_not_inverted(cmyk, expected):
    data = saved(Image.new("CMYK", (16, 16), cmyk), "JPEG", quality=100)
    assert b"Adobe" in data  # the marker that says: stored inverted
    assert np.abs(np.array(rgb(data), float) - expected).max() <= 2  # a flat block at quality 100 is off by rounding


@pytest.mark.parametrize(
    "data",
    [
        tiff(2, 1, struct.pack("<2f", 0.0, 1.0), [32], sample_format=3),
        tiff(2, 1, struct.pack("<2I", 0, 70000), [32]),
        tiff(2, 1, struct.pack("<2h", -1, 5), [16], sample_format=2),
    ],
    ids=["float", "32-bit", "negative"],
)
def test_samples_that_do_not_say_what_white_is_are_quarantined(data):
    assert reason_of(data) is Reason.UNSUPPORTED_FORMAT


@pytest.mark.parametrize(("kind", "options"), [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})])
def test_first_frame(kind, options):
    frames = [Image.new("RGB", (9, 7), color) for color in ("#ff0000", "#00ff00", "#0000ff")]
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert rgb(data) == [[[255, 0, 0]] * 9] * 7


def test_multi_picture_jpeg_gives_its_first():
    first, second = picture(), picture(seed=3)
    data = saved(first, "MPO", save_all=True, append_images=[second])
    assert rgb(data) == rgb(saved(first, "JPEG"))


@pytest.mark.parametrize(("kind", "tolerance"), [("JPEG", 60), ("WEBP", 60), ("JPEG2000", 0), ("AVIF", 60), ("BMP", 0)])
def test_common_formats_show_the_picture(kind, tolerance):
    # lossy: a coarse bound that a swapped channel, a flip or a shift of the ramps would break
    difference = np.abs(np.array(rgb(saved(picture(), kind)), float) - np.asarray(picture()))
    assert difference[..., :2].max() <= tolerance


# ------------------------------------------------------------------------------------------------------ orientation

# EXIF 2.32, section 4.6.4 A, tag 0x0112: the side of the upright picture where stored row 0 and stored column 0 lie
SIDES = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


def upright(stored: np.ndarray, orientation: int) -> np.ndarray:
    rows, columns = stored.shape[:2]
    row_side, column_side = SIDES[orientation]
    transposed = row_side in ("left", "right")
    result = np.zeros((columns, rows, 3) if transposed else (rows, columns, 3), np.uint8)
    for i in range(rows):
        for j in range(columns):
            a = rows - 1 - i if row_side in ("bottom", "right") else i
            b = columns - 1 - j if column_side in ("bottom", "right") else j
            result[(b, a) if transposed else (a, b)] = stored[i, j]
    return result


NEARLY_LOSSLESS: dict[str, dict] = {
    "WEBP": {"lossless": True},
    "JPEG": {"quality": 100, "subsampling": "4:4:4"},
    "AVIF": {"quality": 100, "subsampling": "4:4:4"},
}


@pytest.mark.parametrize("orientation", SIDES)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG", "AVIF"])
def test_orientation(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = picture(5, 3)
    pixels = np.array(rgb(saved(stored, kind, exif=exif, **NEARLY_LOSSLESS.get(kind, {}))))
    expected = upright(np.asarray(stored), orientation)
    assert pixels.shape == expected.shape
    # the ramps of `picture` differ by 51 and more between neighbours, so no other orientation comes this near
    assert np.abs(pixels[..., :2].astype(int) - expected[..., :2]).max() <= (25 if kind in {"JPEG", "AVIF"} else 0)


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage that is no TIFF", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM"])
def test_broken_exif_states_no_orientation(exif):
    assert rgb(saved(picture(), "JPEG", exif=exif)) == rgb(saved(picture(), "JPEG"))


# ----------------------------------------------------------------------------------------------------------- limits

BIG = 60_000  # 3.6e9 pixels: 14 GB if anything decoded them; above Pillow's own bomb limit
HUGE_HEADERS = {
    "PNG": png(BIG, BIG, 8, 2, []),
    "BMP": b"BM" + struct.pack("<IHHIIiiHHIIIIII", 1000, 0, 0, 54, 40, BIG, BIG, 1, 24, 0, 0, 0, 0, 0, 0) + bytes(64),
    "GIF": b"GIF89a" + struct.pack("<HHBBB", BIG, BIG, 0x80, 0, 0) + bytes(6) + b",\0\0\0\0\1\0\1\0\0\2\2D\1\0;",
    "TIFF": tiff(BIG, BIG, b"\0", [8]),
    "PNM": f"P6 {BIG} {BIG} 255\n".encode() + bytes(64),
}


def test_limits_are_inclusive():
    data = saved(picture(31, 24), "PNG")
    exact = DecodeLimits(max_bytes=len(data), max_pixels=31 * 24, background=(0, 0, 0), max_cpu_s=1)
    assert decode(data, exact).size == (31, 24)
    assert reason_of(data, DecodeLimits(len(data), 31 * 24 - 1, (0, 0, 0), 1)) is Reason.TOO_MANY_PIXELS
    assert reason_of(data, DecodeLimits(len(data) - 1, 31 * 24, (0, 0, 0), 1)) is Reason.TOO_MANY_BYTES


def test_too_many_bytes_meets_no_parser(monkeypatch):
    monkeypatch.setattr(images_decode, "_DECODERS", None)
    assert reason_of(bytes(LIMITS.max_bytes + 1)) is Reason.TOO_MANY_BYTES


def test_pillows_process_wide_pixel_limit_plays_no_part(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(saved(picture(), "PNG"), LIMITS).size == (31, 24)


@pytest.mark.parametrize("chunk", [b"zTXt", b"iCCP"])
def test_bomb_in_an_ancillary_chunk(chunk):
    bomb = png_chunk(chunk, b"name\0\0" + zlib.compress(bytes(50_000_000)))
    assert len(bomb) < 100_000
    assert reason_of(png(1, 1, 8, 0, [b"\0"], bomb)) is Reason.CORRUPT


# ----------------------------------------------------------------------- declared: more room or work than the picture
# has

EXPENSIVE = DecodeLimits(max_bytes=2**26, max_pixels=100_000_000, background=(0, 0, 0), max_cpu_s=60)


def tiled_tiff(width: int, height: int, tile_width: int, tile_length: int) -> bytes:
    """Grey, compressed, in tiles of which one is in the file; LONG tags (TIFF 6.0, section 15)."""
    body = zlib.compress(bytes(1000))
    tags = {256: width, 257: height, 258: 8, 259: 8, 262: 1, 277: 1, 322: tile_width, 323: tile_length}
    tags |= {324: 8, 325: len(body)}
    ifd = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, v) for tag, v in tags.items())
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + ifd + bytes(4)


def jpeg_2000(width: int, height: int, **options) -> bytes:
    """A codestream that declares this size, whatever is in it (ISO/IEC 15444-1, A.5.1)."""
    data = bytearray(saved(Image.new("L", (16, 16)), "JPEG2000", no_jp2=True, **options))
    struct.pack_into(">8I", data, 8, width, height, 0, 0, width, height, 0, 0)
    return bytes(data)


def jpeg_of_scans(more: int) -> bytes:
    """A progressive JPEG whose last scan comes `more` times again."""
    data = saved(picture(), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * more + data[last:]


def gif_frame(side: int) -> bytes:
    """Canvas of 1 x 1 px, a comment, and a first frame of side x side."""
    return b"GIF89a\1\0\1\0\0\0\0!\xfe\2hi\0," + struct.pack("<HHHHB", 0, 0, side, side, 0) + b"\2\2D\1\0;"


def webp_canvas(side: int) -> bytes:
    extended = b"VP8X" + struct.pack("<I", 10) + bytes(4) + 2 * (side - 1).to_bytes(3, "little")
    return b"RIFF" + struct.pack("<I", 4 + len(extended)) + b"WEBP" + extended


WEBP_9999 = bytes.fromhex(
    "524946461a000000574542505650384c0e0000002f0ea7c3090710 11fd0f4444ff03"
)  # lossless, one colour
TEXT_CHUNKS = [png_chunk(b"tEXt", b"a\0")] * 100_001
DECLARED: dict[str, tuple[bytes, str]] = {
    "TIFF tile": (tiled_tiff(10, 10, 46336, 46336), "too_many_pixels: a tile of 46336x46336 = 2147024896 pixels"),
    "TIFF long tiles": (tiled_tiff(10_000, 1, 16, 6_000_000), "too_expensive: TIFF: more than 400000000 pixels in"),
    "JPEG 2000 in JP2": (
        saved(picture(), "JPEG2000").replace(
            struct.pack(">HHII", 47, 0, 31, 24), struct.pack(">HHII", 47, 0, BIG, BIG)
        ),
        f"too_many_pixels: a codestream of {BIG}x{BIG} =",
    ),
    "JPEG 2000 blocks": (jpeg_2000(9999, 9999, codeblock_size=(4, 4)), "too_expensive: JPEG 2000: more than 4194304"),
    "JPEG 2000 precincts": (
        jpeg_2000(9999, 9999, precinct_size=(4, 4), num_resolutions=1),
        "too_expensive: JPEG 2000: more than 4194304 code-blocks",
    ),
    "JPEG scans": (jpeg_of_scans(100), "too_expensive: JPEG: more than 100 scans"),
    "PNG text": (png(1, 1, 8, 0, [b"\0"], *TEXT_CHUNKS), "too_expensive: PNG: more than 100000 chunks beside"),
    "PNM comments": (b"P3 4 4 255\n" + b"#\n" * 500_000, "too_expensive: PNM: more than 1000 comments"),
    "GIF frame": (gif_frame(BIG), f"too_many_pixels: {BIG}x{BIG} ="),
    "WebP canvas": (webp_canvas(16_000), "too_many_pixels: 16000x16000 ="),
    "AVIF": (
        saved(picture(), "AVIF").replace(
            b"ispe" + struct.pack(">3I", 0, 31, 24), b"ispe" + struct.pack(">3I", 0, BIG, BIG)
        ),
        f"too_many_pixels: {BIG}x{BIG} =",
    ),
}


@pytest.mark.parametrize("name", [*HUGE_HEADERS, *DECLARED])
def test_what_a_codec_would_take_is_known_before_it_runs(name, monkeypatch):
    def load(self):
        pytest.fail("the pixels were decoded")

    for decoder in images_decode._DECODERS.values():
        monkeypatch.setattr(decoder, "load", load)
    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    header = f"too_many_pixels: {BIG}x{BIG} = {BIG * BIG} pixels, the limit is 100000000"
    data, expected = DECLARED[name] if name in DECLARED else (HUGE_HEADERS[name], header)
    with pytest.raises(BadImage, match=expected):
        decode(data, EXPENSIVE)


@pytest.mark.parametrize(
    "data",
    [
        saved(picture(), "JPEG2000", tile_size=(16, 16), codeblock_size=(4, 4)),
        saved(picture(), "JPEG2000", precinct_size=(16, 16)),
        saved(picture(), "TIFF", compression="tiff_deflate", tile=(16, 16)),
        jpeg_of_scans(30),
        saved(picture(), "JPEG", exif=b"Exif\0\0" + b"\xff\xda" * 1000),  # what looks like scans in another segment
        png(1, 1, 8, 0, [b"\0"], *TEXT_CHUNKS[:1000]),
        b"P3 1 1 255\n" + b"# more than one line\n" * 20 + b"1 2 3",
    ],
    ids=["tiles", "precincts", "TIFF tiles", "scans", "thumbnail", "text", "comments"],
)
def test_clean_files_declare_no_more_than_that(data):
    assert decode(data, LIMITS).mode == "RGB"


def test_more_scans_are_too_many_only_up_to_the_end_of_the_picture():
    data = saved(picture(), "JPEG", progressive=True)
    assert rgb(data + b"\xff\xda" * 1000) == rgb(data)  # a film behind it, as phones store


def test_tags_that_mislead_the_explanation_too_are_that_images(monkeypatch):
    """StripOffsets as text: once a TypeError in what asked whether the file ends early."""
    data = tiff(4, 4, zlib.compress(bytes(16)), [8], extra={259: 8}.items())
    entry = struct.pack("<HHI", 273, 4, 1)
    assert entry in data
    assert reason_of(data.replace(entry, struct.pack("<HHI", 273, 2, 2))) is Reason.CORRUPT


@pytest.mark.parametrize("error", [RecursionError, MemoryError, OverflowError, ZeroDivisionError, AssertionError])
def test_whatever_a_codec_raises_is_that_images(error, monkeypatch):
    def load(self):
        raise error("of a codec")

    monkeypatch.setattr(images_decode._DECODERS["PNG"], "load", load)
    expected = Reason.TOO_EXPENSIVE if error is MemoryError else Reason.CORRUPT
    assert reason_of(saved(picture(), "PNG")) is expected


@pytest.mark.parametrize("field", [{"max_bytes": 0}, {"max_pixels": 0}, {"max_cpu_s": 0}, {"background": (0, 0, 256)}])
def test_senseless_limits_are_the_users_mistake(field):
    with pytest.raises(UserError):
        DecodeLimits(**{"max_bytes": 1, "max_pixels": 1, "background": (0, 0, 0), "max_cpu_s": 1} | field)


# --------------------------------------------------------------------------------------------------------- not read


def heif(brand: bytes) -> bytes:
    return struct.pack(">I", 24) + b"ftyp" + brand + b"\0\0\0\0mif1" + brand + bytes(64)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", Reason.EMPTY),
        (b"<!DOCTYPE html><html><body>404</body></html>", Reason.NOT_AN_IMAGE),
        (b"<html><svg></svg></html>", Reason.NOT_AN_IMAGE),
        (b"%PDF-1.7\n", Reason.NOT_AN_IMAGE),
        (b'{"error": "AccessDenied"}', Reason.NOT_AN_IMAGE),
        (b"BMW is a car maker, not a bitmap", Reason.NOT_AN_IMAGE),
        (b"\0" * 1000, Reason.NOT_AN_IMAGE),
        (struct.pack(">I", 24) + b"ftypisom" + bytes(64), Reason.NOT_AN_IMAGE),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', Reason.UNSUPPORTED_FORMAT),
        (b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- x -->\n<svg/>', Reason.UNSUPPORTED_FORMAT),
        (heif(b"heic"), Reason.UNSUPPORTED_FORMAT),
        (saved(picture(), "EPS"), Reason.UNSUPPORTED_FORMAT),
        (saved(picture(), "ICO"), Reason.UNSUPPORTED_FORMAT),
        (saved(picture(), "SGI"), Reason.UNSUPPORTED_FORMAT),
        (saved(picture(), "DDS"), Reason.UNSUPPORTED_FORMAT),
        (b"8BPS\0\1" + bytes(100), Reason.UNSUPPORTED_FORMAT),
        (
            tiff(1, 1, b"\0", [8], extra={254: 1}.items()),
            Reason.UNSUPPORTED_FORMAT,
        ),  # DNG: the first page is a thumbnail
        (tiff(1, 1, bytes(8), [64], sample_format=3), Reason.UNSUPPORTED_FORMAT),
        (b"\x89PNG\r\n", Reason.TRUNCATED),
        (
            png(4, 4, 8, 0, [bytes(4)] * 4).replace(zlib.compress(bytes(20)), b"x" * len(zlib.compress(bytes(20)))),
            Reason.CORRUPT,
        ),
        (png(1, 1, 8, 0, [b"\0"]).replace(b"IHDR\0", b"IHDR\1"), Reason.CORRUPT),
    ],
)
def test_reason(data, reason):
    assert reason_of(data) is reason


CORPUS: dict[str, tuple[str, dict]] = {
    "PNG": ("PNG", {}),
    "JPEG": ("JPEG", {}),
    "progressive JPEG": ("JPEG", {"progressive": True}),
    "WebP": ("WEBP", {}),
    "lossless WebP": ("WEBP", {"lossless": True}),
    "GIF": ("GIF", {}),
    "BMP": ("BMP", {}),
    "TIFF": ("TIFF", {}),
    "LZW TIFF": ("TIFF", {"compression": "tiff_lzw"}),
    "PNM": ("PPM", {}),
    "JP2": ("JPEG2000", {}),
    "AVIF": ("AVIF", {}),
}


@cache
def corpus(name: str) -> bytes:
    kind, options = CORPUS[name]
    if kind not in {"GIF", "BMP", "PPM", "JPEG2000"}:
        options = options | {"exif": Image.Exif()}
    return saved(picture().convert("P") if kind == "GIF" else picture(), kind, **options)


@pytest.mark.parametrize("name", CORPUS)
def test_a_file_cut_anywhere_is_truncated_or_whole(name):
    """Whole: the cut took bytes after the last pixel only, such as PNG's IEND."""
    data = corpus(name)
    whole = rgb(data)
    reasons = []
    for length in range(16, len(data), 7):
        try:
            assert rgb(data[:length]) == whole
        except BadImage as error:
            reasons.append(error.reason)
    if name in {"TIFF", "LZW TIFF", "AVIF", "JP2", "PNM"}:  # a cut inside their directories can look like damage
        assert set(reasons) <= {Reason.TRUNCATED, Reason.CORRUPT}
        assert reasons.count(Reason.TRUNCATED) >= 0.95 * len(reasons) > 0
    else:
        assert set(reasons) == {Reason.TRUNCATED}


def outcome(data: bytes) -> tuple[str, str]:
    """What decode makes of any bytes; anything but a picture or a BadImage, and any warning, is an error here."""
    failure = None
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            image = decode(data, LIMITS)
        except BadImage as error:
            failure = error
    assert not warned
    if failure:
        assert failure.detail.isprintable()
        assert 0 < len(failure.detail) <= 300
        return failure.reason, failure.detail
    assert image.mode == "RGB"
    return "decoded", image.tobytes().hex()


def test_pillows_warnings_stay_inside():
    data = corpus("TIFF")[:16]
    with pytest.warns(UserWarning, match="Corrupt EXIF data"), pytest.raises(UnidentifiedImageError):
        Image.open(io.BytesIO(data))
    assert outcome(data)[0] == Reason.TRUNCATED


fuzz = settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@fuzz
@given(st.binary(max_size=200), st.sampled_from(["", *CORPUS]))
def test_random_bytes_give_a_picture_or_bad_image(tail, name):
    data = (corpus(name)[:14] if name else b"") + tail
    assert outcome(data) == outcome(data)  # twice: the quarantine table is a function of the bytes


@fuzz
@given(st.data(), st.sampled_from(list(CORPUS)))
def test_damaged_files_give_a_picture_or_bad_image(draw, name):
    data = bytearray(corpus(name))
    # most damage to the first bytes, where headers and directories lie
    position = st.one_of(st.integers(0, min(len(data), 400) - 1), st.integers(0, len(data) - 1))
    for at, value in draw.draw(st.lists(st.tuples(position, st.integers(0, 255)), min_size=1, max_size=8)):
        data[at] = value
    cut = draw.draw(st.one_of(st.just(len(data)), st.integers(0, len(data))))
    assert outcome(bytes(data[:cut])) == outcome(bytes(data[:cut]))


def test_bad_image_is_one_short_line_and_survives_pickling():
    error = BadImage(Reason.CORRUPT, "a\nb\t\x00 <object at 0x7f00> " + "x" * 500)
    assert error.detail.startswith("a b ? <object> xxx")
    assert len(error.detail) == 300
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.reason, copy.detail, str(copy)) == (error.reason, error.detail, f"corrupt: {error.detail}")


# ----------------------------------------------------------------------------------------------------------- resize

SIZES = [(1, 1), (5, 3), (64, 64), (97, 64), (64, 97), (37, 411), (224, 224), (225, 224), (301, 200), (640, 481)]


@cache
def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), np.uint8))


def timm_pixels(image: Image.Image, preprocess: Preprocess) -> np.ndarray:
    from timm.data.transforms_factory import create_transform

    transform = create_transform(
        input_size=(3, preprocess.height, preprocess.width),
        is_training=False,
        interpolation=preprocess.interpolation,
        mean=preprocess.mean,
        std=preprocess.std,
        crop_pct=preprocess.crop_pct,
        crop_mode=preprocess.crop_mode,
        normalize=False,  # uint8 [3, H, W], nothing scaled
    )
    return transform(image).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("target", [(64, 64), (48, 65)])
@pytest.mark.parametrize("crop_pct", [1.0, 0.875, 0.41])
def test_resize_is_timms_bit_for_bit(crop_mode, target, crop_pct):
    height, width = target
    for interpolation in images_resize._INTERPOLATION:
        preprocess = Preprocess(
            height, width, interpolation, crop_pct, crop_mode, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        )
        for size in SIZES if interpolation == "bilinear" else SIZES[1::3]:
            pixels = resize(noise(*size), preprocess)
            assert pixels.dtype == np.uint8
            assert pixels.shape == (*target, 3)
            assert pixels.flags.writeable
            assert pixels.flags.c_contiguous
            np.testing.assert_array_equal(pixels, timm_pixels(noise(*size), preprocess), f"{size} {preprocess}")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.tuples(st.integers(1, 80), st.integers(1, 80)),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.sampled_from(["center", "squash"]),
    st.floats(0.3, 1.0),
)
def test_resize_is_timms_for_any_size(size, target, crop_mode, crop_pct):
    preprocess = Preprocess(target[0], target[1], "bicubic", crop_pct, crop_mode, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    np.testing.assert_array_equal(resize(noise(*size), preprocess), timm_pixels(noise(*size), preprocess))


def test_paper_is_the_authors_transform():
    """Their notebook: Resize((224, 224)), ToTensor, Normalize(ImageNet)."""
    from torchvision import transforms

    authors = transforms.Resize((224, 224))
    paper = Preprocess.paper()
    assert (paper.mean, paper.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    np.testing.assert_array_equal(resize(noise(301, 200), paper), np.asarray(authors(noise(301, 200))))


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_extreme_aspect_ratio_stays_in_memory(crop_mode):
    preprocess = Preprocess(224, 224, "bilinear", 1.0, crop_mode, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    line = Image.new("RGB", (1, 1_000_000), (9, 9, 9))
    if crop_mode == "center":
        with pytest.raises(BadImage, match="too_many_pixels: aspect ratio of 1x1000000"):
            resize(line, preprocess)
    else:
        assert resize(line, preprocess).shape == (224, 224, 3)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"interpolation": "random"}, "nearest, box, bilinear, hamming, bicubic, lanczos"),
        ({"crop_mode": "middle"}, "center, squash, border"),
        ({"crop_pct": 0.0}, "crop_pct"),
        ({"crop_pct": 1.1}, "crop_pct"),
        ({"height": 0}, "0x224"),
        ({"std": [1.0, 0.0, 1.0]}, "std"),
        ({"mean": [float("nan"), 0.0, 1.0]}, "mean"),
        ({"mean": [0.5]}, "mean"),
        ({"crop": "squash"}, "crop_pct"),
    ],
)
def test_bad_preprocess_is_the_users_mistake(field, message):
    with pytest.raises(UserError, match=message):
        Preprocess.from_json(Preprocess.paper().to_json() | field)


def test_preprocess_survives_json():
    preprocess = Preprocess(64, 48, "lanczos", 0.875, "border", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert Preprocess.from_json(json.loads(json.dumps(preprocess.to_json()))) == preprocess


# ---------------------------------------------------------------------------------------------------------- prepare


def test_prepare_reports_the_upright_source():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(picture(31, 24), "PNG", exif=exif)
    prepared = prepare(data, LIMITS, Preprocess.paper())
    assert (prepared.width, prepared.height) == (24, 31)
    np.testing.assert_array_equal(prepared.pixels, resize(decode(data, LIMITS), Preprocess.paper()))
    # SHA-256 of the empty message is FIPS 180-4's own example; here the digest of known bytes by another program
    digest = subprocess.run(["sha256sum"], input=data, capture_output=True, check=True).stdout.split()[0].decode()
    assert prepared.content_hash == digest


def test_decode_workers_stay_light():
    code = "import sys, pd_core.images.decode, pd_core.images.resize; print(*{m.split('.')[0] for m in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout.split()
    assert not {"torch", "torchvision", "timm", "ray", "pandas", "pyarrow", "mlflow"} & set(loaded)
