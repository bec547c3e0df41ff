"""Rejection sampling on Ray against the bare loop of generator, extractor and predictor in one process."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks import process, table
from pd_core.core import artifacts, files
from pd_core.core.settings.base import TrackingSettings
from pd_core.core.settings.generate import GenerateSettings, GeneratorSettings, WeightingSettings
from pd_core.density import realset
from pd_core.density import scorer as density_scorer
from pd_core.generate import chunks as generate_chunks
from pd_core.generate import workflow

CHUNK = 64
STEPS = 50
LOG_FOLDER = "BENCHMARK_LOG_FOLDER"  # environment of Ray's workers
THRESHOLD, WEIGHT = "p80", 10.0
FLAT = 1.1

TEXT = f"""\
The demo's generator (a DDPM of 8 px digits, DDIM at {STEPS} steps) and its index (EfficientNet-lite0 at 64 px). Ours:
`generate.py`, from the pilot to committed Parquet parts, tau = {THRESHOLD}, w = {WEIGHT:g}, chunks of {CHUNK}, actors
of 1 thread. Bare loop: one process of 1 thread makes the same chunks: images, resize, features, predicted densities,
and keeps none. Steady rate: accepted images per second between the commits of the first and of the last whole part.
Share of an actor's time outside generator and extractor: of the time between its first and its last chunk. Memory: a
generator that costs next to nothing (coloured rectangles), so that the rest has the most to do."""


def measure(quick: bool) -> table.Section:
    """Rates with one and with two actors, and memory for few and many accepted images."""
    section = table.Section("Generate", TEXT)
    made = process.call("benchmarks.generate.prepare", {"cache": str(process.CACHE), "work": str(process.WORK)}).value
    n, chunks = (100, 4) if quick else (1000, 30)
    bare = process.call("benchmarks.generate.bare_loop", {**made, "chunks": chunks}, threads=1).value
    runs = {}
    for actors in (1, 2):
        output = str(process.WORK / f"samples-{actors}")
        runs[actors] = process.call(
            "benchmarks.generate.ours", {**made, "output": output, "n": n, "actors": actors}
        ).value
        print(f"generate: {actors} actors: {runs[actors]}", flush=True)
    one, two = runs[1], runs[2]
    ratio = one["accepted_per_s"] / (one["acceptance"] * bare["candidates_per_s"])
    section.claims += [
        table.at_least("1 actor: accepted/s over acceptance rate x the bare loop's candidates/s", ratio, 0.95),
        table.reported("share of an actor's time outside generator and extractor", one["outside"]),
        table.reported("2 actors over 1: accepted/s", two["accepted_per_s"] / one["accepted_per_s"]),
        table.reported("same rows with 1 and 2 actors (1: equal to the byte)", float(one["sha256"] == two["sha256"])),
    ]
    rates = table.Table(
        "Rates", ["side", "candidates/s", "acceptance rate", "accepted/s", "start-up s (with the pilot)"]
    )
    rates.rows.append(["bare loop", bare["candidates_per_s"], None, None, None])
    for actors, run in runs.items():
        rates.rows.append(
            [f"{actors} actors", run["candidates_per_s"], run["acceptance"], run["accepted_per_s"], run["startup_s"]]
        )
    section.tables.append(rates)
    section.raw += [{"side": "bare", **bare}, *({"actors": actors, **run} for actors, run in runs.items())]
    _memory(section, made, (200, 600) if quick else (1_000, 10_000))
    return section


def _memory(section: table.Section, made: dict[str, str], sizes: tuple[int, int]) -> None:
    peaks: dict[int, dict[str, float]] = {}
    for n in sizes:
        output = str(process.WORK / f"memory-{n}")
        outcome = process.call("benchmarks.generate.cheap", {"index": made["index"], "output": output, "n": n})
        found = {"driver": outcome.peak_rss_bytes, **outcome.children}
        peaks[n] = {title: value / 2**20 for title, value in found.items() if title == "driver" or "ray::" in title}
        print(f"generate: {n} rows: {peaks[n]}", flush=True)
    few, many = sizes
    shown = table.Table("Peak resident memory, MiB", ["process", *(f"n = {n:,}" for n in sizes), "growth"])
    for title, high in peaks[many].items():
        low = peaks[few].get(title)
        shown.rows.append([title, low, high, high / low if low else None])
    for title in ("driver", "ray::MapWorker"):
        if title in peaks[few] and title in peaks[many]:
            growth = peaks[many][title] / peaks[few][title]
            section.claims.append(table.at_most(f"{title}: peak at n = {many:,} over {few:,}", growth, FLAT))
    section.tables.append(shown)


# ---- inputs ----------------------------------------------------------------------------------------------------------


def prepare(cache: str, work: str) -> dict[str, str]:
    """The demo's index and its generator; the generator is trained once and kept."""
    from demo import make_digits, train_ddpm
    from workflows import build_index

    data = Path(cache, "demo-data")
    images, checkpoint = (
        make_digits.write_digits(data),
        make_digits.write_checkpoint(data / make_digits.CHECKPOINT_NAME),
    )
    generator = Path(cache, "ddpm")
    assert train_ddpm.main(["--data", str(images), "--output", str(generator)]) == 0
    index = Path(work, "index")
    build_index.main(
        [
            *("--config", str(build_index.DEFAULT_CONFIG), "--data.source", str(images), "--output", str(index)),
            *("--features.checkpoint", str(checkpoint), "--no-tracking.enabled"),
        ]
    )
    return {"index": str(index), "generator": str(generator)}


def _generator(path: str) -> GeneratorSettings:
    return GeneratorSettings(path=path, scheduler="DDIMScheduler", steps=STEPS)


# ---- the sides, each in a process of its own -------------------------------------------------------------------------


def bare_loop(index: str, generator: str, chunks: int) -> dict[str, float]:
    """Chunks of images and their predicted densities, one after the other."""
    import torch

    from pd_core.core import seeds as core_seeds
    from pd_core.generators import protocol
    from pd_core.generators.open import open_generator

    real = realset.open_realset(index)
    made = open_generator(_generator(generator))
    scorer = density_scorer.Scorer(real.extractor, real.predictor())

    def run(chunk: int) -> None:
        numbers = np.arange(chunk * CHUNK, (chunk + 1) * CHUNK)
        with torch.no_grad():
            images = made.generate(
                core_seeds.integers(numbers, core_seeds.stream(0, "image")).tolist(), protocol.Conditions()
            )
            scorer.log_density(scorer.features(images))

    run(0)
    watch = artifacts.Stopwatch()
    for chunk in range(1, chunks + 1):
        run(chunk)
    return {"seconds": watch.seconds, "candidates_per_s": chunks * CHUNK / watch.seconds}


def ours(index: str, generator: str, output: str, n: int, actors: int) -> dict[str, Any]:
    """The workflow; its generator actors log when they began and ended each chunk, and what they did inside."""
    log = Path(f"{output}-log")
    log.mkdir(parents=True)
    os.environ[LOG_FOLDER] = str(log)  # before Ray starts: its workers inherit it
    started = time.time()
    with mock.patch.object(generate_chunks, "_MakeChunk", TimedMakeChunk):
        workflow.generate(_settings(index, output, n, actors, _generator(generator)))
    folder = Path(output, "samples")
    totals = json.loads((folder / files.ARTIFACT).read_text())
    commits = {p.name: p.stat().st_mtime for p in sorted((folder / files.RECORDS).iterdir())}
    parts = totals["parts"][:-1]  # the last was written again, cut to n rows
    times = [commits[f"{part['name']}.json"] for part in parts]
    seconds = times[-1] - times[0]
    candidates = sum(part["counts"]["candidates"] for part in parts[1:])
    accepted = sum(part["rows"] for part in parts[1:])
    return {
        "candidates_per_s": candidates / seconds,
        "accepted_per_s": accepted / seconds,
        "acceptance": accepted / candidates,
        "startup_s": times[0] - started,
        "outside": _outside(log, times[0], times[-1]),
        "sha256": [part["sha256"] for part in totals["parts"]],
    }


def _outside(log: Path, begin: float, end: float) -> float:
    """1 - (time in generator and extractor) / (time between an actor's first and last chunk), over all actors."""
    inside = total = 0.0
    for path in log.iterdir():
        rows = np.loadtxt(path, ndmin=2)  # started, seconds inside, ended
        rows = rows[(rows[:, 0] >= begin) & (rows[:, 2] <= end)]
        if len(rows) > 1:
            inside += rows[:, 1].sum()
            total += rows[-1, 2] - rows[0, 0]
    return 1 - inside / total if total else float("nan")


class TimedMakeChunk(generate_chunks._MakeChunk):
    """chunking._MakeChunk, logged."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.inside_s = 0.0
        for owner, name in ((self.maker.generator, "generate"), (self.maker.scorer, "features")):
            setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, function: Any) -> Any:
        def timed(*arguments: Any) -> Any:
            watch = artifacts.Stopwatch()
            result = function(*arguments)
            self.inside_s += watch.seconds
            return result

        return timed

    def __call__(self, numbers: Any) -> Any:
        self.inside_s, started = 0.0, time.time()
        made = super().__call__(numbers)
        with Path(os.environ[LOG_FOLDER], str(os.getpid())).open("a") as file:
            file.write(f"{started} {self.inside_s} {time.time()}\n")
        return made


def cheap(index: str, output: str, n: int) -> dict[str, Any]:
    """The workflow with a generator of coloured rectangles."""
    settings = GeneratorSettings(kind="python", path="benchmarks.generate:rectangles")
    workflow.generate(_settings(index, output, n, 2, settings))
    return {}


class Rectangles:
    """8 px: one colour with a rectangle of another."""

    num_classes = 0
    takes_prompts = False

    def identity(self) -> dict[str, Any]:
        return {"rectangles": 1}

    def generate(self, seeds: Any, conditions: Any) -> Any:
        import torch

        pixels = np.empty((len(seeds), 8, 8, 3), np.uint8)
        for image, seed in zip(pixels, seeds, strict=True):
            rng = np.random.default_rng(seed)
            image[:] = rng.integers(0, 256, 3)
            image[rng.integers(8) :, rng.integers(8) :] = rng.integers(0, 256, 3)
        return torch.from_numpy(pixels)


def rectangles() -> Rectangles:
    """A factory for --generator.kind python."""
    return Rectangles()


def _settings(index: str, output: str, n: int, actors: int, generator: GeneratorSettings) -> GenerateSettings:
    return GenerateSettings(
        index=index,
        output=output,
        generator=generator,
        n=n,
        actors=actors,
        chunk=CHUNK,
        weighting=WeightingSettings(threshold=THRESHOLD, weight=WEIGHT),
        tracking=TrackingSettings(enabled=False),
    )
