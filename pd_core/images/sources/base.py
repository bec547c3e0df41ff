"""What a source is: resolved from the settings on the driver, walked and read in the workers."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from fsspec.utils import glob_translate

from pd_core.core import files, schemas
from pd_core.core.errors import UserError, printable
from pd_core.core.settings.data import DataSettings
from pd_core.images.sources import names, stores

Kind = Literal["directory", "glob", "parquet", "webdataset"]

CONTAINER_SUFFIXES = {"parquet": (".parquet", ".pq"), "webdataset": (".tar",)}
MAGIC = re.compile(r"[*?\[{]")
BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")
MAX_ALTERNATIVES = 100_000
PEEK_FILES = 1000  # as many file names decide what kind of source it is
TABLE_ROWS = 65_536


@dataclass(frozen=True)
class Source:
    """A set of images that can be listed and read; small and picklable, holds no connection and no credentials.

    Attributes:
        kind: how its files hold images.
        root: folder or s3:// prefix that all names are relative to.
        names: keys of the files that were named one by one; with `patterns` empty too, all files under the root.
        patterns: globs relative to the root (fsspec's: `*` stays within a folder, `**` does not).
        settings: the data section.
        metadata_type: type of the listing's `metadata` column; None where there is none.
        only: one of the metadata, and the value that it has of the images that are listed; None: all are.
        committed: `state` of files that one of our stages has committed, by what they hold; None: they are looked at.
    """

    kind: Kind
    root: str
    names: tuple[str, ...]
    patterns: tuple[str, ...]
    settings: DataSettings
    metadata_type: pa.StructType | None = None
    only: tuple[str, str] | None = None
    committed: Mapping[str, Any] | None = None

    def store(self) -> stores.Store:
        """A new connection to where the files are."""
        return stores.open_store(self.root, self.settings.follow_links, self.names)


def locate(settings: DataSettings) -> Source:
    """The user's source split into a root and what is meant under it; its kind is that of a folder until `decide_kind`
    looks. A path that exists is never taken for a pattern.

    Raises:
        UserError: nothing is there, or it cannot be looked at.
    """
    given = settings.source or ""
    uri = files.absolute(given)
    if uri.startswith("s3://") and MAGIC.search(uri.split("/")[2]):
        raise UserError(f"{uri}: the bucket must be named in full; put wildcards behind it")
    store = stores.open_store(uri)
    with stores.explained(store):
        kind = store.kind()
    if kind == "directory":
        return Source("directory", uri, (), (), settings)
    folder, _, name = uri.rpartition("/")
    if kind == "file":
        return Source("directory", folder or "/", (names.escape(name),), (), settings)
    if not MAGIC.search(given):
        raise UserError(f"{printable(uri)}: no such file or directory; check data.source")
    return _locate_pattern(uri, settings)


def _locate_pattern(uri: str, settings: DataSettings) -> Source:
    found = MAGIC.search(uri)
    assert found is not None
    root, _, pattern = uri[: found.start()].rpartition("/")
    pattern += uri[found.start() :]
    root = root or "/"
    store = stores.open_store(root)
    with stores.explained(store):
        if store.kind() != "directory":
            raise UserError(f"{printable(uri)}: {printable(root)} is no directory; check data.source")
    every = list(itertools.islice(expand_braces(pattern), MAX_ALTERNATIVES + 1))
    if len(every) > MAX_ALTERNATIVES:
        raise UserError(f"{uri}: the braces name more than {MAX_ALTERNATIVES} files; use a wildcard")
    globs = tuple(p for p in every if re.search(r"[*?\[]", p))
    for glob in globs:
        _regex(glob)
    named = tuple(names.escape(p) for p in every if p not in set(globs))
    return Source("directory", root, named, globs, settings)


def expand_braces(pattern: str) -> Iterator[str]:
    """`{000..002}` and `{a,b}`, as a shell does; braces with neither a range nor a comma stay as they are."""
    for found in BRACES.finditer(pattern):
        ends = RANGE.fullmatch(found[1])
        if ends:
            low, high, width = int(ends[1]), int(ends[2]), len(ends[1])
            values: Iterable[str] = (f"{value:0{width}d}" for value in range(low, high + 1))
        elif "," in found[1]:
            values = found[1].split(",")
        else:
            continue
        for value in values:
            for rest in expand_braces(pattern[found.end() :]):
                yield pattern[: found.start()] + value + rest
        return
    yield pattern


def _regex(glob: str) -> re.Pattern[str]:
    try:
        return re.compile(glob_translate(glob))
    except (ValueError, re.error) as error:
        raise UserError(f"data.source: {glob!r} is not a pattern ({error}); see fsspec's glob") from None


def entries(source: Source, kind: Kind | None, skipped: Counter[str]) -> Iterator[stores.Entry]:
    """The files of a source, in no order.

    Args:
        source: where.
        kind: files that cannot belong to it are left out; None takes all that are not hidden.
        skipped: counts by suffix what is left out.

    Raises:
        UserError: a folder cannot be read, or a file that was named, or a pattern, is not there.
        RunError: the store does not answer.
    """
    store = source.store()
    missing = {*source.names, *source.patterns}
    named = {names.unescape(name) for name in source.names}
    regexes = [(pattern, _regex(pattern)) for pattern in source.patterns]

    def choose(name: str) -> bool:
        if name in named:
            missing.discard(names.escape(name))
            return True
        matching = next((pattern for pattern, regex in regexes if regex.match(name)), None)
        if matching is None and (regexes or named):
            return False
        missing.discard(matching or "")
        left_out = _left_out(name, kind)
        if left_out:
            names.leave_out(skipped, left_out)
        return not left_out

    depth, stem = _bounds([*named, *source.patterns])
    with stores.explained(store):
        yield from store.walk(choose, depth, stem, skipped)
    if missing:
        first = printable(min(missing))
        raise UserError(
            f"{printable(source.root)}: {len(missing)} of the {len(source.names) + len(source.patterns)} files or "
            f"patterns that data.source names match nothing, the first is {first!r}{_how_to_follow(skipped)}; "
            "check data.source"
        )


def _left_out(name: str, kind: Kind | None) -> str | None:
    """Under which heading a file is skipped, or None if it belongs to a source of this kind."""
    if name.rpartition("/")[2].startswith("."):
        return stores.HIDDEN
    suffix = names.suffix(name)
    if kind is None:
        return None
    if kind in CONTAINER_SUFFIXES:
        return None if suffix in CONTAINER_SUFFIXES[kind] else suffix
    return suffix if suffix in names.SIDECAR_SUFFIXES else None


def _bounds(wanted: Sequence[str]) -> tuple[int | None, str]:
    """Depth of folders to walk, and how every wanted name starts."""
    if not wanted:
        return None, ""
    parts = [re.split(r"[*?\[]", name, maxsplit=1)[0] for name in wanted]
    low, high = min(parts), max(parts)
    same = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))
    depth = None if any("**" in name for name in wanted) else max(name.count("/") for name in wanted) + 1
    return depth, low[:same]


def containers(source: Source, skipped: Counter[str]) -> list[stores.Entry]:
    """The Parquet files or tars of a source, by name."""
    return sorted(entries(source, source.kind, skipped), key=lambda entry: entry.name)


def decide_kind(source: Source) -> Kind:
    """What the files are, by their names; checked against `data.kind`.

    Raises:
        UserError: there are no files, they are of several kinds, or `data.kind` says otherwise.
    """
    skipped: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    packed = 0
    for entry in itertools.islice(entries(source, None, skipped), PEEK_FILES):
        seen[names.suffix(entry.name)] += 1
        packed += entry.name.lower().endswith(names.PACKED_TAR_SUFFIXES)
    settings = source.settings
    shown = printable(settings.source or "")
    if not seen:
        raise UserError(f"{shown}: no files{_found(skipped)}; check data.source")
    whole_folder = not (source.names or source.patterns)
    if settings.kind != "auto":
        return _checked(settings.kind, whole_folder, shown)
    has = {kind: any(seen[suffix] for suffix in suffixes) for kind, suffixes in CONTAINER_SUFFIXES.items()}
    images = any(seen[suffix] for suffix in names.IMAGE_SUFFIXES)
    if has["parquet"] + has["webdataset"] + images > 1:
        raise UserError(
            f"{shown}: holds files of several kinds: {names.summary(seen)}; say which are meant with --data.kind"
        )
    if packed and not (images or any(has.values())):
        raise UserError(
            f"{shown}: compressed tars cannot be read at random; unpack them to .tar (images are compressed already)"
        )
    if has["parquet"]:
        return "parquet"
    if has["webdataset"]:
        return "webdataset"
    return "directory" if whole_folder else "glob"


def _checked(kind: Kind, whole_folder: bool, shown: str) -> Kind:
    if kind == "directory" and not whole_folder:
        raise UserError(f"{shown}: not a directory, but data.kind is directory; drop --data.kind")
    if kind == "glob" and whole_folder:
        raise UserError(f"{shown}: a directory, but data.kind is glob; add a pattern such as /**/*.png")
    return kind


def _found(skipped: Counter[str]) -> str:
    return f" but those left out: {names.summary(skipped)}{_how_to_follow(skipped)}" if skipped else ""


def _how_to_follow(skipped: Counter[str]) -> str:
    many = skipped[stores.OUTSIDE]
    return f" ({names.leading_out(many)}: {stores.HOW_TO_FOLLOW})" if many else ""


def require_some(source: Source) -> None:
    """Raise UserError unless the source has at least one file of its kind."""
    skipped: Counter[str] = Counter()
    if next(entries(source, source.kind, skipped), None) is None:
        what = {"parquet": "Parquet files", "webdataset": ".tar files"}.get(source.kind, "images")
        shown = printable(source.settings.source or "")
        raise UserError(f"{shown}: no {what}{_found(skipped)}; check data.source and data.kind")


def listing_table(
    source: Source,
    keys: Sequence[str],
    container: Sequence[str] | pa.Array,
    offset: np.ndarray | Sequence[int],
    size: np.ndarray | Sequence[int],
    version: np.ndarray | Sequence[int] | pa.Array,
    label: Sequence[str | None] | pa.Array,
    metadata: pa.Array | None = None,
) -> pa.Table:
    """Columns as a table of `schemas.listing`; `sample_id` is made from the keys."""
    columns = [names.sample_ids(keys), keys, container, offset, size, version, label]
    if source.metadata_type is not None:
        columns.append(metadata)
    schema = schemas.listing(source.metadata_type)
    arrays = [
        column if isinstance(column, pa.Array) else pa.array(column, field.type)
        for column, field in zip(columns, schema, strict=True)
    ]
    return pa.Table.from_arrays(arrays, schema=schema)
