"""The one reader of Parquet: what a file says of itself is looked at before anything of it is used.

Importing `ray.data` registers Arrow extension types for the whole process, one of which unpickles what a column holds
as soon as a value is taken out of it: a file that names that type runs code in whoever reads it. No type of Ray's is
registered while a file is opened here, so that its columns are the plain bytes that they are stored as; and a file
that names one is refused.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import resource
import threading
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, TypeVar

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from pd_core.core import rlimits, schemas, trust
from pd_core.core.errors import UserError, one_line, printable

FOOTER_BYTES = 32 << 20  # Arrow makes some tenfold of it in memory
LIST_ITEMS = 8000  # columns, or row groups; a list that claims more makes Arrow allocate for them before it reads one
UNPACKED_BYTES = 1 << 30  # that any file may take in memory while it is read
# times its own bytes, where that is more: images hardly shrink, and a page that does is made for it
UNPACKED_RATIO = 32
ROWS_PER_BYTE = 64  # names that resemble each other take less than a byte a row
T = TypeVar("T")
_END_BYTES = 8  # the footer's length, and four letters
_RAY_TYPES = (
    "ray.data.arrow_pickled_object",
    "ray.data.arrow_tensor",
    "ray.data.arrow_tensor_v2",
    "ray.data.arrow_variable_shaped_tensor",
)


def forget_ray_types() -> None:
    """Have Arrow know none of Ray's extension types any more, as if this process had not imported `ray.data`."""
    for name in _RAY_TYPES:
        with contextlib.suppress(pa.ArrowKeyError):  # it is not registered
            pa.unregister_extension_type(name)


def open_parquet(file: BinaryIO, where: str, **options: Any) -> pq.ParquetFile:
    """A Parquet file whose schema holds nothing but plain types, each column once; of our own tables, those that they
    have.

    Args:
        file: seekable, open for reading.
        where: its URI, for messages.
        options: of pyarrow's ParquetFile.

    Raises:
        UserError: the schema has an extension type, a column twice, or folders without end; or the metadata are too
            large.
        pa.ArrowException, OSError: it is no whole Parquet file.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - _END_BYTES))
    footer = int.from_bytes(file.read(_END_BYTES)[:4], "little")
    file.seek(0)
    if FOOTER_BYTES < footer < size:
        raise UserError(
            f"{where}: its metadata take {footer} bytes, at most {FOOTER_BYTES} are read; write it with larger row "
            "groups"
        )
    forget_ray_types()
    try:
        opened = pq.ParquetFile(
            file,
            thrift_container_size_limit=LIST_ITEMS,
            thrift_string_size_limit=FOOTER_BYTES,
            arrow_extensions_enabled=False,  # UUID and JSON, which Parquet itself knows, are bytes and text
            **options,
        )
        found = opened.schema_arrow
    except UnicodeDecodeError as error:
        raise pa.ArrowInvalid(f"a name in its metadata is no UTF-8: {error}") from None
    except OSError as error:
        if "Exceeded size limit" not in str(error):
            raise
        raise UserError(
            f"{where}: has more than {LIST_ITEMS} columns or row groups; write it with larger ones"
        ) from None
    trust.schema(found, where)
    _check_rows(opened.metadata, size, where)
    return opened


def _check_rows(metadata: pq.FileMetaData, size: int, where: str) -> None:
    """Refuse counts of rows that contradict each other, or that no file of so many bytes is listed with in any time."""
    groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    if min(groups, default=0) < 0 or sum(groups) != metadata.num_rows:
        raise UserError(f"{where}: claims {metadata.num_rows} rows, its row groups {sum(groups)}; write it again")
    if metadata.num_rows > ROWS_PER_BYTE * size:
        raise UserError(
            f"{where}: claims {metadata.num_rows} rows in {size} bytes, more than {ROWS_PER_BYTE} a byte; write it "
            "again"
        )


def read_schema(serialized: bytes, where: str) -> pa.Schema:
    """A schema from its own Arrow message, as `open_parquet` would take it.

    Args:
        serialized: of `pa.Schema.serialize`, as a record states it.
        where: URI of the record, for messages.

    Raises:
        UserError: it is none, or as `open_parquet`.
    """
    forget_ray_types()
    try:
        found = pa.ipc.read_schema(pa.py_buffer(serialized))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(
            f"{where}: states no types of columns ({one_line(printable(str(error)))}); make it again"
        ) from None
    trust.schema(found, where)
    return found


def check_known(schema: pa.Schema, where: str) -> None:
    """Hold the columns of a table of ours, each by its name, to the types that it has in `schemas`.

    Raises:
        UserError: one is of another type.
    """
    for field in schema:
        wanted = schemas.known().get(field.name, frozenset())
        if wanted and not any(schemas.is_like(field.type, kind) for kind in wanted):
            expected = " or ".join(sorted(str(kind) for kind in wanted))
            raise UserError(
                f"{where}: the column {field.name!r} is {one_line(str(field.type))}, expected {expected}; no run of "
                "pd_core has written it: make it again"
            )


@contextlib.contextmanager
def bounded(packed_bytes: int) -> Iterator[None]:
    """Memory that reading inside may take: what 33 kB of Parquet unpack to is a gigabyte, whatever their metadata say
    of it.

    The limit is one of the whole process, above what it holds now: `pa.ArrowMemoryError` may also tell that something
    else has taken much meanwhile, as a large import does, so whoever meets it tries once more. A reader inside is to
    be made inside, too, since it takes memory from where it was made.

    Args:
        packed_bytes: of what is read, as it lies in the file.
    """
    with _lock:
        if not _bounds:
            _before.append((resource.getrlimit(resource.RLIMIT_DATA)[0], pa.default_memory_pool()))
            pa.set_memory_pool(pa.system_memory_pool())  # the others reserve a gigabyte to begin with
        _bounds.append(bound := rlimits.data_bytes() + max(UNPACKED_BYTES, UNPACKED_RATIO * packed_bytes))
        rlimits.set_soft(resource.RLIMIT_DATA, max(_bounds))
    try:
        yield
    finally:
        with _lock:
            _bounds.remove(bound)
            if _bounds:
                rlimits.set_soft(resource.RLIMIT_DATA, max(_bounds))
            else:
                soft, pool = _before.pop()
                rlimits.set_soft(resource.RLIMIT_DATA, soft)
                pa.set_memory_pool(pool)


def bounded_batches(make: Callable[[], Iterator[T]], packed_bytes: int) -> Iterator[T]:
    """What a reader gives, each step within `bounded`; where memory ran out, once more by another that `make` makes."""
    batches, given, again = make(), 0, True
    while True:
        try:
            with bounded(packed_bytes):
                batch = next(batches, None)
        except pa.ArrowMemoryError:
            if not again:
                raise
            batches, again = itertools.islice(make(), given, None), False
            continue
        if batch is None:
            return
        given += 1
        yield batch


_lock = threading.Lock()
_bounds: list[int] = []  # of all readers of this process at this time; the largest holds
_before: list[tuple[int, pa.MemoryPool]] = []  # the limit, and Arrow's memory, before the first of them
