"""What a run costs: seconds, bytes, requests, network and memory of every phase, in closed forms of its size.

A stage of a workflow is a sequence of phases, a phase a number of equal tasks. Each formula follows the code that it
names; what one unit of work takes was measured (`MEASURED`, by benchmarks/unit_costs.py and docs/benchmarks.json).
docs/scaling.md prints what these functions say of runs that nobody has paid for yet; `--dry-run` has a few shorter
formulas of its own.

Pure functions: nothing here looks at a cluster, a file or a clock.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pd_core.core import files as core_files
from pd_core.core.settings.index import BuildIndexSettings
from pd_core.density import densities, fit
from pd_core.engine import resources
from pd_core.generate import chunks as generate_chunks
from pd_core.images.sources import stores
from pd_core.index import build as index_build
from pd_core.index import features, knn, search

GIB = float(1 << 30)
PROCESS_BYTES = 400e6  # of a worker that has imported what it needs, before it holds any row
STORE_SHARE = 0.3  # of a node's memory that Ray keeps for its object store
KMEANS_ITERATIONS = 10  # of index.train_quantizer
KEY_BYTES = 40  # mean length of an image's key
TEXT_BYTES = 60  # of a row in Parquet: id, key, content hash, size and label
HASH_BYTES = 36  # of that, the content hash, which only features have
MEASURED_DIM = 768  # of the vectors that pairs were measured with; their time is proportional to D (768 over 384: 1.9)
RAY_BLOCK_BYTES = 128 << 20  # Ray Data's target for a block
REQUESTS_OF_COLUMNS = 5  # to read some columns of a Parquet file: its size, its footer, the columns
DRIVER_BYTES = 200e6  # of the driver before it knows of any part
PIXELS_OF_PNG = 2.0  # bytes of a photograph's pixels over those of its PNG (two of them: 1.7 and 2.3)
SAMPLE_BYTES = 200  # of a sample's row beside its image
RECORDED_STAGES = 4  # listing, features, neighbors, densities: the driver holds the records of all their parts


# ---- unit costs ------------------------------------------------------------------------------------------------------


def _unit(value: float, unit: str, source: str) -> Any:
    return field(default=value, metadata={"unit": unit, "source": source})


@dataclass(frozen=True)
class UnitCosts:
    """Seconds of one core, bytes and rates of one unit of work, each with where it was measured.

    `unit_costs: NAME` is a figure of docs/unit_costs.json, `benchmarks: NAME` a section of docs/benchmarks.json.
    """

    list_s: float = _unit(1.05e-05, "core s / file", "unit_costs: list_s")
    listing_bytes: float = _unit(14.3, "B / image", "unit_costs: listing_bytes")
    table_write_s: float = _unit(5.27e-09, "core s / B", "unit_costs: table_write_s_per_byte")
    table_read_s: float = _unit(2.56e-09, "core s / B", "unit_costs: table_read_s_per_byte")
    feature_ratio: float = _unit(0.976, "B / B of float32", "unit_costs: features_bytes_ratio")
    neighbor_bytes: float = _unit(15.9, "B / neighbor", "unit_costs: neighbors_bytes")
    neighbor_write_s: float = _unit(2.97e-06, "core s / row, k = 20", "unit_costs: neighbors_write_s")
    neighbor_read_s: float = _unit(6.05e-07, "core s / row, k = 20", "unit_costs: neighbors_read_s")
    record_read_s: float = _unit(6.39e-05, "core s / part", "unit_costs: record_read_s")
    part_memory_bytes: float = _unit(605, "B of the driver / part", "unit_costs: part_memory_bytes")
    kmeans_flops: float = _unit(1.32e11, "FLOP/s of a core", "unit_costs: kmeans_flops")
    coarse_s: float = _unit(1.27e-08, "core s / pair, D = 768", "unit_costs: coarse_s.64")
    exact_pair_s: float = _unit(1.03e-08, "core s / pair, D = 768", "unit_costs: pair_exact_s.768")
    pair_s: float = _unit(1.29e-08, "core s / pair, D = 768", "unit_costs: pair_s.768")
    query_s: float = _unit(4.04e-05, "core s / query and process", "unit_costs: query_s.768")
    merge_s: float = _unit(1.88e-06, "core s / query and process", "unit_costs: merge_s")
    shard_build_s: float = _unit(3.02e-09, "core s / B", "unit_costs: shard_build_s_per_byte")
    mean_distance_s: float = _unit(7.65e-08, "core s / row, k = 20", "unit_costs: mean_distance_s")
    calibrate_s: float = _unit(1.62e-07, "core s / row", "unit_costs: calibrate_s")
    calibrate_bytes: float = _unit(61.6, "B / row", "unit_costs: calibrate_bytes")
    rank_s: float = _unit(1.51e-06, "core s / row", "unit_costs: rank_s")
    epoch_s: float = _unit(2.25e-05, "core s / row, D = 768, batches of 256", "unit_costs: epoch_s.256")
    epoch_large_s: float = _unit(2.35e-05, "core s / row, D = 768, batches of 4,096", "unit_costs: epoch_s.4096")
    task_start_s: float = _unit(0.393, "s", "unit_costs: task_start_s")
    torch_start_s: float = _unit(1.33, "s", "unit_costs: torch_start_s")
    task_driver_s: float = _unit(0.00088, "s of the driver / task", "unit_costs: task_driver_s")
    piece_driver_s: float = _unit(0.000175, "s of the driver / piece", "unit_costs: piece_driver_s")
    block_driver_s: float = _unit(0.00419, "s of the driver / block", "unit_costs: block_driver_s")
    features_start_s: float = _unit(15.5, "s", "benchmarks: features, start-up, mean of both sizes")
    search_start_s: float = _unit(5.72, "s", "benchmarks: selfjoin, start-up, mean")
    report_s: float = _unit(2.1, "s", "docs/log.md, 2026-11-27: the report of 1,911 images")

    def on(self, core_flops: float) -> UnitCosts:
        """The same on a core of so many FLOP/s in matrix products: only what consists of products changes with it."""
        factor = CORE_FLOPS / core_flops
        names = ("coarse_s", "exact_pair_s", "pair_s", "query_s", "epoch_s", "epoch_large_s")
        slower = {name: getattr(self, name) * factor for name in names}
        return replace(self, kmeans_flops=self.kmeans_flops / factor, **slower)


CORE_FLOPS = 1.93e11  # unit_costs: flops, of the core that all of these are of
MEASURED = UnitCosts()


# ---- the cluster -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fleet:
    """The machines, all alike, and the store that they share.

    Attributes:
        nodes: machines with CPUs.
        cores: of each.
        memory_bytes: of each.
        network_bytes_per_s: of each, in and out.
        request_s: until an object store answers a request; 0 for a local disk.
        gets_per_s, puts_per_s: requests that the store takes of all nodes together.
        local: one machine, whose Ray starts and ends with the run.
        elastic: an autoscaler brought the nodes, and would bring more.
        gpus: of each node.
        gpu_speed: images of a model that a GPU takes in the time of one of a core. Never measured: always an
        assumption.
    """

    nodes: int
    cores: float
    memory_bytes: float
    network_bytes_per_s: float = math.inf
    request_s: float = 0.0
    gets_per_s: float = math.inf
    puts_per_s: float = math.inf
    local: bool = False
    elastic: bool = False
    gpus: float = 0.0
    gpu_speed: float = 1.0

    def now(self) -> resources.Cluster:
        """What `cluster` would say of it."""
        cpus = self.nodes * self.cores
        return resources.Cluster(
            2 * cpus if self.local else cpus,
            self.nodes * self.gpus,
            self.local,
            "",
            self.cores,
            elastic=self.elastic,
        )

    @property
    def all_cores(self) -> float:
        """Of all nodes together."""
        return self.nodes * self.cores

    @property
    def store_bytes(self) -> float:
        """Memory of Ray's object store on all nodes together."""
        return STORE_SHARE * self.nodes * self.memory_bytes

    @property
    def worker_bytes(self) -> float:
        """Memory of one node that processes can use."""
        return (1 - STORE_SHARE) * self.memory_bytes


# ---- phases ----------------------------------------------------------------------------------------------------------

CORES, STORE, REQUESTS, NETWORK = "cores", "store bandwidth", "store requests", "network"
ONE, FEW, DRIVER, POOL, MEMORY = "one process", "few tasks", "driver", "actor pool", "memory"
NOWHERE = "no setting; a design change: see docs/scaling.md"
HOLD_LESS = "more nodes; nodes with more memory; --index.kind ivf_sq8 where it is ivf_flat (a quarter of the bytes)"


@dataclass(frozen=True)
class Phase:
    """A number of equal tasks, and what they need together.

    Attributes:
        stage, name: which phase of which stage.
        tasks: what is done again from its start where its process dies.
        core_s: seconds of one core, of all tasks together.
        at_once: tasks at the same time at most, however many cores there are.
        threads: of one task.
        read_bytes, written_bytes: at the store. gets, puts: requests to it.
        moved_bytes: from process to process, across nodes where there are several.
        memory_bytes: of one task's process. shared_bytes: of a node beside that, whatever the number of its processes.
        start_s: before the first task runs.
        floors: seconds below which the phase does not come, by what sets them.
        levers: what to set where something limits the phase, by that something.
        blocks: where it is not 0, each task is a process that answers so many requests, and one that is down holds up
        all.
    """

    stage: str
    name: str
    tasks: int
    core_s: float = 0.0
    at_once: float = math.inf
    threads: float = 1.0
    read_bytes: float = 0.0
    written_bytes: float = 0.0
    gets: float = 0.0
    puts: float = 0.0
    moved_bytes: float = 0.0
    memory_bytes: float = 0.0
    shared_bytes: float = 0.0
    start_s: float = 0.0
    floors: Mapping[str, float] = field(default_factory=dict)
    levers: Mapping[str, str] = field(default_factory=dict)
    blocks: int = 0

    @property
    def title(self) -> str:
        """`stage: name`."""
        return f"{self.stage}: {self.name}"

    def lever(self, limit: str) -> str:
        """What moves it where `limit` limits it."""
        return self.levers.get(limit, NOWHERE if limit in (ONE, MEMORY) else "more nodes")


# Phases that more nodes can make slower. A block of queries is merged in one task, an answer of every search process
# after the other: once there are more processes than blocks, each one more costs every block another merge.
SLOWER_WITH_NODES = {"neighbors: search"}


def slots(phase: Phase, fleet: Fleet) -> float:
    """Tasks that run at the same time."""
    return max(1.0, min(float(phase.tasks), phase.at_once, fleet.all_cores / phase.threads))


def limits(phase: Phase, fleet: Fleet) -> dict[str, float]:
    """Seconds that each resource alone would take, its start apart. The phase takes the longest of them.

    A task reads, computes and writes in turn, so what a core takes and what the store takes add up, under the name of
    the larger. Everything else goes on beside them.
    """
    together = slots(phase, fleet)
    threads = min(phase.threads, fleet.cores)
    computing = phase.core_s / (together * threads)
    busy = min(together, fleet.nodes) * fleet.network_bytes_per_s
    asking = (phase.gets + phase.puts) * fleet.request_s / together
    storing = (phase.read_bytes + phase.written_bytes) / busy + asking
    alone = ONE if together == 1 and fleet.all_cores > 1 else None
    few = (
        FEW if together * threads < 0.7 * fleet.all_cores else None
    )  # three quarters are what `cluster` gives to actors
    name = alone or (STORE if storing > computing else few or CORES)
    found = {
        name: computing + storing,
        NETWORK: phase.moved_bytes / busy if fleet.nodes > 1 else 0.0,
        REQUESTS: max(phase.gets / fleet.gets_per_s, phase.puts / fleet.puts_per_s),
    }
    for name, floor in phase.floors.items():
        found[name] = max(found.get(name, 0.0), floor)
    return found


def seconds(phase: Phase, fleet: Fleet) -> float:
    """Of the whole phase, nothing failing."""
    return phase.start_s + max(limits(phase, fleet).values())


def limit_of(phase: Phase, fleet: Fleet) -> str:
    """What the phase waits for most."""
    found = limits(phase, fleet)
    return max(found, key=lambda name: found[name])


def node_bytes(phase: Phase, fleet: Fleet) -> float:
    """Memory of the node that needs most, the object store apart."""
    together = phase.tasks if phase.blocks else slots(phase, fleet)
    return phase.shared_bytes + phase.memory_bytes * math.ceil(together / fleet.nodes)


def fits(phase: Phase, fleet: Fleet) -> bool:
    """Whether a node has the memory. Ray starts as many tasks as there are cores, whatever memory they need."""
    return node_bytes(phase, fleet) <= fleet.worker_bytes


@dataclass(frozen=True)
class Bottleneck:
    """The phase that a run waits for most, what limits it, and what moves that."""

    phase: Phase
    limit: str
    seconds: float
    lever: str

    def __str__(self) -> str:
        return f"{self.phase.title}: {self.limit}"


def bottleneck(phases: Sequence[Phase], fleet: Fleet) -> Bottleneck:
    """The first phase that does not fit into memory, else the longest one."""
    for phase in phases:
        if not fits(phase, fleet):
            return Bottleneck(phase, MEMORY, math.inf, phase.lever(MEMORY))
    longest = max(phases, key=lambda phase: seconds(phase, fleet))
    limit = limit_of(longest, fleet)
    return Bottleneck(longest, limit, seconds(longest, fleet), longest.lever(limit))


def total_s(phases: Iterable[Phase], fleet: Fleet) -> float:
    """Of all phases, one after the other, nothing failing."""
    return sum(seconds(phase, fleet) for phase in phases)


def by_stage(phases: Iterable[Phase], fleet: Fleet) -> dict[str, float]:
    """Seconds of each stage."""
    found: dict[str, float] = {}
    for phase in phases:
        found[phase.stage] = found.get(phase.stage, 0.0) + seconds(phase, fleet)
    return found


# What a cluster of others is taken to be where nobody says: assumptions, none of them measured here.
NETWORK_BYTES_PER_S = 10e9 / 8  # of a node: AWS documents 10 Gbit/s for a node of 32 vCPUs (m5.8xlarge)
REQUEST_S = 0.05  # of a small request: AWS writes of tens of milliseconds
GETS_PER_S, PUTS_PER_S = 5500.0, 3500.0  # AWS documents at least so many per partitioned prefix
LARGE_S = 3600.0  # a plan of a run that takes longer says what limits it


# ---- build_index -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Build:
    """The size of a run of build_index.

    Attributes:
        rows: N, images. files: objects of the source that hold them. dim: D. pixels: of the model's input.
        image_bytes: of one image in its file. decode_s, model_s: seconds of one core for one image.
        settings: resolved: kind, shards and cells of the index are numbers.
        nprobe: cells that a query probes. scanned: share of all rows that it is compared with; 1 where search is exact.
        spread: of probed cells over shards: a query goes to about actors**spread of them.
        epochs: of the predictor.
        parquet: whether the source is Parquet.
    """

    rows: int
    files: int
    dim: int
    pixels: int
    image_bytes: float
    decode_s: float
    model_s: float
    settings: BuildIndexSettings
    nprobe: int
    scanned: float
    spread: float
    epochs: int
    parquet: bool = False

    @property
    def exact(self) -> bool:
        """Whether every query is compared with every row."""
        return self.nprobe == 0

    @property
    def cells(self) -> int:
        """Of the coarse quantizer, 0 without one."""
        return self.settings.index.cells or 0

    @property
    def shards(self) -> int:
        """Index files."""
        return self.settings.index.shards or 1

    @property
    def parts(self) -> int:
        """Committed parts of each table."""
        return -(-self.rows // self.settings.features.whole_part_rows)

    @property
    def groups(self) -> int:
        """Tasks of one pass over all features in the index stage."""
        per_group = -(-index_build.GROUP_ROWS // self.settings.features.whole_part_rows)
        return -(-self.parts // per_group)

    @property
    def vector_bytes(self) -> float:
        """Of one row in the index."""
        return {"ivf_sq8": self.dim, "ivf_pq": self.settings.index.pq_bytes}.get(self.settings.index.kind, 4 * self.dim)


# Where cells are searched, how many of them and what share of the rows depends on the data and is known after
# calibration. Before it: the real features of `benchmarks: selfjoin` (88,192 rows, recall 0.99), with the growth that
# its separated clusters show from 100,000 to 300,000 rows. Other data may need ten times as many (overlapping clusters:
# 256 at 100,000).
EXPECTED_ROWS, EXPECTED_NPROBE, EXPECTED_SCANNED, EXPECTED_SPREAD = 88_192, 30, 0.0286, 0.49
NPROBE_GROWTH, SCANNED_GROWTH = 0.32, -0.185  # exponents of N


def expected_search(rows: int, cells: int) -> tuple[int, float, float]:
    """(nprobe, share of the rows scanned, spread over shards) of an index whose recall is not calibrated yet."""
    grown = rows / EXPECTED_ROWS
    nprobe = max(1, min(cells, round(EXPECTED_NPROBE * grown**NPROBE_GROWTH)))
    return nprobe, min(1.0, EXPECTED_SCANNED * grown**SCANNED_GROWTH), EXPECTED_SPREAD


def build_of(
    settings: BuildIndexSettings,
    rows: int,
    files: int,
    dim: int,
    pixels: int,
    image_bytes: float,
    decode_s: float,
    model_s: float,
    parquet: bool = False,
) -> Build:
    """The run of these settings, with kind, shards and cells as the index stage resolves them."""
    parts = -(-rows // settings.features.whole_part_rows)
    chosen = index_build.resolve(settings.index, settings.density.exact, rows, dim, parts)
    cells = chosen.cells
    nprobe, scanned, spread = expected_search(rows, cells) if cells else (0, 1.0, 1.0)
    resolved = settings.model_copy(update={"index": chosen})
    epochs = settings.estimator.epochs  # at most: patience ends most fits earlier
    return Build(
        rows, files, dim, pixels, image_bytes, decode_s, model_s, resolved, nprobe, scanned, spread, epochs, parquet
    )


def searchers(build: Build, fleet: Fleet, share: float = 1.0) -> tuple[int, int]:
    """Search actors and the threads of each, as the neighbors stage would start them with this share of the cluster."""
    chosen = build.settings.index
    actors, threads, *_ = resources.search_actors(fleet.now(), chosen.actors, chosen.actor_cpus, build.shards, share)
    return actors, threads


def fan_out(build: Build, actors: int) -> float:
    """Search actors that a query goes to, on average.

    All of them where search is exact. Else those that hold one of its nprobe cells; cells that are near lie in one
    shard, so these are few: actors**spread, with the spread that the data was measured to have.
    """
    return float(actors) if build.exact else min(float(actors), float(build.nprobe), actors**build.spread)


def rows_sent(build: Build, actors: int, queries: int) -> float:
    """Rows that travel to search actors: `search.Traffic.rows_sent` of so many queries."""
    return queries * fan_out(build, actors)


def search_bytes(build: Build, actors: int, queries: int) -> float:
    """Between block tasks and search actors: queries with their probes, and k + 1 distances and ids back."""
    each = 4 * build.dim + 4 * build.nprobe + 12 * (build.settings.density.k + 1)
    return rows_sent(build, actors, queries) * each


def build_index(build: Build, fleet: Fleet, unit: UnitCosts = MEASURED) -> list[Phase]:
    """The phases of `workflow.build_index`, in their order."""
    phases = [_listing(build, unit), _features(build, fleet, unit)]
    phases += _flat(build, unit) if not build.cells else _cells(build, fleet, unit)
    phases += [*_neighbors(build, fleet, unit), *_densities(build, fleet, unit)]
    return [*phases, _estimator(build, unit), _report(build, unit)]


def _features_bytes(build: Build, unit: UnitCosts) -> float:
    """Of the whole features table."""
    return build.rows * (4.0 * build.dim * unit.feature_ratio + TEXT_BYTES)


def _listing(build: Build, unit: UnitCosts) -> Phase:
    """`listing._list`: one task walks the source twice (its state, its images), sorts all names and holds all ids."""
    pages = 2 * (build.files / stores.PAGE_KEYS)
    opened = build.files if build.files < build.rows else 0  # containers: the header of each is read
    whole_names = KEY_BYTES + 16 if build.files >= build.rows else 0  # Arrow text and size
    return Phase(
        "listing",
        "walk and sort",
        tasks=1,
        core_s=build.rows * unit.list_s,
        written_bytes=build.rows * unit.listing_bytes,
        gets=pages + opened + build.parts,
        puts=2 * build.parts,
        # the order, ids of parts and of all, their argsort and what check_unique compares: 8 bytes each
        memory_bytes=PROCESS_BYTES + build.rows * (whole_names + 5 * 8),
        levers={
            ONE: "source of Parquet files or tars with thousands of images each (fewer files to walk); "
            "design: list folders in tasks",
            MEMORY: "source of Parquet files or tars; design: list folders in tasks",
        },
    )


def extractors(build: Build, fleet: Fleet) -> int:
    """Most replicas of the model."""
    chosen = build.settings.features
    gpus = chosen.actor_gpus if chosen.actor_gpus is not None or fleet.gpus else 0.0
    return resources.actor_pool(fleet.now(), chosen.actors, chosen.actor_cpus, gpus)[1]


def _features(build: Build, fleet: Fleet, unit: UnitCosts) -> Phase:
    """`features.run`: tasks decode, actors extract, tasks write; pixels and features pass through Ray's store."""
    chosen = build.settings.features
    batches = -(-build.rows // chosen.batch_size)
    batch_bytes = 3 * build.pixels * chosen.batch_size
    together = features.batches_together(
        batches, chosen.batch_size, batch_bytes, chosen.whole_part_rows if build.parquet else None
    )
    decoders = -(-batches // together)
    blocks = max(decoders, math.ceil(build.rows * 3 * build.pixels / RAY_BLOCK_BYTES))
    on_gpu = bool(fleet.gpus) and chosen.actor_gpus != 0
    model_s = build.model_s / (fleet.gpu_speed if on_gpu else 1.0)
    replicas = extractors(build, fleet)
    if on_gpu:
        replicas = min(replicas, int(fleet.nodes * fleet.gpus / (chosen.actor_gpus or 1.0)))
    pool_s = build.rows * model_s / (replicas * (1 if on_gpu else chosen.actor_cpus))
    merged = build.rows * build.image_bytes / stores.MERGED_BYTES
    size = _features_bytes(build, unit)
    return Phase(
        "features",
        "decode and extract",
        tasks=blocks,
        core_s=build.rows * (build.decode_s + (0.0 if on_gpu else model_s)) + size * unit.table_write_s,
        read_bytes=build.rows * (build.image_bytes + unit.listing_bytes),
        written_bytes=size,
        gets=(build.rows if build.files >= build.rows else max(build.files, merged)) + 3 * build.parts,
        puts=2 * build.parts,
        moved_bytes=build.rows * (3.0 * build.pixels + 2 * 4 * build.dim),
        memory_bytes=PROCESS_BYTES + 12 * batch_bytes,
        start_s=unit.features_start_s,
        floors={
            POOL if on_gpu or replicas * chosen.actor_cpus < 0.9 * fleet.all_cores else CORES: pool_s,
            "decoding tasks": build.rows * build.decode_s / min(decoders, fleet.all_cores),
            DRIVER: (2 * blocks + build.parts) * unit.block_driver_s + 2 * build.parts * _record_s(fleet, unit),
        },
        levers={
            CORES: "more nodes; GPUs with --features.actor_gpus 1; --features.precision bf16",
            FEW: "more nodes; GPUs with --features.actor_gpus 1",
            POOL: "--features.actors: nearly one per core (default: three quarters of the cores that are up, or 64); "
            "more GPUs",
            "decoding tasks": "none: features.MAX_TASKS of them at most",
            NETWORK: "--features.image_size, or nodes with more network",
            REQUESTS: "pack the images: Parquet files or tars are read in requests of 8 MiB",
            STORE: "pack the images: Parquet files or tars are read in requests of 8 MiB",
            DRIVER: "--features.part_rows and --features.batch_size larger: fewer records, fewer blocks",
        },
    )


def _record_s(fleet: Fleet, unit: UnitCosts) -> float:
    """Of the driver, to read the record of one part, as `Stage.finished_parts` does."""
    return unit.record_read_s + fleet.request_s / core_files.READERS


def _flat(build: Build, unit: UnitCosts) -> list[Phase]:
    """`build._fill_flat`: every shard is built from whole parts."""
    size = _features_bytes(build, unit)
    vectors = build.rows * build.vector_bytes
    return [
        Phase(
            "index",
            "fill shards",
            tasks=build.shards,
            core_s=size * unit.table_read_s + vectors * unit.shard_build_s,
            read_bytes=size,
            written_bytes=vectors + 8 * build.rows,
            gets=build.parts + build.shards,
            puts=2 * build.shards,
            memory_bytes=PROCESS_BYTES + 4 * vectors / build.shards,
            start_s=unit.task_start_s,
            levers={FEW: "--index.shards larger", ONE: "--index.shards larger", MEMORY: "--index.shards larger"},
        )
    ]


def neighbors_bytes(build: Build, unit: UnitCosts = MEASURED) -> float:
    """Of the neighbors table: Parquet keeps each different id of a part once, 8 bytes, and its place where it is named.

    The unit cost is that of ids which are all different; of few rows many are the same.
    """
    named = float(min(build.rows, build.settings.features.whole_part_rows) * build.settings.density.k)
    different = build.rows * -math.expm1(named * math.log1p(-1.0 / build.rows)) if build.rows > 1 else 1.0
    each = unit.neighbor_bytes - 8.0 * (1.0 - min(1.0, different / named))
    return build.rows * build.settings.density.k * each


def training_rows(build: Build) -> int:
    """Rows that the quantizer is trained on."""
    return min(build.rows, build.cells * build.settings.index.train_rows_per_cell)


def rounds(build: Build, fleet: Fleet) -> int:
    """Passes over all features in which the shards are filled, `build.fit_shards` of them in each."""
    shard_bytes = build.rows * build.dim * 4 // build.shards
    return -(-build.shards // min(build.shards, index_build.fit_shards(fleet.store_bytes, shard_bytes, build.groups)))


def _coarse_s(build: Build, queries: int, unit: UnitCosts) -> float:
    """Of one core, to compare queries with the centroids of all cells."""
    return float(queries) * build.cells * unit.coarse_s * build.dim / MEASURED_DIM


def _cells(build: Build, fleet: Fleet, unit: UnitCosts) -> list[Phase]:
    """`build.run` with cells: sample, train, assign, deal, build, calibrate; each pass reads all features again."""
    chosen, groups, dim = build.settings.index, build.groups, build.dim
    size, vectors = _features_bytes(build, unit), build.rows * build.vector_bytes
    raw = 4.0 * build.rows * dim
    reading = Phase("index", "", groups, read_bytes=size, gets=float(build.parts))
    group_bytes = 3 * raw / groups
    template = 4.0 * build.cells * dim
    trained = training_rows(build)
    threads = float(min(chosen.actor_cpus, fleet.cores))
    passes, queries = rounds(build, fleet), min(build.rows, chosen.calibration_queries)
    fewer = "--index.shards smaller (a search process then holds more), larger nodes; design: groups of more rows"
    coarse = _coarse_s(build, build.rows, unit)
    return [
        replace(
            reading,
            name="draw the training sample",
            core_s=size * unit.table_read_s,
            moved_bytes=4.0 * trained * dim,
            memory_bytes=PROCESS_BYTES + group_bytes,
            start_s=unit.task_start_s,
        ),
        Phase(
            "index",
            "train the quantizer",
            tasks=1,
            threads=threads,
            core_s=2.0 * KMEANS_ITERATIONS * trained * build.cells * dim / unit.kmeans_flops,
            written_bytes=template,
            memory_bytes=PROCESS_BYTES + 2 * 4.0 * trained * dim,
            levers={
                ONE: "--index.actor_cpus (its threads), --index.cells smaller, --index.train_rows_per_cell 39",
                FEW: "--index.cells smaller, --index.train_rows_per_cell 39; --index.actor_cpus up to a node's cores",
                MEMORY: "--index.cells smaller, --index.train_rows_per_cell 39",
            },
        ),
        replace(
            reading,
            name="assign rows to cells",
            core_s=size * unit.table_read_s + coarse,
            moved_bytes=template * fleet.nodes + 4.0 * build.rows + 8.0 * groups * build.cells,
            memory_bytes=PROCESS_BYTES + group_bytes + 3 * template,
            floors={DRIVER: groups * (unit.task_driver_s + 8.0 * build.cells / fleet.network_bytes_per_s)},
            levers={CORES: "more nodes; --index.cells smaller", DRIVER: "--index.cells smaller"},
        ),
        Phase(
            "index",
            f"deal rows to shards, {passes} passes" if passes > 1 else "deal rows to shards",
            tasks=passes * groups,
            core_s=passes * size * unit.table_read_s,
            read_bytes=passes * size,
            gets=float(passes * build.parts),
            moved_bytes=2 * raw,
            memory_bytes=PROCESS_BYTES + 2 * group_bytes,
            floors={DRIVER: passes * groups * unit.task_driver_s + build.shards * groups * unit.piece_driver_s},
            levers={STORE: fewer, CORES: fewer, FEW: fewer, DRIVER: fewer, NETWORK: "more nodes"},
        ),
        Phase(
            "index",
            "build shards",
            tasks=build.shards,
            core_s=vectors * unit.shard_build_s,
            at_once=-(-build.shards // passes),
            written_bytes=vectors + 8 * build.rows + build.shards * template,
            gets=float(build.shards),
            puts=2.0 * build.shards,
            memory_bytes=PROCESS_BYTES + 4 * raw / build.shards,
            levers={MEMORY: "--index.shards larger", ONE: "--index.shards larger", FEW: "--index.shards larger"},
        ),
        replace(
            reading,
            name="calibrate: exact neighbors of a sample",
            tasks=2 * groups,
            core_s=2 * size * unit.table_read_s + float(build.rows) * queries * unit.exact_pair_s * dim / MEASURED_DIM,
            read_bytes=2 * size,
            gets=2.0 * build.parts,
            memory_bytes=PROCESS_BYTES + group_bytes,
            start_s=unit.torch_start_s,
            floors={DRIVER: groups * (unit.task_driver_s + queries * unit.merge_s)},
            levers={
                CORES: "--index.calibration_queries smaller; more nodes",
                DRIVER: "--index.calibration_queries smaller",
            },
        ),
        Phase(
            "index",
            "calibrate: search the shards",
            tasks=build.shards,
            core_s=float(build.rows) * queries * build.scanned * unit.pair_s * dim / MEASURED_DIM
            + vectors * unit.shard_build_s,
            read_bytes=vectors,
            gets=float(build.shards),
            # its bytes, faiss's copy, and the rows taken out of that
            memory_bytes=PROCESS_BYTES + 3 * vectors / build.shards,
            start_s=unit.torch_start_s,
            levers={MEMORY: "--index.shards larger: a task of each core holds a shard three times"},
        ),
    ]


def _pair_s(build: Build, unit: UnitCosts) -> float:
    return (unit.exact_pair_s if build.exact else unit.pair_s) * build.dim / MEASURED_DIM


def search_core_s(build: Build, actors: int, unit: UnitCosts = MEASURED, queries: int | None = None) -> float:
    """Of one core, for some rows (all of them) against all, within the search processes."""
    queries = build.rows if queries is None else queries
    pairs = float(queries) * build.rows * build.scanned
    return pairs * _pair_s(build, unit) + queries * fan_out(build, actors) * unit.query_s


def _neighbors(build: Build, fleet: Fleet, unit: UnitCosts) -> list[Phase]:
    """`neighbors.find_neighbors`: actors hold all shards, tasks send them blocks of queries and merge the answers."""
    density = build.settings.density
    actors, threads = searchers(build, fleet)
    blocks = -(-build.rows // density.block_rows)
    block_rows = min(build.rows, density.block_rows)
    computing = search_core_s(build, actors, unit)
    asking = _coarse_s(build, build.rows, unit)
    merging = float(build.rows) * actors * unit.merge_s
    text = _features_bytes(build, unit)
    near = neighbors_bytes(build, unit)
    asked = asking + merging + text * unit.table_read_s + build.rows * unit.neighbor_write_s
    in_flight = min(blocks, actors + 1)
    wider = "--index.shards larger (a search process each, at most as many as cores), smaller --density.block_rows"
    searching = Phase(
        "neighbors",
        "search",
        tasks=actors,
        threads=float(threads),
        core_s=computing,
        read_bytes=text,
        written_bytes=near,
        gets=2.0 * build.parts,
        puts=2.0 * build.parts,
        moved_bytes=search_bytes(build, actors, build.rows),
        memory_bytes=search_actor_bytes(build, actors, threads),
        shared_bytes=math.ceil(in_flight / fleet.nodes) * (PROCESS_BYTES + block_bytes(build, block_rows)),
        floors={
            "block tasks": asked / min(float(in_flight), fleet.all_cores),
            DRIVER: blocks * unit.task_driver_s + build.parts * _record_s(fleet, unit),
        },
        levers={
            CORES: "more nodes; --index.target_recall lower; --index.kind auto or ivf_flat where exact was asked for",
            FEW: wider,
            ONE: wider,
            "block tasks": "--density.block_rows smaller where there are fewer blocks than processes, "
            "--index.cells smaller, --index.actors smaller (each answers every block)",
            NETWORK: "--index.shards smaller (a query goes to fewer processes)",
            DRIVER: "--features.part_rows larger",
            MEMORY: HOLD_LESS,
        },
        blocks=blocks,
    )
    return [_opening(build, actors, threads, unit), searching]


def _opening(build: Build, actors: int, threads: int, unit: UnitCosts) -> Phase:
    """`search.open_pool`: each search process reads its shards, those of an index with cells twice."""
    vectors = build.rows * build.vector_bytes
    twice = 2 if build.cells and build.shards > actors else 1
    return Phase(
        "neighbors",
        "open the shards",
        tasks=actors,
        core_s=twice * vectors * unit.shard_build_s,
        read_bytes=twice * vectors,
        gets=float(twice * build.shards),
        memory_bytes=search_actor_bytes(build, actors, threads),
        start_s=unit.search_start_s,
        levers={ONE: "--index.shards larger", FEW: "--index.shards larger", MEMORY: HOLD_LESS},
    )


def search_actor_bytes(build: Build, actors: int, threads: int) -> float:
    """Memory of a search process: its rows with their ids, the shard it reads last, and a search of a block."""
    rows = build.rows / actors
    chunk = min(knn.CHUNK_QUERIES, build.settings.density.block_rows)
    wanted = build.settings.density.k + 1 + knn.SPARE
    probes = max(1, build.nprobe)
    searching = threads * chunk * (5.0 * build.dim + 10 * wanted + 12 * probes) * 4
    searching += 16.0 * min(build.rows, build.settings.density.block_rows) * probes
    shard = build.rows * build.vector_bytes / build.shards
    # what opening took is not given back to the system before the first search takes its own
    return PROCESS_BYTES + rows * (build.vector_bytes + 8) + 2 * shard + searching


def block_bytes(build: Build, rows: int) -> float:
    """Memory of a task that holds a block of queries, what was found, and the answer that it is merging."""
    return rows * (2 * 4.0 * build.dim + 36.0 * build.settings.density.k + 4.0 * build.nprobe)


def _densities(build: Build, fleet: Fleet, unit: UnitCosts) -> list[Phase]:
    """`densities.write_densities`: summaries of all parts go to one task, its ranks of all rows to every node."""
    k = build.settings.density.k
    groups = -(-build.parts // densities.GROUP_PARTS)
    near = neighbors_bytes(build, unit)
    written = near + build.rows * (32.0 + TEXT_BYTES - HASH_BYTES)
    group_rows = build.rows / groups
    read = build.rows * (unit.neighbor_read_s + unit.mean_distance_s)
    return [
        Phase(
            "densities",
            "mean distances",
            tasks=groups,
            core_s=read,
            read_bytes=near,
            gets=float(build.parts),
            moved_bytes=16.0 * build.rows,
            memory_bytes=PROCESS_BYTES + group_rows * (12 * k + 8 * k),
            start_s=unit.task_start_s,
        ),
        Phase(
            "densities",
            "normalizer and ranks",
            tasks=1,
            core_s=build.rows * unit.calibrate_s,
            read_bytes=16.0 * build.rows,  # from the other nodes' object stores, over the same network
            memory_bytes=PROCESS_BYTES + build.rows * unit.calibrate_bytes,
            levers={
                MEMORY: "nodes with more memory; design: ranks from merged histograms instead of one sorted array",
                ONE: "design: ranks from merged histograms instead of one sorted array",
            },
        ),
        Phase(
            "densities",
            "write",
            tasks=groups,
            core_s=read + build.rows * (unit.rank_s + unit.neighbor_write_s),
            read_bytes=near + build.rows * TEXT_BYTES,
            written_bytes=written,
            gets=8.0 * build.parts,
            puts=2.0 * build.parts,
            memory_bytes=PROCESS_BYTES + group_rows * 3 * (12 * k + 32 + TEXT_BYTES),
            shared_bytes=8.0 * build.rows,
            floors={
                NETWORK: 8.0 * build.rows / fleet.network_bytes_per_s if fleet.nodes > 1 else 0.0,
                DRIVER: 2 * build.parts * _record_s(fleet, unit),
            },
            levers={
                DRIVER: "--features.part_rows larger: fewer records",
                NETWORK: "design: ranks from merged histograms (every node fetches 8 bytes a row)",
                MEMORY: "design: ranks from merged histograms (every node holds 8 bytes a row)",
                FEW: "--features.part_rows smaller (a task writes 64 parts)",
                ONE: "--features.part_rows smaller (a task writes 64 parts)",
            },
        ),
    ]


def _estimator(build: Build, unit: UnitCosts) -> Phase:
    """`estimator._fit`: one task; rows that do not fit in its window are all read again in every epoch."""
    chosen = build.settings.estimator
    trained = build.rows * (1 - chosen.holdout_fraction)
    passes = 1 if trained <= fit.WINDOW_ROWS else 1 + build.epochs
    size = _features_bytes(build, unit)
    large = chosen.batch_size >= 4096
    each = (unit.epoch_large_s if large else unit.epoch_s) * _weights(build.dim, chosen.hidden) / _weights(MEASURED_DIM)
    window = min(trained, fit.WINDOW_ROWS) * 4.0 * build.dim
    heldout = min(build.rows * chosen.holdout_fraction, fit.HELDOUT_ROWS) * 4.0 * build.dim
    return Phase(
        "estimator",
        "fit the predictor",
        tasks=1,
        # more threads were not measured, and are not counted on
        core_s=build.epochs * trained * each + passes * size * unit.table_read_s,
        read_bytes=passes * size,
        gets=float(passes * 2 * build.parts),
        memory_bytes=PROCESS_BYTES + 2 * window + 2 * heldout,
        start_s=unit.torch_start_s,
        levers={
            ONE: "--estimator.epochs and --estimator.patience smaller, --estimator.batch_size 4096; "
            "design: fit to a sample",
        },
    )


def _weights(dim: int, hidden: Sequence[int] = (512, 256, 128)) -> int:
    """Of the predictor's layers, which its time is proportional to."""
    widths = [dim, *hidden, 1]
    return sum(a * b for a, b in itertools.pairwise(widths))


def _report(build: Build, unit: UnitCosts) -> Phase:
    """`report._draw`: one task goes over the densities of all parts, at worst twice, and over the listing."""
    light = build.rows * (8 + KEY_BYTES + 24)
    return Phase(
        "report",
        "draw",
        tasks=1,
        core_s=unit.report_s + 2 * light * unit.table_read_s,
        read_bytes=2 * light + build.rows * unit.listing_bytes,
        gets=float((2 * REQUESTS_OF_COLUMNS + 1) * build.parts),
        memory_bytes=2 * PROCESS_BYTES,
        levers={ONE: "--features.part_rows larger: fewer parts to open; design: gather in tasks"},
    )


def driver_bytes(build: Build, unit: UnitCosts = MEASURED) -> float:
    """Memory of the driver: the records of all parts of the stages that have one per features part."""
    return DRIVER_BYTES + RECORDED_STAGES * build.parts * unit.part_memory_bytes


def written_bytes(phases: Iterable[Phase]) -> dict[str, float]:
    """Bytes that each stage leaves at the store."""
    found: dict[str, float] = {}
    for phase in phases:
        found[phase.stage] = found.get(phase.stage, 0.0) + phase.written_bytes
    return found


# ---- the incremental update ------------------------------------------------------------------------------------------


def pairs_of_update(old: int, new: int) -> float:
    """Pairs compared when `new` rows join `old` ones: old rows with the new ones only, new rows with all others."""
    return float(old) * new + float(new) * (old + new)


TRAINING = ("draw the training sample", "train the quantizer")  # phases of the index that an update takes over
FEWER_NEW = "fewer new rows at once: an update in steps compares no pair twice"


def update_index(build: Build, new: int, fleet: Fleet, unit: UnitCosts = MEASURED) -> list[Phase]:
    """The phases of `workflow.build_index` with a base, where `new` of `build.rows` images are new and none has gone.

    What is saved is extraction, the training of the quantizer, the pairs of old rows with each other and the fit. All
    else goes over all rows again: listing, the shards of an index with cells and their calibration, the other rows'
    neighbors, densities and report. Where quantizer or predictor do not hold any more, the phases of a whole build come
    on top.
    """
    fresh = replace(build, rows=new, files=max(1, round(build.files * new / build.rows)))
    whole = {phase.title: phase for phase in build_index(build, fleet, unit)}
    shards = _flat(fresh, unit)  # the others are taken over as they are
    if build.cells:
        shards = [phase for phase in whole.values() if phase.stage == "index" and phase.name not in TRAINING]
        shards = [_drift(build, fresh, unit), *(p for p in shards if not build.exact or "calibrate" not in p.name)]
    return [
        _comparison(whole["listing: walk and sort"], build, unit),
        _features(fresh, fleet, unit),
        _take_over(build, fresh, fleet, unit),
        *shards,
        *_update_neighbors(build, fresh, fleet, unit),
        *(phase for phase in whole.values() if phase.stage == "densities"),
        _keep(build, unit),
        whole["report: draw"],
    ]


def _comparison(walk: Phase, build: Build, unit: UnitCosts) -> Phase:
    """`update._compare`: the listing's walk, and the base's listing read twice in the same task."""
    before = 2 * build.rows * unit.listing_bytes
    return replace(
        walk,
        name="walk and compare",
        core_s=walk.core_s + before * unit.table_read_s,
        read_bytes=walk.read_bytes + before,
        gets=walk.gets + (1 + REQUESTS_OF_COLUMNS) * build.parts,
    )


def _take_over(build: Build, fresh: Build, fleet: Fleet, unit: UnitCosts) -> Phase:
    """`features.merge`: a task per part; the store copies what is as it was, the others are written again."""
    size = _features_bytes(fresh, unit)
    return Phase(
        "features",
        "take over what is unchanged",
        tasks=build.parts,
        core_s=size * (unit.table_read_s + unit.table_write_s),
        read_bytes=size,
        written_bytes=size,  # that which passes through a node; a copy is a request
        gets=2.0 * build.parts + (1 + REQUESTS_OF_COLUMNS) * fresh.parts,
        puts=2.0 * build.parts,
        memory_bytes=PROCESS_BYTES + 4 * size / fresh.parts,
        start_s=unit.task_start_s,
        floors={DRIVER: build.parts * unit.task_driver_s + 2 * build.parts * _record_s(fleet, unit)},
        levers={DRIVER: "--features.part_rows larger, of base and update", REQUESTS: "--features.part_rows larger"},
    )


def _drift(build: Build, fresh: Build, unit: UnitCosts) -> Phase:
    """`update.drift`: one task compares all new rows with all centroids, after one with a few rows of the base."""
    size = _features_bytes(fresh, unit)
    part_rows = min(fresh.rows, build.settings.features.whole_part_rows)
    return Phase(
        "index",
        "look whether the quantizer holds",
        tasks=1,
        core_s=_coarse_s(build, fresh.rows, unit) + size * unit.table_read_s,
        read_bytes=size,
        gets=float(fresh.parts),
        memory_bytes=PROCESS_BYTES + 2 * 4.0 * part_rows * build.dim + 3 * 4.0 * build.cells * build.dim,
        start_s=unit.task_start_s,
        levers={ONE: f"--index.cells smaller; {FEWER_NEW}; design: look at a sample of the new rows"},
    )


def _update_neighbors(build: Build, fresh: Build, fleet: Fleet, unit: UnitCosts) -> list[Phase]:
    """`neighbors._merge_block`: every task has the new rows in memory as a shard and compares old ones with it.

    New rows, and old ones that lost a neighbor, are searched for by processes that hold the whole index, beside the
    tasks.
    """
    density, new, old = build.settings.density, fresh.rows, build.rows - fresh.rows
    actors, threads = searchers(build, fleet, search.BESIDE_SHARE)
    blocks = min(-(-build.rows // density.block_rows), build.parts)
    vectors, size, near = new * build.vector_bytes, _features_bytes(build, unit), neighbors_bytes(build, unit)
    fresh_size = _features_bytes(fresh, unit)
    part_rows = min(build.rows, build.settings.features.whole_part_rows)
    computing = float(old) * new * build.scanned * _pair_s(build, unit) + old * unit.query_s
    merging = (old + new * fan_out(build, actors)) * unit.merge_s
    tables = size * unit.table_read_s + build.rows * (unit.neighbor_read_s + unit.neighbor_write_s)
    shard = Phase(
        "neighbors",
        "make a shard of the new rows",
        tasks=1,
        core_s=_coarse_s(build, new, unit) + fresh_size * unit.table_read_s + vectors * unit.shard_build_s,
        read_bytes=fresh_size,
        gets=float(fresh.parts),
        memory_bytes=PROCESS_BYTES + 4 * 4.0 * new * build.dim,
        start_s=unit.task_start_s,
        levers={ONE: FEWER_NEW, MEMORY: FEWER_NEW},
    )
    joined = Phase(
        "neighbors",
        "old rows with new ones, new rows with all",
        tasks=blocks,
        core_s=computing
        + merging
        + tables
        + _coarse_s(build, build.rows, unit)
        + blocks * vectors * unit.shard_build_s,
        at_once=max(1.0, fleet.all_cores - actors * build.settings.index.actor_cpus),
        read_bytes=size + near,
        written_bytes=near,
        gets=3.0 * build.parts,
        puts=2.0 * build.parts,
        moved_bytes=vectors * min(fleet.nodes, blocks) + search_bytes(build, actors, new),
        # the shard as bytes, as faiss reads it and as rows; and a part with what is known of it
        memory_bytes=PROCESS_BYTES + 3 * vectors + block_bytes(build, part_rows),
        shared_bytes=math.ceil(actors / fleet.nodes) * search_actor_bytes(build, actors, threads),
        floors={
            "search processes": search_core_s(build, actors, unit, new) / (actors * min(threads, fleet.cores)),
            DRIVER: blocks * unit.task_driver_s + build.parts * _record_s(fleet, unit),
        },
        levers={
            "search processes": f"--index.shards larger; {FEWER_NEW}",
            FEW: "--density.block_rows smaller",
            DRIVER: "--features.part_rows larger, of base and update",
            MEMORY: f"{FEWER_NEW}; --density.block_rows so large that there are fewer tasks than cores; "
            "design: one shard of the new rows for all tasks of a node",
        },
    )
    return [shard, _opening(build, actors, threads, unit), joined]


def _keep(build: Build, unit: UnitCosts) -> Phase:
    """`estimator._keep`: one task predicts held-out rows, of as many parts as it takes to meet enough of them."""
    chosen = build.settings.estimator
    read = min(float(build.rows), fit.HELDOUT_ROWS / chosen.holdout_fraction)
    share = read / build.rows
    forward = (
        unit.epoch_s / 3 * _weights(build.dim, chosen.hidden) / _weights(MEASURED_DIM)
    )  # of three products of a step
    return Phase(
        "estimator",
        "look whether the predictor holds",
        tasks=1,
        core_s=share * _features_bytes(build, unit) * unit.table_read_s + read * chosen.holdout_fraction * forward,
        read_bytes=share * _features_bytes(build, unit),
        gets=float((1 + REQUESTS_OF_COLUMNS) * math.ceil(share * build.parts)),
        memory_bytes=PROCESS_BYTES + 3 * 4.0 * min(build.rows, build.settings.features.whole_part_rows) * build.dim,
        start_s=unit.torch_start_s,
    )


# ---- generate --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampling:
    """The size of a run of generate.

    Attributes:
        n: images wanted. rate: share of candidates that is accepted. chunk: candidates of a batch. chunks_per_part: of
        a file.
        actor_s: of one replica per candidate. png_bytes: of an image as it is kept.
        replicas: generator processes, at most.
        index_bytes: of the index that scores them, searchers: processes that hold it.
    """

    n: int
    rate: float
    chunk: int
    chunks_per_part: int
    actor_s: float
    png_bytes: float
    replicas: int
    index_bytes: float
    searchers: int

    @property
    def candidates(self) -> int:
        """Expected."""
        return math.ceil(self.n / self.rate)

    @property
    def chunks(self) -> int:
        """Expected."""
        return -(-self.candidates // self.chunk)


def generate(sampling: Sampling, dim: int, fleet: Fleet, unit: UnitCosts = MEASURED) -> list[Phase]:
    """The samples of `sampling.run`: executions of at most `chunks.MAX_CHUNKS` chunks, each with actors of its own."""
    executions = -(-sampling.chunks // generate_chunks.MAX_CHUNKS)
    parts = -(-sampling.chunks // sampling.chunks_per_part)
    written = sampling.n * (sampling.png_bytes + SAMPLE_BYTES)
    return [
        Phase(
            "samples",
            "generate and score",
            tasks=sampling.chunks,
            at_once=sampling.replicas,
            core_s=sampling.candidates * sampling.actor_s,
            written_bytes=written,
            gets=float(parts),
            puts=2.0 * parts,
            moved_bytes=sampling.n * (PIXELS_OF_PNG * sampling.png_bytes + 2 * 4 * dim),
            memory_bytes=PROCESS_BYTES + sampling.chunk * 4 * PIXELS_OF_PNG * sampling.png_bytes,
            shared_bytes=sampling.index_bytes / min(fleet.nodes, sampling.searchers),
            start_s=executions * unit.features_start_s + unit.search_start_s,
            floors={
                DRIVER: (2 * sampling.chunks + parts) * unit.block_driver_s
                + executions * parts / 2 * _record_s(fleet, unit)
            },
            levers={
                CORES: "more nodes; GPUs with --actor_gpus 1; a --weighting that accepts more; fewer --generator.steps",
                FEW: "--actors larger (an autoscaling cluster starts 64 at most without it)",
                ONE: "--actors larger",
                DRIVER: "--chunk larger",
                MEMORY: "an index of kind ivf_sq8 or ivf_pq; --search.actors up to one per node",
            },
        )
    ]
