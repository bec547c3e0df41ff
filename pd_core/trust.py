"""What files of strangers may say: the one place where a name, a path or a type that was read from a file is checked.

Every record, table and container that is opened may have been made by somebody who wants more than to be read. What it names
is matched against a closed form here before anything is opened, written or deleted under that name.
"""

from __future__ import annotations

import re

from pd_core.errors import UserError, printable

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
            f"{where}: names the file {printable(str(name))!r}, which no run of pd_core has written; "
            "do not use what lies there, or make it again"
        )
    return name
