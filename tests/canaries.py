"""Secrets that are recognised wherever they turn up, in the forms in which a program may write them."""

from __future__ import annotations

import base64
import gzip
import io
import secrets
import sqlite3
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq

SQLITE = b"SQLite format 3\0"


def random_text(length: int) -> str:
    """Letters, digits, `/` and `+`, as in the secrets of AWS."""
    return base64.b64encode(secrets.token_bytes(length)).decode()[: length - 2] + "/+"


def forms(secret: str) -> set[bytes]:
    """The secret as it is, quoted in a URL, and in base64, wherever in the encoded text it begins."""
    found = {secret.encode(), quote(secret, safe="").encode(), quote(secret).encode()}
    for before in range(3):
        encoded = base64.b64encode(b"\0" * before + secret.encode())
        # characters that hold bits of neighbours as well differ with these
        whole = encoded[-(-before * 4 // 3) : len(encoded) - (4 if encoded.endswith(b"=") else 0)]
        found |= {whole, whole.replace(b"+", b"-").replace(b"/", b"_")}
    return found


def searched(name: str, data: bytes) -> Iterator[bytes]:
    """The bytes of a file and, of one that is compressed or split into pages, those of what it holds; its name."""
    yield name.encode()
    yield data
    if name.endswith(".parquet"):
        sink = pa.BufferOutputStream()
        table = pq.read_table(io.BytesIO(data))
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        yield sink.getvalue().to_pybytes()
    elif data.startswith(SQLITE):
        with tempfile.NamedTemporaryFile(suffix=".db") as copy:
            copy.write(data)
            copy.flush()
            database = sqlite3.connect(copy.name)
            yield "\n".join(database.iterdump()).encode()
            database.close()
    elif data.startswith(b"\x1f\x8b"):
        yield gzip.decompress(data)
    elif data.startswith(b"PK\x03\x04"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for member in archive.namelist():
                yield from searched(member, archive.read(member))


def find(canaries: Mapping[str, str], name: str, data: bytes) -> set[str]:
    """Names of the canaries that a file holds."""
    texts = list(searched(name, data))
    return {who for who, secret in canaries.items() if any(form in text for form in forms(secret) for text in texts)}


def find_under(canaries: Mapping[str, str], folder: Path) -> dict[str, set[str]]:
    """The same of every regular file under a folder, by its path; files without any are left out."""
    found = {
        str(file.relative_to(folder)): find(canaries, file.name, file.read_bytes())
        for file in folder.rglob("*")
        if file.is_file() and not file.is_symlink()
    }
    return {file: who for file, who in found.items() if who}
