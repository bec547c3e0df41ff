"""What files of strangers may say: the one place where a name, a path or a type that was read from a file is checked.

Every record, table and container that is opened may have been made by somebody who wants more than to be read. What it names
is matched against a closed form here before anything is opened, written or deleted under that name.
"""

from __future__ import annotations

import re

import pyarrow as pa

from pd_core.errors import UserError, printable

MAX_DEPTH = 32  # of a column's type; Arrow itself crashes on thousands
_SHOWN = 100  # characters of a name, in a message
_SEGMENT = r"[A-Za-z0-9_][A-Za-z0-9_.+=@ -]{0,254}"
_PART_NAME = re.compile(rf"{_SEGMENT}(?:/{_SEGMENT})*")


def part_name(name: object, where: str) -> str:
    """The name of a file of a stage, as a record states it: letters, digits and `_ . + = @ -`, folders between slashes.

    No segment begins with a dot, so that none leads out of the stage's directory, and none has a character that a path, a
    URL or a terminal takes for more than itself.

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

    An extension type is a name that stands for code of whoever registered it, and Ray's run what a column holds. Two columns of
    one name, at any depth, are one column to some readers and another to others.

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
                f"{where}: the column {_short(name)} is of the extension type {_short(kind)}, whose values are made by code; write "
                "the file with a plain type, or without it"
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
