"""What pages show of images: of originals, from their source, and of samples, from the tables that hold them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa

from pd_core.core.errors import UserError
from pd_core.core.settings.data import DataSettings
from pd_core.images import child, decode, sources
from pd_core.images.decode import BadImage, Reason

CHANGED = "has changed since it was indexed"


def of_originals(
    source: sources.Source, rows: pa.Table, hashes: Mapping[int, str] | None = None
) -> dict[int, bytes | BadImage]:
    """`resize.thumbnail` of each row of a listing by its sample_id, or what is wrong with that image.

    Args:
        hashes: content hashes by sample_id; an image with another one now is a BadImage whose detail is CHANGED.
    """
    numbers = rows["sample_id"].to_pylist()

    def contents() -> Iterator[bytes | BadImage]:
        for number, content in zip(numbers, sources.read(source, rows), strict=True):
            changed = (
                hashes is not None
                and isinstance(content, bytes)
                and hashlib.sha256(content).hexdigest() != hashes.get(number)
            )
            yield BadImage(Reason.UNREADABLE, CHANGED) if changed else content

    return dict(zip(numbers, child.thumbnails(contents(), decode.limits_of(source.settings)), strict=True))


def readable(made: Mapping[int, bytes | BadImage]) -> dict[int, bytes]:
    """Those that could be made; a report says so in the place of the others."""
    return {number: one for number, one in made.items() if not isinstance(one, BadImage)}


def of_samples(pictures: Iterable[Mapping[str, Any] | None], where: str) -> list[bytes]:
    """`resize.thumbnail` of pictures as tables of samples hold them (`schemas.IMAGE`).

    Raises:
        UserError: one is no picture. The table at the URI `where` was damaged, or others made it.
    """
    contents = ((picture or {}).get("bytes") or b"" for picture in pictures)
    made = []
    for one in child.thumbnails(contents, decode.limits_of(DataSettings())):
        if isinstance(one, BadImage):
            raise UserError(f"{where}: holds a picture that cannot be shown ({one}); make the table again")
        made.append(one)
    return made
