"""Batches of weighted images for fine-tuning, from PNG files to pixels, against torch's DataLoader and its weights."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks import datasets, process, table
from pd_core.core import artifacts, schemas, seeds
from pd_core.core import files as core_files
from pd_core.core.settings.data import DataSettings
from pd_core.engine import resources, session, tasks
from pd_core.finetune import stream, weights
from pd_core.finetune.protocol import Share
from pd_core.images import decode, listing, resize, sources

BATCH = 64
PX = 64
PART = 4096
WORKERS = 2
WEIGHT = 33.0
ABOVE = 0.2  # share of the images that have it
FLAT = 1.1

TEXT = f"""\
Ours: `stream.batches` for one worker on a Ray of its own, {WORKERS} tasks of {resources.DECODE_CPUS:g} CPUs. Loader:
torch's DataLoader with a WeightedRandomSampler, {WORKERS} worker processes, pinned memory off, a Dataset that reads,
decodes and resizes by the same functions (`decode.decode`, `resize.resize`). Same PNG files (3,786 emoji of 64 px),
batches of {BATCH}, nothing is done with a batch. Weights: {WEIGHT:g} for {ABOVE:.0%} of the images and 1 for the
others, or all equal; ours decodes an image once for the {stream.TASK_IMAGES} draws of a task, which is a gain where
weights differ. In turn, each run in a new process. Rate: images per second from the first batch to the last; what comes
before it is start-up, shown beside it, Ray's own start apart. Memory: peak resident memory of the process that consumes
the batches, and of the largest of Ray's that make them, for the same number of steps from N and from 10 N images (hard
links). Flat is taken to be a growth of at most {FLAT:g}."""


def measure(quick: bool) -> table.Section:
    """Rates of both sides, then memory of ours."""
    try:
        files = sorted(datasets.emoji().glob("*.png"))
    except datasets.MissingInputError as missing:
        return table.Section("Weighted data", TEXT, skipped=[str(missing)])
    section = table.Section("Weighted data", TEXT)
    steps, repeats = (60, 1) if quick else (800, 3)
    if process.short:
        repeats = 1
        section.skipped.append("all but one turn of each side (--short)")
    rates = table.Table("Images per second", ["weights", "side", "median", "lowest to highest", "ours / loader"])
    startup = table.Table("First batch, seconds after it was asked for (median)", ["weights", "side", "s"])
    source = str(datasets.repeat_files(files, len(files), process.WORK / "images"))
    for equal in (False, True):
        work, name = str(process.WORK / f"equal-{equal}"), "equal" if equal else f"{WEIGHT:g} and 1"
        process.call("benchmarks.stream.make", {"source": source, "work": work, "equal": equal})
        runs = _compare(source, work, steps, repeats, name)
        section.raw += runs
        found = {side: [run for run in runs if run["side"] == side] for side in ("loader", "ours")}
        medians = {side: table.middle([run["images_per_s"] for run in own]) for side, own in found.items()}
        ratio = medians["ours"] / medians["loader"]
        section.claims.append(table.at_least(f"weights {name}: our images/s over the loader's", ratio, 0.95))
        for side, own in found.items():
            spread = table.spread([run["images_per_s"] for run in own])
            rates.rows.append([name, side, medians[side], spread, ratio if side == "ours" else None])
            startup.rows.append([name, side, table.middle([run["first_s"] for run in own])])
    section.tables += [rates, startup]
    _memory(section, files, quick)
    return section


def _compare(source: str, work: str, steps: int, repeats: int, name: str) -> list[dict[str, Any]]:
    runs = []
    for turn in range(repeats):
        for side in ("loader", "ours"):
            found = process.call(
                f"benchmarks.stream.{side}",
                {"source": source, "work": work, "steps": steps},
                threads=1 if side == "loader" else None,
            ).value
            runs.append({"weights": name, "side": side, "steps": steps, "turn": turn, **found})
            print(f"stream: weights {name}, {side}: {found['images_per_s']:.0f} images/s", flush=True)
    return runs


def _memory(section: table.Section, files: list[Path], quick: bool) -> None:
    few, steps = (500, 60) if quick else (20_000, 300)
    shown = table.Table("Peak memory, MiB", ["process", f"N = {few:,}", f"N = {10 * few:,}", "growth"])
    peaks: dict[str, list[float]] = {"consumer": [], "largest of Ray's that decode": []}
    for rows in (few, 10 * few):
        source = str(datasets.repeat_files(files, rows, process.WORK / f"images-{rows}"))
        work = str(process.WORK / f"weights-{rows}")
        process.call("benchmarks.stream.make", {"source": source, "work": work, "equal": False})
        outcome = process.call("benchmarks.stream.ours", {"source": source, "work": work, "steps": steps})
        makers = [peak for title, peak in outcome.children.items() if title.startswith("ray::")]
        for name, peak in zip(peaks, (outcome.peak_rss_bytes, max(makers)), strict=True):
            peaks[name].append(peak / 2**20)
        section.raw.append({"rows": rows, "peak_rss_bytes": outcome.peak_rss_bytes, "children": outcome.children})
        print(f"stream: {rows} rows: {peaks}", flush=True)
    for name, (low, high) in peaks.items():
        shown.rows.append([name, low, high, high / low])
        section.claims.append(table.at_most(f"{name}: peak at {10 * few:,} over {few:,} images", high / low, FLAT))
    section.tables.append(shown)


# ---- weights without an index ----------------------------------------------------------------------------------------


def make(source: str, work: str, equal: bool) -> None:
    """Commit the listing of a folder, and weights/ of densities that are made up."""
    opened = sources.open_source(DataSettings(source=source))
    with session.session(work):
        listed, _ = tasks.get(listing.start(opened, work, PART, overwrite=False))
    stage = _stage(work)
    stage.begin(overwrite=False)
    parts, sums, schema = [], [], schemas.weights()
    for number in range(listed.parts):
        rows = listed.read(number)
        density = seeds.uniform(rows["sample_id"].to_numpy(), 0)
        weight = np.where((density < 1 - ABOVE) | equal, 1.0, WEIGHT)
        columns = {
            **{name: rows[name] for name in ("sample_id", "key", "label")},
            "row": pa.array(np.arange(len(weight), dtype=np.int32)),
            "density": pa.array(density),
            "weight": pa.array(weight),
        }
        whole = pa.table([columns[name] for name in schema.names], schema=schema)
        parts.append(stage.write_table(artifacts.part_name(number), whole))
        sums.append(weights.total(weight))
    stage.commit(parts, {"part_weights": sums}, {})


def _stage(work: str) -> artifacts.Stage:
    return artifacts.Stage(core_files.join(work, "weights"), "weights", schemas.VERSIONS["weights"], {})


def _drawable(source: str, work: str) -> weights.Drawable:
    folder = core_files.join(work, "listing")
    listed, weighed = artifacts.load_artifact(folder), artifacts.load_artifact(_stage(work).uri)
    assert listed is not None
    assert weighed is not None
    pictures = weights.Pictures(
        sources.open_source(DataSettings(source=source)), listing.read_artifact(folder, listed), own=True
    )
    rows = tuple(part.rows for part in weighed.parts)
    sums = tuple(weighed.totals["part_weights"])
    return weights.Drawable(_stage(work).uri, weighed.fingerprint, pictures, rows, sums, seed=0)


# ---- the sides, each in a process of its own -------------------------------------------------------------------------


def _timed(batches: Any, steps: int, called: float) -> dict[str, float]:
    """Consume so many batches of BATCH images; the rate from the first on."""
    assert len(next(batches)) == BATCH
    first = time.perf_counter()
    assert sum(len(pixels) for pixels in batches) == (steps - 1) * BATCH
    seconds = time.perf_counter() - first
    return {"first_s": first - called, "images_per_s": (steps - 1) * BATCH / seconds}


def ours(source: str, work: str, steps: int) -> dict[str, float]:
    """The stream, as one worker has it."""
    drawable = _drawable(source, work)
    with session.session(work):
        called = time.perf_counter()
        made = stream.batches(
            drawable,
            0,
            steps,
            BATCH,
            Share(0, 1, "cpu", 1),
            mirror=True,
            size=(PX, PX),
            feed=stream.Feed(WORKERS, resources.DECODE_CPUS),
        )
        return _timed((batch.pixels for batch in made), steps, called)


def loader(source: str, work: str, steps: int) -> dict[str, float]:
    """torch's own, mirrored in the Dataset."""
    import torch
    from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler

    drawable = _drawable(source, work)
    tables = [
        core_files.read_table(core_files.join(drawable.uri, artifacts.part_name(i))) for i in range(len(drawable.rows))
    ]
    whole = pa.concat_tables(tables)
    keys, root = whole["key"].to_pylist(), Path(source)
    settings = drawable.pictures.source.settings
    limits = decode.limits_of(settings)
    preprocess = resize.Preprocess(PX, PX, "bicubic", 1.0, "center", (0.0,) * 3, (1.0,) * 3)

    class Files(Dataset[torch.Tensor]):
        def __len__(self) -> int:
            return len(keys)

        def __getitem__(self, row: int) -> torch.Tensor:
            pixels = resize.resize(decode.decode((root / keys[row]).read_bytes(), limits), preprocess)
            image = torch.from_numpy(pixels)
            return image.flip(1) if torch.rand(()) < 0.5 else image

    sampler = WeightedRandomSampler(whole["weight"].to_numpy().tolist(), steps * BATCH)
    called = time.perf_counter()
    made = DataLoader(Files(), batch_size=BATCH, sampler=sampler, num_workers=WORKERS, pin_memory=False)
    return _timed(iter(made), steps, called)
