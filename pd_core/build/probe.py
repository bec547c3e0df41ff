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
    """Unit costs measured on this cluster: seconds of one core per image, and its float32 matrix products in FLOP/s.

    read_s: seconds that a process waits for an image from the source's disk or store.
    """

    read_s: float
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
    seconds, bad, tried, counted = np.zeros(3), 0, 0, 0  # seconds: to read, decode and extract
    contents = sources.read(source, sample.slice(0, PROBE_BATCHES * batch))
    for _ in range(0, min(sample.num_rows, PROBE_BATCHES * batch), batch):
        watch = artifacts.Stopwatch()
        chunk = list(itertools.islice(contents, batch))
        read = watch.seconds
        made = list(child.prepared(chunk, limits, spec.preprocess))
        pixels = [one.pixels for one in made if isinstance(one, resize.Prepared)]
        tried, bad = tried + len(made), bad + len(made) - len(pixels)
        decoded = watch.seconds
        if pixels:
            extractor.extract(np.stack(pixels))
        if tried > batch or sample.num_rows <= batch:  # the first batch pays for lazy set-up
            seconds, counted = seconds + np.diff([0.0, read, decoded, watch.seconds]), counted + len(chunk)
    size = sum(t.numel() * t.element_size() for t in extractor.model.state_dict().values())
    read_s, decode_s, extract_s = (seconds / max(1, counted)).tolist()
    return spec, Probe(read_s, decode_s, extract_s, bad, tried, _flops(), size)


def _flops() -> float:
    import torch

    a = torch.rand(1024, 1024)
    a @ a
    watch = artifacts.Stopwatch()
    for _ in range(4):
        a @ a
    return 4 * 2 * 1024**3 / (watch.seconds * torch.get_num_threads())
