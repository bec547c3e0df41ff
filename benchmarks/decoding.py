"""Decoding in a child that may die, against decoding in the worker, through the first half of the features stage."""

from __future__ import annotations

import itertools
import resource
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import psutil
import pyarrow as pa
from PIL import Image

from benchmarks import process, table
from pd_core.core import artifacts
from pd_core.core.settings.data import DataSettings
from pd_core.images import child as images_child
from pd_core.images import decode, resize, sources
from pd_core.index import features

BATCH = 64
TOGETHER = 4  # batches of a task
PREPROCESS = resize.Preprocess(224, 224, "bicubic", 0.9, "center", (0.5,) * 3, (0.5,) * 3)
TEXT = f"""\
`features._decode` on files of a local disk, as a task of the stage runs it ({TOGETHER} batches of {BATCH}, resized to
224 px). Ours: the files of a batch go to a child process in shared memory, and pixels come back (`child.prepared`). In
the worker: `resize.prepare` of each. One process does both sides in turn, after a turn that is not counted; smooth
pictures with noise, made by code. Images per second by the clock, in which the worker reads the next batch while the
child decodes; and seconds of CPU per image, the child's included, which is what counts where every core is busy. Ratio:
median over the turns."""


def measure(quick: bool) -> table.Section:
    """Both sides for small PNGs and for photographs."""
    section = table.Section("Decoding", TEXT)
    shown = table.Table("Median", ["files", "side", "images/s", "lowest to highest", "CPU ms per image"])
    for kind, side_px, count in (("png", 64, 4096), ("jpg", 500, 1024)):
        count, turns = (count // 8, 2) if quick else (count, 1 if process.short else 9)
        folder = _write(process.WORK / f"{kind}-{side_px}", kind, side_px, count)
        arguments = {"folder": str(folder), "turns": turns}
        runs = process.call("benchmarks.decoding.run", arguments, threads=1).value
        name = f"{side_px} px {kind.upper()}"
        section.raw += [run | {"files": name} for run in runs]
        sides = {side: [run for run in runs if run["side"] == side] for side in ("child", "worker")}
        for side, own in sides.items():
            rates, cpu = [run["images_per_s"] for run in own], [run["cpu_s"] * 1e3 for run in own]
            shown.rows.append([name, side, table.middle(rates), table.spread(rates), table.middle(cpu)])
        for what, ratio in _ratios(sides).items():
            section.claims.append(table.at_least(f"{name}: {what}", ratio, 0.97))
    section.tables.append(shown)
    return section


def _ratios(sides: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    pairs = list(zip(sides["child"], sides["worker"], strict=True))
    return {
        "images/s of the child over the worker's own": table.middle(
            [child["images_per_s"] / worker["images_per_s"] for child, worker in pairs]
        ),
        "the worker's CPU over that with a child": table.middle(
            [worker["cpu_s"] / child["cpu_s"] for child, worker in pairs]
        ),
    }


def _write(folder: Path, kind: str, side_px: int, count: int) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:side_px, 0:side_px]
    for number in range(count):
        waves = [128 + 100 * np.sin(x / (5 + number % 7) + c) * np.cos(y / (9 + number % 5)) for c in range(3)]
        noisy = np.stack(waves, -1) + rng.normal(0, 6, (side_px, side_px, 3))
        Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(folder / f"{number:05d}.{kind}")
    return folder


# ---- in a process of its own -----------------------------------------------------------------------------------------


def run(folder: str, turns: int) -> list[dict[str, Any]]:
    """Seconds of both sides, in turn."""
    source = sources.open_source(DataSettings(source=folder))
    (rows,) = sources.list_images(source)
    listing: Any = _Listing(rows)
    spec: Any = SimpleNamespace(preprocess=PREPROCESS)
    limits, stage = decode.limits_of(source.settings), artifacts.Stage(folder, "features", 1, {})
    work = features.Work(source, listing, spec, limits, BATCH, stage, (0,))
    sides = {"child": images_child.prepared, "worker": in_the_worker}
    found: list[dict[str, Any]] = []
    for _ in range(1 + turns):
        for side, prepared in sides.items():
            with mock.patch.object(images_child, "prepared", prepared):
                found.append({"side": side, **_timed(work)})
    return found[len(sides) :]


class _Listing:
    """What `features` asks of a listing, of one part."""

    def __init__(self, rows: pa.Table) -> None:
        self.rows, self.part_rows = rows, rows.num_rows

    def rows_of(self, _: int) -> int:
        return self.rows.num_rows

    def read(self, _: int) -> pa.Table:
        return self.rows


def in_the_worker(
    contents: Iterable[bytes | decode.BadImage], limits: decode.DecodeLimits, preprocess: resize.Preprocess
) -> Iterator[resize.Prepared | decode.BadImage]:
    """`child.prepared` without a child."""
    for content in contents:
        try:
            if isinstance(content, decode.BadImage):
                raise content
            yield resize.prepare(content, limits, preprocess)
        except decode.BadImage as bad:
            yield bad


def _timed(work: features.Work) -> dict[str, float]:
    batches = work.batches()
    starts = range(0, batches, TOGETHER)
    tasks = [pa.table({"first": [n], "stop": [min(n + TOGETHER, batches)]}) for n in starts]
    cpu, start = _cpu_s(), time.perf_counter()
    made = itertools.chain.from_iterable(features._decode(work, task) for task in tasks)
    count = sum(len(batch["reason"][0]) for batch in made)
    assert count == work.listing.rows_of(0)
    return {"images_per_s": count / (time.perf_counter() - start), "cpu_s": (_cpu_s() - cpu) / count}


def _cpu_s() -> float:
    """Of this process, and of the children that it has."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    children = [child.cpu_times() for child in psutil.Process().children()]
    return own.ru_utime + own.ru_stime + sum(times.user + times.system for times in children)
