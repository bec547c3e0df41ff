r"""Names of images: keys that any table can hold, ids made from them, and what is not an image by its name.

A key is the name of an image relative to the root of its source, in UTF-8. A Linux file name is bytes and need not be
UTF-8, so a byte that does not decode is written `\xNN` (80..ff), and a literal `\x` in a name is written `\x5cx`, which
keeps keys unique and reversible. Every other name is its own key.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from pd_core.core.errors import UserError, printable

# What a folder of images often holds besides images. Everything else is a candidate: the content decides.
_SIDECARS = """
    .txt .json .jsonl .csv .tsv .xml .yaml .yml .toml .md .rst .pdf .html .htm .css .js .py .ipynb .sh .ini .cfg .log
    .db .sqlite .lnk .url .npy .npz .pt .pth .pkl .safetensors .h5 .hdf5 .mat .parquet .arrow .feather .tar .zip .7z
    .rar .gz .tgz .bz2 .xz .zst .md5 .sha1 .sha256 .part .crc
"""
SIDECAR_SUFFIXES = frozenset(_SIDECARS.split())
_IMAGES = ".png .jpg .jpeg .jfif .webp .gif .bmp .tif .tiff .ppm .pgm .pbm .pnm .jp2 .avif .img .image"
IMAGE_SUFFIXES = frozenset(_IMAGES.split())
PACKED_TAR_SUFFIXES = (".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tgz")

MAX_HEADINGS = 1000  # under which files that are left out are counted
OTHER_HEADING = "(others)"

_ESCAPED = re.compile(r"\\x([0-9a-f]{2})")
_UNDECODED = re.compile("[\udc80-\udcff]")


def escape(name: str) -> str:
    """The key of a file name (a str as the os module gives it, with surrogates for undecodable bytes)."""
    if "\\x" in name:
        name = name.replace("\\x", "\\x5cx")
    return name if name.isascii() else _UNDECODED.sub(lambda found: f"\\x{ord(found[0]) - 0xDC00:02x}", name)


def _unescape_one(found: re.Match[str]) -> str:
    value = int(found[1], 16)
    return chr(value) if value < 0x80 else chr(0xDC00 + value)


def unescape(key: str) -> str:
    """The file name of a key; the inverse of `escape`."""
    return _ESCAPED.sub(_unescape_one, key) if "\\x" in key else key


def suffix(name: str) -> str:
    """`.png`: what follows the last dot of the file name, in lower case; `(none)` where there is no dot."""
    stem, dot, last = name.rpartition("/")[2].rpartition(".")
    return f".{last.lower()}" if dot and stem else "(none)"


def sample_id(key: str) -> int:
    """The id of a key: 63 bits of BLAKE2b of its UTF-8 bytes, in 0 .. 2^63 - 1."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little") & 0x7FFF_FFFF_FFFF_FFFF


def sample_ids(keys: Sequence[str]) -> np.ndarray:
    """`sample_id` of each key: int64 [N]."""
    return np.fromiter(map(sample_id, keys), dtype=np.int64, count=len(keys))


def check_unique(ids: np.ndarray, keys_of: Callable[[np.ndarray], Sequence[str]]) -> None:
    """Refuse a listing in which two images share a `sample_id`.

    Args:
        ids: int64 [N], of all rows of the listing.
        keys_of: keys of the rows with these indices (int64 [m]); called only where there is something to report.

    Raises:
        UserError: two rows have the same key, or (once in 2^63 pairs) two keys the same hash.
    """
    order = np.argsort(ids, kind="stable")
    equal = np.flatnonzero(ids[order[1:]] == ids[order[:-1]])
    if not equal.size:
        return
    first, second = np.array([order[equal[0]], order[equal[0] + 1]])
    a, b = (printable(key) for key in keys_of(np.array([first, second])))
    if a == b:
        raise UserError(
            f"data.source: {equal.size} images have the key of another, the first is {a!r} (rows {first} and {second})"
            "; keys must be unique: choose another --data.key_column or remove the copies"
        )
    raise UserError(f"data.source: the keys {a!r} and {b!r} have the same 63-bit hash; rename one of them")


def leave_out(skipped: Counter[str], heading: str, count: int = 1) -> None:
    """Count what is left out. Names of files make headings: beyond MAX_HEADINGS they are OTHER_HEADING."""
    heading = escape(heading)
    skipped[heading if heading in skipped or len(skipped) < MAX_HEADINGS else OTHER_HEADING] += count


def leading_out(many: int) -> str:
    """`3 links lead out of the source`."""
    return f"{many:,} links lead out of the source" if many != 1 else "1 link leads out of the source"


def summary(skipped: Mapping[str, int]) -> str:
    """`.txt (3), .json (1)`: files by suffix, most frequent first."""
    ordered = sorted(skipped.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{name} ({count})" for name, count in ordered[:8])


def nearest(name: str, known: Iterable[str]) -> str:
    """`did you mean 'x'? there are: x, y` for a name that is not there."""
    import difflib

    names = sorted(known)
    match = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    there = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
    return f"did you mean {match[0]!r}? there are: {there}" if match else f"there are: {there or 'none'}"
