"""The plan of a run, for --dry-run: what it will read, write, hold in memory and take, from a listing and a short probe."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pd_core import cluster, features, images, index, indexing, listing, sources, storage
from pd_core.config import BuildIndexSettings
from pd_core.errors import UserError

PROBE_BATCHES = 3  # the first one warms up
START_UP_S = 30.0  # Ray, the listing task, model imports in every actor


@dataclass(frozen=True)
class Probe:
    """Unit costs measured on this cluster: seconds of one core per image, and float32 matrix products in FLOP/s."""

    decode_s: float
    extract_s: float
    bad: int
    tried: int
    flops: float
    model_bytes: int


def probe(source: sources.Source, sample: pa.Table, settings: BuildIndexSettings, limits: images.DecodeLimits) -> Any:
    """Reference to (ExtractorSpec, Probe), measured in one Ray task with the threads of one extractor."""
    cpus = settings.features.actor_cpus
    return cluster.task(_probe, cpus).remote(source, sample, settings, limits)


def _probe(
    source: sources.Source, sample: pa.Table, settings: BuildIndexSettings, limits: images.DecodeLimits
) -> tuple[features.ExtractorSpec, Probe]:
    spec = features.describe(settings.features)
    extractor = features.Extractor(spec, "cpu", settings.features.actor_cpus)
    batch = settings.features.batch_size
    decode_s, extract_s, bad, tried, counted = 0.0, 0.0, 0, 0, 0
    contents = sources.read(source, sample.slice(0, PROBE_BATCHES * batch))
    for chunk in _batched(contents, batch):
        watch = storage.Stopwatch()
        pixels = []
        for content in chunk:
            tried += 1
            try:
                if isinstance(content, images.BadImage):
                    raise content
                pixels.append(images.prepare(content, limits, spec.preprocess).pixels)
            except images.BadImage:
                bad += 1
        decoded = watch.seconds
        if pixels:
            extractor.extract(np.stack(pixels))
        if tried > batch or sample.num_rows <= batch:  # the first batch pays for lazy set-up
            decode_s, extract_s, counted = decode_s + decoded, extract_s + watch.seconds - decoded, counted + len(chunk)
    counted = max(1, counted)
    size = sum(t.numel() * t.element_size() for t in extractor.model.state_dict().values())
    return spec, Probe(decode_s / counted, extract_s / counted, bad, tried, _flops(), size)


def _batched(items: Any, size: int) -> Any:
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


def _flops() -> float:
    import torch

    a = torch.rand(1024, 1024)
    a @ a
    watch = storage.Stopwatch()
    for _ in range(4):
        a @ a
    return 4 * 2 * 1024**3 / watch.seconds


def plan(
    settings: BuildIndexSettings, source: sources.Source, now: cluster.Cluster, limits: images.DecodeLimits
) -> str:
    """The plan as text.

    Raises:
        UserError: as the run itself would, as far as that can be known before it.
    """
    counted = listing.count(source)
    rows = counted["rows"]
    if rows == 0:
        raise UserError(f"{source.root}: no images there; check --data.source")
    spec, unit = cluster.get(probe(source, counted["sample"], settings, limits))
    if settings.density.k >= rows:
        raise UserError(
            f"--density.k {settings.density.k}: needs more than k images, found {rows}; lower k or add images"
        )
    return "\n".join(
        [*_sizes(settings, rows, counted["bytes"], spec, unit, now), *_times(settings, rows, spec, unit, now)]
    )


def _sizes(
    settings: BuildIndexSettings, rows: int, size: int, spec: features.ExtractorSpec, unit: Probe, now: cluster.Cluster
) -> list[str]:
    dim, k = spec.feature_dim, settings.density.k
    allowed = settings.data.max_bad_fraction
    kind = indexing.resolve_kind(settings.index, settings.density.exact, rows)
    shards = settings.index.shards or index.default_shards(rows, dim)
    cells = 0 if kind == "flat" else settings.index.cells or index.default_cells(rows)
    part_rows = settings.features.whole_part_rows
    vector = {"ivf_sq8": dim, "ivf_pq": settings.index.pq_bytes}.get(kind, 4 * dim)
    searchers, *_ = cluster.search_actors(now, settings.index.actors, settings.index.actor_cpus, shards)
    block = min(rows, settings.density.block_rows) * (4 * dim * 2 + 36 * k)
    train = cells * settings.index.train_rows_per_cell * dim * 4
    written = rows * (4 * dim + vector + 2 * 12 * k + 300)
    batch_bytes = settings.features.batch_size * spec.preprocess.height * spec.preprocess.width * 3
    return [
        f"images:    {rows:,} listed, {_bytes(size)}"
        + (f"; {unit.bad} of {unit.tried} probed are bad" if unit.bad else "")
        + ("" if unit.bad <= allowed * unit.tried else f": the run would stop, --data.max_bad_fraction is {allowed:g}"),
        f"features:  {spec.model}, {dim} dimensions, {spec.precision}, {-(-rows // part_rows):,} parts of {part_rows:,} images",
        f"index:     {kind}, {shards} shards" + (f", {cells:,} cells" if cells else ", exact search"),
        f"writes:    about {_bytes(written)} to {settings.output}",
        f"memory:    extractor about {_bytes(unit.model_bytes + 12 * batch_bytes + 400e6)} each; "
        f"search process {_bytes(2 * rows * vector / searchers + 400e6)} each ({searchers}); "
        f"block of queries {_bytes(block)}" + (f"; quantizer training {_bytes(2 * train)}" if train else ""),
    ]


def _times(
    settings: BuildIndexSettings, rows: int, spec: features.ExtractorSpec, unit: Probe, now: cluster.Cluster
) -> list[str]:
    _, most, cpus, gpus = cluster.actor_pool(
        now, settings.features.actors, settings.features.actor_cpus, settings.features.actor_gpus
    )
    cores = cluster.computing_cpus(now)
    # a GPU replica is not probed: its model time is taken as nothing, decoding as the limit
    model_s = 0.0 if gpus else unit.extract_s / max(1.0, min(most, cores / (cpus or 1.0)))
    features_s = rows * (model_s + unit.decode_s / cores)
    exact_s = 2.0 * rows * rows * spec.feature_dim / (unit.flops * cores)
    return [
        f"time:      features about {_time(START_UP_S + features_s)} ({unit.decode_s * 1e3:.1f} ms decoding and "
        f"{unit.extract_s * 1e3:.1f} ms model per image and core, {most} extractors at most)",
        f"           neighbors {'about' if rows <= indexing.FLAT_ROWS else 'at most'} {_time(exact_s)} "
        f"(exact search at {unit.flops / 1e9:.0f} GFLOP/s a core, {cores:g} cores)",
    ]


def _bytes(value: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:,.0f} {unit}" if unit == "B" else f"{value:,.1f} {unit}"
        value /= 1024
    raise AssertionError


def _time(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
