"""The features stage, from PNG files to committed Parquet, against a plain loop in one process."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa

from benchmarks import datasets, process, table
from pd_core.core import artifacts
from pd_core.core import files as core_files
from pd_core.core.settings.data import DataSettings
from pd_core.core.settings.index import FeatureSettings
from pd_core.engine import session, tasks
from pd_core.images import decode, listing, resize, sources
from pd_core.index import extractor as index_extractor
from pd_core.index import features

BATCH = 64
PART = 256
ACTORS = 2
THREADS = 2
LOG_FOLDER = "BENCHMARK_LOG_FOLDER"  # environment of Ray's workers

TEXT = f"""\
Ours: `features.run` on a Ray of its own, files to committed Parquet (parts of {PART}), {ACTORS} model replicas of 1
thread. Plain loop: one process reads, decodes, resizes and runs the same model (`resize.prepare`,
`extractor.Extractor`; torch with {THREADS} threads, channels_last), model loading and a first batch left out, nothing
written. Same PNG files (3,786 emoji of 64 px, repeated by hard links where more images are given), batches of {BATCH},
EfficientNet-lite0 in fp32. In turn, each run in a new process. Steady rate: images per second from when every replica
has done a batch to the last commit. Images that were decoded by then, while the models were loading, had part of their
work for nothing: each is counted less by the share of decoding in the work, as timed in the run. Start-up: from the
call of the stage to that moment, less what the steady rate needs for the images done by then; Ray's own start is
apart."""


def measure(quick: bool) -> table.Section:
    """Both sides at 64 and at 224 px."""
    try:
        files = sorted(datasets.emoji().glob("*.png"))
    except datasets.MissingInputError as missing:
        return table.Section("Features", TEXT, skipped=[str(missing)])
    section = table.Section("Features", TEXT)
    cases = [(64, 1536, 1), (224, 512, 1)] if quick else [(64, 6 * len(files), 3), (224, len(files), 2)]
    if process.short:
        cases = [(px, rows, 1) for px, rows, _ in cases]
        section.skipped.append("all but one turn of each side (--short)")
    results = table.Table(
        "Images per second", ["input px", "images", "side", "median", "lowest to highest", "ours / loop"]
    )
    startup = table.Table(
        "Start-up, paid once per run (median)",
        ["input px", "Ray s", "stage s", "images decoded ahead by then", "share of decoding in the work"],
    )
    for px, rows, repeats in cases:
        runs = _compare(files, px, rows, repeats)
        section.raw += runs
        loop = [run["images_per_s"] for run in runs if run["side"] == "loop"]
        ours = [run for run in runs if run["side"] == "ours" and run["images_per_s"]]
        if len(ours) < repeats:
            missed = f"{repeats - len(ours)} of {repeats} runs had no steady state, the replicas were up too late"
            section.skipped.append(f"{px} px: {missed}; use a machine that does nothing else")
        if not ours:
            continue
        rates = [run["images_per_s"] for run in ours]
        ratio = table.middle(rates) / table.middle(loop)
        section.claims.append(table.at_least(f"{px} px: our images/s over the plain loop's", ratio, 0.95))
        results.rows.append([px, rows, "plain loop", table.middle(loop), table.spread(loop), None])
        results.rows.append([px, rows, "features stage", table.middle(rates), table.spread(rates), ratio])
        names = ("ray_s", "startup_s", "ahead", "decode_share")
        startup.rows.append([px, *(table.middle([run[name] for run in ours]) for name in names)])
    section.tables += [results, startup]
    return section


def _compare(files: list[Path], px: int, rows: int, repeats: int) -> list[dict[str, Any]]:
    source = str(datasets.repeat_files(files, rows, process.WORK / f"images-{px}"))
    common = {"source": source, "px": px, "checkpoint": str(datasets.checkpoint())}
    runs = []
    for turn in range(repeats):
        loop = process.call("benchmarks.features.plain_loop", common, threads=THREADS).value
        output = str(process.WORK / f"features-{px}-{turn}")
        ours = process.call("benchmarks.features.stage", common | {"output": output}).value
        for side, found in (("loop", loop), ("ours", ours)):
            runs.append({"side": side, "px": px, "images": rows, "turn": turn, **found})
            print(f"features: {px} px, {side}: {found['images_per_s']} images/s", flush=True)
    return runs


# ---- the sides, each in a process of its own -------------------------------------------------------------------------


def _at(spec: index_extractor.ExtractorSpec, px: int) -> index_extractor.ExtractorSpec:
    return replace(spec, preprocess=replace(spec.preprocess, height=px, width=px))


def plain_loop(source: str, px: int, checkpoint: str) -> dict[str, float]:
    """Read, prepare and extract every image, batch by batch."""
    spec = _at(index_extractor.describe(FeatureSettings(model=datasets.MODEL, checkpoint=checkpoint)), px)
    extractor = index_extractor.Extractor(spec, threads=THREADS)
    files = sorted(Path(source).rglob("*.png"))
    limits = decode.limits_of(DataSettings())

    def run(batch: list[Path]) -> np.ndarray:
        pixels = [resize.prepare(path.read_bytes(), limits, spec.preprocess).pixels for path in batch]
        return extractor.extract(np.stack(pixels))

    run(files[:BATCH])
    watch = artifacts.Stopwatch()
    kept = [run(files[start : start + BATCH]) for start in range(0, len(files), BATCH)]
    seconds = watch.seconds
    assert sum(map(len, kept)) == len(files)
    return {"seconds": seconds, "images_per_s": len(files) / seconds}


def stage(source: str, px: int, checkpoint: str, output: str) -> dict[str, Any]:
    """Run the stage, with the times of every batch logged by the processes that handle it."""
    settings = FeatureSettings(model=datasets.MODEL, checkpoint=checkpoint, batch_size=BATCH, actors=ACTORS)
    data = DataSettings(source=source)
    log = Path(f"{output}-log")
    log.mkdir(parents=True)
    os.environ[LOG_FOLDER] = str(log)  # before Ray starts: its workers inherit it
    watch = artifacts.Stopwatch()
    with session.session(output) as now:
        ray_s = watch.seconds
        spec = _at(tasks.get(index_extractor.describe_remotely(settings)), px)
        opened = sources.open_source(data)
        listed, _ = tasks.get(listing.start(opened, output, PART, overwrite=False))
        featuring = features.stage_of(output, listed, spec, data, settings, "cpu")
        work = features.Work(opened, listed, spec, decode.limits_of(data), BATCH, featuring)
        called = time.time()
        with mock.patch.multiple(features, _decode=timed_decode, _ExtractBatch=TimedExtract):
            done = featuring.complete(lambda: features.run(work, now, settings, max_bad_fraction=0.0), overwrite=False)
        seconds = time.time() - called
    assert done.rows == listed.rows
    records = Path(featuring.uri, core_files.RECORDS)
    last_commit = max((records / f"{part.name}.json").stat().st_mtime for part in done.parts)
    return {"ray_s": ray_s, "stage_s": seconds, **steady(_logged(log), called, last_commit)}


def steady(logs: dict[str, np.ndarray], called: float, last_commit: float) -> dict[str, float | None]:
    """Steady rate and start-up, as TEXT says, from float64 [batches, 3] per process: time done, seconds, images.

    The rate is None where the replicas were not all up before half of the images were done.
    """
    decoded = np.concatenate([log for name, log in logs.items() if name.startswith("decode")])
    extractors = [log for name, log in logs.items() if name.startswith("extract")]
    extracted = np.concatenate(extractors)
    images_done = extracted[:, 2].sum()
    assert decoded[:, 2].sum() == images_done, "a batch was done twice"
    ready = max(log[:, 0].min() for log in extractors)
    already = extracted[extracted[:, 0] <= ready, 2].sum()
    if len(extractors) < ACTORS or already > images_done / 2:
        return {"images_per_s": None}
    ahead = decoded[decoded[:, 0] <= ready, 2].sum() - already
    share = decoded[:, 1].sum() / (decoded[:, 1].sum() + extracted[:, 1].sum())
    rate = (images_done - already - share * ahead) / (last_commit - ready)
    return {
        "images_per_s": rate,
        "startup_s": ready - called - already / rate,
        "ahead": ahead,
        "decode_share": share,
        "window_s": last_commit - ready,
    }


def _note(kind: str, seconds: float, count: int) -> None:
    with Path(os.environ[LOG_FOLDER], f"{kind}-{os.getpid()}").open("a") as file:
        file.write(f"{time.time()} {seconds} {count}\n")


def _logged(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.loadtxt(path, ndmin=2) for path in sorted(folder.iterdir())}


# as they are, before `stage` puts these in their place
_decode, _ExtractBatch = features._decode, features._ExtractBatch


def timed_decode(work: features.Work, runs: pa.Table) -> Iterator[pa.Table]:
    """features._decode, logged."""
    watch = artifacts.Stopwatch()
    for batch in _decode(work, runs):
        _note("decode", watch.seconds, len(batch["reason"][0]))
        yield batch
        watch = artifacts.Stopwatch()


class TimedExtract(features._ExtractBatch):
    """features._ExtractBatch, logged."""

    def __call__(self, batch: pa.Table) -> pa.Table:
        watch = artifacts.Stopwatch()
        rows = super().__call__(batch)
        _note("extract", watch.seconds, rows.num_rows)
        return rows
