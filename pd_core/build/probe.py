"""What a run's images take on this cluster, measured on a few of them, for its plan."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pd_core.core import artifacts
from pd_core.core.settings.index import BuildIndexSettings
from pd_core.engine import resources, tasks
from pd_core.images import child, decode, resize, sources
from pd_core.index import extractor as index_extractor

PROBE_BATCHES = 3  # the first one warms up


@dataclass(frozen=True)
class Probe:
    """Unit costs measured on this cluster: seconds of one core per image, and its float32 matrix products in FLOP/s."""

    decode_s: float
    extract_s: float
    bad: int
    tried: int
    flops: float
    model_bytes: int


def probe(source: sources.Source, sample: pa.Table, settings: BuildIndexSettings, limits: decode.DecodeLimits) -> Any:
    """Reference to (ExtractorSpec, Probe), measured in one Ray task with the threads of one extractor."""
    cpus = settings.features.actor_cpus
    memory = resources.decode_memory(limits.memory_bytes)
    return tasks.task(_probe, cpus, memory=memory).remote(source, sample, settings, limits)


def _probe(
    source: sources.Source, sample: pa.Table, settings: BuildIndexSettings, limits: decode.DecodeLimits
) -> tuple[index_extractor.ExtractorSpec, Probe]:
    spec = index_extractor.describe(settings.features)
    extractor = index_extractor.Extractor(spec, "cpu", settings.features.actor_cpus)
    batch = settings.features.batch_size
    decode_s, extract_s, bad, tried, counted = 0.0, 0.0, 0, 0, 0
    contents = sources.read(source, sample.slice(0, PROBE_BATCHES * batch))
    for chunk in _batched(contents, batch):
        watch = artifacts.Stopwatch()
        made = list(child.prepared(chunk, limits, spec.preprocess))
        pixels = [one.pixels for one in made if isinstance(one, resize.Prepared)]
        tried, bad = tried + len(made), bad + len(made) - len(pixels)
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
    watch = artifacts.Stopwatch()
    for _ in range(4):
        a @ a
    return 4 * 2 * 1024**3 / (watch.seconds * torch.get_num_threads())
