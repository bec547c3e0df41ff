"""What committing a part costs: through an S3 server on the same machine against a local disk."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import process, table

SIZES = (64 << 10, 1 << 20, 16 << 20)
TEXT = """\
`artifacts.Stage.write_part`: the file, its size looked up again, then its record; random bytes. S3: SeaweedFS on
loopback, one process, so that bandwidth and distance of a real store are not in it. Local: the machine's disk, files
and records flushed (fsync). Median of the parts after the first, one writer. Then a stage of 1,000 recorded parts is
opened (`finished_parts`), as every resumed run does."""


def measure(quick: bool) -> table.Section:
    """Both sides in one process, in turn."""
    section = table.Section("Commit of a part", TEXT)
    parts, recorded = (6, 50) if quick else (40, 1000)
    found = process.call("benchmarks.commit.run", {"parts": parts, "recorded": recorded}).value
    shown = table.Table("Milliseconds", ["what", "local", "S3", "S3 / local"])
    for name, (local, s3) in found.items():
        shown.rows.append([name, local * 1e3, s3 * 1e3, s3 / local])
        section.claims.append(table.reported(f"{name}: S3 over local", s3 / local))
    section.tables.append(shown)
    section.raw.append(found)
    return section


def run(parts: int, recorded: int) -> dict[str, tuple[float, float]]:
    """Seconds by what was done: (local, S3)."""
    import os

    from tests.s3 import running_server

    found: dict[str, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory() as folder, running_server(Path(folder) / "s3") as server:
        os.environ.update(server.env)
        places = (str(Path(folder) / "local"), f"s3://{server.make_bucket()}/stage")
        for size in SIZES:
            data = np.random.default_rng(0).bytes(size)
            times: tuple[list[float], list[float]] = ([], [])
            for number in range(parts):
                for uri, seconds in zip(places, times, strict=True):
                    seconds.append(_write(f"{uri}-{size}", f"part-{number:08d}.parquet", data))
            found[f"a part of {size / 2**20:g} MiB"] = tuple(statistics.median(s[1:]) for s in times)  # type: ignore[assignment]
        opened = []
        for uri in places:
            stage = _stage(f"{uri}-many")
            for number in range(recorded):
                stage.write_part(f"part-{number:08d}.parquet", b"x", 1)
            start = time.perf_counter()
            assert len(stage.finished_parts()) == recorded
            opened.append(time.perf_counter() - start)
        found[f"opening a stage of {recorded:,} parts"] = (opened[0], opened[1])
    return found


def _stage(uri: str):
    from pd_core.core import artifacts

    return artifacts.Stage(uri, "features", 1, {})


def _write(uri: str, name: str, data: bytes) -> float:
    stage = _stage(uri)
    start = time.perf_counter()
    stage.write_part(name, data, 1)
    return time.perf_counter() - start
