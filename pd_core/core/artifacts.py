"""Stages: parts, the commit record `artifact.json`, and fingerprints of what an artifact is made of.

A stage writes parts, and after each part a small record of it in `_parts/`. `artifact.json`, written last, is the
commit. What lies in a stage's directory without a record is not there. Object stores have no rename: a part is one PUT.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any
from urllib.parse import quote, unquote

import pyarrow as pa
from pydantic import Field

from pd_core.core import files, trust
from pd_core.core.errors import RunError, UserError

_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp$")
_TABLE = re.compile(r"part-(\d{8,})\.parquet")
_ROWS_OF_PARTS = {"listing", "features", "index", "neighbors", "densities", "samples"}  # totals' rows are their parts'
_NUMBERED = re.compile(r"(part|shard)-\d+\.\w+")


# ---- fingerprints ----------------------------------------------------------------------------------------------------
def canonical(values: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text, also after they were written and read."""
    values = json.loads(json.dumps(values, allow_nan=False))  # keys that are numbers sort as the texts that they become
    return json.dumps(values, sort_keys=True, separators=(",", ":"))


def sha256(data: bytes) -> str:
    """Hex digest."""
    return hashlib.sha256(data).hexdigest()


def fingerprint(identity: Mapping[str, Any]) -> str:
    """Hash of everything that decides what an artifact holds."""
    return sha256(canonical(identity).encode())


# ---- artifacts -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Part:
    """A committed file of a stage. `counts` holds what the stage wants to add up, e.g. quarantined rows by reason."""

    name: str
    rows: trust.Whole
    bytes: trust.Whole
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    counts: dict[str, trust.Whole] = field(default_factory=dict)


@dataclass(frozen=True)
class Artifact:
    """What `artifact.json` says of a finished stage."""

    kind: str
    schema_version: int
    fingerprint: str
    identity: dict[str, Any]
    parts: tuple[Part, ...]
    totals: dict[str, Any]
    versions: dict[str, str]
    timings_s: dict[str, float]

    @property
    def rows(self) -> int:
        """Rows of all parts."""
        return sum(part.rows for part in self.parts)

    def to_bytes(self) -> bytes:
        """Content of `artifact.json`."""
        return json.dumps(dataclasses.asdict(self), indent=1).encode()

    def state(self) -> dict[str, Any]:
        """Number of parts, their bytes, and a hash of their names and contents."""
        hashes = {part.name: part.sha256 for part in self.parts}
        return {"files": len(hashes), "bytes": sum(p.bytes for p in self.parts), "hash": fingerprint(hashes)}

    def holds(self, parts: Iterable[Part]) -> bool:
        """Whether these parts are those of the record, to the byte."""
        return {part.name: part.sha256 for part in parts} == {part.name: part.sha256 for part in self.parts}


def load_artifact(uri: str) -> Artifact | None:
    """The commit record in a stage's directory, or None where the stage is not finished.

    Raises:
        UserError: it is none of ours: a field is missing, of another type, or names a file that no stage has; or its
            rows are not those of its parts.
    """
    values = files.read_record(files.join(uri, files.ARTIFACT))
    if values is None:
        return None
    artifact = trust.checked(Artifact, values, files.join(uri, files.ARTIFACT))
    for part in artifact.parts:
        trust.part_name(part.name, files.join(uri, files.ARTIFACT))
    rows = artifact.totals.get("rows")
    if artifact.kind in _ROWS_OF_PARTS and isinstance(rows, int) and rows != artifact.rows:
        raise UserError(
            f"{files.join(uri, files.ARTIFACT)}: says {rows} rows, its parts have {artifact.rows}; {trust.NO_RECORD}"
        )
    return artifact


def damaged_parts(uri: str, parts: Iterable[Part]) -> dict[str, str]:
    """What is wrong with each of a directory's parts that is gone or has not its size, by name; lists each folder."""
    named = [(part, *part.name.rpartition("/")[::2]) for part in parts]
    present = {
        folder: files.sizes(files.join(uri, folder) if folder else uri) for folder in {folder for _, folder, _ in named}
    }
    found = {}
    for part, folder, name in named:
        size = present[folder].get(name)
        if size != part.bytes:
            found[part.name] = "is gone" if size is None else f"has {size} of {part.bytes} bytes"
    return found


def check_whole(uri: str, artifact: Artifact) -> None:
    """What was committed in a directory is there, by size; for those who read what another command has written.

    Raises:
        UserError: it is not; names the part.
    """
    if damaged := damaged_parts(uri, artifact.parts):
        raise UserError(f"{uri}: {told_damage(damaged)}; {files.MEND}")


def told_damage(damaged: Mapping[str, str]) -> str:
    """The first of what `damaged_parts` found, and how many more there are."""
    name, what = min(damaged.items())
    return f"{name} {what} since it was committed{f', as {len(damaged) - 1} more' if len(damaged) > 1 else ''}"


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`name: old -> new` for every leaf in which two identities differ."""
    lines = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {_short(a)} -> {_short(b)}")
    return lines


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "…"


@dataclass(frozen=True)
class Stage:
    """The directory of one stage of one run: its parts, their records and the commit.

    Attributes:
        uri: the directory.
        kind: name of the stage, e.g. `features`.
        schema_version: of its tables.
        identity: JSON-able settings and inputs that decide the content; its hash is the fingerprint.
        beside: directories of stages that are made together with this one and committed before it.
    """

    uri: str
    kind: str
    schema_version: int
    identity: dict[str, Any]
    beside: tuple[str, ...] = ()
    folder: files.Folder = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", folder := files.Folder(self.uri))
        _ = folder.place  # where it lies when the stage is thought of

    @property
    def fingerprint(self) -> str:
        """Hash of kind, schema version and identity."""
        return fingerprint({"kind": self.kind, "schema_version": self.schema_version, **self.identity})

    def begin(self, overwrite: bool) -> Artifact | None:
        """Claim the directory. Returns the commit record if the stage is already done with this fingerprint.

        A stage that lost parts after its commit, or has not their bytes any more, is finished no more.

        Raises:
            UserError: the directory holds a stage of another fingerprint and `overwrite` is off.
        """
        done = load_artifact(self.uri)
        if done is not None and done.fingerprint == self.fingerprint and not self.damage(done):
            return done
        self.folder.refuse_link()
        if done is not None and done.fingerprint == self.fingerprint:
            self.folder.delete(files.ARTIFACT)
            done = None
        other = done.identity if done is not None else _started(self.uri)
        if other is not None and (
            done is not None or dataclasses.replace(self, identity=dict(other)).fingerprint != self.fingerprint
        ):
            if not overwrite:
                changed = differences(other, self.identity)
                what = "; ".join(changed[:6]) or "the schema version"
                if changed and all(line.startswith("state.") for line in changed):
                    raise UserError(
                        f"{self.uri}: was made of a source that has changed since ({what.replace('state.', '')}); "
                        "choose another --output (build_index takes over what is as it was by --base "
                        f"{self.uri.rpartition('/')[0]}), or pass --overwrite"
                    )
                raise UserError(
                    f"{self.uri}: holds {self.kind} made with other settings or input ({what}); "
                    "choose another --output or pass --overwrite"
                )
            _clear(self.folder)
        elif other is None and any(not _TEMPORARY.search(name) for name in files.sizes(self.uri)):
            raise UserError(f"{self.uri}: holds files that are not of this program; choose another --output")
        self._drop_temporaries()
        self.folder.write(files.STARTED, canonical(self.identity).encode())
        return None

    def recorded(self) -> Artifact | None:
        """The commit record in the directory where it is of this fingerprint, even if parts of it are damaged."""
        done = load_artifact(self.uri)
        return done if done is not None and done.fingerprint == self.fingerprint else None

    def damage(self, done: Artifact) -> dict[str, str]:
        """`damaged_parts` of what was committed here and in the stages beside."""
        found = damaged_parts(self.uri, done.parts)
        for uri in self.beside:
            artifact = load_artifact(uri)
            own = {files.ARTIFACT: "is gone"} if artifact is None else damaged_parts(uri, artifact.parts)
            found |= {f"../{uri.rpartition('/')[2]}/{name}": what for name, what in own.items()}
        return found

    def _drop_temporaries(self) -> None:
        """Delete what a killed process left half-written; on an object store there is no such thing.

        Only what is old: a run that was thought dead may still be writing.
        """
        if not files.is_local(self.uri):
            return
        for folder in ("", f"{files.RECORDS}/"):
            for name in filter(_TEMPORARY.search, files.sizes(files.join(self.uri, folder))):
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - os.lstat(files.join(self.uri, folder + name)).st_mtime > files.TEMPORARY_S:
                        self.folder.delete(folder + name)

    def write_part(self, name: str, data: bytes, rows: int, counts: Mapping[str, int] | None = None) -> Part:
        """Write one file of the stage and, once its bytes are seen in place, its record; names may have folders."""
        uri = files.join(self.uri, trust.part_name(name, self.uri))
        self.folder.write(name, data)
        fs, path = files.filesystem(uri)
        found = fs.size(path)
        if found != len(data):
            raise RunError(f"{uri}: wrote {len(data)} bytes and found {found}; run the same command again")
        part = Part(name, rows, len(data), sha256(data), dict(counts or {}))
        self._write_record(part)
        return part

    def adopt(self, uri: str, part: Part, name: str | None = None) -> Part:
        """A part that was committed in the directory `uri`, as one of this stage: copied, with a record of its own.

        name: in this stage, if it is another. Raises RunError: the file is not there as it was recorded.
        """
        name = trust.part_name(name or part.name, uri)
        source, target = files.join(uri, part.name), files.join(self.uri, name)
        try:
            self.folder.take(source, name)
        except FileNotFoundError:
            raise RunError(f"{source}: gone, although {uri} is finished; restore it, or build without it") from None
        fs, path = files.filesystem(target)
        if (found := fs.size(path)) != part.bytes:
            raise RunError(f"{source}: has {found} bytes, {part.bytes} were committed; restore it, or build without it")
        part = dataclasses.replace(part, name=name)
        self._write_record(part)
        return part

    def _write_record(self, part: Part) -> None:
        record = {"stage": self.fingerprint, "part": dataclasses.asdict(part)}
        self.folder.write(_record(part.name), canonical(record).encode())

    def write_table(self, name: str, table: pa.Table, counts: Mapping[str, int] | None = None) -> Part:
        """`write_part` of a Parquet table."""
        return self.write_part(name, files.table_bytes(table), table.num_rows, counts)

    def finished_parts(self) -> dict[str, Part]:
        """Recorded parts whose file is in place with its recorded size; others are to be made again.

        A record names its stage's fingerprint: what a late task of an earlier run writes here is not taken for ours.
        One that such a task drops meanwhile is not there.
        """
        parts = self._records()
        damaged = damaged_parts(self.uri, parts)
        return {part.name: part for part in parts if part.name not in damaged}

    def lost_parts(self) -> dict[str, str]:
        """What is wrong with each recorded part that is gone or has not its recorded size, by name."""
        return damaged_parts(self.uri, self._records())

    def _records(self) -> list[Part]:
        # one that another process is writing now is not there yet
        names = sorted(name for name in files.sizes(files.join(self.uri, files.RECORDS)) if not _TEMPORARY.search(name))
        if not names:
            return []
        with ThreadPoolExecutor(files.READERS) as readers:
            records = zip(
                names,
                readers.map(lambda name: files.read_record(files.join(self.uri, files.RECORDS, name)), names),
                strict=True,
            )
            return [part for name, record in records if (part := self._own(name, record)) is not None]

    def _own(self, name: str, record: Any) -> Part | None:
        """The part of a record; None where it is not whole, or of another stage. Raises UserError: none of ours."""
        uri = files.join(self.uri, files.RECORDS, name)
        if record is None or (isinstance(record, dict) and record.get("stage", self.fingerprint) != self.fingerprint):
            return None
        part = trust.checked(Part, record.get("part") if isinstance(record, dict) else record, uri)
        trust.part_name(part.name, uri)
        if name != _record(part.name).rpartition("/")[2]:
            raise UserError(f"{uri}: is the record of another file, {part.name}; {files.UNKNOWN}")
        return part

    def drop_part(self, name: str) -> None:
        """Forget a part and delete its file, if there is one."""
        trust.part_name(name, self.uri)
        self.folder.delete(_record(name))
        self.folder.delete(name)

    def commit(
        self,
        parts: Iterable[Part],
        totals: Mapping[str, Any],
        timings_s: Mapping[str, float],
    ) -> Artifact:
        """Write `artifact.json`: from now on the stage is done."""
        artifact = Artifact(
            kind=self.kind,
            schema_version=self.schema_version,
            fingerprint=self.fingerprint,
            identity=self.identity,
            parts=tuple(sorted(parts, key=lambda part: part.name)),
            totals=dict(totals),
            versions=package_versions(),
            timings_s={name: round(value, 3) for name, value in timings_s.items()},
        )
        self.folder.write(files.ARTIFACT, artifact.to_bytes())
        return artifact

    def complete(self, make: Callable[[], tuple[Iterable[Part], Mapping[str, Any]]], overwrite: bool) -> Artifact:
        """The commit record of the stage: the one that is there, or that of what `make` makes now.

        `make` writes the parts that `finished_parts` does not have and returns all parts and the totals.
        """
        before = self.recorded()
        done = self.begin(overwrite)
        if done is not None:
            return done
        watch = Stopwatch()
        parts, totals = make()
        if before is not None and before.holds(parts):  # what was damaged is as it was, and so is what was said of it
            self.folder.write(files.ARTIFACT, before.to_bytes())
            return before
        return self.commit(parts, totals, {self.kind: watch.seconds})


def begun_identity(uri: str) -> dict[str, Any] | None:
    """Identity of the stage that was begun or finished in a directory, or None."""
    done = load_artifact(uri)
    return _started(uri) if done is None else done.identity


def remove(uri: str) -> None:
    """Delete the stage in a directory, if one was begun there."""
    if _started(uri) is not None:
        folder = files.Folder(uri)
        folder.refuse_link()
        _clear(folder)
        folder.delete(files.STARTED)


def _record(name: str) -> str:
    """Name of the record of a part, in its stage's directory."""
    return f"{files.RECORDS}/{quote(name, safe='')}.json"


def _clear(folder: files.Folder) -> None:
    """Delete a stage in an order that can break off anywhere: what is left is unfinished, and still known as ours.

    Files that no stage writes are somebody else's and stay. Raises UserError: a record is of such a file; nothing is
    deleted then.
    """
    where = files.join(folder.uri, files.RECORDS)
    records = sorted(files.sizes(where))
    recorded = {trust.part_name(unquote(name.removesuffix(".json")), where) for name in records}
    ours = sorted(recorded | {name for name in files.sizes(folder.uri) if _NUMBERED.fullmatch(name)})
    folder.delete(files.ARTIFACT)
    with ThreadPoolExecutor(files.READERS) as deleters:
        list(deleters.map(folder.delete, ours))
        list(deleters.map(lambda name: folder.delete(f"{files.RECORDS}/{name}"), records))


def _started(uri: str) -> dict[str, Any] | None:
    started = files.read_json(files.join(uri, files.STARTED))
    if started is not None and not isinstance(started, dict):
        raise UserError(f"{files.join(uri, files.STARTED)}: is no record of this pd_core; {files.UNKNOWN}")
    return started


def part_name(number: int, suffix: str = ".parquet") -> str:
    """`part-00000042.parquet`; names sort in part order up to 10^8 parts."""
    return f"part-{number:08d}{suffix}"


def part_number(name: str) -> int | None:
    """The number of a table that `part_name` named; None for any other name."""
    found = _TABLE.fullmatch(name)
    return int(found[1]) if found else None


def package_versions() -> dict[str, str]:
    """Versions of what decides numbers and formats, for the artifacts."""
    names = (
        "pd-core",
        "torch",
        "torchvision",
        "timm",
        "torch-fidelity",
        "ray",
        "faiss-cpu",
        "faiss-gpu-cu12",
        "pyarrow",
        "numpy",
        "pillow",
    )
    found = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


class Stopwatch:
    """Wall-clock seconds since it was made."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Elapsed, s."""
        return time.perf_counter() - self.start
