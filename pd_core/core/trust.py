"""What files of strangers may say: the one place where a name, a path or a type that was read from a file is checked.

Every record, table and container that is opened may have been made by somebody who wants more than to be read. What it
names is matched against a closed form here before anything is opened, written or deleted under that name.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import pyarrow as pa
from pydantic import Field, FiniteFloat, TypeAdapter, ValidationError

from pd_core.core.errors import UserError, one_line, printable

Kind = TypeVar("Kind")
Whole = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1, le=1 << 48)]  # of rows and the like
Small = Annotated[int, Field(ge=1, le=1 << 20)]  # of what is made at once, each of which takes memory
NotNegative = Annotated[FiniteFloat, Field(ge=0)]

TEXT_BYTES = 64 << 20  # of settings, prompts and other files that a person may write
WEIGHTS_BYTES = 32 << 30  # of one file of weights; the largest of timm's has 27 GB
MAX_DEPTH = 32  # of a column's type; Arrow itself crashes on thousands
_SHOWN = 100  # characters of a name, in a message
_SEGMENT = r"[A-Za-z0-9_][A-Za-z0-9_.+=@ -]{0,254}"
_PART_NAME = re.compile(rf"{_SEGMENT}(?:/{_SEGMENT})*")


def part_name(name: object, where: str) -> str:
    """The name of a file of a stage, as a record states it: letters, digits and `_ . + = @ -`, folders between slashes.

    No segment begins with a dot, so that none leads out of the stage's directory, and none has a character that a
    path, a URL or a terminal takes for more than itself.

    Args:
        name: as it was read, of any type.
        where: URI of the record, for the message.

    Raises:
        UserError: it is no such name.
    """
    if not isinstance(name, str) or not _PART_NAME.fullmatch(name):
        raise UserError(
            f"{where}: names the file {_short(str(name))}, which no run of pd_core has written; "
            "do not use what lies there, or make it again"
        )
    return name


def file_name(name: object, where: str) -> str:
    """`part_name` without folders: the name of an image, as a table states it. Raises UserError."""
    if "/" in (checked := part_name(name, where)):
        raise UserError(f"{where}: names the file {_short(checked)}, which lies in a folder; make the table again")
    return checked


def relative(name: object, where: str) -> str:
    """A path below a folder, of any letters: it has no `.` or `..`, begins at no root, and holds no control character.

    Raises:
        UserError: it may lead elsewhere.
    """
    if not isinstance(name, str) or {"", ".", ".."} & set(name.split("/")) or any(ord(c) < 32 for c in name):
        raise UserError(f"{where}: names the file {_short(str(name))}, which may lie elsewhere; make it again")
    return name


def schema(found: pa.Schema, where: str) -> None:
    """Refuse a table whose columns are more than plain values.

    An extension type is a name that stands for code of whoever registered it, and Ray's run what a column holds. Two
    columns of one name, at any depth, are one column to some readers and another to others.

    Args:
        found: as Arrow reads it.
        where: URI of the file, for the message.

    Raises:
        UserError: an extension type, a name twice, or a type nested deeper than MAX_DEPTH.
    """
    pending = [(field, field.name, 1) for field in found]
    _refuse_twice([field.name for field in found], where)
    while pending:
        field, name, depth = pending.pop()
        if depth > MAX_DEPTH:
            raise UserError(f"{where}: the column {_short(name)} is nested deeper than {MAX_DEPTH} levels; flatten it")
        if kind := _extension(field):
            raise UserError(
                f"{where}: the column {_short(name)} is of the extension type {_short(kind)}, whose values are made by "
                "code; write the file with a plain type, or without it"
            )
        children = [field.type.field(i) for i in range(field.type.num_fields)]
        if pa.types.is_dictionary(field.type):
            children = [pa.field("", field.type.value_type)]
        if pa.types.is_struct(field.type):
            _refuse_twice([child.name for child in children], where)
        pending += [(child, f"{name}.{child.name}" if len(name) < _SHOWN else name, depth + 1) for child in children]


def _extension(field: pa.Field) -> str | None:
    """Name of the extension type of a column, registered or not; of types that nobody registered, only those of Ray."""
    if isinstance(field.type, pa.BaseExtensionType):
        return str(field.type.extension_name)
    named = (field.metadata or {}).get(b"ARROW:extension:name", b"").decode("utf-8", "replace")
    return named if named.startswith("ray.") else None


def _refuse_twice(names: list[str], where: str) -> None:
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{where}: has two columns named {_short(twice)}; rename one")


def _short(text: str) -> str:
    return repr(printable(text[:_SHOWN]))


NO_RECORD = "it is damaged or no record of pd_core, make it again"


def checked(kind: type[Kind], values: object, where: str, whole: bool = True, advice: str = NO_RECORD) -> Kind:
    """Values of a record as the dataclass, or other type, that they were written from.

    Args:
        kind: its annotations say what is right; bounds as `Annotated[int, Field(ge=1)]`.
        values: as JSON has them.
        where: URI of the record, for the message.
        whole: entries that it does not have are refused, too.
        advice: how the message ends.

    Raises:
        UserError: one is missing, of another type or out of bounds; names the first.
    """
    try:
        made: Kind = _adapter(cast("Any", kind)).validate_python(values, extra="forbid" if whole else None)
    except (ValidationError, RecursionError) as error:
        raise UserError(f"{where}: {_first(error)}; {advice}") from None
    return made


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _first(error: ValidationError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "is nested too deeply"
    first = error.errors(include_url=False, include_context=False)[0]
    name = printable(".".join(str(part) for part in first["loc"]))[:80]
    message = re.sub(r" or an instance of \w+", "", first["msg"].removeprefix("Value error, "))
    message = message.replace("a valid tuple", "a list").replace("a valid dictionary", "an object")  # as JSON says it
    return one_line(printable(f"{f'{name}: ' if name else ''}{message[0].lower()}{message[1:]}"))


def recorded_path(uri: object, where: str, beside: Iterable[str | None], option: str) -> str:
    """A path that a record names, if it may be opened: a local one, made absolute, or s3://BUCKET/KEY.

    Other schemes and chains of them would fetch from anywhere. A record may lead to the machine or the bucket that it
    lies on itself, to no other unless the command leads there too.

    Args:
        uri: as it was read, of any type.
        where: what names it, for the message.
        beside: URIs that the command names, None where it does not: what the record belongs to, and the value of
            `option`.
        option: by which a command names such a path, for the message.

    Raises:
        UserError: it is no such path, or lies elsewhere.
    """
    shown = printable(str(uri))[:200]
    if not isinstance(uri, str) or not uri or "\0" in uri or "::" in uri or not _is_plain(uri):
        raise UserError(
            f"{where}: names {shown!r}, which is neither a local path nor s3://BUCKET/KEY, and is not opened; name the "
            f"right place with {option}"
        )
    path = uri if uri.startswith("s3://") else os.path.abspath(os.path.expanduser(uri.removeprefix("file://")))
    if place_of(path) not in {place_of(one) for one in beside if one is not None}:
        raise UserError(
            f"{where}: names {shown!r}, which lies in another place ({place_of(path)}) than what names it; if you "
            f"trust it, add {option} {shown}"
        )
    return path


def _is_plain(uri: str) -> bool:
    if uri.startswith("s3://"):
        return re.fullmatch(r"s3://[a-zA-Z0-9][a-zA-Z0-9._-]*(/[^?#]*)?", uri) is not None
    return "://" not in uri.removeprefix("file://")


def place_of(uri: str) -> str:
    """Where a URI lies, as far as credentials and rights go: `this machine`, or s3://BUCKET."""
    return "/".join(uri.split("/")[:3]) if "://" in uri.removeprefix("file://") else "this machine"


def check_file(path: str, where: str, most: int = WEIGHTS_BYTES) -> None:
    """Hold a local file to being one that has an end: reading a pipe waits for ever, a device may never be done.

    Args:
        path: local; links are followed.
        where: what names it, for the message.
        most: bytes.

    Raises:
        UserError: it is a pipe, a socket or a device, or larger.
        FileNotFoundError, IsADirectoryError: no file is there.
    """
    check_stat(os.stat(path), where, most)


def check_stat(found: os.stat_result, where: str, most: int) -> None:
    """`check_file` of what the system tells of a file."""
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{where}: is no regular file, but a pipe, a socket or a device; name a file")
    check_size(found.st_size, where, most)


def check_size(size: int, where: str, most: int) -> None:
    """Raises UserError: a file that `where` names has more than `most` bytes."""
    if size > most:
        raise UserError(f"{where}: has {size:,} bytes, more than the {most:,} that such a file may have; name another")


def check_folder(path: str, where: str) -> None:
    """`check_file` of every file in a local directory and in the folders directly in it, where a library looks for
    parts.

    Raises:
        UserError: one is no regular file, or too large.
    """
    folder = Path(path)
    for one in sorted([*folder.iterdir(), *folder.glob("*/*")]):
        if not one.is_dir():
            check_file(str(one), f"{where}, {printable(str(one.relative_to(folder)))}")
