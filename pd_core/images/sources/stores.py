"""Files under a root, local or on S3: walk them, read them, tell a lost image from a lost connection.

Names are keys (see names.py), relative to the root. Paths are taken literally: fsspec's own path rules would read `*`,
`[` and `?versionId=` in a name as commands, so S3 is spoken through the raw calls of s3fs.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import heapq
import os
import platform
import stat
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar, cast

import fsspec.asyn
from fsspec.spec import AbstractBufferedFile

from pd_core.core import files
from pd_core.core.errors import RunError, UserError, printable
from pd_core.images.decode import BadImage, Reason
from pd_core.images.grouping import grouped
from pd_core.images.sources import names

RETRY_DELAYS_S = (0.5, 2.0, 8.0)  # on top of the retries inside botocore and s3fs
GROUP_BYTES = 64 << 20  # fetched from S3 at a time
GROUP_REQUESTS = 128
MERGE_GAP_BYTES = 64 << 10  # spans of one object closer than this are one request
MERGED_BYTES = 8 << 20
PAGE_KEYS = 1000  # of one listing request; S3 gives no more
REMOTE_BLOCK_BYTES = 1 << 20  # read-ahead of `open` on S3

HIDDEN = "(hidden)"
IRREGULAR = "(not a regular file)"
LOOP = "(link to a folder around it)"
OUTSIDE = "(link that leads out of the source)"
TWICE = "(link to a folder that is listed already)"
HOW_TO_FOLLOW = "--data.follow-links follows such links, in a source that you trust"
MAX_ENTRIES = 1000  # into one folder, by links inside a source: folders of two links each are 2^depth folders

Sleep = Callable[[float], None]
Chooser = Callable[[str], bool]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Entry:
    """A file: its name, bytes, and a text that changes when its content does (mtime in ns; ETag on S3)."""

    name: str
    size: int
    version: str

    @property
    def state(self) -> int:
        """Hash of size and version, an int64."""
        digest = hashlib.blake2b(f"{self.size}\0{self.version}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little", signed=True)


@dataclass(frozen=True)
class Span:
    """Bytes to read: `size` bytes from `start`, or with `start` None the whole file, listed with `size` bytes."""

    name: str
    start: int | None
    size: int


def open_store(root: str, follow_links: bool = False, named: Collection[str] = ()) -> Store:
    """The files under a local path or an s3:// URI. Raises UserError for any other scheme.

    Args:
        root: where; it may be a link itself.
        follow_links: also those that lead out of the root; an object store has none.
        named: keys of files that the user has named, which may be such links.
    """
    if root.startswith("s3://"):
        return S3(root)
    if not files.is_local(root):
        shown = root.partition("?")[0]  # behind it may be a signature
        raise UserError(f"{shown}: only local paths and s3:// are read; copy the images to one of them")
    return Local(root, follow_links, frozenset(named))


def explained(store: Store, name: str = "") -> AbstractContextManager[None]:
    """Turn errors of the store into the one line of `files.explain`."""
    return files.explained(files.join(store.uri, printable(names.unescape(name))) if name else store.uri)


def retrying(call: Callable[[], Result], transient: Callable[[BaseException], bool], sleep: Sleep) -> Result:
    """`call()`, again after each of RETRY_DELAYS_S while its error is transient."""
    for delay_s in RETRY_DELAYS_S:
        try:
            return call()
        except Exception as error:
            if not transient(error):
                raise
            sleep(delay_s)
    return call()


def _too_many_bytes(size: int, limit: int) -> BadImage:
    return BadImage(Reason.TOO_MANY_BYTES, f"{size} bytes, the limit is {limit}")


def _shorter(found: int, expected: int) -> BadImage:
    return BadImage(Reason.UNREADABLE, f"{found} bytes where the listing found {expected}: the file has changed")


# ---- local -----------------------------------------------------------------------------------------------------------

# A file that will be no better next time. Anything else may be the network behind a mount.
_LOST_FILE = frozenset(
    {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO}
)

# O_NONBLOCK: a pipe that took the file's place must not hang the run
_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
_READ_NO_LINK = _READ | os.O_NOFOLLOW

# a folder to walk: what its names begin with, its path, the folders around it
_Pending = tuple[str, str, tuple[tuple[int, int], ...]]


class Local:
    """Files under a folder of this machine. Where a link leads is seen at the opened file: none can be put in later."""

    def __init__(self, root: str, follow_links: bool = False, named: frozenset[str] = frozenset()) -> None:
        self.uri = root
        self.root = root.rstrip("/")
        self.follow_links = follow_links
        self.named = named

    @cached_property
    def _place(self) -> str:
        """Where the root lies, its own links followed."""
        descriptor = os.open(self.root or "/", os.O_PATH | os.O_CLOEXEC)
        try:
            return _place_of(descriptor).rstrip("/")
        finally:
            os.close(descriptor)

    def holds(self, descriptor: int) -> bool:
        """Whether what is open lies under the root."""
        return f"{_place_of(descriptor)}/".startswith(f"{self._place}/")

    def _path(self, name: str) -> str:
        return f"{self.root}/{names.unescape(name)}"

    def kind(self) -> Literal["file", "directory"] | None:
        """What the root itself is."""
        try:
            mode = Path(self.uri).stat().st_mode
        except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a null byte
            return None
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:  # a long pattern is no file name
                return None
            raise
        return "directory" if stat.S_ISDIR(mode) else "file"

    def walk(self, choose: Chooser, max_depth: int | None, stem: str, skipped: Counter[str]) -> Iterator[Entry]:
        """The files whose name (unescaped) is chosen, in no order; links are followed, hidden folders are not entered.

        Args:
            choose: is asked before a file is looked at.
            max_depth: 1 is the root alone; None is no limit.
            stem: every chosen name starts with it; S3 uses it.
            skipped: counts what is left out here.

        Raises:
            OSError: a folder cannot be read.
        """
        entered: Counter[tuple[int, int]] = Counter()
        pending: list[_Pending] = [("", self.root or "/", ())]
        linked: list[_Pending] = []  # entered after the others, by name: a folder has the same name on every machine
        while pending or linked:
            prefix, path, ancestors = pending.pop() if pending else heapq.heappop(linked)
            folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                status = os.fstat(folder)
                here = (status.st_dev, status.st_ino)
                if refusal := self._refusal(folder, here in ancestors, entered[here], path):
                    skipped[refusal] += 1
                    continue
                entered[here] += 1
                deeper = max_depth is None or prefix.count("/") + 1 < max_depth
                with os.scandir(folder) as entries:
                    for entry in entries:
                        name = prefix + entry.name
                        if not _is_directory(entry):
                            if choose(name) and (found := self._entry(entry, name, folder, skipped)):
                                yield found
                        elif entry.name.startswith("."):
                            skipped[HIDDEN] += 1
                        elif deeper:
                            below = (f"{name}/", f"{path}/{entry.name}", (*ancestors, here))
                            heapq.heappush(linked, below) if entry.is_symlink() else pending.append(below)
            finally:
                os.close(folder)

    def _refusal(self, folder: int, is_around: bool, entered: int, path: str) -> str | None:
        """Under which heading a folder is not entered, if it is not."""
        if is_around:
            return LOOP
        if self.follow_links:
            return TWICE if entered else None
        if not self.holds(folder):
            return OUTSIDE
        if entered >= MAX_ENTRIES:
            raise UserError(
                f"{printable(path)}: more than {MAX_ENTRIES} links of the source lead to this folder; remove some"
            )
        return None

    def _entry(self, entry: os.DirEntry[str], name: str, folder: int, skipped: Counter[str]) -> Entry | None:
        """A file, unless it is none or a link that must not be followed. One that cannot be looked at is listed:
        reading it says why it is lost.
        """
        key = names.escape(name)
        try:
            status = entry.stat()
            if entry.is_symlink() and not self._may_follow(entry.name, key, folder):
                skipped[OUTSIDE] += 1
                return None
        except OSError as error:
            return Entry(key, 0, f"{errno.errorcode.get(error.errno or 0, 'unknown')}")
        if not stat.S_ISREG(status.st_mode):
            skipped[IRREGULAR] += 1
            return None
        return Entry(key, status.st_size, str(status.st_mtime_ns))

    def _may_follow(self, base: str, key: str, folder: int) -> bool:
        if self.follow_links or key in self.named:
            return True
        descriptor = os.open(base, os.O_PATH | os.O_CLOEXEC, dir_fd=folder)
        try:
            return self.holds(descriptor)
        finally:
            os.close(descriptor)

    def fetch(self, spans: Sequence[Span], limit_bytes: int, sleep: Sleep) -> Iterator[bytes | BadImage]:
        """The bytes of each span, in order; a file that cannot be read, or is too big, gives a BadImage.

        Raises:
            RunError: the file system fails in a way that says nothing of the file, after all retries.
        """
        with closing(_Opener(self)) as opener:
            for span in spans:
                yield self._fetched(opener, span, limit_bytes, sleep)

    def _fetched(self, opener: _Opener, span: Span, limit_bytes: int, sleep: Sleep) -> bytes | BadImage:
        try:
            return retrying(partial(_read, opener, span, limit_bytes), _passing, sleep)
        except OSError as error:
            if not self.lost(error):
                raise files.explain(error, printable(self._path(span.name))) from error
            if error.errno == errno.ENOENT and not self._is_there():
                raise RunError(
                    f"{self.uri}: nothing is there any more on {platform.node()}; make the disk visible on every "
                    "node, then run the same command again"
                ) from None
            return BadImage(Reason.UNREADABLE, error.strerror or type(error).__name__)

    def _is_there(self) -> bool:
        """Whether the root holds anything: a disk that is not mounted is an empty folder, or none."""
        try:
            with os.scandir(self.root or "/") as entries:
                return any(entries)
        except OSError as error:
            return isinstance(error, NotADirectoryError)  # the root is a file

    def lost(self, error: OSError) -> bool:
        """Whether an error is of this one file; any other is of the disk or the network, and ends the run."""
        return error.errno in _LOST_FILE or error.errno == errno.EIO  # EIO that stays is a bad sector

    def open(self, name: str, sleep: Sleep) -> BinaryIO:
        """A seekable file. Raises OSError."""

        def opened() -> BinaryIO:
            with closing(_Opener(self)) as opener:
                return os.fdopen(opener.open(name)[0], "rb")

        return retrying(opened, _passing, sleep)


class _Opener:
    """Opens files of a store one after the other. Those of a folder follow each other, so it is kept open: where it
    lies is seen once, and a file in it lies there too unless it is a link.
    """

    def __init__(self, store: Local) -> None:
        self.store = store
        self._folder, self._descriptor = "", -1

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._folder, self._descriptor = "", -1

    def open(self, name: str) -> tuple[int, int]:
        """Descriptor and bytes of a regular file that lies in the store. Raises OSError."""
        descriptor = self._open(name)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            os.close(descriptor)
            raise OSError(errno.ENXIO, "not a regular file")
        return descriptor, status.st_size

    def _open(self, name: str) -> int:
        path = f"{self.store.root}/{names.unescape(name)}"
        if self.store.follow_links:
            return os.open(path, _READ)
        folder, _, base = path.rpartition("/")
        if folder == self._folder and self._descriptor >= 0:
            try:
                return os.open(base, _READ_NO_LINK, dir_fd=self._descriptor)
            except OSError:  # a link; or the folder is another one by now
                self.close()
        self._descriptor = self._checked(os.open(folder or "/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
        self._folder = folder
        try:
            return os.open(base, _READ_NO_LINK, dir_fd=self._descriptor)
        except OSError as error:
            self.close()
            if error.errno != errno.ELOOP:
                raise
        return self._checked(os.open(path, _READ), name in self.store.named)

    def _checked(self, descriptor: int, named: bool = False) -> int:
        if named or self.store.holds(descriptor):
            return descriptor
        os.close(descriptor)
        raise OSError(errno.ELOOP, f"a link that leads out of the source; {HOW_TO_FOLLOW}")


def _read(opener: _Opener, span: Span, limit_bytes: int) -> bytes | BadImage:
    descriptor, file_bytes = opener.open(span.name)
    try:
        size = file_bytes if span.start is None else span.size
        if size > limit_bytes:
            return _too_many_bytes(size, limit_bytes)
        data = _pread(descriptor, span.start or 0, size)
    finally:
        os.close(descriptor)
    return data if len(data) == size else _shorter(len(data), size)


def _place_of(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")


def _passing(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno not in _LOST_FILE


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _pread(descriptor: int, start: int, size: int) -> bytes:
    chunks = []
    while size and (chunk := os.pread(descriptor, size, start)):  # one call gives at most 2 GiB
        chunks.append(chunk)
        start += len(chunk)
        size -= len(chunk)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


# ---- S3 --------------------------------------------------------------------------------------------------------------

_DENIED_OBJECT = frozenset({"AccessDenied", "AllAccessDisabled", "InvalidObjectState", "403", "Forbidden"})
_WRONG_SETTINGS = frozenset({"NoSuchBucket", "InvalidBucketName", "AuthorizationHeaderMalformed"})


def _code(error: BaseException) -> str:
    """The error code that the server sent; empty if it did not get to answer."""
    response = getattr(error.__cause__, "response", None) or getattr(error, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def _lost_object(error: BaseException) -> bool:
    """Whether the store says that this one object, or its range, cannot be had, with credentials that it accepts."""
    code = _code(error)
    if isinstance(error, FileNotFoundError):
        return code != "NoSuchBucket"
    return (isinstance(error, PermissionError) and code in _DENIED_OBJECT) or _beyond_end(error)


def _beyond_end(error: BaseException) -> bool:
    return _code(error) in ("InvalidRange", "416")


def _transient(error: BaseException) -> bool:
    settled = isinstance(error, FileNotFoundError | PermissionError) or _beyond_end(error)
    credentials = type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "ParamValidationError")
    return not (settled or credentials or _code(error) in _WRONG_SETTINGS or isinstance(error, RunError | UserError))


@dataclass
class _Request:
    """One GET: bytes start..stop (exclusive) of an object, for the spans with these indices."""

    name: str
    start: int
    stop: int
    indices: list[int] = field(default_factory=list)


class S3:
    """Objects under a prefix of a bucket. Credentials come from the environment, as s3fs finds them."""

    def __init__(self, root: str) -> None:
        self.uri = root.rstrip("/")
        self.bucket, _, prefix = self.uri.removeprefix("s3://").partition("/")
        self.prefix = f"{prefix}/" if prefix else ""
        self.fs = files.filesystem(f"s3://{self.bucket}")[0]

    def _key(self, name: str) -> str:
        return self.prefix + names.unescape(name)

    def _call(self, method: str, **arguments: Any) -> dict[str, Any]:
        return self.fs.call_s3(method, Bucket=self.bucket, **arguments)

    def kind(self) -> Literal["file", "directory"] | None:
        """What the root itself is. Raises OSError and botocore's errors."""
        # the listing comes first: unlike HEAD, it says in words what is wrong with bucket or credentials
        page = self._call("list_objects_v2", Prefix=self.prefix, MaxKeys=1)
        if page.get("KeyCount", 0) or not self.prefix:
            return "directory"
        try:
            self._call("head_object", Key=self.prefix.rstrip("/"))
        except FileNotFoundError:
            return None
        return "file"

    def walk(self, choose: Chooser, max_depth: int | None, stem: str, skipped: Counter[str]) -> Iterator[Entry]:
        """As Local.walk; `stem` narrows the listing on the server."""
        more: dict[str, Any] = {"MaxKeys": PAGE_KEYS, **({"Delimiter": "/"} if max_depth == 1 else {})}
        while True:
            page = self._call("list_objects_v2", Prefix=self.prefix + stem, **more)
            for item in page.get("Contents", ()):
                name = item["Key"][len(self.prefix) :]
                if (name.endswith("/") and not item["Size"]) or not name:
                    continue  # what a console leaves to show an empty folder
                if any(folder.startswith(".") for folder in name.split("/")[:-1]):
                    skipped[HIDDEN] += 1
                elif (max_depth is None or name.count("/") < max_depth) and choose(name):
                    yield Entry(names.escape(name), item["Size"], item.get("ETag", "").strip('"'))
            if not page.get("IsTruncated"):
                return
            more["ContinuationToken"] = page["NextContinuationToken"]

    async def get(self, request: _Request) -> bytes:
        """The bytes of a request."""
        async with (await self._object(request))["Body"] as body:
            return await body.read()

    async def _size(self, request: _Request) -> int:
        # not HEAD, whose answer to a refusal has no body to say why
        response = await self._object(request)
        response["Body"].close()
        return int(response["ContentRange"].rpartition("/")[2])

    async def _object(self, request: _Request) -> dict[str, Any]:
        place = {"Bucket": self.bucket, "Key": self._key(request.name)}
        return await self.fs._call_s3("get_object", **place, Range=f"bytes={request.start}-{request.stop - 1}")

    def fetch(self, spans: Sequence[Span], limit_bytes: int, sleep: Sleep) -> Iterator[bytes | BadImage]:
        """As Local.fetch: concurrent requests, at most about GROUP_BYTES at a time; neighbors share a request."""

        def size_of(span: Span) -> int:
            return span.size if span.size <= limit_bytes else 0

        for group in grouped(spans, size_of, GROUP_BYTES, GROUP_REQUESTS):
            results: dict[int, bytes | BadImage] = {
                i: _too_many_bytes(span.size, limit_bytes) for i, span in enumerate(group) if span.size > limit_bytes
            }
            requests = _merge([(i, span) for i, span in enumerate(group) if i not in results], limit_bytes)
            for request, answer in zip(requests, self.settle(self.get, requests, sleep), strict=True):
                for index in request.indices:
                    results[index] = _cut(group[index], request, answer, limit_bytes)
            yield from (results[i] for i in range(len(group)))

    def settle(
        self, ask: Callable[[_Request], Awaitable[Result]], requests: Sequence[_Request], sleep: Sleep
    ) -> list[Result | BaseException]:
        """The answer to each request, or the error that says its object is lost; all are under way at the same time.

        Raises:
            UserError, RunError: for an error that concerns more than its object, after the retries it deserves.
        """
        answers: dict[int, Result | BaseException] = {}
        left = list(range(len(requests)))
        for delay_s in (*RETRY_DELAYS_S, None):
            found = fsspec.asyn.sync(self.fs.loop, _all_of, [ask(requests[i]) for i in left])
            answers.update(zip(left, found, strict=True))
            errors = {i: e for i in left if isinstance(e := answers[i], BaseException) and not _lost_object(e)}
            for i, error in errors.items():
                if delay_s is None or not _transient(error):
                    if not files.is_failure(error):
                        raise error
                    raise files.explain(error, f"{self.uri}/{printable(requests[i].name)}") from error
            if not errors or delay_s is None:
                break
            left = list(errors)
            sleep(delay_s)
        return [answers[i] for i in range(len(requests))]

    def lost(self, error: OSError) -> bool:
        """Whether an error is of this one object; any other is of the store, and ends the run."""
        return _lost_object(error)

    def open(self, name: str, sleep: Sleep) -> BinaryIO:
        """A seekable file with read-ahead. Raises OSError if the object is lost, else UserError or RunError."""
        (size,) = self.settle(self._size, [_Request(name, 0, 1)], sleep)
        if isinstance(size, BaseException):
            if not _beyond_end(size):
                raise size
            size = 0
        return cast("BinaryIO", _Object(self, name, size, sleep))


async def _all_of(calls: Sequence[Awaitable[Result]]) -> list[Result | BaseException]:
    return await asyncio.gather(*calls, return_exceptions=True)


def _merge(spans: Sequence[tuple[int, Span]], limit_bytes: int) -> list[_Request]:
    """The requests that cover the spans. A whole object is asked for up to one byte more than it may have."""
    requests: list[_Request] = []
    for index, span in spans:
        if span.start is None:
            requests.append(_Request(span.name, 0, limit_bytes + 1, [index]))
            continue
        stop = span.start + max(span.size, 1)
        last = requests[-1] if requests else None
        near = last is not None and last.name == span.name and 0 <= span.start - last.stop <= MERGE_GAP_BYTES
        if last is not None and near and stop - last.start <= MERGED_BYTES:
            last.stop = stop
            last.indices.append(index)
        else:
            requests.append(_Request(span.name, span.start, stop, [index]))
    return requests


def _cut(span: Span, request: _Request, answer: bytes | BaseException, limit_bytes: int) -> bytes | BadImage:
    if isinstance(answer, BaseException):
        if not _beyond_end(answer):
            text = "object not found" if isinstance(answer, FileNotFoundError) else f"access denied ({_code(answer)})"
            return BadImage(Reason.UNREADABLE, text)
        answer = b""
    if span.start is None:
        return answer if len(answer) <= limit_bytes else _too_many_bytes(len(answer), limit_bytes)
    data = answer[span.start - request.start :][: span.size]
    return data if len(data) == span.size else _shorter(len(data), span.size)


class _Object(AbstractBufferedFile):
    """An object as a file with read-ahead."""

    def __init__(self, store: S3, name: str, size: int, sleep: Sleep) -> None:
        super().__init__(store.fs, name, block_size=REMOTE_BLOCK_BYTES, size=size)
        self._store, self._sleep = store, sleep

    def _fetch_range(self, start: int, end: int) -> bytes:
        (data,) = self._store.settle(self._store.get, [_Request(self.path, start, end)], self._sleep)
        if isinstance(data, BaseException):
            raise data
        return data


Store = Local | S3
