"""Members of a tar (ustar, pax, GNU), each at a bounded cost of time and memory, whatever its headers say.

`tarfile` reads one block for us, but neither chains of headers nor sizes: a negative size makes it read the same header
for ever, a long chain ends in a RecursionError, and a header of gigabytes is held in memory.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK_BYTES = 512
MAX_HEADERS = 32  # before one member
MAX_HEADER_BYTES = 1 << 20  # that they hold together
MAX_MAP_BYTES = 32 << 20  # of the holes of one member
MAX_NUMBER_DIGITS = 19  # of 2^63

_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_EXTENDED = (*_PAX, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_HOLES = b"GNU.sparse."
_IS_EXTENDED, _GOES_ON = 482, 504  # of GNU's sparse headers: the byte that says that a block of the map follows

Fields = dict[bytes, bytes]


class Broken(Exception):
    """The tar cannot be read from where the member before ended."""


@dataclass(frozen=True)
class Member:
    """What headers say of a member.

    Attributes:
        name: as it stands there, in UTF-8 with surrogates for other bytes; it may hold anything.
        is_file: whether its bytes are those of a file, so that it is no link, device, or file with holes.
        is_folder: whether it is a folder.
        start, size: place of its bytes in the tar; they lie inside it.
        stop: where the headers of the next one begin.
    """

    name: str
    is_file: bool
    is_folder: bool
    start: int
    size: int
    stop: int


def members(file: BinaryIO) -> Iterator[Member]:
    """The members in their order, up to the end marker. The reader may move in the file between them.

    Raises:
        Broken: the headers of the next member are damaged, absurd or absent, or its bytes lie beyond the end.
        OSError: the file cannot be read.
    """
    tar_bytes = file.seek(0, io.SEEK_END)
    offset = 0
    while (member := _next(file, offset, tar_bytes)) is not None:
        yield member
        offset = member.stop


def _next(file: BinaryIO, offset: int, tar_bytes: int) -> Member | None:
    """The member whose headers begin at `offset`; of extended headers in a row the first one holds, as in `tarfile`.
    Global ones are passed over: what they say of all members names none.
    """
    fields: Fields = {}
    held = 0
    position = offset
    for _ in range(MAX_HEADERS):
        file.seek(position)
        block = file.read(BLOCK_BYTES)
        if position == offset and block == bytes(BLOCK_BYTES):
            return None
        header = _header(block)
        position += BLOCK_BYTES
        if header.type not in _EXTENDED:
            return _member(header, fields, _behind_map(file, header, block, position), tar_bytes)
        held += header.size
        if header.size < 0 or held > MAX_HEADER_BYTES:
            raise Broken
        data = file.read(header.size)
        if len(data) < header.size:
            raise Broken
        fields = {**_fields(header.type, data), **fields}
        position += _padded(header.size)
    raise Broken


def _header(block: bytes) -> tarfile.TarInfo:
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except Exception:  # whatever noise makes of the parser; nothing is read from the file here
        raise Broken from None


def _padded(size: int) -> int:
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


def _fields(kind: bytes, data: bytes) -> Fields:
    """What an extended header says that matters here: the name, the size, whether there are holes."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {b"path": data.partition(b"\0")[0]}
    fields: Fields = {}
    for keyword, value in _records(data) if kind in _PAX else ():
        if keyword.startswith(_HOLES):
            fields[_HOLES] = b""
        elif keyword in (b"path", b"size"):
            fields[keyword] = value.rstrip(b"/")
    return fields


def _records(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keyword and value of each `LENGTH KEYWORD=VALUE` and line break of a pax header; LENGTH is that of all of it."""
    position = 0
    while position < len(data) and data[position]:  # some writers fill up with zeros
        digits = data[position : position + MAX_NUMBER_DIGITS + 1].partition(b" ")[0]
        stop = position + _number(digits)
        keyword, equals, value = data[position + len(digits) + 1 : stop - 1].partition(b"=")
        if not equals or data[stop - 1 : stop] != b"\n":
            raise Broken
        yield keyword, value
        position = stop


def _number(digits: bytes) -> int:
    if not digits.isdigit() or len(digits) > MAX_NUMBER_DIGITS:
        raise Broken
    return int(digits)


def _behind_map(file: BinaryIO, header: tarfile.TarInfo, block: bytes, position: int) -> int:
    """Where the bytes of a member begin: behind GNU's map of the holes, which goes on in blocks of its own."""
    goes_on, first = header.type == tarfile.GNUTYPE_SPARSE and block[_IS_EXTENDED], position
    while goes_on:
        block = file.read(BLOCK_BYTES)
        if len(block) < BLOCK_BYTES or position - first > MAX_MAP_BYTES:
            raise Broken
        position += BLOCK_BYTES
        goes_on = block[_GOES_ON]
    return position


def _member(header: tarfile.TarInfo, fields: Fields, start: int, tar_bytes: int) -> Member:
    size = _number(fields[b"size"]) if b"size" in fields else header.size
    has_bytes = header.isreg() or header.type not in tarfile.SUPPORTED_TYPES
    stop = start + size if has_bytes else start
    if size < 0 or stop > tar_bytes:
        raise Broken
    name = fields[b"path"].decode("utf-8", "surrogateescape") if b"path" in fields else header.name
    has_holes = header.type == tarfile.GNUTYPE_SPARSE or _HOLES in fields
    return Member(name, header.isreg() and not has_holes, header.isdir(), start, size, _padded(stop))
