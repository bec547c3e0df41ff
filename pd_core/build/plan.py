"""The plan of a run, for --dry-run: what it will read, write, hold in memory and take, from a listing and a short probe.

A few plain formulas, of computing alone; benchmarks/costs.py models also what store and network add on large clusters.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pd_core.build import probe as build_probe
from pd_core.build import update as build_update
from pd_core.core.errors import UserError
from pd_core.core.settings.index import BuildIndexSettings
from pd_core.density import fit
from pd_core.engine import resources, tasks
from pd_core.images import decode, listing, sources
from pd_core.index import build as index_build
from pd_core.index import extractor as index_extractor

GIB = float(1 << 30)
ASSUMED_CORES, ASSUMED_BYTES = 8.0, 32 * GIB  # of a node where none is up to ask: as those of infra/
GROWN_NODES = 10  # what a plan tells beside the nodes that are up, where there may be more
LARGE_S = 3600.0  # a plan of a run that takes longer says what limits it
PROCESS_BYTES = 400e6  # of a worker that has imported what it needs, before it holds any row
DRIVER_BYTES, PART_BYTES = 200e6, 4 * 605.0  # of the driver, and what it knows of a part in four tables
WORKER_SHARE = 0.7  # of a node's memory; Ray keeps the rest for its object store

# Seconds of a core and FLOP that nobody probes, after docs/unit_costs.json. Comparing, training and fitting consist of
# matrix products, whose rate is probed; memory makes them slower by what these numbers exceed 2, 20 and 6 by.
PAIR_FLOP, KMEANS_FLOP, FIT_FLOP = 3.0, 29.0, 8.0  # a dimension and pair, the same in all iterations, a weight and row
START_UP_S, REPORT_S = 30.0, 2.1  # of Ray, models and search processes; of a small report
LIST_S, TABLE_S = 1.05e-5, 2.6e-9  # of an image that is listed, of a byte of features
ROW_S, RANK_S, MERGE_S, REPORT_ROW_S = 6e-6, 1.6e-7, 1.9e-6, 4e-7  # of a row; MERGE_S of every search process too
RANK_BYTES = 62.0  # of a row
SCANNED, SCANNED_ROWS, SCANNED_GROWTH = 0.0286, 88_192, -0.185  # share of rows scanned where an index has cells

EXTRACT_LEVER = "more nodes; GPUs with --features.actor_gpus 1; --features.precision bf16"
CELLS_LEVER = "--index.cells smaller, --index.train_rows_per_cell 39; --index.actor_cpus (its threads)"
SEARCH_LEVER = (
    "more nodes; --index.shards larger (a search process each); --index.kind ivf_sq8 (a quarter of the bytes)"
)


@dataclass(frozen=True)
class Fleet:
    """The machines, taken to be alike: what the stages size their processes by, nodes with CPUs and bytes of each."""

    cluster: resources.Cluster
    nodes: int
    memory_bytes: float

    @property
    def cores(self) -> float:
        """Of all nodes together."""
        return float(resources.cores()) if self.cluster.local else self.cluster.cpus

    def __str__(self) -> str:
        return f"{self.nodes} node{'s' if self.nodes > 1 else ''} of {self.cores / self.nodes:g} CPUs"


def fleet_of(now: resources.Cluster) -> Fleet:
    """The nodes that are up at this moment, which what ran since `now` may have brought; where none is, an assumed one."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) > 0]
    memory = min((n.get("memory", 0.0) + n.get("object_store_memory", 0.0) for n in nodes), default=0.0)
    cluster = now if nodes else replace(now, cpus=ASSUMED_CORES, node_cpus=ASSUMED_CORES)
    return Fleet(cluster, 1 if now.local else max(1, len(nodes)), memory or ASSUMED_BYTES)


@dataclass(frozen=True)
class Step:
    """Work of equal processes that run at the same time, one step after the other.

    Attributes:
        core_s: seconds of one core, of all processes together.
        processes: at most. threads: of each.
        memory_bytes: of each, beside PROCESS_BYTES.
        lever: what makes it faster, or smaller.
    """

    name: str
    core_s: float
    processes: float
    memory_bytes: float
    lever: str
    threads: float = 1.0

    def seconds(self, fleet: Fleet) -> float:
        """Of all processes, nothing failing."""
        return self.core_s / max(1.0, min(self.processes * self.threads, fleet.cores))

    def node_bytes(self, fleet: Fleet) -> float:
        """Memory of the node that needs most, the object store apart."""
        together = max(1.0, min(self.processes, fleet.cores))
        return (PROCESS_BYTES + self.memory_bytes) * math.ceil(together / fleet.nodes)

    def limit(self, fleet: Fleet) -> str:
        """What it waits for."""
        few = "one process" if self.processes == 1 else "few processes"
        return few if self.processes * self.threads < WORKER_SHARE * fleet.cores else "cores"


@dataclass(frozen=True)
class Build:
    """A run, its index resolved. gpus: the model runs on GPUs, which are not probed. new: of an update, the new images."""

    settings: BuildIndexSettings
    rows: int
    spec: index_extractor.ExtractorSpec
    unit: build_probe.Probe
    fleet: Fleet
    gpus: bool
    new: int | None = None

    @property
    def features_bytes(self) -> float:
        """Of the features table."""
        return self.rows * (4.0 * self.spec.feature_dim + 60)

    @property
    def index_bytes(self) -> float:
        """Of all shards together."""
        index, dim = self.settings.index, self.spec.feature_dim
        return self.rows * (8.0 + {"ivf_sq8": dim, "ivf_pq": index.pq_bytes}.get(index.kind, 4 * dim))

    @property
    def passes(self) -> int:
        """Times that features are read: by index, search and fit."""
        fits = 1 if self.rows <= fit.WINDOW_ROWS else 1 + self.settings.estimator.epochs
        return (5 if self.settings.index.cells else 1) + 1 + fits

    @property
    def scanned(self) -> float:
        """Share of the rows that a query is compared with; calibration decides it, so of cells it is what other data had."""
        return min(1.0, SCANNED * (self.rows / SCANNED_ROWS) ** SCANNED_GROWTH) if self.settings.index.cells else 1.0

    def pairs_s(self, queries: float, rows: float) -> float:
        """Of one core, to compare queries with rows."""
        return queries * rows * self.spec.feature_dim * PAIR_FLOP / self.unit.flops

    def steps(self) -> list[Step]:
        """In their order. An update takes quantizer and predictor over."""
        rows, dim, unit, chosen = self.rows, self.spec.feature_dim, self.unit, self.settings
        fresh = rows if self.new is None else self.new
        model_s = 0.0 if self.gpus else unit.extract_s * chosen.features.actor_cpus
        pixels = 3 * self.spec.preprocess.height * self.spec.preprocess.width
        extractor_bytes = unit.model_bytes + 12.0 * chosen.features.batch_size * pixels
        found = [
            Step("listing", rows * LIST_S, 1, 96.0 * rows, "a source of Parquet files or tars"),
            Step("features", fresh * (unit.decode_s + model_s), math.inf, extractor_bytes, EXTRACT_LEVER),
            *(self._cells() if chosen.index.cells else []),
            self._shards(fresh),
            self._search(fresh),
            Step("densities", rows * ROW_S, math.inf, 0.0, "more nodes"),
            Step("ranks", rows * RANK_S, 1, RANK_BYTES * rows, "nodes with more memory"),
            Step("report", REPORT_S + rows * REPORT_ROW_S, 1, PROCESS_BYTES, "--features.part_rows larger"),
        ]
        weights = sum(a * b for a, b in itertools.pairwise((dim, *chosen.estimator.hidden, 1)))
        fit_s = chosen.estimator.epochs * rows * (weights * FIT_FLOP / unit.flops + 4 * dim * TABLE_S)
        fit_bytes = 8.0 * dim * min(rows, fit.WINDOW_ROWS + fit.HELDOUT_ROWS)
        found.insert(-1, Step("estimator", fit_s, 1, fit_bytes, "--estimator.epochs and --estimator.patience smaller"))
        return [step for step in found if self.new is None or step.name not in ("quantizer", "estimator")]

    def _cells(self) -> list[Step]:
        index, rows, dim = self.settings.index, self.rows, self.spec.feature_dim
        cells = index.cells or 0
        trained = min(rows, cells * index.train_rows_per_cell)
        train_s = float(trained) * cells * dim * KMEANS_FLOP / self.unit.flops
        deal_s = 4 * self.features_bytes * TABLE_S
        deal_s += self.pairs_s(rows, cells + index.calibration_queries * (1 + self.scanned))
        group_bytes = 12.0 * dim * (min(rows, index_build.GROUP_ROWS) + cells)
        return [
            Step("quantizer", train_s, 1, 8.0 * trained * dim, CELLS_LEVER, index.actor_cpus),
            Step("cells", deal_s, math.inf, group_bytes, "more nodes; --index.cells smaller"),
        ]

    def _shards(self, fresh: int) -> Step:
        shards, dim = self.settings.index.shards or 1, self.spec.feature_dim
        share = 1.0 if self.settings.index.cells else fresh / self.rows
        size = 16.0 * self.rows * dim / shards
        return Step("shards", 2 * share * self.features_bytes * TABLE_S, shards, size, "--index.shards larger")

    def _search(self, fresh: int) -> Step:
        index, density, dim = self.settings.index, self.settings.density, self.spec.feature_dim
        shards, rows = index.shards or 1, float(self.rows)
        cluster = self.fleet.cluster
        actors, threads, *_ = resources.search_actors(cluster, index.actors, index.actor_cpus, shards)
        pairs = fresh * rows + (rows - fresh) * fresh  # new rows with all, old ones with the new ones
        search_s = self.pairs_s(pairs * self.scanned + rows * (index.cells or 0), 1) + fresh * actors * MERGE_S
        block = PROCESS_BYTES + min(rows, density.block_rows) * (8.0 * dim + 36.0 * density.k)
        size = self.index_bytes * (1 / actors + 2 / shards) + 20.0 * dim * threads * density.block_rows
        return Step("neighbors", search_s + rows * ROW_S, actors, size + block, SEARCH_LEVER, threads)


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
    spec, unit = tasks.get(build_probe.probe(source, counted["sample"], settings, limits))
    if settings.density.k >= rows:
        raise UserError(
            f"--density.k {settings.density.k}: needs more than k images, found {rows}; lower k or add images"
        )
    now = resources.refreshed(now)  # the probe may have brought a node
    parts = -(-rows // settings.features.whole_part_rows)
    index = index_build.resolve(settings.index, settings.density.exact, rows, spec.feature_dim, parts)
    asked = settings.features.actor_gpus
    gpus = now.gpus > 0 if asked is None else asked > 0  # those that are asked for may be still to come
    build = Build(settings.model_copy(update={"index": index}), rows, spec, unit, fleet_of(now), gpus)
    lines = [*_sizes(build, counted["bytes"], parts), *_times(build), *_grown(build, now.cpus >= 1)]
    lines += limit_lines(build.steps(), build.fleet)
    return "\n".join(lines if base is None or found is None else [*lines, *_update(build, found, base.uri)])


def foresee(
    settings: BuildIndexSettings, source: sources.Source, now: resources.Cluster, base: build_update.Base
) -> build_update.Foreseen:
    """What an update would find; before that, whether it can be one: the walk through a source may take an hour."""
    spec: index_extractor.ExtractorSpec = tasks.get(index_extractor.describe_remotely(settings.features))
    gpus = resources.gpus_to_ask(now, settings.features.actor_gpus, base.artifacts["features"].identity["device"])
    build_update.check_same(base, settings, source, spec, resources.device_of(now, gpus))
    return build_update.foresee(source, base)


def _sizes(build: Build, size: int, parts: int) -> list[str]:
    unit, spec, index = build.unit, build.spec, build.settings.index
    bad = f"; {unit.bad} of {unit.tried} probed are bad" if unit.bad else ""
    if unit.bad > (allowed := build.settings.data.max_bad_fraction) * unit.tried:
        bad += f": the run would stop, --data.max_bad_fraction is {allowed:g}"
    written = build.features_bytes + build.index_bytes + build.rows * (32.0 * build.settings.density.k + 70)
    each = ", ".join(f"{step.name} {_bytes(PROCESS_BYTES + step.memory_bytes)}" for step in build.steps())
    return [
        f"images:    {build.rows:,} listed, {_bytes(size)}{bad}",
        f"features:  {spec.model}, {spec.feature_dim} dimensions, {spec.precision}, {parts:,} parts of "
        f"{build.settings.features.whole_part_rows:,} images",
        f"index:     {index.kind}, {index.shards} shards, {f'{index.cells:,} cells' if index.cells else 'exact search'}",
        f"reads:     images once, {_bytes(size)}; features up to {build.passes} times, {_bytes(build.features_bytes)} each",
        f"writes:    about {_bytes(written)} to {build.settings.output}",
        f"memory:    of a process, about: {each}, driver {_bytes(DRIVER_BYTES + parts * PART_BYTES)}",
    ]


def _times(build: Build) -> list[str]:
    unit, fleet = build.unit, build.fleet
    model = "" if build.gpus else f" and {unit.extract_s * 1e3:.1f} ms model"
    where = f"{fleet.cores:g} cores" if fleet.cluster.local else str(fleet)
    lines = [
        f"time:      {_spent(build)}; at {unit.decode_s * 1e3:.1f} ms decoding{model} per image and core, "
        f"{unit.flops / 1e9:.0f} GFLOP/s a core, {where}; what a remote store takes comes on top"
    ]
    if build.gpus:
        lines.append("           the model runs on GPUs, which are not probed: features are the time of decoding alone")
    lines.append(
        f"           the predictor's fit takes at most {build.settings.estimator.epochs} epochs, fewer where its loss stops falling"
    )
    if build.settings.index.cells:
        exact = build.pairs_s(build.rows, build.rows) / fleet.cores
        lines.append(
            f"           neighbors: as if {build.scanned:.1%} of the rows reached the recall, which calibration decides; "
            f"at most {_time(exact)} (exact search)"
        )
    return lines


def _total_s(build: Build) -> float:
    return START_UP_S + sum(step.seconds(build.fleet) for step in build.steps())


def _spent(build: Build) -> str:
    steps = ", ".join(f"{step.name} {_time(step.seconds(build.fleet))}" for step in build.steps())
    return f"about {_time(_total_s(build))}: start {_time(START_UP_S)}, {steps}"


def _grown(build: Build, up: bool) -> list[str]:
    """For which nodes the times are, and what more of them would make of it, where an autoscaler may add some."""
    fleet = build.fleet
    if not fleet.cluster.elastic:
        return []
    nodes, cpus = fleet.nodes * GROWN_NODES, fleet.cluster.cpus * GROWN_NODES
    grown = replace(build, fleet=replace(fleet, nodes=nodes, cluster=replace(fleet.cluster, cpus=cpus)))
    here = f"the {fleet} that the cluster has now"
    if not up:
        here = f"one node of {fleet.cores:g} CPUs and {_bytes(fleet.memory_bytes)}, an assumption, since none is up"
    return [
        f"fleet:     times are for {here}; the autoscaler adds nodes up to its maximum, {nodes} such nodes would take about "
        f"{_time(_total_s(grown))}; the CPUs compute {sum(s.core_s for s in build.steps()) / 3600:,.1f} core-hours in all"
    ]


def _update(build: Build, found: build_update.Foreseen, base: str) -> list[str]:
    lost = found.gone + found.changed
    searches = f", and the searches for whoever had one of the {lost:,} for a neighbor" if lost else ""
    return [
        f"update:    of {base}: {found}",
        f"           {_spent(replace(build, new=max(1, found.to_extract)))}{searches}; the lines above are of a whole "
        "build, whose neighbors or fit come on top where quantizer or predictor do not hold any more",
    ]


def limit_lines(steps: Sequence[Step], fleet: Fleet) -> list[str]:
    """What limits a run that is large, or that does not fit into memory."""
    has = WORKER_SHARE * fleet.memory_bytes
    for step in steps:
        if (needed := step.node_bytes(fleet)) > has:
            return [
                f"limit:     {step.name}: memory, {_bytes(needed)} on a node that has {_bytes(has)} for processes; "
                f"what moves it: nodes with more memory; {step.lever}"
            ]
    longest = max(steps, key=lambda step: step.seconds(fleet))
    if sum(step.seconds(fleet) for step in steps) < LARGE_S:
        return []
    spent = _time(longest.seconds(fleet))
    return [f"limit:     {longest.name}: {longest.limit(fleet)}, {spent}; what moves it: {longest.lever}"]


def _bytes(value: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:,.0f} {unit}" if unit == "B" else f"{value:,.1f} {unit}"
        value /= 1024
    raise AssertionError


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
