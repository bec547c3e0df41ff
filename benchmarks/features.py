"""The features stage, from PNG files to committed Parquet, against a plain loop in one process."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import datasets, process, table
from pd_core import cluster, features, images, listing, sources, storage
from pd_core.config import DataSettings, FeatureSettings

BATCH = 64
PART = 256
ACTORS = 2
THREADS = 2
DRAIN = 2  # the last parts, while the pipeline runs empty, are left out of the steady rate

TEXT = f"""\
Ours: `features.run` on a Ray of its own, files to committed Parquet, {ACTORS} model replicas of 1 thread. Plain loop: one
process reads, decodes, resizes and runs the same model (`images.prepare`, `features.Extractor`; torch with {THREADS}
threads, channels_last), model loading and a first batch left out, nothing written. Same PNG files (3,786 emoji of 64 px,
repeated by hard links where more images are given), batches of {BATCH}, EfficientNet-lite0 in fp32. In turn, each run in a
new process. Steady rate: images per second between the commit of the first part ({PART} images) and of the last but
{DRAIN}, since the last parts are finished while nothing is decoded any more, which flatters. Start-up: from the call of
the stage to the first commit, less what the steady rate needs for those images; Ray's own start is apart."""


def measure(quick: bool) -> table.Section:
    """Both sides at 64 and at 224 px."""
    try:
        files = sorted(datasets.emoji().glob("*.png"))
    except datasets.MissingInputError as missing:
        return table.Section("Features", TEXT, skipped=[str(missing)])
    cases = [(64, 1536, 1), (224, 1536, 1)] if quick else [(64, 4 * len(files), 3), (224, len(files), 3)]
    section = table.Section("Features", TEXT)
    results = table.Table(
        "Images per second", ["input px", "images", "side", "median", "lowest to highest", "ours / loop"]
    )
    startup = table.Table("Seconds that are paid once per run", ["input px", "Ray", "model replicas and first part"])
    for px, rows, repeats in cases:
        runs = _compare(files, px, rows, repeats)
        section.raw += runs
        loop = [run["images_per_s"] for run in runs if run["side"] == "loop"]
        ours = [run for run in runs if run["side"] == "ours"]
        rates = [run["images_per_s"] for run in ours]
        ratio = table.middle(rates) / table.middle(loop)
        section.claims.append(table.at_least(f"{px} px: our images/s over the plain loop's", ratio, 0.95))
        results.rows.append([px, rows, "plain loop", table.middle(loop), table.spread(loop), None])
        results.rows.append([px, rows, "features stage", table.middle(rates), table.spread(rates), ratio])
        waits = [table.middle([run[name] for run in ours]) for name in ("ray_s", "startup_s")]
        startup.rows.append([px, *waits])
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
        for side, found in (("loop", loop), ("ours", ours | steady(ours["commits"]))):
            runs.append({"side": side, "px": px, "images": rows, "turn": turn, **found})
            print(f"features: {px} px, {side}: {found['images_per_s']:.1f} images/s", flush=True)
    return runs


def steady(commits: list[tuple[float, int]]) -> dict[str, float]:
    """Rate and start-up from the commits (seconds since the call, images) in order of time."""
    first, counted = commits[0], commits[1:-DRAIN]
    rate = sum(count for _, count in counted) / (counted[-1][0] - first[0])
    return {"images_per_s": rate, "startup_s": first[0] - first[1] / rate}


# ---- the sides, each in a process of its own -------------------------------------------------------------------------


def _limits(data: DataSettings) -> images.DecodeLimits:
    return images.DecodeLimits(data.max_image_bytes, data.max_image_pixels, data.background)


def _at(spec: features.ExtractorSpec, px: int) -> features.ExtractorSpec:
    return replace(spec, preprocess=replace(spec.preprocess, height=px, width=px))


def plain_loop(source: str, px: int, checkpoint: str) -> dict[str, float]:
    """Read, prepare and extract every image, batch by batch."""
    spec = _at(features.describe(FeatureSettings(model=datasets.MODEL, checkpoint=checkpoint)), px)
    extractor = features.Extractor(spec, threads=THREADS)
    files = sorted(Path(source).rglob("*.png"))
    limits = _limits(DataSettings())

    def run(batch: list[Path]) -> np.ndarray:
        pixels = [images.prepare(path.read_bytes(), limits, spec.preprocess).pixels for path in batch]
        return extractor.extract(np.stack(pixels))

    run(files[:BATCH])
    watch = storage.Stopwatch()
    kept = [run(files[start : start + BATCH]) for start in range(0, len(files), BATCH)]
    seconds = watch.seconds
    assert sum(map(len, kept)) == len(files)
    return {"seconds": seconds, "images_per_s": len(files) / seconds}


def stage(source: str, px: int, checkpoint: str, output: str) -> dict[str, Any]:
    """Run the stage; when its parts were committed tells how fast it was."""
    settings = FeatureSettings(model=datasets.MODEL, checkpoint=checkpoint, batch_size=BATCH, actors=ACTORS)
    data = DataSettings(source=source)
    watch = storage.Stopwatch()
    with cluster.session(output) as now:
        ray_s = watch.seconds
        spec = _at(cluster.get(features.describe_remotely(settings)), px)
        opened = sources.open_source(data)
        listed, _ = listing.run(opened, output, PART, overwrite=False)
        featuring = features.stage_of(output, listed, spec, data, settings)
        work = features.Work(opened, listed, spec, _limits(data), BATCH, featuring)
        called = time.time()
        done = featuring.complete(lambda: features.run(work, now, settings, max_bad_fraction=0.0), overwrite=False)
        seconds = time.time() - called
    assert done.rows == listed.rows
    records = Path(featuring.uri, storage.RECORDS)
    commits = sorted(((records / f"{part.name}.json").stat().st_mtime - called, part.rows) for part in done.parts)
    return {"ray_s": ray_s, "stage_s": seconds, "commits": commits}
