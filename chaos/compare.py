"""Holds what a disturbed run left to what an undisturbed one made: rows lost, rows doubled, parts that differ."""

from __future__ import annotations

import fnmatch
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pd_core.core import artifacts, files
from pd_core.curate import releases

# By which a row is known; those that a table has. Its other columns may be wrong, which is a part that differs.
ROW = ("sample_id", "key", "direction", "set", "space", "label", "metric", "setting", "step", "name", "number")

# What may differ between two undisturbed runs of the same command, and why. All else is compared to the byte.
MAY_DIFFER = {
    "report/index.html": "shows how long stages took",
    "training/summary.json": "holds the seconds of a step",
    "training/state-*.pt": "holds the same values, pickled; torch's archive is not compared to the byte",
    "sets/*/listing/part-*.parquet": "marks the files of the samples by when they were written, "
    "also where the run itself made them",
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


# Of a release: compared without what names the output, and hashes of where images lie.
AS_TEXT = ("release.json", "README.md")
POINTERS = {"latest.json": ("moved", "lock_token"), "index/current.json": ("digest",)}  # and what may differ in them

# Of versions and releases of curate: when they were made, and a hash of what from.
_NAME = re.compile(rf"(\d{{8}}T\d{{6}}Z|\d{{4}}-\d{{2}}-\d{{2}})-[0-9a-f]{{{releases.HASH_LETTERS}}}")


@dataclass(frozen=True)
class Finished:
    """A committed stage: its folder, its commit record."""

    folder: Path
    artifact: artifacts.Artifact


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


def stages_of(output: Path) -> dict[str, Finished]:
    """Committed stages of an output by their folder in it, in which NAME stands for names that no two outputs share.

    Where one stands for two folders, which a run should not leave, the second has a number.
    """
    found: dict[str, Finished] = {}
    for file in sorted(output.rglob(files.ARTIFACT)):
        artifact = artifacts.load_artifact(str(file.parent))
        assert artifact is not None, file
        name = _NAME.sub("NAME", file.parent.relative_to(output).as_posix())
        same = sum(other == name or other.startswith(f"{name} (") for other in found)
        found[f"{name} ({same + 1})" if same else name] = Finished(file.parent, artifact)
    return found


def compare(found: Path, expected: Path, places: tuple[str, str] | None = None) -> Difference:
    """What differs in `found`, the output of a run, from `expected`, that of an undisturbed one.

    places: where the two were when they were made, if not where they are.
    """
    difference = Difference()
    there_was, wanted_was = places or (str(found), str(expected))
    said = _Said(found, there_was), _Said(expected, wanted_was)
    difference.parts += [
        f"{name}: says otherwise" for name in POINTERS if said[0].pointer(name) != said[1].pointer(name)
    ]
    there, wanted = stages_of(found), stages_of(expected)
    difference.parts += [f"{stage}: not finished" for stage in wanted.keys() - there.keys()]
    difference.parts += [f"{stage}: not in the undisturbed run" for stage in there.keys() - wanted.keys()]
    for stage, one in wanted.items():
        folder = there[stage].folder if stage in there else found / one.folder.relative_to(expected)
        for part_of in {Path(part.name).parent for part in one.artifact.parts}:
            _compare_rows(folder / part_of, one.folder / part_of, difference)
        if stage in there:
            difference.parts += _differing_parts(stage, there[stage], one, said)
            difference.parts += _differing_totals(stage, there[stage].artifact.totals, one.artifact.totals)
    difference.parts.sort()
    return difference


@dataclass(frozen=True)
class _Said:
    """Texts of an output, without what differs between any two: its place, its bucket, names and hashes of versions."""

    root: Path
    place: str

    def text(self, file: Path) -> str:
        text = _NAME.sub("NAME", file.read_text().replace(self.place, "OUTPUT"))
        return re.sub(r"\b[0-9a-f]{64}\b", "HASH", re.sub("s3://[^/]+/", "BUCKET/", text))

    def of_release(self, file: Path) -> Any:
        """Of its record all but `settings`, which name servers too."""
        if file.suffix != ".json":
            return self.text(file)
        return {key: value for key, value in json.loads(self.text(file)).items() if key != "settings"}

    def pointer(self, name: str) -> Any:
        if not (self.root / name).exists():
            return None
        return {key: v for key, v in json.loads(self.text(self.root / name)).items() if key not in POINTERS[name]}


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


def _differing_parts(stage: str, there: Finished, wanted: Finished, said: Sequence[_Said]) -> list[str]:
    hashes = {part.name: part.sha256 for part in there.artifact.parts}
    expected = {part.name: part.sha256 for part in wanted.artifact.parts}
    wrong = []
    for name in sorted(hashes.keys() | expected.keys()):
        path = f"{stage}/{name}"
        if name not in hashes or name not in expected:
            wrong.append(f"{path}: {'lost' if name not in hashes else 'not in the undisturbed run'}")
            continue
        file = there.folder / name
        if not file.exists() or artifacts.sha256(file.read_bytes()) != hashes[name]:
            wrong.append(f"{path}: not as its record says")
        elif there.artifact.kind == "release" and name in AS_TEXT:
            if said[0].of_release(file) != said[1].of_release(wanted.folder / name):
                wrong.append(f"{path}: says otherwise")
        elif hashes[name] != expected[name] and not _may_differ(path):
            wrong.append(f"{path}: other bytes")
    return wrong


def _may_differ(path: str) -> bool:
    """Whether a part is one of MAY_DIFFER, in whatever run within the output."""
    return any(fnmatch.fnmatch(path, may) or fnmatch.fnmatch(path, f"*/{may}") for may in MAY_DIFFER)


def _differing_totals(stage: str, there: Any, wanted: Any) -> list[str]:
    def plain(values: Any) -> Any:
        if isinstance(values, dict):
            named = ((name, f"{stage.rpartition('/')[2]}.{name}", value) for name, value in values.items())
            return {n: plain(value) for n, full, value in named if not {n, full} & MAY_DIFFER_TOTALS.keys()}
        return values

    lines = artifacts.differences(plain(there), plain(wanted))
    return [f"{stage}/{files.ARTIFACT}: totals {line}" for line in lines]
