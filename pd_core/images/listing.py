"""The listing stage: which images there are, in an order that fixes every later part and batch."""

from __future__ import annotations

import base64
import functools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pd_core.core import artifacts, schemas, tables, trust
from pd_core.core import files as core_files
from pd_core.core.errors import UserError, one_line
from pd_core.engine import console, tasks
from pd_core.images import sources

SAMPLE_ROWS = 512  # of a dry run


@dataclass(frozen=True)
class Listing:
    """The committed listing of a source: which image is in which part, in which place.

    Attributes:
        uri: directory of the listing stage.
        fingerprint: of the listing, hence of the source's state.
        rows: images listed.
        part_rows: images of every part but the last.
        metadata: Arrow type of the metadata column, or None.
    """

    uri: str
    fingerprint: str
    rows: int
    part_rows: int
    metadata: pa.StructType | None

    @property
    def parts(self) -> int:
        """Number of parts."""
        return -(-self.rows // self.part_rows)

    def rows_of(self, part: int) -> int:
        """Images in a part."""
        return min(self.part_rows, self.rows - part * self.part_rows)

    def read(self, part: int) -> pa.Table:
        """The listing rows of a part, `schemas.listing`."""
        return core_files.read_table(core_files.join(self.uri, artifacts.part_name(part)))


def start(source: sources.Source, output: str, part_rows: int, overwrite: bool) -> Any:
    """Reference to (Listing, Artifact): one Ray task lists the source into committed parts, unless it is listed
    already.

    `tasks.get` of it raises UserError: two images of one key, nothing to read, or a listing of another source in the
    way.
    """
    return tasks.task(_list).remote(source, output, part_rows, overwrite)


def count(source: sources.Source) -> dict[str, Any]:
    """Images, bytes, files that hold them, and a few sample rows of a source, for --dry-run; nothing is written."""
    return tasks.get(tasks.task(_count).remote(source))


def _count(source: sources.Source) -> dict[str, Any]:
    skipped: Counter[str] = Counter()
    found = counted(source, sources.list_images(source, skipped))
    say_outside(skipped)
    return found


def say_outside(skipped: Counter[str]) -> None:
    """Say that links were left out, if some were, and how they are followed."""
    if many := skipped[sources.OUTSIDE]:
        console.say(f"listing: {sources.leading_out(many)}, left out; {sources.HOW_TO_FOLLOW}")


def counted(source: sources.Source, tables: Iterable[pa.Table]) -> dict[str, Any]:
    """`count` of the tables of a source's listing."""
    rows, size, files, last = 0, 0, 0, None
    sample: pa.Table | None = None
    for table in tables:
        rows += table.num_rows
        size += int(np.maximum(table["size"].to_numpy(), 0).sum())
        sample = _sample(source, sample, table)
        if table.num_rows:  # the images of one container follow each other
            containers = table["container"]
            files += pc.count_distinct(containers).as_py() - (containers[0].as_py() == last)
            last = containers[-1].as_py()
    return {"rows": rows, "bytes": size, "files": files, "sample": sample}


def _sample(source: sources.Source, before: pa.Table | None, table: pa.Table) -> pa.Table:
    """The images of lowest id, which is a hash and so a fair draw; of containers only the first ones."""
    if source.kind in ("parquet", "webdataset"):
        return table.slice(0, SAMPLE_ROWS) if before is None else before
    both = table if before is None else pa.concat_tables([before, table])
    return both.take(
        pc.select_k_unstable(both, k=min(SAMPLE_ROWS, both.num_rows), sort_keys=[("sample_id", "ascending")])
    )


def _list(source: sources.Source, output: str, part_rows: int, overwrite: bool) -> tuple[Listing, artifacts.Artifact]:
    identity = {"source": sources.identity(source), "state": sources.state(source), "part_rows": part_rows}
    stage = artifacts.Stage(core_files.join(output, "listing"), "listing", schemas.VERSIONS["listing"], identity)
    before = stage.recorded()

    def make() -> tuple[list[artifacts.Part], dict[str, Any]]:
        if before is not None:
            console.say(f"listing: {artifacts.told_damage(stage.damage(before))}; making it anew")
        parts: list[artifacts.Part] = []
        ids: list[np.ndarray] = []
        skipped: Counter[str] = Counter()
        for number, table in enumerate(recut(sources.list_images(source, skipped), part_rows)):
            parts.append(stage.write_table(artifacts.part_name(number), table))
            ids.append(table["sample_id"].to_numpy())
        say_outside(skipped)
        if not parts:
            raise UserError(f"{source.root}: no images there; check --data.source")
        sources.check_unique(np.concatenate(ids), functools.partial(_keys_of, stage, part_rows))
        totals = {
            "rows": sum(part.rows for part in parts),
            "skipped": dict(sorted(skipped.items())),
            "metadata": _type_to_text(source.metadata_type),
        }
        return parts, totals

    done = stage.complete(make, overwrite)
    return read_artifact(stage.uri, done), done


def read_artifact(uri: str, done: artifacts.Artifact) -> Listing:
    """The listing of a finished listing stage in a directory. Raises UserError: its record is none of ours."""
    where = core_files.join(uri, core_files.ARTIFACT)
    said = trust.checked(_Said, done.identity | done.totals, where, whole=False)
    return Listing(uri, done.fingerprint, said.rows, said.part_rows, _type_from_text(said.metadata, where))


@dataclass(frozen=True)
class _Said:
    """What is used of the record of a listing."""

    rows: trust.Whole
    part_rows: trust.Count
    metadata: str | None


def rows_of_ids(uri: str, wanted: set[int]) -> Iterator[tuple[str, pa.Table]]:
    """Name and rows, without metadata, of each part of the listing in a directory that has any of the images wanted."""
    done = artifacts.load_artifact(uri)
    value_set, missing = pa.array(sorted(wanted), pa.int64()), len(wanted)
    for part in done.parts if done is not None else ():
        if not missing:
            break
        here = core_files.read_table(core_files.join(uri, part.name), ["sample_id"])["sample_id"]
        keep = pc.is_in(here, value_set=value_set)
        if many := pc.sum(keep).as_py():
            missing -= many
            whole = core_files.read_table(core_files.join(uri, part.name), without=[schemas.METADATA])
            yield part.name, whole.filter(keep)


def recut(tables: Iterable[pa.Table], part_rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of exactly `part_rows`, the last one shorter."""
    held: list[pa.Table] = []
    rows = 0
    for table in tables:
        held.append(table)
        rows += table.num_rows
        while rows >= part_rows:
            together = pa.concat_tables(held)
            yield together.slice(0, part_rows).combine_chunks()
            held, rows = [together.slice(part_rows)], rows - part_rows
    if rows:
        yield pa.concat_tables(held).combine_chunks()


def _keys_of(stage: artifacts.Stage, part_rows: int, rows: np.ndarray) -> list[str]:
    parts = {int(part): None for part in rows // part_rows}
    keys = {
        part: core_files.read_table(core_files.join(stage.uri, artifacts.part_name(part)), ["key"])["key"]
        for part in parts
    }
    return [keys[int(row) // part_rows][int(row) % part_rows].as_py() for row in rows]


def _type_to_text(metadata: pa.StructType | None) -> str | None:
    if metadata is None:
        return None
    return base64.b64encode(pa.schema([pa.field(schemas.METADATA, metadata)]).serialize()).decode()


def _type_from_text(text: str | None, where: str) -> pa.StructType | None:
    if text is None:
        return None
    try:
        (field,) = tables.read_schema(base64.b64decode(text), where)
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: states no type of the metadata ({one_line(error)}); make it again") from None
    return field.type
