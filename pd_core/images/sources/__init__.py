"""Sources of images: a directory, a glob, Parquet files or WebDataset tars, local or on S3; listed, then read in parts.

`open_source` runs on the driver and is cheap. `list_images` walks everything once and fixes the order. `read` fetches
the images of consecutive rows of that listing; what cannot be had comes as a `BadImage` in its place.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pd_core.core import schemas
from pd_core.core.errors import UserError
from pd_core.core.settings.data import DataSettings
from pd_core.images.decode import BadImage
from pd_core.images.sources import folders, names, parquet, webdataset
from pd_core.images.sources.base import Source, decide_kind, entries, locate, require_some
from pd_core.images.sources.names import check_unique, leading_out, sample_id, sample_ids
from pd_core.images.sources.stores import HOW_TO_FOLLOW, OUTSIDE, Sleep, Span

__all__ = [
    "HOW_TO_FOLLOW",
    "OUTSIDE",
    "Source",
    "check_unique",
    "identity",
    "leading_out",
    "list_images",
    "open_source",
    "read",
    "sample_id",
    "sample_ids",
    "state",
]

_LABEL_FORMS = {"parent": ("directory", "glob"), "column": ("parquet",), "member": ("webdataset",)}


def open_source(settings: DataSettings) -> Source:
    """Find out what the source is, and that there is something in it. Reads names and headers, no images.

    Raises:
        UserError: there is no source, nothing is in it, it may not be read, or other data settings do not fit it.
        RunError: the store does not answer.
    """
    if not settings.source:
        raise UserError("data.source: not set; give a directory, a glob, Parquet files or tars, local or s3://")
    source = locate(settings)
    kind = decide_kind(source)
    _check_settings(kind, settings)
    source = dataclasses.replace(source, kind=kind)
    require_some(source)
    if kind == "parquet":
        return dataclasses.replace(source, metadata_type=parquet.open_columns(source).metadata_type)
    if kind == "webdataset":
        return dataclasses.replace(source, metadata_type=webdataset.open_metadata(source))
    return source


def _check_settings(kind: str, settings: DataSettings) -> None:
    form = settings.labels.partition(":")[0]
    if form != "none" and kind not in _LABEL_FORMS[form]:
        fitting = {"parquet": "column:NAME", "webdataset": "member:EXT"}.get(kind, "parent")
        raise UserError(f"data.labels: {settings.labels!r} does not fit a {kind} source; use {fitting} or none")
    if kind == "parquet":
        return
    for name in ("image_column", "key_column", "metadata_columns"):
        if getattr(settings, name) != DataSettings.model_fields[name].default:
            raise UserError(f"data.{name}: only for Parquet, but the source is a {kind} source; drop it")


def identity(source: Source) -> dict[str, Any]:
    """The settings that decide the listing, as JSON values."""
    settings = source.settings
    fields = source.metadata_type or ()
    chosen: dict[str, Any] = {} if source.only is None else {"only": list(source.only)}
    if settings.follow_links:
        chosen["follow_links"] = True
    return chosen | {
        "kind": source.kind,
        "root": names.escape(source.root),
        "names": list(source.names),
        "patterns": [names.escape(pattern) for pattern in source.patterns],
        "labels": settings.labels,
        "image_column": settings.image_column if source.kind == "parquet" else None,
        "key_column": settings.key_column,
        "metadata": {field.name: str(field.type) for field in fields},
    }


State = dict[str, Any]


def state(source: Source) -> State:
    """What the source holds now: number of files, their bytes, and a hash that changes when one of them does.

    The hash is over name, size and mtime (S3: ETag) of each file, whatever the order they are met in; of files that a
    stage of ours has committed, over name and content, so that a part that is made again is no change. Files that a
    Parquet `path` names are not part of it.

    Raises:
        UserError, RunError: as `entries`.
    """
    if source.committed is not None:
        return dict(source.committed)
    count = size = total = 0
    for entry in entries(source, source.kind, Counter()):
        text = f"{entry.name}\0{entry.size}\0{entry.version}"
        # a sum of hashes needs no order and no memory, unlike a hash of the sorted list
        total += int.from_bytes(hashlib.blake2b(text.encode(), digest_size=32).digest(), "little")
        count += 1
        size += entry.size
    return {"files": count, "bytes": size, "hash": f"{total % (1 << 256):064x}"}


def list_images(source: Source, skipped: Counter[str] | None = None) -> Iterator[pa.Table]:
    """Every image of the source, in an order that is the same on every machine.

    Files come by key (bytes of its UTF-8), containers by name and their images as they lie in them.

    Args:
        source: what `open_source` gave.
        skipped: counts, by suffix, the files that were not taken for images.

    Yields:
        Tables of `schemas.listing(source.metadata_type)`, at most 65,536 rows each.

    Raises:
        UserError: a folder or container cannot be read; a Parquet file disagrees with the first or has a null key.
        RunError: the store does not answer.
    """
    counts = Counter() if skipped is None else skipped
    modules = {"parquet": parquet.tables, "webdataset": webdataset.tables}
    tables = modules.get(source.kind, folders.tables)(source, counts)
    return tables if source.only is None else _with(tables, *source.only)


def _with(tables: Iterator[pa.Table], name: str, value: str) -> Iterator[pa.Table]:
    """Rows whose metadata have the value."""
    for table in tables:
        yield table.filter(pc.equal(pc.struct_field(table[schemas.METADATA], name), value))


def read(source: Source, rows: pa.Table, sleep: Sleep = time.sleep) -> Iterator[bytes | BadImage]:
    """The bytes of consecutive rows of the listing, in their order.

    An image that cannot be read gives a BadImage; so does one of more than `data.max_image_bytes`, which is not read
    (of Parquet, its row group has been decoded by then).

    Args:
        source: what `open_source` gave.
        rows: consecutive rows of the listing.
        sleep: waits the given seconds before a request that failed for a passing reason is made again.

    Raises:
        UserError: the store no longer accepts the credentials.
        RunError: the store does not answer, or throttles, after all retries.
    """
    store = source.store()
    if source.kind == "parquet":
        yield from parquet.read(store, source.settings, rows, sleep)
        return
    columns = (rows[name].to_pylist() for name in ("container", "offset", "size"))
    wanted: list[Span | BadImage] = [
        webdataset.span(*row) if source.kind == "webdataset" else Span(row[0], None, row[2])
        for row in zip(*columns, strict=True)
    ]
    spans = [item for item in wanted if isinstance(item, Span)]
    fetched = store.fetch(spans, source.settings.max_image_bytes, sleep)
    for item in wanted:
        yield next(fetched) if isinstance(item, Span) else item
