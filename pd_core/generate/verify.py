"""Checking finished samples (`generate.py --verify`): every file against the commit records, some rows against their seeds.

Of an output all finished stages are checked: the files, the totals that are their sums, and that a candidate is on one side,
in the samples or among the rejected, where these were kept. A commit record tells whether a file is the one that was written.
Whether its rows are what their seeds give, only making them again tells: the whole chunk is made, scored, searched and accepted
as in the run, so that every value must be equal to the last bit and the rows accepted of the chunk must be those of the table.
The number of search processes may be another: distances do not depend on it (knn.py).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pd_core.core import artifacts, schemas, seeds, tables, trust
from pd_core.core import files as core_files
from pd_core.core.errors import UserError, one_line
from pd_core.core.settings.data import DataSettings
from pd_core.engine import console, resources, tasks
from pd_core.generate import sampling
from pd_core.generate.candidates import Batch, ChunkMaker, Recipe, finish, pixels_hash
from pd_core.images import child, decode
from pd_core.index import search

BLOCK_BYTES = 1 << 23  # of a file, read at once
BATCH_ROWS = 64  # with their images, read at once
GROUP_CHUNKS = 32  # of one part, compared by one task: its file is read once for them
READ_AS_WHOLE = (".parquet", ".tar", ".jsonl")  # files that are opened by their suffix, all that lie in a directory
MISSING = "is missing"
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
        rejected: directory of the other candidates, or None where they were not kept.
    """

    uri: str
    recipe: Recipe
    chunks_per_part: int
    candidates: int
    rejected: str | None = None

    def part_of(self, chunk: int) -> str:
        """File that holds the rows of a chunk."""
        return artifacts.part_name(chunk // self.chunks_per_part)

    def beside(self, stage: str) -> str:
        """Directory of another stage of the same output, or of this one."""
        return core_files.join(self.uri.rpartition("/")[0], stage)

    def ids_of(self, part: str) -> tuple[int, int]:
        """First candidate of a part and the first one after it."""
        number, size = artifacts.part_number(part), self.chunks_per_part * self.recipe.chunk
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


def record_differences(artifact: artifacts.Artifact) -> list[str]:
    """What in the commit record of a samples stage contradicts itself."""
    found = [*own_differences(artifact), *_sums(artifact)]
    wanted = artifact.identity["n"]
    if not artifact.rows == artifact.totals["rows"] == wanted:
        found.append(f"its parts hold {artifact.rows} rows, its totals {artifact.totals['rows']}, --n was {wanted}")
    names, candidates = [part.name for part in artifact.parts], artifact.totals["candidates"]
    if names != [artifacts.part_name(number) for number in range(len(names))]:
        found.append("its parts are not numbered from 0 without gaps")
    if -(-candidates // (artifact.identity["chunks_per_part"] * artifact.identity["chunk"])) != len(names):
        found.append(f"{candidates} candidates do not end in the last of its {len(names)} parts")
    return found


def own_differences(artifact: artifacts.Artifact) -> list[str]:
    """What in a commit record contradicts itself, whatever its kind."""
    identity = {"kind": artifact.kind, "schema_version": artifact.schema_version, **artifact.identity}
    if artifacts.fingerprint(identity) != artifact.fingerprint:
        return ["its fingerprint is not that of its identity"]
    return []


def _sums(artifact: artifacts.Artifact) -> list[str]:
    """Totals that are not the sums of the parts' counts, in a samples or pilot stage."""
    totals, parts = artifact.totals, artifact.parts
    candidates = totals.get("candidates")
    if not isinstance(candidates, int) or candidates < 1:
        return [f"its total candidates is {candidates}"]
    bins = [sum(part.counts.get(f"bin_{b:02d}", 0) for part in parts) for b in range(sampling.DENSITY_BINS)]
    sums = {
        "copies": sum(part.counts.get("copies", 0) for part in parts),
        "density_bins": bins,
        "acceptance_rate": artifact.rows / candidates,
    }
    found = [
        f"its total {name} is {totals.get(name)}, the sum of its parts {value}"
        for name, value in sums.items()
        if totals.get(name) != value
    ]
    if (binned := sum(bins)) != (counted := sum(part.counts.get("candidates", 0) for part in parts)):
        found.append(f"its parts count {counted} candidates, and the densities of {binned}")
    return found


def beside_differences(samples: artifacts.Artifact, beside: Mapping[str, artifacts.Artifact]) -> dict[str, list[str]]:
    """What in the commit records of an output's other stages, by name, contradicts themselves or that of the samples."""
    found = {}
    for stage, artifact in beside.items():
        texts = own_differences(artifact)
        theirs = samples.identity if stage == "rejected" else {"samples": samples.fingerprint}
        if artifact.kind != stage:
            texts.append(f"is the record of {artifact.kind}")
        elif stage == "pilot":
            texts += _sums(artifact)
        elif any(artifact.identity.get(name) != value for name, value in theirs.items()):
            texts.append("is of other samples")
        if stage == "rejected" and _stems(artifact).keys() != _stems(samples).keys():
            texts.append("names other parts than samples/")
        if stage == "export" and _stems(artifact) != {stem: rows for stem, rows in _stems(samples).items() if rows}:
            texts.append("names other parts than samples/, or with other numbers of rows")
        found[f"{stage}/{core_files.ARTIFACT}"] = texts
    if samples.identity.get("keep_rejected") and "rejected" not in beside:
        found[f"rejected/{core_files.ARTIFACT}"] = ["is missing, though --keep-rejected was set"]
    return found


def _stems(artifact: artifacts.Artifact) -> dict[str, int]:
    """Rows by name of a part without its suffix."""
    return {part.name.partition(".")[0]: part.rows for part in artifact.parts}


def check_parts(
    samples: Samples, artifact: artifacts.Artifact, beside: Mapping[str, artifacts.Artifact], draw: Draw
) -> tuple[dict[str, list[str]], np.ndarray]:
    """Every part of every stage against its commit record, each in a Ray task.

    Args:
        samples: whose rows may be chosen.
        artifact: their commit record.
        beside: those of the output's other finished stages, by name.
        draw: the choice of rows.

    Returns:
        texts by file (STAGE/NAME), and the chosen sample_ids, int64.
    """
    stages = {"samples": artifact, **beside}
    found = {f"samples/{core_files.ARTIFACT}": record_differences(artifact), **beside_differences(artifact, beside)}
    for stage, committed in stages.items():
        found |= {f"{stage}/{name}": texts for name, texts in surplus(samples.beside(stage), committed).items()}
    items = [(stage, part) for stage, committed in stages.items() for part in committed.parts]
    task = tasks.task(_check, resources.IO_CPUS)
    keys, chosen = np.empty(0), np.empty(0, np.int64)
    with console.progress("verify parts", len(items), "parts") as bar:
        submit = lambda item: task.remote(samples, *item, draw)  # noqa: E731
        for (stage, part), check in tasks.bounded(submit, items, tasks.in_flight):
            found[f"{stage}/{part.name}"] = check.differences
            keys, chosen = _first(np.append(keys, check.keys), np.append(chosen, check.ids), draw.rows)
            bar.update()
    return {name: texts for name, texts in sorted(found.items()) if texts}, chosen


def surplus(uri: str, artifact: artifacts.Artifact, folders: Sequence[str] = ("",)) -> dict[str, list[str]]:
    """Files in these folders of an artifact that its record does not name; text by name."""
    known = {part.name for part in artifact.parts}
    there = [
        f"{folder}/{name}".lstrip("/")
        for folder in folders
        for name in core_files.names(core_files.join(uri, folder) if folder else uri)
    ]
    text = "is not in the record, though whoever opens the directory reads it"
    return {name: [text] for name in there if name.endswith(READ_AS_WHOLE) and name not in known}


def _check(samples: Samples, stage: str, part: artifacts.Part, draw: Draw) -> PartCheck:
    if stage == "samples":
        return check_part(samples, part, draw)
    if "/" in part.name:
        return PartCheck(["is no name of a part"])
    differences = file_differences(core_files.join(samples.beside(stage), part.name), part)
    if not differences and stage == "export" and part.name.endswith(".jsonl"):
        differences = picture_differences(samples, part)
    return PartCheck(differences)


def check_part(samples: Samples, part: artifacts.Part, draw: Draw) -> PartCheck:
    """One part of the samples against its record, and the rows it offers for the choice; runs in a Ray task.

    Holds a block of the file and the columns of ids and copies; no image is decoded.
    """
    location = core_files.join(samples.uri, part.name)
    if artifacts.part_number(part.name) is None:
        return PartCheck(["is no name of a part"])
    differences = file_differences(location, part)
    if differences == [MISSING]:
        return PartCheck(differences)
    try:
        table = _columns(location, ["sample_id", "likely_copy"], schemas.samples())
    except (pa.ArrowException, OSError, ValueError) as error:  # its bytes were read just now: they are no such table
        if _is_refusal(error):
            raise
        return PartCheck([*differences, f"cannot be read: {one_line(error)}"])
    numbers, copies = table["sample_id"].to_numpy(), int(pc.sum(table["likely_copy"].cast(pa.int64())).as_py() or 0)
    counted = {"rows": (len(numbers), part.rows)}
    if not samples.recipe.drop_copies:  # else they are not in the table
        counted["copies"] = (copies, part.counts.get("copies", 0))
    size = samples.chunks_per_part * samples.recipe.chunk
    counted["candidates"] = (size, part.counts.get("candidates", 0))
    differences += _unequal(counted)
    first, end = samples.ids_of(part.name)
    inside = (numbers >= first) & (numbers < end)
    if not inside.all():
        differences.append(f"sample_id {numbers[~inside][0]} is not one of its own, {first} ... {end - 1}")
    if not (np.diff(numbers) > 0).all():
        differences.append("its sample_ids do not ascend")
    if end == samples.candidates and end - 1 not in numbers:
        differences.append(f"sample {end - 1}, the last of all, is not in it")
    own = np.unique(numbers[inside])
    differences += _rejected_differences(samples, part.name, own)
    return PartCheck(differences, *_first(seeds.uniform(own, seeds.stream(draw.seed, "verify")), own, draw.rows))


def file_differences(location: str, part: artifacts.Part) -> list[str]:
    """How the bytes of a file differ from its record."""
    try:
        size, digest = _digest(location)
    except FileNotFoundError:
        return [MISSING]
    return _unequal({"bytes": (size, part.bytes), "sha256": (digest, part.sha256)})


def picture_differences(samples: Samples, part: artifacts.Part) -> list[str]:
    """Whether the files of exported pictures, which no record holds, are those in the samples; `part` is their list.

    Not whether the samples can be read, which the check of their own file tells. Holds BATCH_ROWS pictures twice.
    """
    folder, other = samples.beside("export"), dict[str, list[str]]()
    try:
        lines = [json.loads(line) for line in core_files.read_bytes(core_files.join(folder, part.name)).splitlines()]
        files: dict[int, str] = {line["sample_id"]: trust.relative(line["file"], part.name) for line in lines}
    except (ValueError, KeyError, TypeError) as error:
        return [f"is no list of pictures: {one_line(error)}"]

    def differs(row: Mapping[str, Any]) -> None:
        file = files.pop(row["sample_id"], None)
        if file is None:
            other.setdefault("is not in it", []).append(f"sample {row['sample_id']}")
            return
        try:
            same = (
                row["image"] is not None
                and core_files.read_bytes(core_files.join(folder, file)) == row["image"]["bytes"]
            )
        except FileNotFoundError:
            other.setdefault("is missing", []).append(file)
        else:
            if not same:
                other.setdefault("is not the picture of its sample", []).append(file)

    location = core_files.join(samples.uri, part.name.replace(".jsonl", ".parquet"))
    try:
        with core_files.open_file(location) as file, ThreadPoolExecutor(core_files.READERS) as readers:
            table = tables.open_parquet(file, location, buffer_size=BLOCK_BYTES, pre_buffer=False)
            for batch in table.iter_batches(BATCH_ROWS, columns=["sample_id", "image"]):
                list(readers.map(differs, batch.to_pylist()))
    except FileNotFoundError:
        return []
    except (pa.ArrowException, OSError, ValueError) as error:
        if _is_refusal(error):
            raise
        return []
    if files:
        other["is of no sample"] = list(files.values())
    return [f"{min(names)} {text} ({len(names)} such)" for text, names in other.items()]


def _rejected_differences(samples: Samples, name: str, accepted: np.ndarray) -> list[str]:
    """Whether each candidate of a part is either in `accepted`, int64, or in the table of the rejected; not whether that
    can be read, which the check of its own file tells.
    """
    if samples.rejected is None:
        return []
    try:
        table = _columns(core_files.join(samples.rejected, name), ["sample_id"], schemas.rejected())
    except FileNotFoundError:
        return []
    except (pa.ArrowException, OSError, ValueError) as error:
        if _is_refusal(error):
            raise
        return [f"rejected/{name} beside it cannot be read: {one_line(error)}"]
    first, end = samples.ids_of(name)
    there, counts = np.unique(np.append(accepted, table["sample_id"].to_numpy()), return_counts=True)
    texts = {
        "is neither in it nor in rejected/": np.setdiff1d(np.arange(first, end), there),
        "is more than once in it and rejected/ together": there[counts > 1],
        "is in rejected/ beside it, but not of this part": there[(there < first) | (there >= end)],
    }
    return [f"candidate {found[0]} {text} ({len(found)} such)" for text, found in texts.items() if len(found)]


def _is_refusal(error: Exception) -> bool:
    """Whether the bytes were not to be had. What pyarrow cannot decode is an OSError too, but one of no system call."""
    return isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None)


def _first(keys: np.ndarray, numbers: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.lexsort((numbers, keys))[:count]
    return keys[order], numbers[order]


def _unequal(compared: Mapping[str, tuple[Any, Any]]) -> list[str]:
    return [
        f"{name} {found}, committed {recorded}" for name, (found, recorded) in compared.items() if found != recorded
    ]


def _digest(location: str) -> tuple[int, str]:
    """Bytes and SHA-256 of a file of any size."""
    digest, size = hashlib.sha256(), 0
    with core_files.open_file(location) as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            size += len(block)
    return size, digest.hexdigest()


def _columns(location: str, names: list[str], schema: pa.Schema) -> pa.Table:
    with core_files.open_file(location) as file:
        parquet = tables.open_parquet(file, location)
        if not parquet.schema_arrow.equals(schema):
            raise ValueError("its columns are not those that it should have")
        return parquet.read(names)


# ---- the rows --------------------------------------------------------------------------------------------------------


class _Maker:
    """Ray actor: chunks made again."""

    def __init__(self, recipe: Recipe) -> None:
        self.failure: Exception | None = None
        try:
            self.maker = ChunkMaker(recipe, resources.assigned_device())
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


def check_rows(samples: Samples, pool: search.SearchPool, now: resources.Cluster, chosen: np.ndarray) -> Findings:
    """Make the chunks of these sample_ids again, on one actor and on the device type that made them, and compare.

    Raises:
        UserError: the generator, the extractor or the predictor are not what they were.
    """
    import ray

    free = replace(now, held_cpus=pool.cpus)
    gpus = 1.0 if samples.recipe.device == "cuda" else 0.0
    _, _, cpus, gpus = resources.actor_pool(free, 1, samples.recipe.threads, gpus)
    maker: Any = ray.remote(_Maker).options(num_cpus=cpus, num_gpus=gpus, **tasks.ACTOR_OPTIONS).remote(samples.recipe)
    task = tasks.task(compare_group, pool.io_cpus)
    found = Findings()
    try:
        tasks.wait_for([maker], "verify")
        with console.progress("verify rows", len(chosen), "rows") as bar:
            submit = lambda group: task.remote(samples, pool, maker, group)  # noqa: E731
            for _, findings in tasks.bounded(submit, _groups(samples, chosen), lambda: IN_FLIGHT):
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
    found = Findings()
    try:
        present, stored = _stored(samples, group)
    except (pa.ArrowException, OSError, ValueError) as error:
        if _is_refusal(error):
            raise
        text = f"its file cannot be read: {one_line(error)}"
        return Findings(rows={number: text for chosen in group.values() for number in chosen})
    for chunk, chosen in group.items():
        made = tasks.get(maker.make.remote(chunk))
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
    """All sample_ids that the table has of each chunk, and the chosen rows; the file is read in batches.

    Raises:
        pa.ArrowException, OSError, ValueError: the file cannot be decoded, or not be had (`_is_refusal`).
    """
    (name,) = {samples.part_of(chunk) for chunk in group}
    chosen = pa.array([number for numbers in group.values() for number in numbers])
    present: dict[int, list[int]] = {chunk: [] for chunk in group}
    kept = []
    location = core_files.join(samples.uri, name)
    with core_files.open_file(location) as file:
        table = tables.open_parquet(file, location, buffer_size=BLOCK_BYTES, pre_buffer=False)
        for batch in table.iter_batches(BATCH_ROWS):
            numbers = batch["sample_id"]
            for number in numbers.to_pylist():
                if (chunk := number // samples.recipe.chunk) in present:
                    present[chunk].append(number)
            kept.append(batch.filter(pc.is_in(numbers, chosen)))
    stored = pa.Table.from_batches(kept)
    stored.validate(full=True)  # texts that are no UTF-8 would raise later
    return present, stored


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
    if image is None or image["bytes"] is None:
        return None
    pixels = child.pixels(image["bytes"], decode.limits_of(DataSettings()))
    return None if pixels is None else pixels_hash(pixels)
