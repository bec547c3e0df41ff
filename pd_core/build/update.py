"""An update of an index: the stages of build_index again, from those of an earlier run (the base) and what is new in the source.

Images that lie unchanged in the source keep their features. A row's neighbors change only where one of them is gone or a new
row comes nearer, so old rows are compared with the new ones alone; the distance of a pair is the same bits wherever it is
computed, hence with an exact index the result is that of a whole build on the same features. Densities need numbers of the
whole set (c and the ranks) and are written anew by the stage's own second pass.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version as version_of
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import FiniteFloat

from pd_core.core import artifacts as core_artifacts
from pd_core.core import files as core_files
from pd_core.core import schemas, seeds, trust
from pd_core.core.errors import RunError, UserError
from pd_core.core.settings.index import (
    BuildIndexSettings,
    DensitySettings,
    EstimatorSettings,
    IndexSettings,
    UpdateSettings,
)
from pd_core.density import estimator, fit
from pd_core.density import predictor as density_predictor
from pd_core.engine import console, resources, tasks, telemetry
from pd_core.images import decode as images_decode
from pd_core.images import listing, sources
from pd_core.index import build, features, knn, neighbors, search
from pd_core.index import extractor as index_extractor
from pd_core.index import shards as index_shards
from pd_core.index.features import load_features

ADDED = "added"  # folder of the new images' own listing, features and quarantine
REMOVED = "removed.parquet"  # in the listing of these, the sample ids of the base that are gone
DRIFT_PARTS = 4  # of the base, that new rows are compared with
STAGES = ("listing", "features", "index", "neighbors", "densities", "estimator")


@dataclass(frozen=True)
class Base:
    """A finished output of build_index: its place and the commit record of each stage."""

    uri: str
    artifacts: dict[str, core_artifacts.Artifact]
    settings: dict[str, Any]

    def folder(self, stage: str) -> str:
        """Directory of a stage."""
        return core_files.join(self.uri, stage)


def open_base(uri: str) -> Base:
    """The earlier run at `uri`.

    Raises:
        UserError: it is not there, not finished, or of another schema.
    """
    uri = core_files.absolute(uri)
    with core_files.explained(f"--base {uri}"):
        record = core_files.join(uri, "run.json")
        if (recorded := core_files.read_json(record)) is None:
            raise UserError(f"--base {uri}: no finished run of build_index there; finish it, or leave --base out")
        settings = trust.checked(_Run, recorded, record, whole=False).settings
        found = {stage: core_artifacts.load_artifact(core_files.join(uri, stage)) for stage in STAGES}
    artifacts: dict[str, core_artifacts.Artifact] = {}
    for stage, artifact in found.items():
        if artifact is None or artifact.schema_version != schemas.VERSIONS[stage]:
            raise OtherSettings(
                f"--base {uri}: {stage}/ is not finished or of another pd_core; leave --base out to build anew"
            )
        if (kind := _USED.get(stage)) is not None:
            trust.checked(
                kind, artifact.identity | artifact.totals, f"{uri}/{stage}/{core_files.ARTIFACT}", whole=False
            )
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
    kind: index_shards.ShardKind
    rows: trust.Count
    dim: trust.Small
    nprobe: trust.Whole
    cells: trust.Count | None = None
    auto: bool = False
    changed: trust.Whole = 0
    rows_when_trained: trust.Count = 1
    cell_distance: trust.NotNegative | None = None
    recall: trust.NotNegative | None = None
    target_recall: trust.NotNegative | None = None


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
    base: Base, settings: BuildIndexSettings, source: sources.Source, spec: index_extractor.ExtractorSpec, device: str
) -> None:
    """Raises OtherSettings: a setting that decides features or densities, or the extractor, is not what the base was made with."""
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
        "torch": version_of("torch"),
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
            f"--base {base.uri}: was made with other settings ({'; '.join(found[:6])}), so its numbers are not comparable; "
            "leave --base out to build anew"
        )


# ---- listing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Changes:
    """What the source has now, against the base.

    Attributes:
        listed: the whole listing: images of the base that are unchanged, in its order, then the new ones.
        added: listing of the new ones, or None.
        kept: images of each part of the base's listing that stay, of the `base_rows` that it has.
        removed: sample ids of the base that are gone, changed, or read again; ascending int64.
        indexed_removed: how many of them are in the base's index: an image that could not be read is not.
    """

    listed: listing.Listing
    added: listing.Listing | None
    kept: tuple[int, ...]
    base_rows: tuple[int, ...]
    removed: np.ndarray
    indexed_removed: int


def compare(source: sources.Source, base: Base, output: str, part_rows: int, overwrite: bool) -> Any:
    """Reference to (Changes, Artifact): one Ray task lists the source and writes listing/ and added/listing/."""
    return tasks.task(_compare).remote(source, base, output, part_rows, overwrite)


def _compare(
    source: sources.Source, base: Base, output: str, part_rows: int, overwrite: bool
) -> tuple[Changes, core_artifacts.Artifact]:
    watch = core_artifacts.Stopwatch()
    before = base.artifacts["listing"]
    identity = {
        "source": sources.identity(source),
        "state": sources.state(source),
        "part_rows": part_rows,
        "base": before.fingerprint,
        "base_features": base.artifacts["features"].fingerprint,
    }
    version = schemas.VERSIONS["listing"]
    fresh = core_artifacts.Stage(core_files.join(output, ADDED, "listing"), "listing", version, identity)
    stage = core_artifacts.Stage(core_files.join(output, "listing"), "listing", version, identity, beside=(fresh.uri,))
    done = stage.begin(overwrite)
    if done is None:
        known = _Known.of(base)
        fresh.begin(overwrite=True)
        skipped: Counter[str] = Counter()
        rows = listing.recut(known.new_of(sources.list_images(source, skipped)), part_rows)
        added = [fresh.write_table(core_artifacts.part_name(number), table) for number, table in enumerate(rows)]
        listing.say_outside(skipped)
        gone = int((~known.seen & ~known.again).sum())
        if skipped[sources.OUTSIDE] and gone and sources.OUTSIDE not in (before.totals.get("skipped") or {}):
            raise UserError(
                f"{source.root}: {skipped[sources.OUTSIDE]} links lead out of it and are left out, {gone} images of --base are not "
                "there any more, and the base may have followed links; add --data.follow-links, or remove the links"
            )
        if not known.met:
            raise UserError(f"{source.root}: no images there; check --data.source")
        sources.check_unique(np.concatenate(known.met), functools.partial(_keys_of, source))
        metadata = before.totals["metadata"]
        removed = pa.table({"sample_id": np.sort(known.ids[~known.seen])})
        added.append(fresh.write_part(REMOVED, core_files.table_bytes(removed), 0))
        fresh.commit(added, {"rows": sum(p.rows for p in added), "skipped": {}, "metadata": metadata}, {})
        whole = listing.recut(_kept_then_added(base, known, fresh, added), part_rows)
        parts = [stage.write_table(core_artifacts.part_name(number), table) for number, table in enumerate(whole)]
        totals = {
            "rows": sum(part.rows for part in parts),
            "skipped": dict(sorted(skipped.items())),
            "metadata": metadata,
            "added": sum(part.rows for part in added),
            "removed": removed.num_rows,
            "indexed_removed": gone,
            "kept": known.kept(),
        }
        done = stage.commit(parts, totals, {"listing": watch.seconds})
    written = core_artifacts.load_artifact(fresh.uri)
    assert written is not None, "it is committed before the listing that follows from it"
    changes = Changes(
        listing.read_artifact(stage.uri, done),
        listing.read_artifact(fresh.uri, written) if written.rows else None,
        tuple(done.totals["kept"]),
        tuple(part.rows for part in before.parts),
        core_files.read_table(core_files.join(fresh.uri, REMOVED))["sample_id"].to_numpy(),
        done.totals["indexed_removed"],
    )
    return changes, done


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
    known = _Known.of(base)
    counted = listing.counted(source, known.watched(sources.list_images(source)))
    met = np.concatenate(known.met) if known.met else np.empty(0, np.int64)
    stay, kept = int(np.isin(known.ids, met).sum()), int(known.seen.sum())
    again = int(np.isin(known.ids[known.again], met).sum())
    return Foreseen(counted, len(met) - stay, stay - kept - again, len(known.ids) - stay, again, kept)


class _Known:
    """The images of the base's listing, and which of them the source still has; 33 bytes a row.

    Attributes:
        ids, place: sample_id int64 [N], and a hash of the file it lies in, where, and of the state of that file, int64 [N].
        again: bool [N], those that could not be read, hence are not in the index and are tried again.
        seen: bool [N].
        met: sample ids of the source, as they were met.
    """

    def __init__(self, sample_id: np.ndarray, place: np.ndarray, again: np.ndarray, part_rows: list[int]) -> None:
        self.ids, self.part_rows, self.again = sample_id, part_rows, again
        self.place = np.where(again, 0, place)  # that of no file
        self.order = np.argsort(sample_id, kind="stable")
        self.seen = np.zeros(len(sample_id), bool)
        self.met: list[np.ndarray] = []

    @classmethod
    def of(cls, base: Base) -> _Known:
        """From the tables; an image that could not be read (a passing reason) is known no more, so that it is tried again."""
        artifact, unreadable = base.artifacts["listing"], _unreadable(base)
        sample_ids, places = [], []
        for part in artifact.parts:
            table = core_files.read_table(core_files.join(base.folder("listing"), part.name), _PLACE)
            sample_ids.append(table["sample_id"].to_numpy())
            places.append(_place_of(table))
        sample_id = np.concatenate(sample_ids)
        again = np.isin(sample_id, unreadable)
        return cls(sample_id, np.concatenate(places), again, [part.rows for part in artifact.parts])

    def meet(self, table: pa.Table) -> np.ndarray:
        """Bool [n], which rows of a listing's table are known as they are; `seen` and `met` are filled."""
        sample_id, place = table["sample_id"].to_numpy(), _place_of(table)
        self.met.append(sample_id)
        at = np.searchsorted(self.ids, sample_id, sorter=self.order)
        row = self.order[np.minimum(at, len(self.order) - 1)]
        same: np.ndarray = (self.ids[row] == sample_id) & (self.place[row] == place)
        self.seen[row[same]] = True
        return same

    def new_of(self, tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
        """Rows of a listing that are not known, all of which it meets."""
        for table in tables:
            same = self.meet(table)
            if not same.all():
                yield table.filter(pa.array(~same))

    def watched(self, tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
        """All tables of a listing, all of which it meets."""
        for table in tables:
            self.meet(table)
            yield table

    def kept(self) -> list[int]:
        """Of each part of the listing, how many are still there."""
        return [int(part.sum()) for part in np.split(self.seen, np.cumsum(self.part_rows)[:-1])]


_PLACE = ("sample_id", "container", "offset", "size", "version")


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
    quarantine = core_artifacts.load_artifact(base.folder("quarantine"))
    found = [np.empty(0, np.int64)]
    for part in () if quarantine is None else quarantine.parts:
        if images_decode.Reason.UNREADABLE in part.counts:
            table = core_files.read_table(
                core_files.join(base.folder("quarantine"), part.name), ["sample_id", "reason"]
            )
            found.append(
                table.filter(pc.equal(table["reason"], images_decode.Reason.UNREADABLE))["sample_id"].to_numpy()
            )
    return np.concatenate(found)


def _kept_then_added(
    base: Base, known: _Known, fresh: core_artifacts.Stage, added: Sequence[core_artifacts.Part]
) -> Iterator[pa.Table]:
    start = 0
    for part in base.artifacts["listing"].parts:
        seen = known.seen[start : start + part.rows]
        start += part.rows
        if seen.any():
            yield core_files.read_table(core_files.join(base.folder("listing"), part.name)).filter(pa.array(seen))
    for part in added:
        if part.name != REMOVED:
            yield core_files.read_table(core_files.join(fresh.uri, part.name))


def _keys_of(source: sources.Source, rows: np.ndarray) -> list[str]:
    """Keys of some rows of the source's listing, which is walked again for it."""
    found, start = {}, 0
    for table in sources.list_images(source):
        for row in rows[(rows >= start) & (rows < start + table.num_rows)].tolist():
            found[row] = table["key"][row - start].as_py()
        start += table.num_rows
    return [found[row] for row in rows.tolist()]


# ---- features --------------------------------------------------------------------------------------------------------


def features_stage(
    output: str, changes: Changes, base: Base, added: core_artifacts.Artifact | None
) -> core_artifacts.Stage:
    """The features stage under `output`: of the base, without what was removed, and with what was added."""
    before = base.artifacts["features"]
    keep = ("extractor", "decode", "device", "batch_size", "threads", "torch")
    identity = {name: before.identity[name] for name in keep} | {
        "listing": changes.listed.fingerprint,
        "base": before.fingerprint,
        "added": None if added is None else added.fingerprint,
    }
    beside = (core_files.join(output, "quarantine"),)
    return core_artifacts.Stage(
        core_files.join(output, "features"), "features", schemas.VERSIONS["features"], identity, beside
    )


@dataclass(frozen=True)
class _Piece:
    """Parts of the base and of what was added, from which a part of the whole listing is put together."""

    number: int
    old: tuple[int, ...]
    new: tuple[int, ...]
    whole: bool  # exactly the base's part of the same number


def _pieces(changes: Changes) -> Iterator[_Piece]:
    """Of each part of the whole listing, in order."""
    ends = np.cumsum(changes.kept)
    total = int(ends[-1]) if len(ends) else 0
    part_rows = changes.listed.part_rows
    for number in range(changes.listed.parts):
        start = number * part_rows
        stop = start + changes.listed.rows_of(number)
        old = [p for p in range(*_between(ends, start, min(stop, total))) if changes.kept[p]] if start < total else []
        first, last = max(start, total) - total, stop - total
        new = range(first // part_rows, -(-last // part_rows)) if last > 0 else range(0)
        # no row of it is gone: the base's parts are full but for the last, and a part that lost a row is not
        whole = old == [number] and not len(new) and changes.kept[number] == stop - start == changes.base_rows[number]
        yield _Piece(number, tuple(old), tuple(new), whole)


def _between(ends: np.ndarray, start: int, stop: int) -> tuple[int, int]:
    """First part that holds row `start`, and the one after that which holds row `stop` - 1; parts end at `ends`."""
    return int(np.searchsorted(ends, start, side="right")), int(np.searchsorted(ends, stop - 1, side="right")) + 1


@dataclass(frozen=True)
class _Sources:
    """Where a part's rows of one table come from: folder, and the parts there that are read."""

    base: str
    old: tuple[core_artifacts.Part, ...]
    added: str
    new: tuple[core_artifacts.Part, ...]


def merge_features(
    stage: core_artifacts.Stage, changes: Changes, base: Base, output: str, max_bad_fraction: float
) -> tuple[list[core_artifacts.Part], dict[str, Any]]:
    """Put features/ and quarantine/ together; returns the parts and totals of features/ to commit."""
    import ray

    quarantine = features.quarantine_of(stage)
    quarantine.begin(overwrite=True)
    done, kept = stage.finished_parts(), base.artifacts["features"]
    there = {kind: _parts_of(base.folder(kind)) for kind in ("features", "quarantine")}
    new = {kind: _parts_of(core_files.join(output, ADDED, kind)) for kind in there}
    merge, removed = tasks.task(_merge_part), ray.put(changes.removed)
    todo = [piece for piece in _pieces(changes) if core_artifacts.part_name(piece.number) not in done]

    def submit(piece: _Piece) -> Any:
        read = {
            kind: _Sources(
                base.folder(kind),
                _named(there[kind], piece.old),
                core_files.join(output, ADDED, kind),
                _named(new[kind], piece.new),
            )
            for kind in there
        }
        return merge.remote(stage, quarantine, changes.listed.uri, piece, read, removed)

    with console.progress("features", changes.listed.parts, "parts", changes.listed.parts - len(todo)) as bar:
        for _ in tasks.bounded(submit, todo, tasks.in_flight):
            bar.update(1)
            telemetry.PARTS.add(1, stage="features")
    parts = stage.finished_parts()
    reasons = features.reasons_of(parts.values())
    listed, good = changes.listed.rows, sum(part.rows for part in parts.values())
    features.stop_if_mostly_bad(reasons, listed, int(max_bad_fraction * listed), quarantine.uri)
    if good + sum(reasons.values()) != listed:
        raise RunError(
            f"features: {listed} images listed, but {good} features and {sum(reasons.values())} quarantined; "
            "this is a defect: keep the output and report it"
        )
    bad = {"rows": sum(reasons.values()), "reasons": reasons}
    quarantine.commit(quarantine.finished_parts().values(), bad, {})
    totals = kept.totals | {"rows": good, "listed": listed, "quarantined": bad["rows"]}
    return list(parts.values()), totals


def _parts_of(uri: str) -> dict[str, core_artifacts.Part]:
    artifact = core_artifacts.load_artifact(uri)
    return {} if artifact is None else {part.name: part for part in artifact.parts}


def _named(parts: dict[str, core_artifacts.Part], numbers: Sequence[int]) -> tuple[core_artifacts.Part, ...]:
    names = [core_artifacts.part_name(number) for number in numbers]
    return tuple(parts[name] for name in names if name in parts)


def _merge_part(
    stage: core_artifacts.Stage,
    quarantine: core_artifacts.Stage,
    listing_uri: str,
    piece: _Piece,
    read: dict[str, _Sources],
    removed: np.ndarray,
) -> None:
    name = core_artifacts.part_name(piece.number)
    if piece.whole:
        for target, kind in ((quarantine, "quarantine"), (stage, "features")):
            for part in read[kind].old:
                target.adopt(read[kind].base, part)
        return
    wanted = core_files.read_table(core_files.join(listing_uri, name), ["sample_id"])["sample_id"]
    bad = _gather(read["quarantine"], wanted, removed)
    reasons: Counter[str] = Counter(bad["reason"].to_pylist()) if bad is not None else Counter()
    if bad is not None and bad.num_rows:
        quarantine.write_table(name, bad, dict(sorted(reasons.items())))
    else:
        quarantine.drop_part(name)
    good = _gather(read["features"], wanted, removed)
    assert good is not None, "every part has features, if only of no rows"
    stage.write_table(name, good, dict(sorted(reasons.items())))


def _gather(read: _Sources, wanted: pa.ChunkedArray, removed: np.ndarray) -> pa.Table | None:
    """Rows of a table of the base and of what was added that belong to a part, in the order of the listing.

    An image whose content has changed is in both under one id: the base's row is among the removed.
    """
    tables = []
    for uri, parts in ((read.base, read.old), (read.added, read.new)):
        for part in parts:
            table = core_files.read_table(core_files.join(uri, part.name))
            keep = pc.is_in(table["sample_id"], value_set=wanted)
            if uri == read.base:
                keep = pc.and_(keep, pa.array(~np.isin(table["sample_id"].to_numpy(), removed)))
            tables.append(table.filter(keep))
    return pa.concat_tables(tables).combine_chunks() if tables else None


# ---- index -----------------------------------------------------------------------------------------------------------


def kept_index(
    base: Base, changes: Changes, output: str, added: core_artifacts.Artifact | None
) -> build.Kept | build.KeptShards | None:
    """What the index of an update has from the base: the quantizer, and how many cells are probed; of a flat one the shards, or None."""
    before = base.artifacts["index"]
    if before.totals["kind"] == "flat":
        names = tuple(_added_parts(output, added))
        rows = 0 if added is None else added.rows
        shards = build.KeptShards(base.folder("index"), before.fingerprint, before.parts, changes.removed, names, rows)
        return shards if shards.worthwhile(before.rows + rows, before.totals["dim"]) else None
    return build.Kept(
        uri=base.folder("index"),
        fingerprint=before.fingerprint,
        quantizer=next(part for part in before.parts if part.name == search.QUANTIZER),
        kind=before.totals["kind"],
        cells=before.totals["cells"],
        nprobe=before.totals["nprobe"],
        rows=_rows_when_trained(before),
        auto=before.identity["auto"],
    )


def _added_parts(output: str, added: core_artifacts.Artifact | None) -> list[str]:
    """The features parts of what was added that have rows, as URIs."""
    parts = () if added is None else added.parts
    return [core_files.join(output, ADDED, "features", part.name) for part in parts if part.rows]


def _changed(before: core_artifacts.Artifact) -> int:
    return int(before.totals.get("changed", 0))


def trained_facts(base: Base, changes: Changes, added: core_artifacts.Artifact | None) -> dict[str, Any]:
    """What an index that keeps the base's quantizer remembers of it, for its totals: see `drift`."""
    changed = _changed(base.artifacts["index"]) + _moved(changes, added)
    return {"changed": changed, "cell_distance": _trained_distance(base)}


def _moved(changes: Changes, added: core_artifacts.Artifact | None) -> int:
    """Rows that have come into the index or gone from it; an image whose content is another is both."""
    return changes.indexed_removed + (0 if added is None else added.rows)


def _trained_distance(base: Base) -> float:
    """`_cell_distance` of a sample of the rows that there were when the quantizer was trained."""
    distance = base.artifacts["index"].totals.get("cell_distance")
    if distance is None:
        parts = [part.name for part in base.artifacts["features"].parts if part.rows]
        chosen = tuple(
            core_files.join(base.folder("features"), name) for name in parts[:: max(1, len(parts) // DRIFT_PARTS)]
        )
        distance = _measured_once(base.artifacts["index"].fingerprint, base.folder("index"), chosen)
    return float(distance)


@functools.lru_cache(maxsize=1)  # asked for by `drift`, and again for what is remembered
def _measured_once(fingerprint: str, index_uri: str, uris: tuple[str, ...]) -> float:
    distance: float = tasks.get(tasks.task(_cell_distance).remote(index_uri, uris))
    return distance


def _rows_when_trained(before: core_artifacts.Artifact) -> int:
    return int(before.identity.get("rows_when_trained", before.totals["rows"]))


def drift(
    base: Base,
    changes: Changes,
    added: core_artifacts.Artifact | None,
    rows: int,
    output: str,
    settings: UpdateSettings,
    index_settings: IndexSettings,
    density: DensitySettings,
) -> str | None:
    """Why the index has to be built anew, its quantizer trained again, and every neighbor searched for; or None."""
    before = base.artifacts["index"]
    if before.totals["kind"] == "flat":
        kind = build.resolve_kind(index_settings, density.exact, rows)
        if kind != "flat":
            return f"{rows:,} rows are enough for an index with cells, which the base has not"
        growth = _moved(changes, added) / before.totals["rows"]
        if growth > settings.max_growth:
            return f"{growth:.0%} of the rows have changed, --update.max_growth is {settings.max_growth:g}"
        return None
    growth = (_changed(before) + _moved(changes, added)) / _rows_when_trained(before)
    if growth > settings.max_growth:
        return f"{growth:.0%} of the rows have changed since its quantizer was trained, --update.max_growth is {settings.max_growth:g}"
    if added is None or not added.rows:
        return None
    new = _added_parts(output, added)
    far = tasks.get(tasks.task(_cell_distance).remote(base.folder("index"), new))
    before_far = _trained_distance(base)
    if before_far > 0 and far > settings.max_cell_distance * before_far:
        return (
            f"the new rows' mean squared distance to their cells' centroids is {far / before_far:.2f} times that of the others, "
            f"--update.max_cell_distance is {settings.max_cell_distance:g}"
        )
    return None


def short_of_recall(indexed: core_artifacts.Artifact) -> str | None:
    """Why an index with the base's quantizer does not do, or None."""
    totals = indexed.totals
    if totals["nprobe"] and totals["recall"] < totals["target_recall"]:
        return f"recall {totals['recall']:.4f} of the extended index is below --index.target_recall {totals['target_recall']:g}"
    return None


def _cell_distance(index_uri: str, uris: Sequence[str]) -> float:
    """Mean squared distance of the rows of some features parts to the centroid of their cell."""
    quantizer = search.read_quantizer(index_uri)
    total, rows = 0.0, 0
    for uri in uris:
        _, vectors = load_features(uri)
        distances, _ = quantizer.search(np.ascontiguousarray(vectors), 1)
        total, rows = total + float(distances.sum(dtype=np.float64)), rows + len(vectors)
    return total / max(1, rows)


# ---- neighbors -------------------------------------------------------------------------------------------------------


def neighbors_stage(output: str, info: search.IndexInfo, base: Base, settings: DensitySettings) -> core_artifacts.Stage:
    """The neighbors stage under `output`."""
    identity = neighbors.neighbors_stage(output, info, settings).identity
    identity["base"] = base.artifacts["neighbors"].fingerprint
    return core_artifacts.Stage(
        core_files.join(output, "neighbors"), "neighbors", schemas.VERSIONS["neighbors"], identity
    )


@dataclass(frozen=True)
class _Merge:
    """What a task of the stage needs; picklable. cell_rows: rows of each cell in the base's index, int64 [cells]."""

    stage: core_artifacts.Stage
    features: str
    base: str
    k: int
    cell_rows: np.ndarray


def merge_neighbors(
    stage: core_artifacts.Stage,
    info: search.IndexInfo,
    base: Base,
    changes: Changes,
    output: str,
    merged: core_artifacts.Artifact,
    settings: DensitySettings,
    index_settings: IndexSettings,
    now: resources.Cluster,
) -> tuple[list[core_artifacts.Part], dict[str, Any]]:
    """Neighbors of new rows, and of those that lost one, over the whole index; of all others from what they had and the new rows.

    Returns:
        Parts and totals to commit; `searched` counts the rows of the first kind in this call.
    """
    import ray

    done = stage.finished_parts()
    pieces = {piece.number: piece for piece in _pieces(changes)}
    blocks = neighbors.make_blocks(merged, settings.block_rows)
    todo = [missing for block in blocks if (missing := [name for name in block if name not in done])]
    telemetry.PARTS.add(0, stage="neighbors")
    telemetry.SEARCHED.add(0, stage="neighbors")
    removed, searched = ray.put(changes.removed), 0
    features_uri = core_files.join(output, "features")
    job = _Merge(stage, features_uri, base.uri, settings.k, _cell_rows(base))
    new = _new_rows(info, output, changes)
    with (
        # most of the work is in the tasks, which compare with the new rows: the pool gets the smaller share of the CPUs
        search.open_pool(
            info, resources.refreshed(now), index_settings.actors, index_settings.actor_cpus, True
        ) as pool,
        console.progress("neighbors", len(merged.parts), "parts", len(done)) as bar,
    ):
        merge = tasks.task(_merge_block)

        def submit(names: list[str]) -> Any:
            return merge.remote(job, [(name, pieces[_number(name)]) for name in names], pool, new, removed)

        for names, count in tasks.bounded(submit, todo, tasks.in_flight):
            bar.update(len(names))
            telemetry.PARTS.add(len(names), stage="neighbors")
            telemetry.SEARCHED.add(count, stage="neighbors")
            searched += count
    parts = list(stage.finished_parts().values())
    if (found := sum(part.rows for part in parts)) != merged.rows:
        raise RunError(f"{stage.uri}: {found} of {merged.rows} rows are there; run the same command again")
    totals = {"rows": merged.rows, "k": settings.k, "dim": info.dim, "nprobe": info.nprobe, "searched": searched}
    return parts, totals


def _cell_rows(base: Base) -> np.ndarray:
    if base.artifacts["index"].totals["kind"] == "flat":
        return np.empty(0, np.int64)
    return np.array(search.read_cells(base.folder("index")).rows_of_cell, np.int64)


def _number(name: str) -> int:
    number = core_artifacts.part_number(name)
    assert number is not None, name
    return number


def _new_rows(info: search.IndexInfo, output: str, changes: Changes) -> Any:
    """Reference to the shard of the new rows alone, as bytes of a `.faiss` file; None where there are none."""
    added = (
        core_artifacts.load_artifact(core_files.join(output, ADDED, "features")) if changes.added is not None else None
    )
    names = _added_parts(output, added)
    return tasks.task(_shard_of).remote(info, names) if names else None


def _shard_of(info: search.IndexInfo, uris: Sequence[str]) -> bytes:
    sample_id, vectors = build.load_group(uris)
    if info.kind == "flat":
        return index_shards.serialize(
            index_shards.build_shard(index_shards.train_template("flat", info.dim), vectors, sample_id)
        )
    template = core_files.read_bytes(core_files.join(info.uri, search.QUANTIZER))
    cells = index_shards.cell_of(search.read_quantizer(info.uri), vectors)
    return index_shards.serialize(index_shards.build_shard(template, vectors, sample_id, cells))


def _merge_block(
    job: _Merge, wanted: Sequence[tuple[str, _Piece]], pool: search.SearchPool, new: bytes | None, removed: np.ndarray
) -> int:
    """Write the neighbors of some parts; returns how many rows were searched for in the whole index."""
    nearest = None if new is None else knn.ShardSearch.open([new], device="cpu")
    searched = 0
    for name, piece in wanted:
        table, vectors = load_features(core_files.join(job.features, name))
        sample_id = table["sample_id"].to_numpy()
        distances, found = _neighbors_before(job, piece, sample_id)
        # new, or with other content under the id that it had; one of its neighbors is gone; more than its cells were searched
        whole = (found[:, 0] == knn.MISSING_ID) | np.isin(sample_id, removed) | np.isin(found, removed).any(axis=1)
        probes = None if pool.info.exact else search.probes_of(pool.info, vectors)
        if probes is not None:
            whole |= job.cell_rows[probes].sum(axis=1) <= job.k + 1
        old = np.flatnonzero(~whole)
        if nearest is not None and len(old):  # where a search of the whole index would have looked
            if probes is None:
                more = nearest.search_all(vectors[old], job.k)
            else:
                more = nearest.search_cells(vectors[old], probes[old], job.k)
            distances[old], found[old] = knn.merge_topk([(distances[old], found[old]), more], job.k)
        if whole.any():
            distances[whole], found[whole], _ = search.search(pool, vectors[whole], job.k, sample_id[whole])
        neighbors.write_neighbors(job.stage, name, sample_id, found, distances)
        searched += int(whole.sum())
    return searched


def _neighbors_before(job: _Merge, piece: _Piece, sample_id: np.ndarray) -> knn.Found:
    """What the base had for each row; MISSING_ID where it did not know the row."""
    distances = np.full((len(sample_id), job.k), np.inf, np.float32)
    found = np.full((len(sample_id), job.k), knn.MISSING_ID, np.int64)
    order = np.argsort(sample_id)
    for number in piece.old:
        uri = core_files.join(job.base, "neighbors", core_artifacts.part_name(number))
        if not core_files.exists(uri):  # a part all of whose images are in quarantine
            continue
        table = core_files.read_table(uri)
        theirs = table["sample_id"].to_numpy()
        at = order[np.minimum(np.searchsorted(sample_id, theirs, sorter=order), len(order) - 1)]
        same = sample_id[at] == theirs
        for column, target in (("neighbor_distances", distances), ("neighbor_ids", found)):
            values = table[column].combine_chunks().flatten().to_numpy().reshape(-1, job.k)
            target[at[same]] = values[same]
    return distances, found


# ---- estimator -------------------------------------------------------------------------------------------------------


def estimator_stage(
    output: str, densities: core_artifacts.Stage, settings: EstimatorSettings, base: Base
) -> core_artifacts.Stage:
    """The estimator stage under `output`."""
    stage = estimator.stage_of(output, densities, settings)
    identity = stage.identity | {"base": base.artifacts["estimator"].fingerprint}
    return dataclasses.replace(stage, identity=identity)


def keep_or_fit(
    stage: core_artifacts.Stage,
    base: Base,
    output: str,
    densities: core_artifacts.Artifact,
    feature_dim: int,
    settings: EstimatorSettings,
    update: UpdateSettings,
) -> tuple[list[core_artifacts.Part], dict[str, Any]]:
    """The base's predictor, on the new scale, while it holds on held-out rows; else one that is fitted anew."""
    before = base.artifacts["estimator"]
    asked = {name: stage.identity[name] for name in ("settings", "torch")}
    of_base = {name: before.identity[name] for name in asked}
    volume_dim = [artifact.totals["volume_dim"] for artifact in (densities, base.artifacts["densities"])]
    fitted_r2 = before.totals.get("fitted_r2", before.totals["heldout"]["r2_log_density"])
    uris = core_files.join(output, "features"), core_files.join(output, "densities")
    if asked != of_base or volume_dim[0] != volume_dim[1] or settings.split != "hash" or fitted_r2 is None:
        console.say(
            "estimator: fitted anew, since the base's was made with other settings or cannot be judged on held-out images"
        )
        return estimator.run(stage, uris[0], uris[1], densities, feature_dim, settings)
    shift = densities.totals["log_normalizer"] - base.artifacts["densities"].totals["log_normalizer"]
    names = _spread(densities, settings)
    keep = tasks.task(_keep, resources.feasible_cpus(settings.threads))
    least = fitted_r2 - update.max_r2_drop
    heldout = tasks.get(keep.remote(stage, base.folder("estimator"), shift, uris, names, settings, least))
    if heldout is None:
        console.say(
            f"estimator: the base's predictor has lost more than {update.max_r2_drop:g} of its R²; fitting anew"
        )
        return estimator.run(stage, uris[0], uris[1], densities, feature_dim, settings)
    console.say(
        f"estimator: kept from the base; R² of log density {heldout['r2_log_density']:.3f}, {fitted_r2:.3f} when fitted"
    )
    totals = {name: before.totals[name] for name in ("n_train", "epochs", "best_epoch")}
    totals |= {"heldout": heldout, "n_heldout": heldout["n"], "fitted_r2": fitted_r2}
    return list(stage.finished_parts().values()), totals


def _spread(densities: core_artifacts.Artifact, settings: EstimatorSettings) -> list[str]:
    """Parts that hold about `fit.HELDOUT_ROWS` held-out rows, evenly from all: the listing has an order, new images are last."""
    names = [part.name for part in densities.parts if part.rows]
    wanted = len(names) * fit.HELDOUT_ROWS / max(1.0, densities.rows * settings.holdout_fraction)
    if wanted >= len(names):
        return names
    return [names[i] for i in np.unique(np.linspace(0, len(names) - 1, max(2, round(wanted))).round().astype(int))]


def _keep(
    stage: core_artifacts.Stage,
    folder: str,
    shift: float,
    uris: tuple[str, str],
    names: Sequence[str],
    settings: EstimatorSettings,
    least: float,
) -> dict[str, Any] | None:
    """Write the base's predictor with its target moved by `shift`, the change of log c; None where it does not hold any more."""
    files = {
        name: core_files.read_bytes(core_files.join(folder, name))
        for name in (density_predictor.WEIGHTS_FILE, density_predictor.DESCRIPTION_FILE)
    }
    predictor = density_predictor.from_bytes(files).rescaled(shift)
    true, predicted = [], []
    for name in names:
        sample_id, vectors, log_density = estimator.load_part(*uris, name)
        held = fit.held_out(sample_id, settings)
        if held.any():
            true.append(log_density[held])
            predicted.append(predictor.predict(vectors[held]).log_density)
    if not true:
        return None
    measured = fit.calibration(np.concatenate(true), np.concatenate(predicted))
    if measured.r2_log_density is None or measured.r2_log_density < least:
        return None
    stage.write_part(density_predictor.WEIGHTS_FILE, density_predictor.weights_bytes(predictor), 0)
    stage.write_part(density_predictor.DESCRIPTION_FILE, files[density_predictor.DESCRIPTION_FILE], 0)
    shown = slice(fit.CALIBRATION_ROWS)
    table = {"log_density": np.concatenate(true)[shown], "predicted_log_density": np.concatenate(predicted)[shown]}
    stage.write_table(estimator.HELDOUT, pa.table(table))
    return dataclasses.asdict(measured)
