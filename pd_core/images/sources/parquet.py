"""Parquet files with an image column of bytes or struct<bytes, path>. Images stay in file order: (file, row)."""

from __future__ import annotations

import io
import posixpath
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pd_core.core import files as core_files
from pd_core.core import trust
from pd_core.core.errors import UserError, one_line, printable
from pd_core.core.settings.data import DataSettings
from pd_core.core.tables import bounded_batches, open_parquet
from pd_core.images.decode import BadImage, Reason
from pd_core.images.sources import names, stores
from pd_core.images.sources.base import TABLE_ROWS, Source, containers, listing_table
from pd_core.images.sources.stores import Entry, Sleep, Span

READ_BUFFER_BYTES = 8 << 20
BATCH_BYTES = 32 << 20  # images decoded from a row group at a time
MAX_BATCH_ROWS = 256

_CORRUPT = (pa.ArrowException, OSError, UnicodeDecodeError)


@dataclass(frozen=True)
class Columns:
    """The columns of a Parquet source, by role, with the types they must have in every file."""

    image: str
    key: str | None
    label: str | None
    metadata: tuple[str, ...]
    types: dict[str, pa.DataType]

    @property
    def metadata_type(self) -> pa.StructType | None:
        """The metadata columns as one struct; dictionaries become their values."""
        fields = [pa.field(name, _plain(self.types[name])) for name in self.metadata]
        return pa.struct(fields) if fields else None


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def open_columns(source: Source) -> Columns:
    """The columns that the settings name, from the first file; checks that some file has rows.

    Raises:
        UserError: a column is missing or of a wrong type, a file is not Parquet, or there are no rows.
    """
    store = source.store()
    first: Columns | None = None
    for entry in containers(source, Counter()):
        with _open(store, entry.name) as file:
            first = first or _resolve(file.schema_arrow, source.settings, entry.name)
            if file.metadata.num_rows:
                return first
    raise UserError(f"{printable(source.settings.source or '')}: the Parquet files have no rows")


@contextmanager
def _open(store: stores.Store, name: str) -> Iterator[pq.ParquetFile]:
    with stores.explained(store, name):
        file = store.open(name, time.sleep)
    with file:
        uri = printable(f"{store.uri}/{name}")
        try:
            parquet_file = _parquet(file, uri)
        except _CORRUPT as error:
            raise UserError(f"{uri}: not a readable Parquet file ({_line(error)}); repair or remove it") from error
        yield parquet_file


def _parquet(file: BinaryIO, where: str) -> pq.ParquetFile:
    # buffered, page by page: a row group can be gigabytes of images
    return open_parquet(file, where, pre_buffer=False, buffer_size=READ_BUFFER_BYTES, page_checksum_verification=True)


def _line(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)  # without the path
    return printable(one_line(text))


def _resolve(schema: pa.Schema, settings: DataSettings, where: str) -> Columns:
    label = settings.labels.partition(":")[2] if settings.labels.startswith("column:") else None
    used = {"image_column": settings.image_column, "key_column": settings.key_column, "labels": label}
    for setting, name in [*used.items(), *(("metadata_columns", name) for name in settings.metadata_columns or ())]:
        if name is not None and name not in schema.names:
            raise UserError(
                f"data.{setting}: {printable(where)} has no column {name!r}; {names.nearest(name, schema.names)}"
            )
    metadata = settings.metadata_columns
    if metadata is None:
        metadata = [name for name in schema.names if name not in used.values()]
    if settings.image_column in metadata:
        raise UserError(f"data.metadata_columns: {settings.image_column!r} is the image column; leave it out")
    types = {name: schema.field(name).type for name in schema.names}
    _check_image_type(settings.image_column, types[settings.image_column])
    for setting in ("key_column", "labels"):
        _check_text_type(setting, used[setting], types)
    wanted = {settings.image_column, settings.key_column, label, *metadata} - {None}
    return Columns(
        settings.image_column, settings.key_column, label, tuple(metadata), {n: types[n] for n in types if n in wanted}
    )


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)


def _check_image_type(name: str, kind: pa.DataType) -> None:
    if pa.types.is_struct(kind):
        children = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
        if "bytes" in children and _is_bytes(children["bytes"]) and _is_text(children.get("path", pa.string())):
            return
    elif _is_bytes(kind):
        return
    raise UserError(
        f"data.image_column: {name!r} is {kind}, expected bytes or struct<bytes, path>; name another column"
    )


def _check_text_type(setting: str, name: str | None, types: dict[str, pa.DataType]) -> None:
    if name is None:
        return
    try:
        pa.array([], _plain(types[name])).cast(pa.string())
    except pa.ArrowException:
        raise UserError(f"data.{setting}: column {name!r} is {types[name]}, which has no text form") from None


# ---- listing ---------------------------------------------------------------------------------------------------------


def tables(source: Source, skipped: Counter[str]) -> Iterator[pa.Table]:
    """Tables of the listing, by file name and row; `offset` is the row in the file, `size` -1.

    Raises:
        UserError: files differ in a column that is used, a key is null, or a column other than the image is corrupt.
    """
    store = source.store()
    columns: Columns | None = None
    for entry in containers(source, skipped):
        with _open(store, entry.name) as file:
            found = _resolve(file.schema_arrow, source.settings, entry.name)
            columns = columns or found
            _check_same(columns, found, entry.name)
            yield from _file_tables(source, file, entry, columns)


def _check_same(expected: Columns, found: Columns, name: str) -> None:
    for column in sorted({*expected.types, *found.types}):
        a, b = expected.types.get(column), found.types.get(column)
        if a != b:
            raise UserError(
                f"{printable(name)}: column {column!r} is {b or 'missing'} but {a or 'missing'} in the first file; "
                "all files must agree (choose fewer with --data.metadata_columns)"
            )


def _file_tables(source: Source, file: pq.ParquetFile, entry: Entry, columns: Columns) -> Iterator[pa.Table]:
    try:
        yield from _rows(source, file, entry, columns)
    except _CORRUPT as error:
        uri = printable(f"{source.root}/{entry.name}")
        raise UserError(
            f"{uri}: a key, label or metadata column is corrupt ({_line(error)}); repair or remove the file"
        ) from error


def _rows(source: Source, file: pq.ParquetFile, entry: Entry, columns: Columns) -> Iterator[pa.Table]:
    name, state = entry.name, entry.state
    read = list(dict.fromkeys(c for c in (columns.key, columns.label, *columns.metadata) if c is not None))
    start = 0
    for rows, batch in _row_batches(file, read, entry.size):
        offsets = list(range(start, start + rows))
        start += rows
        keys = [f"{name}#{row}" for row in offsets] if columns.key is None else _keys(batch, columns.key, name, offsets)
        labels = [None] * rows if columns.label is None else _column(batch, columns.label).cast(pa.string())
        metadata = None
        if source.metadata_type is not None:
            metadata = pa.StructArray.from_arrays(
                [_column(batch, field.name) for field in source.metadata_type], fields=list(source.metadata_type)
            )
        yield listing_table(source, keys, [name] * rows, offsets, [-1] * rows, [state] * rows, labels, metadata)


def _row_batches(
    file: pq.ParquetFile, columns: list[str], file_bytes: int
) -> Iterator[tuple[int, pa.RecordBatch | None]]:
    if columns:

        def unpacked() -> Iterator[pa.RecordBatch]:
            return map(_unpacked, file.iter_batches(batch_size=TABLE_ROWS, columns=columns, use_threads=False))

        yield from ((batch.num_rows, batch) for batch in bounded_batches(unpacked, file_bytes))
        return
    for start in range(0, file.metadata.num_rows, TABLE_ROWS):
        yield min(TABLE_ROWS, file.metadata.num_rows - start), None


def _unpacked(batch: pa.RecordBatch) -> pa.RecordBatch:
    """With the values of dictionaries in place of their numbers: one byte may stand for a long text in every row."""
    columns = [c.dictionary_decode() if pa.types.is_dictionary(c.type) else c for c in batch.columns]
    unpacked = pa.record_batch(columns, batch.schema.names)
    # a text that is no UTF-8, or more of it than an array holds, would be met wherever it is read
    unpacked.validate(full=True)
    return unpacked


def _column(batch: pa.RecordBatch | None, name: str) -> pa.Array:
    assert batch is not None
    return batch.column(batch.schema.get_field_index(name))


def _keys(batch: pa.RecordBatch | None, column: str, name: str, rows: Sequence[int]) -> list[str]:
    keys = _column(batch, column).cast(pa.string())
    if keys.null_count:
        row = rows[keys.is_null().index(True).as_py()]
        raise UserError(f"data.key_column: {column!r} is null in {printable(name)} row {row}; every image needs a key")
    return keys.to_pylist()


# ---- reading ---------------------------------------------------------------------------------------------------------


def read(store: stores.Store, settings: DataSettings, rows: pa.Table, sleep: Sleep) -> Iterator[bytes | BadImage]:
    """Images of consecutive rows of the listing; of a file only the image column of their row groups is read."""
    files = rows["container"].to_pylist()
    offsets = rows["offset"].to_pylist()
    start = 0
    for stop in range(1, len(files) + 1):
        if stop == len(files) or files[stop] != files[start]:
            reader = _Reader(store, settings, files[start], sleep)
            yield from reader.images(offsets[start:stop])
            start = stop


def _unreadable(text: str) -> BadImage:
    return BadImage(Reason.UNREADABLE, text)


@dataclass(frozen=True)
class _Reader:
    """The images of one file."""

    store: stores.Store
    settings: DataSettings
    name: str
    sleep: Sleep

    def images(self, offsets: Sequence[int]) -> Iterator[bytes | BadImage]:
        """The images at these rows of the file."""
        order = sorted(range(len(offsets)), key=offsets.__getitem__)
        if order != list(range(len(offsets))):  # a listing that was updated has those that are read again at its end
            found = dict(zip(order, self.images([offsets[i] for i in order]), strict=True))
            yield from (found[i] for i in range(len(offsets)))
            return
        try:
            file = self.store.open(self.name, self.sleep)
        except OSError as error:
            yield from [self._lost(error)] * len(offsets)
            return
        with file:
            yield from self._opened(file, offsets)

    def _lost(self, error: Exception, where: str = "") -> BadImage:
        """What becomes of the images behind an error; it is raised if it says nothing of the file."""
        # pyarrow's own complaints about the content are OSErrors without a number
        if isinstance(error, OSError) and error.errno is not None and not self.store.lost(error):
            raise core_files.explain(error, printable(f"{self.store.uri}/{self.name}")) from error
        return _unreadable(where + _line(error))

    def _opened(self, opened: BinaryIO, offsets: Sequence[int]) -> Iterator[bytes | BadImage]:
        try:
            file = _parquet(opened, printable(f"{self.store.uri}/{self.name}"))
            if self.settings.image_column not in file.schema_arrow.names:
                raise pa.ArrowInvalid("the image column is gone: the file has changed since it was listed")
            column = self.settings.image_column
            _check_image_type(column, file.schema_arrow.field(column).type)
        except _CORRUPT as error:
            yield from [self._lost(error)] * len(offsets)
            return
        file_bytes = opened.seek(0, io.SEEK_END)
        start = done = 0
        for group in range(file.metadata.num_row_groups):
            stop = start + file.metadata.row_group(group).num_rows
            inside = [offset - start for offset in offsets[done:] if offset < stop]
            yield from self._group(file, group, inside, file_bytes)
            done += len(inside)
            start = stop
        yield from [_unreadable("the file has fewer rows than when it was listed")] * (len(offsets) - done)

    def _group(
        self, file: pq.ParquetFile, group: int, rows: Sequence[int], file_bytes: int
    ) -> Iterator[bytes | BadImage]:
        if not rows:
            return
        done = position = 0
        packed = min(file.metadata.row_group(group).total_byte_size, file_bytes)
        batches = bounded_batches(partial(self._batches, file, group), packed)
        while done < len(rows):
            try:
                batch = next(batches)
            except pa.ArrowMemoryError as error:
                bad = BadImage(Reason.TOO_EXPENSIVE, f"row group {group} takes more memory than it may: {_line(error)}")
                yield from [bad] * (len(rows) - done)
                return
            except _CORRUPT as error:
                yield from [self._lost(error, f"row group {group} is corrupt: ")] * (len(rows) - done)
                return
            inside = [row - position for row in rows[done:] if row < position + len(batch)]
            yield from self._values(batch, inside)
            done += len(inside)
            position += len(batch)

    def _batches(self, file: pq.ParquetFile, group: int) -> Iterator[pa.Array]:
        # not of the image column alone: asked for a column's facts, Arrow ends the process where these are odd
        metadata = file.metadata.row_group(group)
        per_row = max(metadata.total_byte_size // max(metadata.num_rows, 1), 1)
        size = min(max(BATCH_BYTES // per_row, 1), MAX_BATCH_ROWS)
        columns = [self.settings.image_column]
        for batch in file.iter_batches(batch_size=size, row_groups=[group], columns=columns, use_threads=False):
            yield batch.column(0)
        raise pa.ArrowInvalid("it has fewer rows than its header says")

    def _values(self, batch: pa.Array, rows: Sequence[int]) -> Iterator[bytes | BadImage]:
        """Bytes at these rows of a batch; a struct without bytes names a file beside the Parquet file."""
        if not rows:
            return
        paths = None
        if pa.types.is_struct(batch.type):
            fields = [batch.type.field(i).name for i in range(batch.type.num_fields)]
            children = dict(zip(fields, batch.flatten(), strict=True))  # flatten: a null struct has null children
            batch, paths = children["bytes"], children.get("path")
        sizes = pc.binary_length(batch)
        limit = self.settings.max_image_bytes
        for row in rows:
            size = sizes[row].as_py()
            if size is None:
                yield self._beside(paths[row] if paths is not None else None)
            elif size > limit:
                yield BadImage(Reason.TOO_MANY_BYTES, f"{size} bytes, the limit is {limit}")
            else:
                yield batch[row].as_py()

    def _beside(self, named: pa.Scalar | None) -> bytes | BadImage:
        try:
            path = None if named is None else named.as_py()
        except UnicodeDecodeError:
            return _unreadable("its path is no UTF-8")
        if not path:
            return BadImage(Reason.EMPTY, "null in the image column")
        relative = posixpath.normpath(posixpath.join(posixpath.dirname(names.unescape(self.name)), path))
        try:
            trust.relative(relative, self.name)
        except UserError:
            return _unreadable(f"path {path!r} leads out of the source")
        span = Span(names.escape(relative), None, 0)
        return next(iter(self.store.fetch([span], self.settings.max_image_bytes, self.sleep)))
