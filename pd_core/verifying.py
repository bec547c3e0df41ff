"""Checking finished samples (`generate.py --verify`): every part against the commit record, some rows against their seeds.

The commit record tells whether a file is the one that was written. Whether its rows are what their seeds give, only making
them again tells: the whole chunk is made, scored, searched and accepted as in the run, so that every value must be equal to
the last bit and the rows accepted of the chunk must be those of the table. The number of search processes may be another:
distances do not depend on it (knn.py).
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pd_core import cluster, ids, schemas, search, storage
from pd_core.candidates import Batch, ChunkMaker, Recipe, finish, pixels_hash
from pd_core.errors import UserError, one_line

BLOCK_BYTES = 1 << 23  # of a file, read at once
BATCH_ROWS = 64  # with their images, read at once
GROUP_CHUNKS = 32  # of one part, compared by one task: its file is read once for them
IN_FLIGHT = 3  # groups: one that is made, one that is read, one that is compared
_SPOKEN = {"density_predicted": "predicted density", "density_index": "density by the index"}


@dataclass(frozen=True)
class Draw:
    """The choice of rows: the `rows` of them with the smallest hashes of their ids and this seed."""

    rows: int
    seed: int


@dataclass(frozen=True)
class Samples:
    """A finished samples stage; picklable.

    Attributes:
        uri: its directory.
        recipe: of its rows.
        chunks_per_part: chunks whose accepted rows make one part.
        candidates: up to the one that gave the last row; what lies behind it is not in the table.
    """

    uri: str
    recipe: Recipe
    chunks_per_part: int
    candidates: int

    def part_of(self, chunk: int) -> str:
        """File that holds the rows of a chunk."""
        return storage.part_name(chunk // self.chunks_per_part)

    def ids_of(self, part: str) -> tuple[int, int]:
        """First candidate of a part and the first one after it."""
        number, size = storage.part_number(part), self.chunks_per_part * self.recipe.chunk
        assert number is not None, part
        return number * size, min((number + 1) * size, self.candidates)


@dataclass(frozen=True)
class PartCheck:
    """What was found of one part.

    Attributes:
        differences: from the commit record, one text each.
        keys: float64, ascending, of the rows that the part offers for the choice. ids: int64, their sample_ids.
    """

    differences: list[str]
    keys: np.ndarray = field(default_factory=lambda: np.empty(0))
    ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))


@dataclass(frozen=True)
class Findings:
    """What differs.

    Attributes:
        parts: texts by file, of those that differ from the commit record or are missing or surplus.
        rows: every chosen row by sample_id, and what differs from what its seed gives, or None.
        chunks: texts by chunk, of those whose accepted rows are not those of the table.
    """

    parts: dict[str, list[str]] = field(default_factory=dict)
    rows: dict[int, str | None] = field(default_factory=dict)
    chunks: dict[int, list[str]] = field(default_factory=dict)

    def add(self, other: Findings) -> None:
        """Take the rows and chunks of another over."""
        self.rows.update(other.rows)
        self.chunks.update(other.chunks)


# ---- the files -------------------------------------------------------------------------------------------------------


def record_differences(artifact: storage.Artifact) -> list[str]:
    """What in the commit record of a samples stage contradicts itself."""
    found = []
    identity = {"kind": artifact.kind, "schema_version": artifact.schema_version, **artifact.identity}
    if storage.fingerprint(identity) != artifact.fingerprint:
        found.append("its fingerprint is not that of its identity")
    wanted = artifact.identity["n"]
    if not artifact.rows == artifact.totals["rows"] == wanted:
        found.append(f"its parts hold {artifact.rows} rows, its totals {artifact.totals['rows']}, --n was {wanted}")
    names, candidates = [part.name for part in artifact.parts], artifact.totals["candidates"]
    if names != [storage.part_name(number) for number in range(len(names))]:
        found.append("its parts are not numbered from 0 without gaps")
    if -(-candidates // (artifact.identity["chunks_per_part"] * artifact.identity["chunk"])) != len(names):
        found.append(f"{candidates} candidates do not end in the last of its {len(names)} parts")
    return found


def check_parts(samples: Samples, artifact: storage.Artifact, draw: Draw) -> tuple[dict[str, list[str]], np.ndarray]:
    """Every part against the commit record, each in a Ray task; returns texts by file and the chosen sample_ids, int64."""
    import ray

    found = {storage.ARTIFACT: record_differences(artifact)}
    known = {part.name for part in artifact.parts}
    for name in sorted(storage.sizes(samples.uri)):
        if name.endswith(".parquet") and name not in known:
            found[name] = ["is not of this run, though whoever opens the directory reads it"]
    task: Any = ray.remote(check_part).options(num_cpus=cluster.IO_CPUS, **cluster.TASK_OPTIONS)
    keys, chosen = np.empty(0), np.empty(0, np.int64)
    with cluster.progress("verify parts", len(artifact.parts), "parts") as bar:
        submit = lambda part: task.remote(samples, part, draw)  # noqa: E731
        for part, check in cluster.bounded(submit, artifact.parts, cluster.in_flight):
            found[part.name] = check.differences
            keys, chosen = _first(np.append(keys, check.keys), np.append(chosen, check.ids), draw.rows)
            bar.update()
    return {name: texts for name, texts in sorted(found.items()) if texts}, chosen


def check_part(samples: Samples, part: storage.Part, draw: Draw) -> PartCheck:
    """One part against its record, and the rows it offers for the choice; runs in a Ray task.

    Holds a block of the file and the column of ids; no image is decoded.
    """
    location = storage.join(samples.uri, part.name)
    if storage.part_number(part.name) is None:
        return PartCheck(["is no name of a part"])
    try:
        size, digest = _digest(location)
    except FileNotFoundError:
        return PartCheck(["is missing"])
    compared = {"bytes": (size, part.bytes), "sha256": (digest, part.sha256)}
    try:
        numbers = _ids_in(location)
    except (pa.ArrowException, OSError, ValueError) as error:  # its bytes were read just now: they are no such table
        return PartCheck([*_unequal(compared), f"cannot be read: {one_line(error)}"])
    differences = _unequal(compared | {"rows": (len(numbers), part.rows)})
    first, end = samples.ids_of(part.name)
    inside = (numbers >= first) & (numbers < end)
    if not inside.all():
        differences.append(f"sample_id {numbers[~inside][0]} is not one of its own, {first} ... {end - 1}")
    if not (np.diff(numbers) > 0).all():
        differences.append("its sample_ids do not ascend")
    if end == samples.candidates and end - 1 not in numbers:
        differences.append(f"sample {end - 1}, the last of all, is not in it")
    own = np.unique(numbers[inside])
    return PartCheck(differences, *_first(ids.uniform(own, ids.stream(draw.seed, "verify")), own, draw.rows))


def _first(keys: np.ndarray, numbers: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.lexsort((numbers, keys))[:count]
    return keys[order], numbers[order]


def _unequal(compared: Mapping[str, tuple[Any, Any]]) -> list[str]:
    return [
        f"{name} {found}, committed {recorded}" for name, (found, recorded) in compared.items() if found != recorded
    ]


def _digest(location: str) -> tuple[int, str]:
    """Bytes and SHA-256 of a file of any size."""
    fs, path = storage.filesystem(location)
    digest, size = hashlib.sha256(), 0
    with fs.open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            size += len(block)
    return size, digest.hexdigest()


def _ids_in(location: str) -> np.ndarray:
    fs, path = storage.filesystem(location)
    with fs.open(path, "rb") as file:
        parquet = pq.ParquetFile(file)
        if not parquet.schema_arrow.equals(schemas.samples()):
            raise ValueError("its columns are not those of samples")
        return parquet.read(["sample_id"])["sample_id"].to_numpy()


# ---- the rows --------------------------------------------------------------------------------------------------------


class _Maker:
    """Ray actor: chunks made again."""

    def __init__(self, recipe: Recipe) -> None:
        self.failure: Exception | None = None
        try:
            self.maker = ChunkMaker(recipe, cluster.assigned_device())
        except Exception as error:  # an actor that dies in its constructor would take the reason with it
            self.failure = error

    def ready(self) -> None:
        """Answers once the models are loaded; raises what kept them from it."""
        if self.failure is not None:
            raise self.failure

    def make(self, chunk: int) -> Batch | str:
        """The chunk, or why it cannot be made."""
        self.ready()
        try:
            return self.maker.make(chunk)
        except UserError:
            raise
        except Exception as error:  # whatever a generator raises: the other rows are compared all the same
            return f"{type(error).__name__}: {one_line(error)}"


def check_rows(samples: Samples, pool: search.SearchPool, now: cluster.Cluster, chosen: np.ndarray) -> Findings:
    """Make the chunks of these sample_ids again, on one actor and on the device type that made them, and compare.

    Raises:
        UserError: the generator, the extractor or the predictor are not what they were.
    """
    import ray

    free = replace(now, held_cpus=pool.cpus)
    gpus = 1.0 if samples.recipe.device == "cuda" else 0.0
    _, _, cpus, gpus = cluster.actor_pool(free, 1, samples.recipe.threads, gpus)
    maker: Any = (
        ray.remote(_Maker).options(num_cpus=cpus, num_gpus=gpus, **cluster.ACTOR_OPTIONS).remote(samples.recipe)
    )
    task: Any = ray.remote(compare_group).options(num_cpus=pool.io_cpus, **cluster.TASK_OPTIONS)
    found = Findings()
    try:
        cluster.wait_for([maker], "verify")
        with cluster.progress("verify rows", len(chosen), "rows") as bar:
            submit = lambda group: task.remote(samples, pool, maker, group)  # noqa: E731
            for _, findings in cluster.bounded(submit, _groups(samples, chosen), lambda: IN_FLIGHT):
                found.add(findings)
                bar.update(len(findings.rows))
    finally:
        ray.kill(maker)
    return found


Group = dict[int, list[int]]  # chosen sample_ids by chunk, all of one part


def _groups(samples: Samples, chosen: np.ndarray) -> Iterator[Group]:
    parts: dict[str, Group] = defaultdict(dict)
    for number in sorted(chosen.tolist()):
        chunk = number // samples.recipe.chunk
        parts[samples.part_of(chunk)].setdefault(chunk, []).append(number)
    for group in parts.values():
        chunks = list(group)
        for start in range(0, len(chunks), GROUP_CHUNKS):
            yield {chunk: group[chunk] for chunk in chunks[start : start + GROUP_CHUNKS]}


def compare_group(samples: Samples, pool: search.SearchPool, maker: Any, group: Group) -> Findings:
    """Some chunks of one part; runs in a Ray task, which holds the chosen rows, one chunk, and while it reads a part."""
    present, stored = _stored(samples, group)
    found = Findings()
    for chunk, chosen in group.items():
        made = cluster.get(maker.make.remote(chunk))
        if isinstance(made, str):
            found.rows.update(dict.fromkeys(chosen, f"cannot be made again: {made}"))
            continue
        table, _, _ = finish(samples.recipe, pool, chunk, made)
        table = table.filter(pc.less(table["sample_id"], samples.candidates))
        if differences := compare_accepted(present[chunk], table["sample_id"].to_pylist()):
            found.chunks[chunk] = differences
        own = stored.filter(pc.is_in(stored["sample_id"], pa.array(chosen)))
        found.rows.update(compare_rows(own, table))
    return found


def _stored(samples: Samples, group: Group) -> tuple[dict[int, list[int]], pa.Table]:
    """All sample_ids that the table has of each chunk, and the chosen rows; the file is read in batches."""
    (name,) = {samples.part_of(chunk) for chunk in group}
    chosen = pa.array([number for numbers in group.values() for number in numbers])
    present: dict[int, list[int]] = {chunk: [] for chunk in group}
    kept = []
    fs, path = storage.filesystem(storage.join(samples.uri, name))
    with fs.open(path, "rb") as file:
        for batch in pq.ParquetFile(file, buffer_size=BLOCK_BYTES, pre_buffer=False).iter_batches(BATCH_ROWS):
            numbers = batch["sample_id"]
            for number in numbers.to_pylist():
                if (chunk := number // samples.recipe.chunk) in present:
                    present[chunk].append(number)
            kept.append(batch.filter(pc.is_in(numbers, chosen)))
    return present, pa.Table.from_batches(kept)


def compare_accepted(table: Iterable[int], made: Iterable[int]) -> list[str]:
    """How the sample_ids that the table has of a chunk differ from those accepted when it is made again."""
    stored, expected = Counter(table), set(made)
    texts = dict.fromkeys(expected - stored.keys(), "is accepted, but not in the table")
    for number, count in stored.items():
        if number not in expected:
            texts[number] = "is in the table, but not accepted"
        elif count > 1:
            texts[number] = f"is in the table {count} times"
    return [f"sample {number} {text}" for number, text in sorted(texts.items())]


def compare_rows(stored: pa.Table, made: pa.Table) -> dict[int, str | None]:
    """What differs in each stored row from the row made again, by sample_id; None where nothing does."""
    expected = {row["sample_id"]: row for row in made.to_pylist()}
    found: dict[int, str | None] = {}
    for row in stored.to_pylist():
        number = row["sample_id"]
        found[number] = found.get(number) or _difference(row, expected.get(number))
    return found


def _difference(row: Mapping[str, Any], made: Mapping[str, Any] | None) -> str | None:
    if _pixels_hash(row["image"]) != row["image_hash"]:
        return "the stored picture does not have the stored hash"
    if made is None:
        return "the candidate made again is not accepted"
    if row["image_hash"] != made["image_hash"]:
        return "the picture made again is another"
    names: Sequence[str] = [name for name in made if name not in ("image", "image_hash")]
    texts = [f"{_SPOKEN.get(n, n)} {row[n]}, expected {made[n]}" for n in names if row[n] != made[n]]
    path, expected = row["image"]["path"], made["image"]["path"]
    if path != expected:
        texts.append(f"image path {path}, expected {expected}")
    return "; ".join(texts) or None


def _pixels_hash(image: Mapping[str, Any] | None) -> str | None:
    """Of the picture in a file; its compressed bytes may be others, as another zlib makes them. None: no RGB picture."""
    from PIL import Image

    if image is None or image["bytes"] is None:
        return None
    try:
        with Image.open(io.BytesIO(image["bytes"]), formats=["PNG"]) as picture:
            return pixels_hash(np.asarray(picture)) if picture.mode == "RGB" else None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # what Pillow raises of broken files
        return None
