"""Files at URIs, local or on S3, written whole or not at all; folders that links cannot lead out of."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import json
import os
import stat
import sys
import uuid
from collections.abc import Collection, Iterator, Sequence
from typing import Any, TypeGuard

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from pd_core.core import tables, trust
from pd_core.core.errors import RunError, UserError, one_line, printable

ARTIFACT = "artifact.json"
STARTED = "started.json"
RECORDS = "_parts"
UNKNOWN = "restore it, or delete the folder and make it again"
MEND = "run the command that wrote it again, which makes such parts anew"
RECORD_BYTES = 1 << 30  # of a file of JSON; the record of a million parts has 0.2 GB
READERS = 16  # threads that read or delete small files
TEMPORARY_S = 3600.0  # no file takes longer to write


# ---- URIs ------------------------------------------------------------------------------------------------------------
def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a URI and the path in it. Listings are never cached: other processes write there.

    Raises:
        UserError: it is neither local nor s3://; fsspec itself would fetch from anywhere, through any chain of
            protocols.
    """
    if is_local(uri):
        return LocalFileSystem(), LocalFileSystem._strip_protocol(uri)
    if not uri.startswith("s3://"):
        raise UserError(
            f"{printable(uri.partition('?')[0])}: only local paths and s3:// are used; copy it to one of them"
        )
    from pd_core.core.s3 import S3FileSystem  # half a second of imports

    fs = S3FileSystem(**S3FileSystem._get_kwargs_from_urls(uri), use_listings_cache=False)
    return fs, fs._strip_protocol(uri)


def is_local(uri: str) -> bool:
    """Whether the URI is a path of this machine."""
    return "://" not in uri or uri.startswith("file://")


def absolute(uri: str) -> str:
    """The URI, or the absolute path of a local one, so that it means the same in every process."""
    return os.path.abspath(os.path.expanduser(uri.removeprefix("file://"))) if is_local(uri) else uri.rstrip("/")


def is_inside(uri: str, folder: str) -> bool:
    """Whether the URI is the folder or lies under it, links on a local disk followed."""
    uri, folder = (os.path.realpath(absolute(u)) if is_local(u) else absolute(u) for u in (uri, folder))
    return f"{uri}/".startswith(f"{folder.rstrip('/')}/")


def join(uri: str, *names: str) -> str:
    """`uri/name/name`."""
    return "/".join([uri.rstrip("/"), *names])


def explain(error: BaseException, uri: str) -> UserError | RunError:
    """One clear line for a storage error; throttling is told apart from denial, and both from absence."""
    chain = f"{error} {error.__cause__ or ''}"
    text = one_line(chain)
    kind = type(error).__name__
    if any(
        word in chain
        for word in ("SlowDown", "Throttl", "RequestLimitExceeded", "TooManyRequests", "reduce your request")
    ):
        return RunError(
            f"{uri}: the store throttles requests ({text}); run the same command again later or with fewer workers"
        )
    if kind in ("NoCredentialsError", "PartialCredentialsError") or "Unable to locate credentials" in chain:
        return UserError(f"{uri}: no credentials found; set them in the environment or use an instance role")
    if any(word in chain for word in ("ExpiredToken", "TokenRefreshRequired")):
        return UserError(f"{uri}: the credentials have expired; refresh them and run the same command again")
    if any(word in chain for word in ("InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch")):
        return UserError(
            f"{uri}: the store does not accept these credentials ({text}); check the access key and secret"
        )
    if isinstance(error, PermissionError) or "AccessDenied" in chain or "Forbidden" in chain:
        return UserError(f"{uri}: permission denied ({text}); check the credentials and the rights they give")
    if isinstance(error, FileNotFoundError) or "NoSuchBucket" in chain:
        return UserError(f"{uri}: not found; check the path or bucket name")
    if isinstance(error, NotADirectoryError | IsADirectoryError | FileExistsError):
        return UserError(f"{uri}: {text}; check the path")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunError(f"{uri}: no room left there ({text}); make room and run the same command again")
    if kind in ("EndpointConnectionError", "ConnectTimeoutError") or "Could not connect" in chain:
        return RunError(f"{uri}: cannot reach the store ({text}); check the endpoint and the network, then run again")
    return RunError(f"{uri}: {kind}: {text}")


def is_failure(error: BaseException | None) -> TypeGuard[BaseException]:
    """Whether an error is one of a file system or object store; s3fs lets some of botocore's through as they are."""
    library = type(error).__module__.partition(".")[0]
    return isinstance(error, OSError) or library in ("botocore", "aiobotocore", "aiohttp")


@contextlib.contextmanager
def explained(name: str) -> Iterator[None]:
    """Turn what a file system or object store raises into its line about `name`, a URI or a setting and its URI."""
    try:
        yield
    except Exception as error:  # botocore's errors are told by their module alone, see `is_failure`
        if is_failure(error):
            raise explain(error, name) from error
        raise


def read_bytes(uri: str) -> bytes:
    """All bytes at a URI, which must be a regular file: a pipe would hang, and a device never ends.

    Raises:
        FileNotFoundError: nothing is there.
        UserError: it is no regular file.
    """
    with open_file(uri) as file:
        data: bytes = file.read()
        return data


def read_file(uri: str, where: str, most: int) -> bytes:
    """All bytes of a file that a user or a record names: a regular file of at most `most` bytes, whatever grows
    meanwhile.

    Args:
        uri: local or s3://.
        where: what names it, for messages.
        most: bytes.

    Raises:
        UserError: it is a pipe or a device, or larger.
        FileNotFoundError, IsADirectoryError: no file is there.
    """
    with open_file(uri, where, most) as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        data: bytes = file.read(size)  # not `most`, for which Python would make room
        return data


def open_file(uri: str, where: str | None = None, most: int = sys.maxsize) -> Any:
    """A file at a URI, seekable, open for reading; arguments and errors as of `read_file`."""
    fs, path = filesystem(uri)
    where = where or uri
    if not is_local(uri):
        file = fs.open(path, "rb")
        trust.check_size(file.size or 0, where, most)
        return file
    trust.check_file(path, where, most)  # a device may act when it is opened
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        trust.check_stat(os.fstat(descriptor), where, most)  # one may have been put there meanwhile
    except BaseException:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def read_json(uri: str) -> Any:
    """The values of a JSON file, None where there is no file.

    Raises:
        UserError: what is there is no whole JSON, or no regular file.
    """
    try:
        data = read_file(uri, uri, RECORD_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise NotWhole(f"{uri}: is no whole JSON file ({one_line(error)}); restore or correct it") from None


class NotWhole(UserError):
    """A file of JSON is cut, or holds something else."""


def read_record(uri: str) -> Any:
    """`read_json` of a file that only we write; None also where it is not whole: what it speaks of is made again."""
    try:
        return read_json(uri)
    except NotWhole:
        return None


def write_bytes(uri: str, data: bytes) -> None:
    """Write the file whole or not at all: rename on a local disk, one PUT on an object store."""
    fs, path = filesystem(uri)
    if not is_local(uri):
        fs.pipe_file(path, data)
        return
    folder, _, name = path.rpartition("/")
    Folder(folder or "/").write(name, data)


def create(uri: str, data: bytes) -> bool:
    """Write the file unless there is one; whether it was written. Of several processes that try at once one succeeds.

    False is also the answer to a client that repeats a request whose answer was lost: read the file to know.
    Locally by a link, on an object store by a PUT on the condition that the object is absent (`If-None-Match: *`).
    """
    fs, path = filesystem(uri)
    if is_local(uri):
        temporary = f"{path}.{uuid.uuid4().hex}.tmp"
        write_bytes(temporary, data)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        finally:
            os.unlink(temporary)
        return True
    for last in (False, False, True):
        try:
            fs.pipe_file(path, data, mode="create")
            return True
        except Exception as error:  # s3fs gives the store's refusal as an OSError without a type of its own
            said = f"{error} {error.__cause__!r}"
            if "PreconditionFailed" in said or isinstance(error, FileExistsError):
                return False
            if last or "ConditionalRequestConflict" not in said:  # the answer to racing requests: to be asked again
                raise
    raise AssertionError


def _entries(uri: str) -> list[dict[str, Any]]:
    """What lies directly in a directory, as fsspec tells it; empty where there is none."""
    fs, path = filesystem(uri)
    try:
        found: list[dict[str, Any]] = fs.ls(path, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return []
    # an object store may hold an object of that name for a directory: consoles make them, and servers after a deletion
    return [entry for entry in found if entry["type"] == "directory" or not entry["name"].endswith("/")]


def folders(uri: str) -> list[str]:
    """Names of the folders directly in a directory, in order; empty where there is none."""
    return sorted(e["name"].rstrip("/").rpartition("/")[2] for e in _entries(uri) if e["type"] == "directory")


def remove_folder(uri: str) -> None:
    """Delete a directory with all that is in it; nothing there is fine."""
    fs, path = filesystem(uri)
    with contextlib.suppress(FileNotFoundError):
        fs.rm(path, recursive=True)


def exists(uri: str) -> bool:
    """Whether a file or directory is at the URI."""
    fs, path = filesystem(uri)
    return bool(fs.exists(path))


def sizes(uri: str) -> dict[str, int]:
    """Name to bytes of the files directly in a directory; empty where there is none."""
    return {e["name"].rpartition("/")[2]: e["size"] for e in _entries(uri) if e["type"] == "file"}


def names(uri: str) -> list[str]:
    """Names of all that lies directly in a directory but folders; with links, which `sizes` leaves out."""
    return [e["name"].rpartition("/")[2] for e in _entries(uri) if e["type"] != "directory"]


def delete_file(uri: str) -> None:
    """Delete a file; nothing there is fine."""
    fs, path = filesystem(uri)
    with contextlib.suppress(FileNotFoundError):
        fs.rm_file(path)


def table_bytes(table: pa.Table) -> bytes:
    """The Parquet file of a table; the same table gives the same bytes."""
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, table.schema, compression="zstd", store_schema=True) as writer:
        if table.num_rows:  # some readers stumble over a row group without rows
            writer.write_table(table)
    return sink.getvalue()


def read_table(uri: str, columns: Sequence[str] | None = None, without: Collection[str] = ()) -> pa.Table:
    """A Parquet file of ours as a table: all of it in one request, or some columns, the bytes of the others unread.

    Raises:
        UserError: what is there is no whole Parquet file, lacks a column, or has one that is not as `schemas` says.
    """
    with io.BytesIO(read_bytes(uri)) if columns is None and not without else open_file(uri) as file:
        try:
            parquet = tables.open_parquet(file, uri)
            wanted = [n for n in columns or parquet.schema_arrow.names if n not in without]
            if missing := set(wanted) - set(parquet.schema_arrow.names):
                raise UserError(f"{uri}: has no column {min(missing)!r}; {MEND}")
            table = parquet.read(wanted)
            tables.check_known(table.schema, uri)
            table.validate(full=True)  # texts are UTF-8, lists lie inside their values
        except pa.ArrowMemoryError:
            raise
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # of the store; Arrow's own have no number
                raise
            raise UserError(f"{uri}: is no whole Parquet file ({one_line(printable(str(error)))}); {MEND}") from None
        return table


# ---- folders that are written into -----------------------------------------------------------------------------------
class Folder:
    """A directory that is written into by names, some of which were read from files: none of them leads out of it.

    On a local disk every write and deletion goes through the directory's own descriptor: no link below it is followed,
    and one that takes its place is noticed, from this process' first look at it on. Nodes may have mounted the disk
    elsewhere, so each process looks for itself.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def __getstate__(self) -> dict[str, Any]:
        return {"uri": self.uri}

    @functools.cached_property
    def place(self) -> str | None:
        """Where the directory lies, links followed; None on a store."""
        return os.path.realpath(absolute(self.uri)) if is_local(self.uri) else None

    def refuse_link(self) -> None:
        """Raises UserError: the directory is a link, so that it may be somebody else's."""
        if self.place is not None and os.path.islink(absolute(self.uri)):
            raise UserError(f"{self.uri}: is a link to {self.place}, which is not written into; remove the link")

    def write(self, name: str, data: bytes) -> None:
        """Write a file whole or not at all, as `write_bytes`; the name may lead into folders."""
        if self.place is None:
            write_bytes(self._uri_of(name), data)
            return
        with self._opened(name, make=True) as (folder, last), _replacing(folder, last) as temporary:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666, dir_fd=folder)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())

    def take(self, source: str, name: str) -> None:
        """The bytes of a file of another directory, without reading them where that can be had.

        On one local disk a hard link (files are replaced here, never written into), on one object store a copy that
        the store makes by itself; else through this process.

        Raises:
            FileNotFoundError: nothing is there.
            RunError: that file is a link or no regular file.
        """
        if self.place is None and not is_local(source):
            (fs, path), (other, target) = filesystem(source), filesystem(self._uri_of(name))
            if fs is other:
                fs.cp_file(path, target)
                return
        elif self.place is not None and is_local(source):
            source = absolute(source)
            if not stat.S_ISREG(os.lstat(source).st_mode):
                raise RunError(f"{source}: is a link or no regular file, which is not taken over; restore it")
            try:
                with self._opened(name, make=True) as (folder, last), _replacing(folder, last) as temporary:
                    os.link(source, temporary, dst_dir_fd=folder)
                return
            except OSError as error:
                if error.errno not in _NO_LINKS:  # another disk, or one without links
                    raise
        self.write(name, read_bytes(source))

    def delete(self, name: str) -> None:
        """Delete a file; nothing there is fine."""
        if self.place is None:
            delete_file(self._uri_of(name))
            return
        with contextlib.suppress(FileNotFoundError), self._opened(name) as (folder, last):
            os.unlink(last, dir_fd=folder)

    def _uri_of(self, name: str) -> str:
        _segments(name)
        return join(self.uri, name)

    @contextlib.contextmanager
    def _opened(self, name: str, make: bool = False) -> Iterator[tuple[int, str]]:
        """Descriptor of the directory in which a name lies, and its last segment."""
        *folders, last = _segments(name)
        assert self.place is not None
        if make:
            os.makedirs(self.place, exist_ok=True)
        opened = [os.open(self.place, _DIRECTORY)]
        try:
            if os.readlink(f"/proc/self/fd/{opened[0]}") != self.place:
                raise RunError(
                    f"{self.uri}: another folder has taken its place; put it back and run the same command again"
                )
            for segment in folders:
                if make:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(segment, dir_fd=opened[-1])
                opened.append(os.open(segment, _DIRECTORY | os.O_NOFOLLOW, dir_fd=opened[-1]))
            yield opened[-1], last
        except NotADirectoryError:
            raise RunError(f"{join(self.uri, name)}: a link or a file is in the way; remove it") from None
        finally:
            for descriptor in opened:
                os.close(descriptor)


_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC  # O_PATH: a folder that may be entered need not be readable
_NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS)


def _segments(name: str) -> list[str]:
    segments = name.split("/")
    if {"", ".", ".."} & set(segments) or "\0" in name:  # whoever reads names has checked them
        raise ValueError(f"{name!r} leads out of its folder")
    return segments


@contextlib.contextmanager
def _replacing(folder: int, name: str) -> Iterator[str]:
    """A temporary name in the directory with this descriptor; what the body makes there gets the name at last."""
    temporary = f"{name}.{uuid.uuid4().hex}.tmp"
    try:
        yield temporary
        os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(
                temporary, dir_fd=folder
            )  # of a body that failed; a rename onto a link of the same file leaves it too


def refuse_links(uri: str) -> None:
    """Folders of an output that lead out of it by a link: what is written there would be somebody else's.

    Raises:
        UserError: there is one; the output itself may be a link, since the user has named it.
    """
    if not is_local(uri):
        return
    root = os.path.realpath(absolute(uri))
    for folder, inside, _ in os.walk(root):
        inside[:] = [name for name in inside if name not in (RECORDS, "png")]  # files alone, perhaps by the million
        for name in inside:
            path = os.path.join(folder, name)
            if os.path.islink(path) and not is_inside(path, root):
                raise UserError(
                    f"{uri}: {printable(path)} is a link to {printable(os.path.realpath(path))}, outside of it, where "
                    "nothing is written; remove the link or choose another --output"
                )
