"""Holds what a disturbed run left to what an undisturbed one made: rows lost, rows doubled, parts that differ."""

from __future__ import annotations

import fnmatch
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pd_core import storage

# By which a row is known; those that a table has. Its other columns may be wrong, which is a part that differs.
ROW = ("sample_id", "key", "direction", "set", "space", "label", "metric", "setting", "step", "name", "number")

# What may differ between two undisturbed runs of the same command, and why. All else is compared to the byte.
MAY_DIFFER = {
    "report/index.html": "shows how long stages took",
    "training/summary.json": "holds the seconds of a step",
    "training/state-*.pt": "holds the same values, pickled; torch's archive is not compared to the byte",
}
MAY_DIFFER_TOTALS = {
    "report.bytes": "the page shows how long stages took",
    "actor_s_per_candidate": "seconds",
    "actor_s_per_image": "seconds",
    "step_s": "seconds",
    "data_s": "seconds",
    "images_s": "images per second",
    "rows_sent_per_query": "of the searches of the last run alone",
    "settings": "name the place of the output",
}


@dataclass
class Difference:
    """Between two outputs.

    Attributes:
        lost: rows that are not there. doubled: rows that are there too often.
        parts: files that are gone, that differ, or that are not as their own record says; stages that are not finished.
    """

    lost: int = 0
    doubled: int = 0
    parts: list[str] = field(default_factory=list)

    @property
    def none(self) -> bool:
        """Whether there is none."""
        return not (self.lost or self.doubled or self.parts)


def stages_of(output: Path) -> dict[str, storage.Artifact]:
    """Committed stages of an output by their folder in it."""
    found = {}
    for file in sorted(output.rglob(storage.ARTIFACT)):
        artifact = storage.load_artifact(str(file.parent))
        assert artifact is not None, file
        found[file.parent.relative_to(output).as_posix()] = artifact
    return found


def compare(found: Path, expected: Path) -> Difference:
    """What differs in `found`, the output of a run, from `expected`, that of an undisturbed one."""
    difference = Difference()
    there, wanted = stages_of(found), stages_of(expected)
    difference.parts += [f"{stage}: not finished" for stage in wanted.keys() - there.keys()]
    difference.parts += [f"{stage}: not in the undisturbed run" for stage in there.keys() - wanted.keys()]
    for stage, artifact in wanted.items():
        _compare_rows(found / stage, expected / stage, difference)
        if stage in there:
            difference.parts += _differing_parts(stage, found / stage, there[stage], artifact)
            difference.parts += _differing_totals(stage, there[stage].totals, artifact.totals)
    difference.parts.sort()
    return difference


def _compare_rows(found: Path, expected: Path, difference: Difference) -> None:
    """Rows of the tables that lie there, committed or not: who opens the folder reads them all."""
    rows, wanted = _rows(found), _rows(expected)
    difference.lost += (wanted - rows).total()
    difference.doubled += (rows - wanted).total()


def _rows(folder: Path) -> Counter[tuple[Any, ...]]:
    counted: Counter[tuple[Any, ...]] = Counter()
    for file in folder.glob("*.parquet"):
        try:
            table = pq.ParquetFile(file).read()
        except (pa.ArrowInvalid, OSError):
            continue  # its rows are lost
        columns = [name for name in ROW if name in table.column_names] or table.column_names
        kind = "" if file.name.startswith("part-") else file.name  # the parts of a stage are one table
        counted.update((kind, *(repr(value) for value in row.values())) for row in table.select(columns).to_pylist())
    return counted


def _differing_parts(stage: str, folder: Path, there: storage.Artifact, wanted: storage.Artifact) -> list[str]:
    hashes = {part.name: part.sha256 for part in there.parts}
    expected = {part.name: part.sha256 for part in wanted.parts}
    wrong = []
    for name in sorted(hashes.keys() | expected.keys()):
        path = f"{stage}/{name}"
        if name not in hashes or name not in expected:
            wrong.append(f"{path}: {'lost' if name not in hashes else 'not in the undisturbed run'}")
            continue
        file = folder / name
        if not file.exists() or storage.sha256(file.read_bytes()) != hashes[name]:
            wrong.append(f"{path}: not as its record says")
        elif hashes[name] != expected[name] and not any(fnmatch.fnmatch(path, may) for may in MAY_DIFFER):
            wrong.append(f"{path}: other bytes")
    return wrong


def _differing_totals(stage: str, there: Any, wanted: Any) -> list[str]:
    def plain(values: Any) -> Any:
        if isinstance(values, dict):
            named = ((name, f"{stage}.{name}", value) for name, value in values.items())
            return {n: plain(value) for n, full, value in named if not {n, full} & MAY_DIFFER_TOTALS.keys()}
        return values

    lines = storage.differences(plain(there), plain(wanted))
    return [f"{stage}/{storage.ARTIFACT}: totals {line}" for line in lines]
