"""A directory or a glob: each file is an image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc

from pd_core.images.sources import names
from pd_core.images.sources.base import TABLE_ROWS, Source, entries, listing_table


def tables(source: Source, skipped: Counter[str]) -> Iterator[pa.Table]:
    """Tables of the listing, by key in the order of its UTF-8 bytes."""
    found = _collect(source, skipped)
    order = pc.sort_indices(found["name"])
    for start in range(0, len(order), TABLE_ROWS):
        rows = found.take(order.slice(start, TABLE_ROWS))
        keys = rows["name"].to_pylist()
        labels = _folders(source, keys) if source.settings.labels == "parent" else [None] * len(keys)
        yield listing_table(
            source, keys, keys, [0] * len(keys), rows["size"].combine_chunks(), rows["state"].combine_chunks(), labels
        )


def _collect(source: Source, skipped: Counter[str]) -> pa.Table:
    """Names, sizes and states as Arrow arrays: a Python object per file would take ten times the memory."""
    schema = pa.schema([("name", pa.large_string()), ("size", pa.int64()), ("state", pa.int64())])
    batches, keys, sizes, states = [], [], [], []
    for entry in entries(source, source.kind, skipped):
        keys.append(entry.name)
        sizes.append(entry.size)
        states.append(entry.state)
        if len(keys) == TABLE_ROWS:
            batches.append(pa.record_batch([keys, sizes, states], schema=schema))
            keys, sizes, states = [], [], []
    batches.append(pa.record_batch([keys, sizes, states], schema=schema))
    return pa.Table.from_batches(batches)


def _folders(source: Source, keys: list[str]) -> list[str]:
    root = names.escape(source.root.rstrip("/").rpartition("/")[2])
    return [key.rpartition("/")[0].rpartition("/")[2] if "/" in key else root for key in keys]
