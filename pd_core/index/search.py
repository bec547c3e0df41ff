"""Search over shards on Ray: a query travels to the shards that own the cells it probes, and the answers are merged."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from pd_core.core import artifacts, trust
from pd_core.core import files as core_files
from pd_core.core.errors import RunError, UserError
from pd_core.engine import resources, tasks, telemetry
from pd_core.index import knn
from pd_core.index import shards as index_shards

QUANTIZER = "quantizer.faiss"
CELLS = "cells.json"
BESIDE_SHARE = 0.25  # of the CPUs that search processes may fill while a generator runs


@dataclass(frozen=True)
class IndexInfo:
    """A committed index, as much of it as a query needs to find its shards; small and picklable.

    Attributes:
        uri: directory of the index stage.
        fingerprint: of the stage.
        kind: flat, ivf_flat, ivf_sq8 or ivf_pq.
        rows: N. dim: D.
        shards: number of shard files.
        nprobe: cells a query probes; 0 where every search is exact.
        shard_of_cell: shard that owns each cell; empty for `flat`.
    """

    uri: str
    fingerprint: str
    kind: Annotated[str, Field(pattern="^(flat|ivf_flat|ivf_sq8|ivf_pq)$")]
    rows: trust.Count
    dim: trust.Small
    shards: trust.Small
    nprobe: Annotated[int, Field(ge=0)]
    shard_of_cell: tuple[int, ...]

    def __post_init__(self) -> None:
        cells = len(self.shard_of_cell)
        if (self.kind == "flat") != (cells == 0) or self.nprobe > cells:
            raise ValueError(f"an index of kind {self.kind} has not {cells} cells of which {self.nprobe} are probed")
        if cells and not 0 <= min(self.shard_of_cell) <= max(self.shard_of_cell) < self.shards:
            raise ValueError(f"a cell belongs to none of the {self.shards} shards")

    @property
    def exact(self) -> bool:
        """Whether a search compares with every row."""
        return self.nprobe == 0


def shard_name(shard: int) -> str:
    """File of a shard."""
    return f"shard-{shard:05d}.faiss"


def open_index(uri: str) -> IndexInfo:
    """The index in a directory. Raises UserError where none is committed, or its records say what cannot be."""
    artifact = artifacts.load_artifact(uri)
    if artifact is None or artifact.kind != "index":
        raise UserError(f"{uri}: no finished index there; run build_index.py with this --output first")
    where, totals = core_files.join(uri, core_files.ARTIFACT), artifact.totals
    owners = () if totals.get("kind") == "flat" else read_cells(uri).shard_of_cell
    values = {name: totals.get(name) for name in ("kind", "rows", "dim", "shards", "nprobe")}
    own = {"uri": uri, "fingerprint": artifact.fingerprint, "shard_of_cell": owners}
    info = trust.checked(IndexInfo, values | own, where)
    if missing := {shard_name(shard) for shard in range(info.shards)} - {part.name for part in artifact.parts}:
        raise UserError(f"{where}: names no {min(missing)}; it is damaged or no record of pd_core, make it again")
    return info


@dataclass(frozen=True)
class Cells:
    """Of each cell of an index, its shard and its rows."""

    shard_of_cell: tuple[trust.Whole, ...]
    rows_of_cell: tuple[trust.Whole, ...]


def read_cells(uri: str) -> Cells:
    """What cells.json of the index in a directory says. Raises UserError: it is not there, or says what cannot be."""
    where = core_files.join(uri, CELLS)
    return trust.checked(Cells, core_files.read_json(where), where)


@contextmanager
def _named(uri: str) -> Iterator[None]:
    """What is said inside of an index file, said of the index in a directory."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{uri}: {error}") from None


def _open_shards(info: IndexInfo, shards: Iterable[int], threads: int, device: str) -> knn.ShardSearch:
    uris = [core_files.join(info.uri, shard_name(shard)) for shard in shards]
    with _named(info.uri):
        opened = knn.ShardSearch.open([functools.partial(core_files.read_bytes, uri) for uri in uris], threads, device)
        if (opened.rows.dim, len(opened.rows.rank_of)) != (info.dim, len(info.shard_of_cell) or 1):
            raise UserError("its shards have other cells or dimensions than its record; build it again")
    return opened


class OpenIndex:
    """All shards of an index in the memory of this process, searched without Ray: what `search` finds, to the bit.

    Raises:
        UserError: its files are none that build.py writes, or of another index.
    """

    def __init__(self, info: IndexInfo, threads: int, device: str) -> None:
        self.info = info
        self.rows = _open_shards(info, range(info.shards), threads, device)

    def search(self, queries: np.ndarray, k: int, exclude_ids: np.ndarray) -> knn.Found:
        """The k nearest rows, of fewer than there are, for float32 [m, D].

        exclude_ids: int64 [m], the id that is no neighbor of its query, or knn.MISSING_ID.
        """
        assert k < self.info.rows, k
        found = self.rows.search(queries, probes_of(self.info, queries), k + 1)
        distances, ids = knn.merge_topk([found], k, exclude_ids)
        short = np.flatnonzero(~np.isfinite(distances[:, -1]))  # their cells hold fewer rows
        if len(short):
            everywhere = self.rows.search_all(queries[short], k + 1)
            distances[short], ids[short] = knn.merge_topk([everywhere], k, exclude_ids[short])
        return distances, ids


class _Searcher:
    """Ray actor that holds some shards in memory; after a restart it opens them again."""

    def __init__(self, info: IndexInfo, shards: Sequence[int], threads: int, workflow: str, stage: str) -> None:
        telemetry.hold(workflow, stage)
        self.refused: UserError | None = None  # an error here would reach the driver as Ray's, without its line
        try:
            self.rows = _open_shards(info, shards, threads, resources.assigned_device())
        except UserError as error:
            self.refused = error

    def ready(self) -> None:
        """Answers once the shards are open. Raises UserError: their files are none of ours, or of another index."""
        if self.refused is not None:
            raise self.refused

    def search(self, queries: np.ndarray, probes: np.ndarray | None, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Within the probed cells that are held here, or within all rows."""
        return self.rows.search(queries, probes, k)


@dataclass(frozen=True)
class SearchPool:
    """Handles of the actors that hold an index; picklable, so tasks route their own queries."""

    info: IndexInfo
    actors: tuple[Any, ...]
    cpus: float = 0.0  # that they claim together
    io_cpus: float = 0.0  # that a task which asks them should claim

    def close(self) -> None:
        """End the actors."""
        import ray

        for actor in self.actors:
            ray.kill(actor)


@contextmanager
def open_pool(
    info: IndexInfo,
    now: resources.Cluster,
    actors: int | None,
    actor_cpus: int,
    beside_generator: bool = False,
    stage: str = "neighbors",
) -> Iterator[SearchPool]:
    """Search actors for a while. Each holds shards that follow each other: their cells are near, queries share them.

    Args:
        info: the index.
        now: the cluster.
        actors: how many, or None for as many as fit.
        actor_cpus: fewest threads of each.
        beside_generator: a generator runs meanwhile and takes most of the time: it gets all GPUs and most CPUs.
        stage: that the actors' seconds are counted for: neighbors, or scoring (of candidates), whose cost is another.
    """
    import ray

    share = BESIDE_SHARE if beside_generator else 1.0
    count, threads, cpus, gpus = resources.search_actors(now, actors, actor_cpus, info.shards, share)
    actor = ray.remote(_Searcher).options(num_cpus=cpus, num_gpus=gpus, **tasks.ACTOR_OPTIONS)
    holders = _holder(np.arange(info.shards), info.shards, count)
    owned = [np.flatnonzero(holders == number).tolist() for number in range(count)]
    handles = tuple(actor.remote(info, shards, threads, telemetry.workflow(), stage) for shards in owned)
    pool = SearchPool(info, handles, count * cpus, resources.io_cpus(now, count * cpus))
    try:
        tasks.wait_for(pool.actors, "search")
        yield pool
    finally:
        pool.close()


def _holder(shard: np.ndarray, shards: int, actors: int) -> np.ndarray:
    """Number of the actor that holds each shard."""
    return shard.astype(np.int64) * actors // shards


@dataclass(frozen=True)
class Traffic:
    """What a search moved: rows sent to shards, each D float32, beside the rows that asked."""

    queries: int
    rows_sent: int


def search(
    pool: SearchPool, queries: np.ndarray, k: int, exclude_ids: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, Traffic]:
    """The k nearest rows of the index for each query; runs inside a Ray task or the driver.

    Args:
        pool: the open index.
        queries: float32 [m, D].
        k: neighbors.
        exclude_ids: int64 [m], an id that is not a neighbor of its query (leave-one-out), or None.

    Returns:
        Euclidean distances float32 [m, k] ascending, ids int64 [m, k], and what travelled.
    """
    import ray

    wanted = k + (exclude_ids is not None)
    everything = ray.put(queries)
    pending: dict[Any, np.ndarray | None] = {}
    sent = 0
    for actor, rows, probes in _routes(pool, queries):
        whole = len(rows) == len(queries)
        pending[actor.search.remote(everything if whole else queries[rows], probes, wanted)] = None if whole else rows
        sent += len(rows)
    best: tuple[np.ndarray, np.ndarray] | None = None
    while pending:
        (done,), _ = ray.wait(list(pending), num_returns=1)
        found = _spread(tasks.get(done), pending.pop(done), len(queries))
        best = found if best is None else knn.merge_topk([best, found], wanted)
    assert best is not None
    distances, ids = knn.merge_topk([best], k, exclude_ids)
    short = np.flatnonzero(~np.isfinite(distances[:, -1]))
    if len(short) and not pool.info.exact:  # its cells hold fewer than k rows: such a query is compared with every row
        everywhere = replace(pool, info=replace(pool.info, nprobe=0))
        own = None if exclude_ids is None else exclude_ids[short]
        distances[short], ids[short], more = search(everywhere, queries[short], k, own)
        sent += more.rows_sent
    elif len(short):
        raise RunError(f"search: the index holds fewer than k = {k} other rows")
    return distances, ids, Traffic(len(queries), sent)


def _routes(pool: SearchPool, queries: np.ndarray) -> Iterator[tuple[Any, np.ndarray, np.ndarray | None]]:
    """(actor, rows of the queries that go there, cells they probe); None: every cell."""
    info = pool.info
    probes = probes_of(info, queries)
    if probes is None:
        yield from ((actor, np.arange(len(queries)), None) for actor in pool.actors)
        return
    holder = _holder(np.asarray(info.shard_of_cell), info.shards, len(pool.actors))
    holders = holder[probes]
    for number, actor in enumerate(pool.actors):
        rows = np.flatnonzero((holders == number).any(axis=1))
        if len(rows):
            yield actor, rows, probes[rows]  # cells held elsewhere count as empty there


def probes_of(info: IndexInfo, queries: np.ndarray) -> np.ndarray | None:
    """Cells that each query is compared with, nearest first: int32 [m, nprobe] for float32 [m, D]; None: all rows."""
    return None if info.exact else index_shards.coarse_probes(_quantizer(info), queries, info.nprobe)


_open_quantizers: dict[str, Any] = {}  # one per process: tasks of one run share it


def _quantizer(info: IndexInfo) -> Any:
    if info.fingerprint not in _open_quantizers:
        _open_quantizers.clear()
        quantizer = read_quantizer(info.uri)
        if (quantizer.d, quantizer.ntotal) != (info.dim, len(info.shard_of_cell)):
            raise UserError(
                f"{info.uri}: its {QUANTIZER} has other cells or dimensions than its record; build it again"
            )
        _open_quantizers[info.fingerprint] = quantizer
    return _open_quantizers[info.fingerprint]


def read_quantizer(uri: str) -> Any:
    """The coarse quantizer of the index stage in a directory. Raises UserError: its file is none of ours."""
    with _named(core_files.join(uri, QUANTIZER)):
        template = index_shards.deserialize(core_files.read_bytes(core_files.join(uri, QUANTIZER)))
        return index_shards.quantizer_of(index_shards.centroids_of(template))


def _spread(found: tuple[np.ndarray, np.ndarray], rows: np.ndarray | None, count: int) -> tuple[np.ndarray, np.ndarray]:
    if rows is None:
        return found
    distances = np.full((count, found[0].shape[1]), np.inf, dtype=np.float32)
    ids = np.full((count, found[1].shape[1]), -1, dtype=np.int64)
    distances[rows], ids[rows] = found
    return distances, ids
