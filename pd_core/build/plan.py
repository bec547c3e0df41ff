"""The plan of a run, for --dry-run: what it will read, write, hold in memory and take, from a listing and a short probe."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from pd_core.build import costs, update as build_update
from pd_core.core import artifacts, files
from pd_core.core.errors import UserError
from pd_core.core.settings.index import BuildIndexSettings
from pd_core.engine import resources, tasks
from pd_core.images import child, decode, listing, resize, sources
from pd_core.index import extractor as index_extractor

PROBE_BATCHES = 3  # the first one warms up
START_UP_S = 10.0  # of Ray and of the first model, which tells the features' dimension
RANKS = "densities: normalizer and ranks"
ASSUMED_CORES, ASSUMED_BYTES = 8.0, 32 * costs.GIB  # of a node where none is up to ask: as those of infra/
GROWN_NODES = 10  # what a plan tells beside the nodes that are up, where there may be more


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


def plan(
    settings: BuildIndexSettings,
    source: sources.Source,
    now: resources.Cluster,
    limits: decode.DecodeLimits,
    base: build_update.Base | None = None,
) -> str:
    """The plan as text.

    base: of an update, of which a line is told beside those of a whole build, which it may become.

    Raises:
        UserError: as the run itself would, as far as that can be known before it.
    """
    found = None if base is None else foresee(settings, source, now, base)
    counted = listing.count(source) if found is None else found.counted
    rows = counted["rows"]
    if rows == 0:
        raise UserError(f"{source.root}: no images there; check --data.source")
    spec, unit = tasks.get(probe(source, counted["sample"], settings, limits))
    if settings.density.k >= rows:
        raise UserError(
            f"--density.k {settings.density.k}: needs more than k images, found {rows}; lower k or add images"
        )
    now = resources.refreshed(now)  # the probe may have brought a node
    fleet = fleet_of(now, str(settings.output))
    build = build_of(settings, source, counted, spec, unit, fleet)
    phases = costs.build_index(build, fleet, costs.MEASURED.on(unit.flops))
    sizes = _sizes(settings, rows, counted["bytes"], spec, unit, build, phases, fleet)
    times = _times(unit, build, phases, fleet, START_UP_S, on_gpus(settings, fleet))
    update = [] if base is None or found is None else _update(unit, build, found, fleet, base.uri)
    grown = _grown(unit, build, phases, fleet, now.cpus >= 1)
    return "\n".join([*sizes, *times, *grown, *limit_lines(phases, fleet), *update])


def foresee(
    settings: BuildIndexSettings, source: sources.Source, now: resources.Cluster, base: build_update.Base
) -> build_update.Foreseen:
    """What an update would find; before that, whether it can be one: the walk through a source may take an hour."""
    spec: index_extractor.ExtractorSpec = tasks.get(index_extractor.describe_remotely(settings.features))
    gpus = resources.gpus_to_ask(now, settings.features.actor_gpus, base.artifacts["features"].identity["device"])
    build_update.check_same(base, settings, source, spec, resources.device_of(now, gpus))
    return build_update.foresee(source, base)


def on_gpus(settings: BuildIndexSettings, fleet: costs.Fleet) -> bool:
    """Whether the extractors run on GPUs: where there are any, unless the settings say it; then these may be still to come."""
    asked = settings.features.actor_gpus
    return bool(fleet.gpus) if asked is None else asked > 0


def build_of(
    settings: BuildIndexSettings,
    source: sources.Source,
    counted: Mapping[str, Any],
    spec: index_extractor.ExtractorSpec,
    unit: Probe,
    fleet: costs.Fleet,
) -> costs.Build:
    """The run as the model sees it, with the seconds that were probed here.

    counted: of `listing.count`.
    """
    return costs.build_of(
        settings,
        counted["rows"],
        counted["files"],
        spec.feature_dim,
        spec.preprocess.height * spec.preprocess.width,
        counted["bytes"] / counted["rows"],
        unit.decode_s,
        0.0 if on_gpus(settings, fleet) else unit.extract_s * settings.features.actor_cpus,
        parquet=source.kind == "parquet",
    )


def fleet_of(now: resources.Cluster, output: str) -> costs.Fleet:
    """The cluster as the model sees it. Network and object store are not probed, but taken to be as `costs` assumes.

    Its nodes are those that are up at this moment, which what ran since `now` may have brought; where none is, one of
    ASSUMED_CORES and ASSUMED_BYTES.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) > 0]
    memory = min((n.get("memory", 0.0) + n.get("object_store_memory", 0.0) for n in nodes), default=0.0)
    remote = not files.is_local(output)
    count = max(1, len(nodes))
    cores = sum(node["CPU"] for node in nodes) / count
    return costs.Fleet(
        nodes=1 if now.local else count,
        cores=float(resources.cores()) if now.local else cores or ASSUMED_CORES,
        memory_bytes=memory or ASSUMED_BYTES,
        network_bytes_per_s=costs.NETWORK_BYTES_PER_S if remote or not now.local else math.inf,
        request_s=costs.REQUEST_S if remote else 0.0,
        gets_per_s=costs.GETS_PER_S if remote else math.inf,
        puts_per_s=costs.PUTS_PER_S if remote else math.inf,
        local=now.local,
        elastic=now.elastic,
        gpus=sum(node.get("GPU", 0.0) for node in nodes) / count,
    )


def _sizes(
    settings: BuildIndexSettings,
    rows: int,
    size: int,
    spec: index_extractor.ExtractorSpec,
    unit: Probe,
    build: costs.Build,
    phases: Sequence[costs.Phase],
    fleet: costs.Fleet,
) -> list[str]:
    allowed = settings.data.max_bad_fraction
    by_name = {phase.title: phase for phase in phases}
    searching = by_name["neighbors: search"]
    training = by_name.get("index: train the quantizer")
    batch_bytes = settings.features.batch_size * spec.preprocess.height * spec.preprocess.width * 3
    block = costs.block_bytes(build, min(rows, settings.density.block_rows))
    return [
        f"images:    {rows:,} listed, {_bytes(size)}"
        + (f"; {unit.bad} of {unit.tried} probed are bad" if unit.bad else "")
        + ("" if unit.bad <= allowed * unit.tried else f": the run would stop, --data.max_bad_fraction is {allowed:g}"),
        f"features:  {spec.model}, {spec.feature_dim} dimensions, {spec.precision}, {build.parts:,} parts of "
        f"{settings.features.whole_part_rows:,} images",
        f"index:     {build.settings.index.kind}, {build.shards} shards"
        + (f", {build.cells:,} cells" if build.cells else ", exact search"),
        f"writes:    about {_bytes(sum(costs.written_bytes(phases).values()))} to {settings.output}",
        f"memory:    extractor about {_bytes(unit.model_bytes + 12 * batch_bytes + costs.PROCESS_BYTES)} each; "
        f"search process {_bytes(searching.memory_bytes)} each ({searching.tasks}); "
        f"block of queries {_bytes(block)}; ranks of all rows {_bytes(by_name[RANKS].memory_bytes)}; "
        f"driver {_bytes(costs.driver_bytes(build))}"
        + (f"; quantizer training {_bytes(training.memory_bytes)}" if training else ""),
    ]


def _times(
    unit: Probe, build: costs.Build, phases: Sequence[costs.Phase], fleet: costs.Fleet, start_s: float, gpus: bool
) -> list[str]:
    stages = ", ".join(f"{stage} {_time(spent)}" for stage, spent in costs.by_stage(phases, fleet).items())
    model = "" if gpus else f" and {unit.extract_s * 1e3:.1f} ms model"
    where = f"{fleet.all_cores:g} cores" if fleet.local else f"{_nodes(fleet)} of {fleet.cores:g} CPUs"
    lines = [
        f"time:      about {_time(start_s + costs.total_s(phases, fleet))}: start {_time(start_s)}, {stages}; at {unit.decode_s * 1e3:.1f} ms decoding"
        f"{model} per image and core, {unit.flops / 1e9:.0f} GFLOP/s a core, {where}",
    ]
    if gpus:
        lines.append(
            "           the model runs on GPUs, which are not probed: its time is not among these, features are decoding alone"
        )
    lines.append(
        f"           the predictor's fit takes at most {build.epochs} epochs, and less where its loss stops falling"
    )
    if build.cells:
        lines.append(
            f"           neighbors: as if {build.nprobe} of {build.cells:,} cells reached the recall, which calibration decides; "
            f"at most {_time(_exact_s(build, unit, fleet))} (exact search)"
        )
    return lines


def _update(unit: Probe, build: costs.Build, found: build_update.Foreseen, fleet: costs.Fleet, base: str) -> list[str]:
    phases = costs.update_index(build, max(1, found.to_extract), fleet, costs.MEASURED.on(unit.flops))
    stages = ", ".join(f"{stage} {_time(spent)}" for stage, spent in costs.by_stage(phases, fleet).items())
    lost = found.gone + found.changed
    searches = f", and the searches for whoever had one of the {lost:,} for a neighbor" if lost else ""
    return [
        f"update:    of {base}: {found}",
        f"           about {_time(START_UP_S + costs.total_s(phases, fleet))}: start {_time(START_UP_S)}, {stages}{searches}; the lines above are of a whole build, "
        "whose neighbors or fit come on top where quantizer or predictor do not hold any more",
    ]


def _nodes(fleet: costs.Fleet) -> str:
    return f"{fleet.nodes} node" + ("s" if fleet.nodes > 1 else "")


def _grown(unit: Probe, build: costs.Build, phases: Sequence[costs.Phase], fleet: costs.Fleet, up: bool) -> list[str]:
    """For which nodes the times are, and what more of them would make of it, where an autoscaler may add some."""
    if not fleet.elastic:
        return []
    more = replace(fleet, nodes=fleet.nodes * GROWN_NODES)
    then = costs.total_s(costs.build_index(build, more, costs.MEASURED.on(unit.flops)), more)
    here = f"the {_nodes(fleet)} of {fleet.cores:g} CPUs that the cluster has now"
    if not up:
        here = f"one node of {fleet.cores:g} CPUs and {_bytes(fleet.memory_bytes)}, an assumption, since none is up"
    return [
        f"fleet:     times are for {here}; the autoscaler adds nodes up to its maximum, {more.nodes} such nodes would take about "
        f"{_time(START_UP_S + then)}; the CPUs compute {sum(phase.core_s for phase in phases) / 3600:,.1f} core-hours in all"
    ]


def limit_lines(phases: Sequence[costs.Phase], fleet: costs.Fleet) -> list[str]:
    """What limits a run that is large, or that does not fit into memory."""
    first = costs.bottleneck(phases, fleet)
    if first.limit == costs.MEMORY:
        return [
            f"limit:     {first}: {_bytes(costs.node_bytes(first.phase, fleet))} on a node that has "
            f"{_bytes(fleet.worker_bytes)} for processes; {first.lever}"
        ]
    if costs.total_s(phases, fleet) < costs.LARGE_S:
        return []
    return [f"limit:     {first}, {_time(first.seconds)}; what moves it: {first.lever}"]


def of_samples(sampling: costs.Sampling, dim: int, fleet: costs.Fleet) -> list[str]:
    """The same of the samples of generate, whose candidates the pilot has timed."""
    if math.isnan(sampling.actor_s):  # the pilot's seconds are lost
        return []
    return [
        line.replace("limit:     ", "limit:      ") for line in limit_lines(costs.generate(sampling, dim, fleet), fleet)
    ]


def _exact_s(build: costs.Build, unit: Probe, fleet: costs.Fleet) -> float:
    each = costs.MEASURED.on(unit.flops).exact_pair_s * build.dim / costs.MEASURED_DIM
    return float(build.rows) * build.rows * each / fleet.all_cores


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
