"""What is only about the base of an update: it is opened, and its settings and listing compared with what is there now.

Images that lie unchanged in the source keep their features; what else is taken over, each stage says. Densities need
numbers of the whole set (c and the ranks) and are always written anew.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import FiniteFloat

from pd_core.core import artifacts as core_artifacts
from pd_core.core import files, schemas, seeds, trust
from pd_core.core.errors import UserError
from pd_core.core.settings.index import BuildIndexSettings
from pd_core.engine import tasks
from pd_core.images import decode, listing, sources
from pd_core.index import features
from pd_core.index.base import ADDED, Base, Update
from pd_core.index.extractor import ExtractorSpec
from pd_core.index.shards import ShardKind

REMOVED = "removed.parquet"  # in the listing of the new images, the sample ids of the base that are gone
STAGES = ("listing", "features", "index", "neighbors", "densities", "estimator")


def open_base(uri: str) -> Base:
    """The earlier run at `uri`.

    Raises:
        UserError: it is not there, not finished, or of another schema.
    """
    uri = files.absolute(uri)
    with files.explained(f"--base {uri}"):
        record = files.join(uri, "run.json")
        if (recorded := files.read_json(record)) is None:
            raise UserError(f"--base {uri}: no finished run of build_index there; finish it, or leave --base out")
        settings = trust.checked(_Run, recorded, record, whole=False).settings
        found = {stage: core_artifacts.load_artifact(files.join(uri, stage)) for stage in STAGES}
    artifacts: dict[str, core_artifacts.Artifact] = {}
    for stage, artifact in found.items():
        if artifact is None or artifact.schema_version != schemas.VERSIONS[stage]:
            raise OtherSettings(
                f"--base {uri}: {stage}/ is not finished or of another pd_core; leave --base out to build anew"
            )
        if (kind := _USED.get(stage)) is not None:
            trust.checked(kind, artifact.identity | artifact.totals, f"{uri}/{stage}/{files.ARTIFACT}", whole=False)
        artifacts[stage] = artifact
    return Base(uri, artifacts, settings)


@dataclass(frozen=True)
class _Run:
    """What is used of the run.json of a base."""

    settings: dict[str, dict[str, Any] | bool | str | None]


@dataclass(frozen=True)
class _UsedListing:
    """What is used of the records of a base, here and below."""

    source: dict[str, Any]
    metadata: str | None


@dataclass(frozen=True)
class _UsedFeatures:
    extractor: dict[str, Any]
    decode: dict[str, Any]
    device: Literal["cpu", "cuda"]
    batch_size: trust.Small
    threads: trust.Small
    torch: str


@dataclass(frozen=True)
class _UsedIndex:
    kind: ShardKind
    rows: trust.Count
    dim: trust.Small
    nprobe: trust.Whole
    cells: trust.Count | None = None
    changed: trust.Whole = 0
    rows_when_trained: trust.Count = 1
    cell_distance: trust.NotNegative | None = None


@dataclass(frozen=True)
class _UsedDensities:
    volume_dim: trust.NotNegative
    log_normalizer: FiniteFloat


@dataclass(frozen=True)
class _Heldout:
    r2_log_density: float | None


@dataclass(frozen=True)
class _UsedEstimator:
    settings: dict[str, Any]
    torch: str
    heldout: _Heldout
    n_train: trust.Whole
    epochs: trust.Whole
    best_epoch: trust.Whole
    fitted_r2: float | None = None


_USED: dict[str, type] = {
    "listing": _UsedListing,
    "features": _UsedFeatures,
    "index": _UsedIndex,
    "densities": _UsedDensities,
    "estimator": _UsedEstimator,
}


class OtherSettings(UserError):
    """The base was made with other settings than those of now, or by another pd_core."""


def check_same(
    base: Base, settings: BuildIndexSettings, source: sources.Source, spec: ExtractorSpec, device: str
) -> None:
    """Raises OtherSettings: the extractor, or a setting that decides features or densities, is not that of the base."""
    now = settings.model_dump(mode="json")
    decides = {
        "data": ("kind", "labels", "image_column", "key_column", "metadata_columns"),
        "features": ("part_rows",),
        "index": ("kind", "shards", "cells", "target_recall", "pq_bytes"),
        "density": ("k", "exact"),
    }
    before = {}
    for section, names in decides.items():
        given = base.settings.get(section)
        before[section] = {name: given.get(name) if isinstance(given, dict) else None for name in names}
    found = core_artifacts.differences(
        before, {s: {name: now[s][name] for name in names} for s, names in decides.items()}
    )
    identity = {
        "extractor": spec.identity(),
        "decode": features.decoding(settings.data),
        "device": device,
        "batch_size": settings.features.batch_size,
        "threads": settings.features.actor_cpus,
        "torch": version("torch"),
    }
    of_base = base.artifacts["features"].identity
    found += core_artifacts.differences({name: of_base[name] for name in identity}, identity)
    listed = base.artifacts["listing"].identity["source"]
    columns = {name: listed.get(name) for name in ("kind", "metadata", "labels", "image_column", "key_column")}
    found += core_artifacts.differences(
        columns, {name: sources.identity(source).get(name) for name in columns}, "source."
    )
    if found:
        raise OtherSettings(
            f"--base {base.uri}: was made with other settings ({'; '.join(found[:6])}), so its numbers are not "
            "comparable; leave --base out to build anew"
        )


# ---- listing ---------------------------------------------------------------------------------------------------------


def compare(source: sources.Source, base: Base, output: str, part_rows: int, overwrite: bool) -> Any:
    """Reference to (Update, Artifact): one Ray task lists the source and writes listing/ and added/listing/."""
    return tasks.task(_compare).remote(source, base, output, part_rows, overwrite)


def _compare(
    source: sources.Source, base: Base, output: str, part_rows: int, overwrite: bool
) -> tuple[Update, core_artifacts.Artifact]:
    watch = core_artifacts.Stopwatch()
    identity = {
        "source": sources.identity(source),
        "state": sources.state(source),
        "part_rows": part_rows,
        "base": base.artifacts["listing"].fingerprint,
        "base_features": base.artifacts["features"].fingerprint,
    }
    kind, number = "listing", schemas.VERSIONS["listing"]
    fresh = core_artifacts.Stage(files.join(output, ADDED, kind), kind, number, identity)
    stage = core_artifacts.Stage(files.join(output, kind), kind, number, identity, beside=(fresh.uri,))
    done = stage.begin(overwrite)
    if done is None:
        parts, totals = _list(source, base, fresh, stage, part_rows)
        done = stage.commit(parts, totals, {kind: watch.seconds})
    written = core_artifacts.load_artifact(fresh.uri)
    assert written is not None, "it is committed before the listing that follows from it"
    update = Update(
        base=base,
        listed=listing.read_artifact(stage.uri, done),
        fresh=listing.read_artifact(fresh.uri, written) if written.rows else None,
        kept=tuple(done.totals["kept"]),
        removed=files.read_table(files.join(fresh.uri, REMOVED))["sample_id"].to_numpy(),
        indexed_removed=done.totals["indexed_removed"],
        folder=files.join(output, ADDED),
    )
    return update, done


def _list(
    source: sources.Source, base: Base, fresh: core_artifacts.Stage, stage: core_artifacts.Stage, part_rows: int
) -> tuple[list[core_artifacts.Part], dict[str, Any]]:
    """Write and commit the listing of new images, and write that of all; returns parts and totals of the latter."""
    before, known = base.artifacts["listing"].totals, _Known(base)
    fresh.begin(overwrite=True)
    skipped: Counter[str] = Counter()
    new = listing.recut(known.new_of(sources.list_images(source, skipped)), part_rows)
    added = [fresh.write_table(core_artifacts.part_name(number), table) for number, table in enumerate(new)]
    listing.say_outside(skipped)
    gone = int((~known.seen & ~known.again).sum())
    if skipped[sources.OUTSIDE] and gone and sources.OUTSIDE not in (before.get("skipped") or {}):
        raise UserError(
            f"{source.root}: {sources.leading_out(skipped[sources.OUTSIDE])}, left out, and images of --base "
            f"that are gone ({gone:,}) may have been found by links; add --data.follow-links, or remove the links"
        )
    if not known.found:
        raise UserError(f"{source.root}: no images there; check --data.source")
    sources.check_unique(np.concatenate(known.found), functools.partial(_keys_of, source))
    removed = np.sort(known.ids[~known.seen])
    marked = fresh.write_part(REMOVED, files.table_bytes(pa.table({"sample_id": removed})), 0)
    rows = sum(part.rows for part in added)
    fresh.commit([*added, marked], {"rows": rows, "skipped": {}, "metadata": before["metadata"]}, {})
    whole = listing.recut(_kept_then_added(base, known, fresh.uri, added), part_rows)
    parts = [stage.write_table(core_artifacts.part_name(number), table) for number, table in enumerate(whole)]
    totals = {
        "rows": sum(part.rows for part in parts),
        "skipped": dict(sorted(skipped.items())),
        "metadata": before["metadata"],
        "added": rows,
        "removed": len(removed),
        "indexed_removed": gone,
        "kept": known.kept(),
    }
    return parts, totals


@dataclass(frozen=True)
class Foreseen:
    """What an update would find, in images.

    Attributes:
        counted: of the source as it is now, see `listing.count`.
        new, changed, gone: by key; changed: of another content or place.
        again: that the base could not read, so they are tried again.
        kept: as they were.
    """

    counted: dict[str, Any]
    new: int
    changed: int
    gone: int
    again: int
    kept: int

    @property
    def to_extract(self) -> int:
        """Images whose features are computed."""
        return self.new + self.changed + self.again

    def __str__(self) -> str:
        again = f", {self.again:,} to be tried again" if self.again else ""
        return (
            f"{self.new:,} new images, {self.changed:,} changed, {self.gone:,} gone{again}, {self.kept:,} as they were"
        )


def foresee(source: sources.Source, base: Base) -> Foreseen:
    """What an update of `base` would find, by one walk through the source, of which nothing is written.

    Raises:
        UserError: the source has no images.
    """
    found: Foreseen = tasks.get(tasks.task(_foresee).remote(source, base))
    if not found.counted["rows"]:
        raise UserError(f"{source.root}: no images there; check --data.source")
    return found


def _foresee(source: sources.Source, base: Base) -> Foreseen:
    known = _Known(base)
    tables = sources.list_images(source)
    counted = listing.counted(source, (table for table in tables if len(known.find(table)) == table.num_rows))
    found = np.concatenate(known.found) if known.found else np.empty(0, np.int64)
    stay, kept = int(np.isin(known.ids, found).sum()), int(known.seen.sum())
    again = int(np.isin(known.ids[known.again], found).sum())
    return Foreseen(counted, len(found) - stay, stay - kept - again, len(known.ids) - stay, again, kept)


_PLACE = ("sample_id", "container", "offset", "size", "version")


class _Known:
    """The images of the base's listing, and which of them the source still has; 33 bytes a row.

    Attributes:
        ids: sample_id int64 [N].
        again: bool [N], those that the store did not give, for a passing reason: not in the index, and tried again.
        place: int64 [N], a hash of where an image lies, and of the state of its file; 0 for those tried again.
        seen: bool [N].
        found: sample ids of the source, as they came.
    """

    def __init__(self, base: Base) -> None:
        self.parts = base.artifacts["listing"].parts
        tables = [files.read_table(files.join(base.folder("listing"), part.name), _PLACE) for part in self.parts]
        self.ids = np.concatenate([table["sample_id"].to_numpy() for table in tables])
        self.again = np.isin(self.ids, _unreadable(base))
        self.place = np.where(self.again, 0, np.concatenate([_place_of(table) for table in tables]))
        self.order = np.argsort(self.ids, kind="stable")
        self.seen = np.zeros(len(self.ids), bool)
        self.found: list[np.ndarray] = []

    def find(self, table: pa.Table) -> np.ndarray:
        """Bool [n], which rows of a listing's table are known as they are; `seen` and `found` are filled."""
        sample_id, place = table["sample_id"].to_numpy(), _place_of(table)
        self.found.append(sample_id)
        at = np.searchsorted(self.ids, sample_id, sorter=self.order)
        row = self.order[np.minimum(at, len(self.order) - 1)]
        same: np.ndarray = (self.ids[row] == sample_id) & (self.place[row] == place)
        self.seen[row[same]] = True
        return same

    def new_of(self, tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
        """Rows of a listing that are not known as they are."""
        for table in tables:
            same = self.find(table)
            if not same.all():
                yield table.filter(pa.array(~same))

    def kept(self) -> list[int]:
        """Of each part of the listing, how many are still there."""
        return [int(part.sum()) for part in np.split(self.seen, np.cumsum([part.rows for part in self.parts])[:-1])]


def _place_of(table: pa.Table) -> np.ndarray:
    """A hash, never 0, of the file that each image lies in, of where it lies there, and of the file's state."""
    names = table["container"].combine_chunks().dictionary_encode()
    container = sources.sample_ids(names.dictionary.to_pylist())[names.indices.to_numpy()].astype(np.uint64)
    offset, size, version = (table[name].to_numpy().astype(np.uint64) for name in _PLACE[2:])
    with np.errstate(over="ignore"):
        mixed = seeds.splitmix64(
            version ^ seeds.splitmix64(offset ^ seeds.splitmix64(size ^ seeds.splitmix64(container)))
        )
    return np.where(mixed == 0, 1, mixed).astype(np.int64)


def _unreadable(base: Base) -> np.ndarray:
    """Sample ids that the base quarantined since the store did not give them."""
    uri, reason = base.folder("quarantine"), decode.Reason.UNREADABLE
    quarantine = core_artifacts.load_artifact(uri)
    found = [np.empty(0, np.int64)]
    for part in () if quarantine is None else quarantine.parts:
        if reason in part.counts:
            table = files.read_table(files.join(uri, part.name), ["sample_id", "reason"])
            found.append(table.filter(pc.equal(table["reason"], reason))["sample_id"].to_numpy())
    return np.concatenate(found)


def _kept_then_added(
    base: Base, known: _Known, added_uri: str, added: Sequence[core_artifacts.Part]
) -> Iterator[pa.Table]:
    start = 0
    for part in known.parts:
        seen = known.seen[start : start + part.rows]
        start += part.rows
        if seen.any():
            yield files.read_table(files.join(base.folder("listing"), part.name)).filter(pa.array(seen))
    for part in added:
        yield files.read_table(files.join(added_uri, part.name))


def _keys_of(source: sources.Source, rows: np.ndarray) -> list[str]:
    """Keys of some rows of the source's listing, which is walked again for it."""
    found, start = {}, 0
    for table in sources.list_images(source):
        for row in rows[(rows >= start) & (rows < start + table.num_rows)].tolist():
            found[row] = table["key"][row - start].as_py()
        start += table.num_rows
    return [found[row] for row in rows.tolist()]
