"""The features stage: every image of a source through extractor actors into committed parts.

An update extracts the images that are not in its base as they are now, and puts the parts together with those of the
base.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version as version_of
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from pd_core.core import artifacts, files, schemas, trust
from pd_core.core.errors import RunError, UserError
from pd_core.core.settings.data import DataSettings
from pd_core.core.settings.index import FeatureSettings
from pd_core.engine import console, resources, tasks, telemetry
from pd_core.images import child, resize, sources
from pd_core.images import decode as images_decode
from pd_core.images.decode import Reason
from pd_core.images.listing import Listing
from pd_core.index.base import Update
from pd_core.index.extractor import Extractor, ExtractorSpec

MAX_TASKS = 8192  # read tasks of one execution: the driver's plan stays this small for any number of images
FEWEST_TASKS = 16  # of one execution, where there are so many batches
TASK_BATCHES = 8
TASK_BYTES = 32 << 20  # pixels that a task hands over
PARQUET_ROWS = 1024


# ---- the stage -------------------------------------------------------------------------------------------------------
def decoding(data: DataSettings) -> dict[str, Any]:
    """JSON-able: what decides the pixels of an image beside its bytes."""
    import PIL

    return {
        "max_image_bytes": data.max_image_bytes,
        "max_image_pixels": data.max_image_pixels,
        "background": list(data.background),
        "pillow": PIL.__version__,
    }


def stage_of(
    output: str, listing: Listing, spec: ExtractorSpec, data: DataSettings, settings: FeatureSettings, device: str
) -> artifacts.Stage:
    """The features stage under `output`. Device, batch size, threads and torch are part of it: they may move last bits.

    device: cpu or cuda.
    """
    identity = {
        "listing": listing.fingerprint,
        "extractor": spec.identity(),
        "decode": decoding(data),
        "device": device,
        "batch_size": settings.batch_size,
        "threads": settings.actor_cpus,
        "torch": version_of("torch"),  # not torch.__version__: the driver would import torch for it
    }
    beside = (files.join(output, "quarantine"),)
    return artifacts.Stage(files.join(output, "features"), "features", schemas.VERSIONS["features"], identity, beside)


_Byte = Annotated[int, Field(ge=0, le=255)]


@dataclass(frozen=True)
class _Decoding:
    """What is used of `decoding`, as it is recorded."""

    max_image_bytes: trust.Count
    max_image_pixels: trust.Count
    background: tuple[_Byte, _Byte, _Byte]


@dataclass(frozen=True)
class Recorded:
    """How the features in a directory were made, as far as it decides those of another image."""

    device: Literal["cpu", "cuda"]
    batch_size: trust.Small
    threads: trust.Small
    decode: _Decoding

    @property
    def limits(self) -> images_decode.DecodeLimits:
        """What decoding an image may take."""
        return images_decode.limits_of(DataSettings(**asdict(self.decode)))


def recorded(artifact: artifacts.Artifact, where: str) -> Recorded:
    """What the record of a features stage says. Raises UserError: what cannot be; `where` is its URI."""
    return trust.checked(Recorded, artifact.identity, where, whole=False)


def quarantine_of(features: artifacts.Stage) -> artifacts.Stage:
    """The quarantine stage beside a features stage."""
    uri = features.uri.removesuffix("features") + "quarantine"
    version = schemas.VERSIONS["quarantine"]
    return replace(features, uri=uri, kind="quarantine", schema_version=version, beside=())


def batches_together(batches: int, batch_size: int, batch_bytes: int, parquet_rows: int | None) -> int:
    """Batches that one task decodes: so many that Ray's own work of a millisecond or more per task weighs little.

    Of Parquet, in parts of `parquet_rows`, more, since a row group is decoded whole for any of its rows.
    """
    least = max(1, -(-batches // MAX_TASKS))
    if parquet_rows is not None:
        return max(least, min(PARQUET_ROWS, parquet_rows) // batch_size)
    return max(least, min(TASK_BYTES // batch_bytes, TASK_BATCHES, batches // FEWEST_TASKS))


@dataclass(frozen=True)
class Work:
    """What every process of the stage needs to know; small and picklable."""

    source: sources.Source
    listing: Listing
    spec: ExtractorSpec
    limits: images_decode.DecodeLimits
    batch_size: int
    features: artifacts.Stage
    missing: tuple[int, ...] = field(default=(), repr=False)  # parts to make, ascending
    halvings: int = 0  # of the batches that a task decodes

    @property
    def quarantine(self) -> artifacts.Stage:
        """Beside the features, of the same identity: what one has of an image the other has not."""
        return quarantine_of(self.features)

    def finished_parts(self) -> dict[str, artifacts.Part]:
        """Parts of features/ that are in place together with their quarantined rows."""
        done, quarantined = self.features.finished_parts(), self.quarantine.finished_parts()
        bad = {name: sum(part.counts.values()) for name, part in done.items()}
        return {n: p for n, p in done.items() if bad[n] == (quarantined[n].rows if n in quarantined else 0)}

    @property
    def batches_together(self) -> int:
        """Batches that one task decodes."""
        size = self.spec.preprocess.height * self.spec.preprocess.width * 3 * self.batch_size
        rows = self.listing.part_rows if self.source.kind == "parquet" else None
        return max(1, batches_together(self.batches(), self.batch_size, size, rows) >> self.halvings)

    @property
    def batches_per_part(self) -> int:
        """Batches of a full part."""
        return -(-self.listing.part_rows // self.batch_size)

    def batches(self) -> int:
        """Batches of all missing parts; only the last part of the listing may have fewer than the others."""
        last = self.missing[-1]
        short = self.batches_per_part - -(-self.listing.rows_of(last) // self.batch_size)
        return len(self.missing) * self.batches_per_part - short


def run(
    work: Work, now: resources.Cluster, settings: FeatureSettings, max_bad_fraction: float, some: bool = True
) -> tuple[list[artifacts.Part], dict[str, Any]]:
    """Make the missing parts of features/ and quarantine/; returns the parts and totals of features/ to commit.

    Args:
        work: what is to be done.
        now: the cluster.
        settings: of the stage.
        max_bad_fraction: share of the listed images that may be quarantined.
        some: refuse a source none of whose images is usable.

    Raises:
        UserError: more images than that are unusable.
        RunError: parts are still missing after as many executions as `tasks.ROUND_DELAYS_S`.
    """
    parts = list(_complete(work, now, settings, int(max_bad_fraction * work.listing.rows)).values())
    totals = _conclude(work.quarantine, parts, work.listing.rows, max_bad_fraction)
    if totals["rows"] == 0 and some:
        bad = totals["quarantined"]
        raise UserError(f"{work.source.root}: none of the {bad} images is usable; see {work.quarantine.uri}")
    return parts, totals | {"dim": work.spec.feature_dim, "extractor": work.spec.to_json()}


def _conclude(
    quarantine: artifacts.Stage, parts: Sequence[artifacts.Part], listed: int, max_bad_fraction: float
) -> dict[str, Any]:
    """Commit the quarantine beside features parts; returns their counts. Every listed image is in one of the two."""
    reasons = reasons_of(parts)
    stop_if_mostly_bad(reasons, listed, int(max_bad_fraction * listed), quarantine.uri)
    good, bad = sum(part.rows for part in parts), sum(reasons.values())
    if good + bad != listed:
        raise RunError(
            f"features: {listed} images listed, but {good} features and {bad} quarantined; "
            "this is a defect: keep the output and report it"
        )
    quarantine.commit(quarantine.finished_parts().values(), {"rows": bad, "reasons": reasons}, {})
    return {"rows": good, "listed": listed, "quarantined": bad}


def _complete(work: Work, now: resources.Cluster, settings: FeatureSettings, max_bad: int) -> dict[str, artifacts.Part]:
    """All parts by name, after as many executions as it takes.

    After one that made nothing a task takes half as many batches: one that ends its worker takes ever fewer others
    along.
    """
    work.quarantine.begin(overwrite=True)  # the features stage has been begun: what lies here is its, or stale

    parts: set[str] = set()
    fruitless = -1

    def execute() -> None:
        nonlocal fruitless
        done = work.finished_parts()
        fruitless = 0 if len(done) > len(parts) else fruitless + 1
        parts.update(done)
        missing = tuple(p for p in range(work.listing.parts) if artifacts.part_name(p) not in done)
        if missing:
            _execute(replace(work, missing=missing, halvings=fruitless), now, settings, max_bad, done)
        if absent := work.listing.parts - len(work.finished_parts()):
            raise RunError(f"features: {absent} of {work.listing.parts} parts are missing; run the same command again")

    tasks.persist("features", execute, lambda: len(parts))
    return work.finished_parts()


def _execute(
    work: Work, now: resources.Cluster, settings: FeatureSettings, max_bad: int, done: Mapping[str, artifacts.Part]
) -> None:
    bad = reasons_of(done.values())
    stop_if_mostly_bad(bad, work.listing.rows, max_bad, work.quarantine.uri)
    rows_done = sum(part.rows + sum(part.counts.values()) for part in done.values())
    _count(0, 0, dict.fromkeys(Reason, 0))
    with console.progress("features", work.listing.rows, "images", rows_done) as bar:
        for record in _stream(work, now, settings).iter_rows():
            bar.update(record["rows"])
            reasons = json.loads(record["quarantined"])
            _count(1, record["rows"], reasons)
            for reason, count in reasons.items():
                bad[reason] = bad.get(reason, 0) + count
            stop_if_mostly_bad(bad, work.listing.rows, max_bad, work.quarantine.uri)


def _count(parts: int, rows: int, quarantined: Mapping[str, int]) -> None:
    telemetry.PARTS.add(parts, stage="features")
    telemetry.IMAGES.add(rows, stage="features")
    for reason, count in quarantined.items():
        telemetry.QUARANTINED.add(count, stage="features", reason=str(reason))


def _stream(work: Work, now: resources.Cluster, settings: FeatureSettings) -> Any:
    """The Ray Data plan: batch numbers -> decoded batches -> features -> committed parts, in order."""
    import ray.data

    console.silence_ray_data()
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.raise_original_map_exception = True  # else our errors arrive as text inside Ray's
    fewest, most, cpus, gpus = resources.actor_pool(now, settings.actors, settings.actor_cpus, settings.actor_gpus)
    batches = work.batches()
    together = work.batches_together
    runs = [{"first": n, "stop": min(n + together, batches)} for n in range(0, batches, together)]
    # not ray.data.range or from_arrow: these run a task of a CPU for every block, to read or to look at it
    numbers = ray.data.from_items(runs, override_num_blocks=len(runs))
    decoded = numbers.map_batches(
        functools.partial(_decode, work),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=resources.DECODE_CPUS,
        memory=resources.decode_memory(work.limits.memory_bytes),
    )
    extracted = decoded.map_batches(
        _ExtractBatch,
        fn_constructor_args=(work.spec, settings.actor_cpus, work.batch_size, telemetry.workflow()),
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(min_size=fewest, max_size=most),
        num_cpus=cpus,
        num_gpus=gpus or None,
    )
    parts = extracted.repartition(target_num_rows_per_block=work.listing.part_rows, strict=True)
    return parts.map_batches(
        functools.partial(_write_part, work), batch_size=None, batch_format="pyarrow", num_cpus=resources.IO_CPUS
    )


# A decoded batch is one row: pixels of the good images, and for every image of the batch what is known of it.
_BATCH = pa.schema(
    [
        ("part", pa.int64()),
        ("first_row", pa.int64()),
        ("pixels", pa.large_binary()),
        ("width", pa.list_(pa.int32())),
        ("height", pa.list_(pa.int32())),
        ("content_hash", pa.list_(pa.string())),
        ("reason", pa.list_(pa.string())),  # null where the image is good
        ("detail", pa.list_(pa.string())),
    ]
)


def _extracted_schema(dim: int) -> pa.Schema:
    """One row per image, good or not, in listing order."""
    return pa.schema(
        [
            ("part", pa.int64()),
            ("row", pa.int64()),
            ("feature", pa.list_(pa.float32(), dim)),
            ("width", pa.int32()),
            ("height", pa.int32()),
            ("content_hash", pa.string()),
            ("reason", pa.string()),
            ("detail", pa.string()),
        ]
    )


def _decode(work: Work, runs: pa.Table) -> Iterator[pa.Table]:
    """Runs of batch numbers (first, stop) to decoded batches; within a part they are read in one go."""
    child.begin()
    numbers = [n for run in runs.to_pylist() for n in range(run["first"], run["stop"])]
    places = [(work.missing[n // work.batches_per_part], n % work.batches_per_part) for n in numbers]
    for part in dict.fromkeys(part for part, _ in places):
        inside = [batch for p, batch in places if p == part]
        first, stop = inside[0] * work.batch_size, (inside[-1] + 1) * work.batch_size
        rows = _listed(work.listing, part)[first:stop]
        decoded = child.prepared(sources.read(work.source, rows), work.limits, work.spec.preprocess)
        for start in range(0, rows.num_rows, work.batch_size):
            yield _decoded_batch(part, first + start, itertools.islice(decoded, work.batch_size))


@functools.lru_cache(maxsize=2)  # the batches of a part mostly meet the same few workers
def _listed(listing: Listing, part: int) -> pa.Table:
    return listing.read(part)


def _decoded_batch(part: int, first_row: int, batch: Iterable[resize.Prepared | images_decode.BadImage]) -> pa.Table:
    good: list[memoryview] = []
    facts: list[dict[str, Any]] = []
    for one in batch:
        if isinstance(one, images_decode.BadImage):
            facts.append({"reason": one.reason.value, "detail": one.detail})
            continue
        good.append(one.pixels.data)
        facts.append({"width": one.width, "height": one.height, "content_hash": one.content_hash})
    columns: dict[str, list[Any]] = {
        name: [[fact.get(name) for fact in facts]] for name in ("width", "height", "content_hash", "reason", "detail")
    }
    return pa.table({"part": [part], "first_row": [first_row], "pixels": [b"".join(good)], **columns}, schema=_BATCH)


class _ExtractBatch:
    """Ray Data actor: a decoded batch to its features."""

    def __init__(self, spec: ExtractorSpec, threads: int, batch_size: int, workflow: str) -> None:
        telemetry.hold(workflow, "features")
        self.batch_size = batch_size
        self.failure: UserError | RunError | None = None
        try:
            self.extractor = Extractor(spec, resources.assigned_device(), threads)
        except (UserError, RunError) as error:  # an actor that dies in its constructor would take the reason with it
            self.failure = error

    def __call__(self, batch: pa.Table) -> pa.Table:
        if self.failure is not None:
            raise self.failure
        assert batch.num_rows == 1, batch.num_rows
        spec = self.extractor.spec
        columns = {name: batch[name].combine_chunks().flatten() for name in _BATCH.names[3:]}
        reasons, details = columns["reason"].to_pylist(), columns["detail"].to_pylist()
        count = len(reasons)
        good = np.array([reason is None for reason in reasons], dtype=bool)
        features = np.zeros((count, spec.feature_dim), dtype=np.float32)
        if good.any():
            watch = artifacts.Stopwatch()
            raw = batch["pixels"].combine_chunks().buffers()[2]
            found = int(good.sum())
            shape = (found, spec.preprocess.height, spec.preprocess.width, 3)
            pixels = np.frombuffer(raw, np.uint8, count=int(np.prod(shape))).reshape(shape)
            features[good] = self.extractor.extract_some(pixels, self.batch_size)
            telemetry.busy(watch.seconds, "features", self.extractor.device.type)
        for row in np.flatnonzero(~np.isfinite(features).all(axis=1)):
            features[row] = 0
            bad = not_finite(spec)
            reasons[row], details[row] = bad.reason.value, bad.detail
        first = batch["first_row"][0].as_py()
        arrays = {
            "part": pa.array(np.full(count, batch["part"][0].as_py())),
            "row": pa.array(np.arange(first, first + count)),
            "feature": _fixed_size_list(features),
            **columns,
            "reason": pa.array(reasons, pa.string()),
            "detail": pa.array(details, pa.string()),
        }
        schema = _extracted_schema(spec.feature_dim)
        return pa.table([arrays[name] for name in schema.names], schema=schema)


def not_finite(spec: ExtractorSpec) -> images_decode.BadImage:
    """What is said of an image whose feature is not finite."""
    return images_decode.BadImage(Reason.FEATURE_NOT_FINITE, f"{spec.model} in {spec.precision} gave NaN or infinity")


def _fixed_size_list(values: np.ndarray) -> pa.FixedSizeListArray:
    _, dim = values.shape
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).reshape(-1)), dim)


def _write_part(work: Work, rows: pa.Table) -> pa.Table:
    """All images of one part, in order, to its committed files; returns what the driver counts."""
    part = rows["part"][0].as_py()
    expected = work.listing.rows_of(part)
    order = rows["row"].to_numpy()
    if rows.num_rows != expected or not np.array_equal(order, np.arange(expected)) or len(rows["part"].unique()) != 1:
        raise RunError(f"features: part {part} arrived with {rows.num_rows} rows out of order, expected {expected}")
    listed = work.listing.read(part)
    bad = rows["reason"].is_valid().to_numpy(zero_copy_only=False)
    name = artifacts.part_name(part)
    reasons: Counter[str] = Counter()
    if bad.any():
        told = [listed["sample_id"], listed["key"], rows["reason"], rows["detail"]]
        table = pa.table([column.filter(pa.array(bad)) for column in told], schema=schemas.quarantine())
        reasons.update(table["reason"].to_pylist())
        work.quarantine.write_table(name, table, reasons)
    else:  # an attempt that died may have left rows here that this one could read
        work.quarantine.drop_part(name)
    good = pa.array(~bad)
    schema = schemas.features(work.spec.feature_dim, work.listing.metadata)
    columns = {**{c: listed[c] for c in listed.column_names}, **{c: rows[c] for c in rows.column_names}}
    table = pa.table([columns[c].filter(good).cast(schema.field(c).type) for c in schema.names], schema=schema)
    work.features.write_table(name, table, dict(sorted(reasons.items())))
    return pa.table({"rows": [rows.num_rows], "quarantined": [json.dumps(reasons)]})


# ---- an update -------------------------------------------------------------------------------------------------------
_Place = tuple[str, artifacts.Part]  # a part, and the directory of its stage


def merge(
    stage: artifacts.Stage, update: Update, max_bad_fraction: float
) -> tuple[list[artifacts.Part], dict[str, Any]]:
    """Put features/ and quarantine/ of an update together from those of its base and of its new images.

    Returns:
        The parts and totals of features/ to commit.

    Raises:
        UserError: more images than `max_bad_fraction` of the listed ones are unusable.
    """
    import ray

    quarantine = quarantine_of(stage)
    quarantine.begin(overwrite=True)
    origins, removed, merge_part = update.origins(), ray.put(update.removed), tasks.task(_merge_part)
    folders = {kind: (update.base.folder(kind), files.join(update.folder, kind)) for kind in ("features", "quarantine")}
    there = {uri: _parts_of(uri) for pair in folders.values() for uri in pair}

    def submit(names: Sequence[str]) -> Any:
        (name,) = names
        origin = origins[name]
        places = {
            kind: (_places(old, there[old], origin.old), _places(new, there[new], origin.new))
            for kind, (old, new) in folders.items()
        }
        return merge_part.remote(stage, quarantine, update.listed.uri, name, origin.whole, places, removed)

    bad = quarantine.finished_parts()
    for name, part in stage.finished_parts().items():
        if sum(part.counts.values()) != (bad[name].rows if name in bad else 0):
            stage.drop_part(name)  # its quarantined rows, which were written first, are lost
    parts = tasks.make_missing(stage, [[name] for name in origins], submit)
    totals = _conclude(quarantine, parts, update.listed.rows, max_bad_fraction)
    return parts, update.base.artifacts["features"].totals | totals


def _parts_of(uri: str) -> dict[str, artifacts.Part]:
    artifact = artifacts.load_artifact(uri)
    return {} if artifact is None else {part.name: part for part in artifact.parts}


def _places(uri: str, parts: Mapping[str, artifacts.Part], numbers: Iterable[int]) -> list[_Place]:
    names = map(artifacts.part_name, numbers)
    return [(uri, parts[name]) for name in names if name in parts]


def _merge_part(
    stage: artifacts.Stage,
    quarantine: artifacts.Stage,
    listing_uri: str,
    name: str,
    whole: bool,
    places: Mapping[str, tuple[list[_Place], list[_Place]]],
    removed: np.ndarray,
) -> None:
    """Write a part of both stages. places: of each, parts of the base and parts of the new images."""
    if whole:
        for target in (quarantine, stage):
            for uri, part in places[target.kind][0]:
                target.adopt(uri, part)
        return
    wanted = files.read_table(files.join(listing_uri, name), ["sample_id"])["sample_id"]
    bad = _gather(*places["quarantine"], wanted, removed)
    reasons: dict[str, int] = {}
    if bad is not None and bad.num_rows:
        reasons = dict(sorted(Counter(bad["reason"].to_pylist()).items()))
        quarantine.write_table(name, bad, reasons)
    else:
        quarantine.drop_part(name)
    good = _gather(*places["features"], wanted, removed)
    assert good is not None, "every part has features, if only of no rows"
    stage.write_table(name, good, reasons)


def _gather(
    old: Iterable[_Place], new: Iterable[_Place], wanted: pa.ChunkedArray, removed: np.ndarray
) -> pa.Table | None:
    """Rows of a table of the base and of the new images that belong to a part, in the order of the listing.

    An image whose content has changed is in both under one id: the base's row is among the removed.
    """
    tables = []
    for places, gone in ((old, removed), (new, removed[:0])):
        for uri, part in places:
            table = files.read_table(files.join(uri, part.name))
            stays = pa.array(~np.isin(table["sample_id"].to_numpy(), gone))
            tables.append(table.filter(pc.and_(pc.is_in(table["sample_id"], value_set=wanted), stays)))
    return pa.concat_tables(tables).combine_chunks() if tables else None


# ---- what is said of features ----------------------------------------------------------------------------------------
def reasons_of(parts: Iterable[artifacts.Part]) -> dict[str, int]:
    """Quarantined images by reason, added up over features parts."""
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part.counts)
    return dict(total)


def told(bad: Mapping[str, int]) -> str:
    """Quarantined images by reason, for a person: the commonest first."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(bad.items(), key=lambda item: (-item[1], item[0])))


def left_out(parts: Iterable[artifacts.Part], listed: int, quarantine: str) -> list[str]:
    """A line on the images that were quarantined, if any were, for a person."""
    if not (bad := reasons_of(parts)):
        return []
    return [f"quarantine: {sum(bad.values()):,} of {listed:,} images left out ({told(bad)}): {quarantine}"]


def stop_if_mostly_bad(bad: Mapping[str, int], listed: int, max_bad: int, quarantine: str) -> None:
    """Raise UserError once more than `max_bad` images are quarantined."""
    total = sum(bad.values())
    if total > max_bad:
        raise UserError(
            f"data: {total} of {listed} images are unusable so far ({told(bad)}), --data.max_bad_fraction allows "
            f"{max_bad} of {listed}; see {quarantine}, mend them or raise it to {total / listed + 5e-4:.3f} or more; "
            "what is done is kept"
        )


def load_features(uri: str) -> tuple[pa.Table, np.ndarray]:
    """One features part: its columns without `feature`, and the features float32 [n, D]."""
    table = files.read_table(uri)
    column = table["feature"].combine_chunks()
    dim = column.type.list_size
    values = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, dim)
    return table.drop_columns(["feature"]), values
