"""k nearest neighbors over the shards of an index: search, merge, exact reference, recall and its calibration.

Inside a shard the work goes cell by cell as matrix products, all queries that probe a cell at once. It has two steps:

1. *Candidates.* Scores ‖x‖² − 2·q·x (float32, vectors centred, the constant ‖q‖² left out) select a few more
   than k rows.
2. *Distances.* The candidates' distances are computed again from the differences, so that a distance depends on
   the pair
   alone: the same bits in whatever block, shard or number of threads it was found, and exactly 0 for a duplicate.

A bound on the rounding error of the scores tells whether a row outside the candidates could belong to the k nearest.
Where it could (more near-ties than spare candidates, such as many copies of one image), that query is searched again,
directly. The result is therefore a function of the query and of the set of rows it is compared with, ties broken by id.
(The bits of a distance follow faiss's instruction set, AVX2 or AVX-512; between two such machines they differ by
float32 rounding.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from pd_core.core import arithmetic
from pd_core.index.shards import Rows, Shard, faiss, flat_rows, open_rows

if TYPE_CHECKING:
    import torch

MISSING_ID = -1  # pads results where there are fewer than k rows; its distance is inf
SPARE = 8  # candidates kept beyond k, so that rounding of the scores does not decide who is among the k
CHUNK_QUERIES = 32768  # queries that one thread works on at a time
TILE_QUERIES, TILE_ROWS = 512, 1024  # largest block of scores: 2 MiB per thread, within its cache
DIRECT_ROWS = 8192  # compared at once with a query that is searched directly
DECODED_VALUES = 1 << 22  # values decoded at once for step 2 of the compressed kinds (16 MiB)
_UNIT_ROUNDOFF = 2.0**-24  # of float32
Found = tuple[np.ndarray, np.ndarray]  # Euclidean distances float32 [m, k] ascending, ids int64 [m, k]


class ShardSearch:
    """Exact search within the cells a query probes (or within all rows), in shards held in memory.

    Memory beyond the rows, about: per thread CHUNK_QUERIES·(5·D + 10·(k + SPARE) + 12·probes)·4 bytes, one block of
    scores and one of rows; per call 16 bytes per (query, probe). Nothing grows with the number of pairs compared.

    Args:
        rows: of shards.open_rows or shards.flat_rows.
        threads: used by every search.
        device: torch device of step 1; "auto" is cuda where torch sees one. Untested on a real GPU.
        heaps: keep candidates in faiss's heaps (CPU only) instead of torch.topk; None: on the CPU. False on the CPU is
            how the tests run the code of the GPU path.
    """

    def __init__(self, rows: Rows, threads: int = 1, device: str = "auto", heaps: bool | None = None) -> None:
        import torch

        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.rows, self.threads, self.device = rows, threads, device
        self.heaps = device == "cpu" if heaps is None else heaps
        assert not (self.heaps and device != "cpu")
        # Any centre is right; near the data it keeps the scores small, and with them their rounding error.
        step = max(1, len(rows.ids) // 4096)
        sample = rows.at(np.arange(0, len(rows.ids), step))
        self.center = sample.mean(0, dtype=np.float64).astype(np.float32) if len(sample) else np.zeros(rows.dim, "f4")

    @classmethod
    def open(cls, sources: Sequence[Shard], threads: int = 1, device: str = "auto") -> ShardSearch:
        """Open shards of one kind, their cells disjoint; see shards.open_rows."""
        return cls(open_rows(sources), threads, device)

    def search(self, queries: np.ndarray, probes: np.ndarray | None, k: int) -> Found:
        """`search_cells` of the cells that are probed, or `search_all` where none are named."""
        return self.search_all(queries, k) if probes is None else self.search_cells(queries, probes, k)

    def search_cells(self, queries: np.ndarray, probes: np.ndarray, k: int) -> Found:
        """The k nearest rows among the cells each query probes.

        Args:
            queries: float32 [m, D].
            probes: int32 [m, p], cell numbers, each at most once per row and best nearest first; -1 for none. Cells of
                other shards count as empty.
            k: neighbors wanted.

        Returns:
            Found, sorted by (distance, id), padded with inf and MISSING_ID.
        """
        ranks = np.where(probes >= 0, self.rows.rank_of[probes], -1)
        nearest = ranks[np.arange(len(ranks)), (ranks >= 0).argmax(1)]

        def work(chosen: np.ndarray) -> Iterator[_Work]:
            return _cell_work(ranks[chosen], self.rows.offsets)

        def ranges(query: int) -> list[tuple[int, int]]:
            own = ranks[query][ranks[query] >= 0]
            return list(zip(self.rows.offsets[own].tolist(), self.rows.offsets[own + 1].tolist(), strict=True))

        # queries of one cell probe much the same cells: side by side they are found in cache
        return self._search(queries, np.argsort(nearest, kind="stable"), work, ranges, k)

    def search_all(self, queries: np.ndarray, k: int) -> Found:
        """The k nearest of all rows for float32 [m, D]: Found, as search_cells."""
        n = len(self.rows.ids)

        def work(chosen: np.ndarray) -> Iterator[_Work]:
            everyone = np.arange(len(chosen))
            for start in range(0, n, TILE_ROWS):
                yield everyone, start, min(start + TILE_ROWS, n)

        return self._search(queries, np.arange(len(queries)), work, lambda _: [(0, n)], k)

    def _search(
        self,
        queries: np.ndarray,
        order: np.ndarray,
        work: Callable[[np.ndarray], Iterator[_Work]],
        ranges: Callable[[int], list[tuple[int, int]]],
        k: int,
    ) -> Found:
        m, dim = queries.shape
        assert dim == self.rows.dim and queries.dtype == np.float32 and k >= 1
        distances, ids = np.full((m, k), np.inf, np.float32), np.full((m, k), MISSING_ID, np.int64)
        size = max(1, min(CHUNK_QUERIES, math.ceil(m / self.threads)))
        if len(self.rows.ids) == 0:
            return distances, ids

        def chunk(start: int) -> None:
            faiss.omp_set_num_threads(1)  # a setting of the calling thread
            chosen = order[start : start + size]
            own = np.ascontiguousarray(queries[chosen])
            positions, worst = self._candidates(own, work(chosen), k + SPARE)
            squared, found, sure = self._rescore(own, positions, worst, k)
            answers: dict[tuple[bytes, tuple[tuple[int, int], ...]], Found] = {}
            for i in np.flatnonzero(~sure).tolist():
                # copies of one image ask the same: once is enough
                asked = own[i].tobytes(), tuple(ranges(int(chosen[i])))
                if asked not in answers:
                    answers[asked] = self._direct(own[i : i + 1], asked[1], k)
                squared[i], found[i] = answers[asked]
            distances[chosen], ids[chosen] = np.sqrt(squared), found

        with single_threaded_torch(), ThreadPoolExecutor(self.threads) as pool:
            list(pool.map(chunk, range(0, m, size)))
        return distances, ids

    def _candidates(self, queries: np.ndarray, work: Iterator[_Work], keep: int) -> tuple[np.ndarray, np.ndarray]:
        """Step 1: positions int64 [c, keep] of the lowest scores (-1: none) and the highest score kept, float32 [c]."""
        import torch

        columns = self.rows.dim + 1
        q = np.ones((len(queries), columns), np.float32)
        np.subtract(queries, self.center, out=q[:, :-1])
        q_device = torch.from_numpy(q).to(self.device)
        x = np.empty((TILE_ROWS, columns), np.float32)
        kept = _Heaps(len(q), keep) if self.heaps else _TopK(len(q), keep, self.device)
        gathered = torch.empty((TILE_QUERIES, columns), device=self.device)
        scores = torch.empty(TILE_QUERIES * TILE_ROWS, device=self.device)
        for chosen, first, last in work:
            for start in range(first, last, TILE_ROWS):
                stop = min(start + TILE_ROWS, last)
                x_device = torch.from_numpy(self._score_rows(start, stop, x)).to(self.device)
                for begin in range(0, len(chosen), TILE_QUERIES):
                    some = chosen[begin : begin + TILE_QUERIES]
                    rows = _take(q_device, some, gathered)
                    block = scores[: len(some) * (stop - start)].view(len(some), stop - start)
                    kept.add(some, torch.mm(rows, x_device.T, out=block), start)
        return kept.finish()

    def _score_rows(self, start: int, stop: int, out: np.ndarray) -> np.ndarray:
        """Rows such that (q, 1)·row is the score: (−2·x, ‖x‖²), x centred."""
        x = out[: stop - start]
        np.subtract(self.rows.block(start, stop), self.center, out=x[:, :-1])
        x[:, -1] = np.einsum("nd,nd->n", x[:, :-1], x[:, :-1])
        x[:, :-1] *= -2.0
        return x

    def _rescore(
        self, queries: np.ndarray, positions: np.ndarray, worst: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Step 2: squared distances [c, k] and ids [c, k] by (distance, id); whether no other row can belong there."""
        squared = np.where(positions >= 0, self._squared_distances(queries, positions), np.inf)
        found = np.where(positions >= 0, self.rows.ids[positions], MISSING_ID)
        squared, found = (values[:, :k] for values in _sorted(squared, found))
        # Any row at a squared distance <= t has a centred norm of at most ‖q‖ + sqrt(t), so its score is off by at most
        # γ·(2‖q‖‖x‖ + ‖x‖²). γ: D + 1 products summed in any order, a norm of D terms, the centring, the distance
        # itself.
        t = squared[:, -1].astype(np.float64)
        q_norm = np.linalg.norm((queries - self.center).astype(np.float64), axis=1)
        x_norm = q_norm + np.sqrt(t)
        error = score_error(self.rows.dim) * (q_norm + x_norm) ** 2
        full = positions.min(1) >= 0  # otherwise every row seen is a candidate
        with np.errstate(invalid="ignore"):  # inf - inf where there are fewer than k rows, and then not full
            sure = ~full | (worst + q_norm**2 - error > t)
        return squared, found, sure

    def _squared_distances(self, queries: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Squared distances float32 [c, p] to the rows at int64 [c, p], from the differences; anything for -1."""
        positions = np.maximum(positions, 0)
        if self.rows.vectors is not None:
            return _pairwise(queries, self.rows.vectors, positions)
        c, p = positions.shape
        out = np.empty((c, p), np.float32)
        step = max(1, DECODED_VALUES // (p * self.rows.dim))
        for start in range(0, c, step):
            some = positions[start : start + step]
            decoded = self.rows.at(some.ravel())
            out[start : start + step] = _pairwise(
                queries[start : start + step], decoded, np.arange(some.size).reshape(some.shape)
            )
        return out

    def _direct(self, query: np.ndarray, ranges: Sequence[tuple[int, int]], k: int) -> Found:
        """The k nearest within ranges of rows, squared, without step 1: for float32 [1, D], float32 [k], int64 [k]."""
        positions = np.concatenate([np.arange(start, stop) for start, stop in ranges])
        squared, found = np.full(k, np.inf, np.float32), np.full(k, MISSING_ID, np.int64)
        for start in range(0, len(positions), DIRECT_ROWS):
            some = positions[start : start + DIRECT_ROWS]
            squared = np.concatenate([squared, self._squared_distances(query, some[None])[0]])
            found = np.concatenate([found, self.rows.ids[some]])
            near = squared <= np.partition(squared, k - 1)[k - 1]  # at least k, more where the k-th has ties
            squared, found = squared[near], found[near]
            order = np.lexsort((found, squared))[:k]
            squared, found = squared[order], found[order]
        return squared, found


# --- candidates -------------------------------------------------------------------------------------------------------
_Work = tuple[np.ndarray, int, int]  # queries (int64, ascending) to be compared with rows start:stop


def _cell_work(ranks: np.ndarray, offsets: np.ndarray) -> Iterator[_Work]:
    """One item per cell that is probed, cells in order; first each query's nearest cell, which sets a low bar.

    ranks: int64 [c, p], cell ranks, -1 for none.
    """
    c = len(ranks)
    query, column = np.nonzero((ranks >= 0) & (offsets[ranks + 1] > offsets[ranks]))
    later = column > (ranks >= 0).argmax(1)[query]
    keys = np.sort(
        (later * (len(offsets) + 1) + ranks[query, column]) * c + query
    )  # (later, cell, query) in one integer
    group, query = np.divmod(keys, c)
    bounds = np.concatenate([[0], np.flatnonzero(np.diff(group)) + 1, [len(group)]]) if len(group) else np.zeros(1, int)
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        rank = int(group[start]) % (len(offsets) + 1)
        yield query[start:stop], int(offsets[rank]), int(offsets[rank + 1])


class _Heaps:
    """The lowest `keep` scores of each query in faiss's heaps: one pass, most of a block rejected by a compare."""

    def __init__(self, queries: int, keep: int) -> None:
        self.result = faiss.ResultHeap(queries, keep)
        self.result.I[:] = MISSING_ID

    def add(self, chosen: np.ndarray, scores: torch.Tensor, start: int) -> None:
        m, n = scores.shape
        chosen, positions = np.ascontiguousarray(chosen, np.int64), np.arange(start, start + n)
        self.result.heaps.addn_query_subset_with_ids(
            m, faiss.swig_ptr(chosen), n, faiss.swig_ptr(scores.numpy()), faiss.swig_ptr(positions), 0
        )

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        return self.result.I, self.result.D[:, 0].copy()  # the root of a max-heap


class _TopK:
    """The same by torch.topk, on any device."""

    def __init__(self, queries: int, keep: int, device: str) -> None:
        import torch

        self.keep, self.device = keep, device
        self.scores = torch.full((queries, keep), torch.inf, device=device)
        self.positions = torch.full((queries, keep), MISSING_ID, dtype=torch.int64, device=device)

    def add(self, chosen: np.ndarray, scores: torch.Tensor, start: int) -> None:
        import torch

        rows = torch.from_numpy(chosen).to(self.device)
        new, column = scores.topk(min(self.keep, scores.shape[1]), dim=1, largest=False)
        both = torch.cat([self.scores[rows], new], dim=1)
        positions = torch.cat([self.positions[rows], column + start], dim=1)
        self.scores[rows], best = both.topk(self.keep, dim=1, largest=False)
        self.positions[rows] = positions.gather(1, best)

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        return self.positions.cpu().numpy(), self.scores.max(1).values.cpu().numpy()


def _take(queries: torch.Tensor, chosen: np.ndarray, out: torch.Tensor) -> torch.Tensor:
    """Rows `chosen` (ascending) of the queries: a view where they lie side by side, else gathered into out."""
    import torch

    first, last = int(chosen[0]), int(chosen[-1]) + 1
    if last - first == len(chosen):
        return queries[first:last]
    return torch.index_select(queries, 0, torch.from_numpy(chosen).to(queries.device), out=out[: len(chosen)])


@contextmanager
def single_threaded_torch() -> Iterator[None]:
    """Float32 products in float32, on the calling thread. Threads are ours, one per chunk of queries; a matrix product
    that splits once more only adds waiting.
    """
    import torch

    with arithmetic.kept():
        torch.set_num_threads(1)
        torch.set_float32_matmul_precision("highest")  # some images of containers ask for less by the environment
        yield


def _pairwise(queries: np.ndarray, vectors: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Squared distances float32 [c, p] of query i to vectors[positions[i, j]], each from its own differences."""
    c, p = positions.shape
    out = np.empty((c, p), np.float32)
    queries, positions = np.ascontiguousarray(queries), np.ascontiguousarray(positions, np.int64)
    pointers = (faiss.swig_ptr(array) for array in (out, queries, vectors, positions))
    faiss.fvec_L2sqr_by_idx(*pointers, queries.shape[1], c, p)
    return out


def score_error(dim: int) -> float:
    """γ: a squared distance from centred float32 scores errs by at most γ·(‖q‖ + ‖x‖)² (`pair_distances`)."""
    return (3 * dim + 32) * _UNIT_ROUNDOFF


def pair_distances(queries: np.ndarray, vectors: np.ndarray, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Euclidean distances float32 [p] of queries[rows] to vectors[positions], in the bits that every search gives.

    Args:
        queries: float32 [m, D].
        vectors: float32 [n, D], contiguous.
        rows: int64 [p].
        positions: int64 [p].
    """
    faiss.omp_set_num_threads(1)  # a setting of the calling thread
    out = np.empty(len(rows), np.float32)
    step = max(1, DECODED_VALUES // (4 * queries.shape[1]))
    for start in range(0, len(rows), step):
        some = slice(start, start + step)
        out[some] = _pairwise(queries[rows[some]], vectors, positions[some, None])[:, 0]
    return np.sqrt(out)


# --- merging and the exact reference ----------------------------------------------------------------------------------
def _sorted(distances: np.ndarray, ids: np.ndarray) -> Found:
    order = np.lexsort((ids, distances), axis=-1)
    return np.take_along_axis(distances, order, 1), np.take_along_axis(ids, order, 1)


def merge_topk(parts: Sequence[Found], k: int, exclude_ids: np.ndarray | None = None) -> Found:
    """The k nearest over several searches of disjoint rows, by (distance, id).

    Args:
        parts: Found of each search, all of the same m queries; the number of columns may differ.
        k: neighbors wanted. To remove each query itself, search k + 1.
        exclude_ids: int64 [m], an id per query that is no neighbor of it: its own. A duplicate has another id and
            stays.

    Returns:
        Found with k columns, padded with inf and MISSING_ID.
    """
    distances = np.concatenate([part[0] for part in parts], axis=1)
    ids = np.concatenate([part[1] for part in parts], axis=1)
    if exclude_ids is not None:
        own = ids == exclude_ids[:, None]
        distances, ids = np.where(own, np.float32(np.inf), distances), np.where(own, MISSING_ID, ids)
    distances, ids = (values[:, :k] for values in _sorted(distances, ids))
    short = ((0, 0), (0, k - distances.shape[1]))
    return np.pad(distances, short, constant_values=np.inf), np.pad(ids, short, constant_values=MISSING_ID)


def exact_search(
    queries: np.ndarray, blocks: Iterable[tuple[np.ndarray, np.ndarray]], k: int, threads: int = 1, device: str = "auto"
) -> Found:
    """The k nearest of all rows, streamed: float32 [m, D] against blocks of (ids int64 [b], features float32 [b, D]).

    Memory: the queries, their results, and one block. The same bits whatever the blocks.
    """
    found = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    for ids, features in blocks:
        part = ShardSearch(flat_rows(ids, features), threads, device).search_all(queries, k)
        found = merge_topk([found, part], k)
    return merge_topk([found], k)
