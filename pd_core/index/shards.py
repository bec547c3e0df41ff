"""The sharded FAISS index: coarse cells, the grouping of cells into shards, and shards as ordinary `.faiss` files.

All shards share one coarse quantizer (k-means centroids, every shard holds all of them) and each owns whole cells.
Plain faiss therefore opens a shard, searches it and merges shards (`merge_from`). Kind `flat` has no cells: its shards
are row ranges. A cell is the Voronoi region of one centroid; `cells` counts them.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pd_core.core.errors import UserError, one_line

try:
    import faiss as faiss  # `as`: knn takes it from here, so that its absence is reported in one place
except ImportError as error:
    raise UserError("faiss is not installed; pip install 'pd-core[cpu]' or 'pd-core[gpu]'") from error


HAS_GPUS = hasattr(faiss, "StandardGpuResources")  # this build of faiss, whatever the machine


def faiss_version() -> str:
    """Version of faiss, part of every index's identity."""
    return str(faiss.__version__)


ShardKind = Literal["flat", "ivf_flat", "ivf_sq8", "ivf_pq"]

ROWS_PER_CELL = 39  # training rows each centroid needs; below it faiss's k-means warns (ClusteringParameters)
MAX_ROWS_PER_CELL = 256  # and more than this it does not use
LLOYD_ITERATIONS = 10
SHARD_BYTES = 1 << 30
_PQ_ROWS = 256 * MAX_ROWS_PER_CELL  # what the 256 codewords of a sub-quantizer are trained on at most
MAX_DIM = 1 << 20
_LEAF_CELLS = 16  # cell_order stops bisecting here: so few cells fit in cache together


def default_cells(rows: int) -> int:
    """Number of cells for an index of `rows` vectors: 4·sqrt(rows), with ROWS_PER_CELL rows to train each."""
    return max(1, min(round(4 * math.sqrt(rows)), rows // ROWS_PER_CELL))


def default_shards(rows: int, dim: int) -> int:
    """One shard per GiB of float32 vectors: a property of the data, never of the cluster that happens to run."""
    return max(1, math.ceil(rows * dim * 4 / SHARD_BYTES))


def nearest_divisor(dim: int, near: int) -> int:
    """The divisor of `dim` that is nearest to `near`: what to set pq_bytes to."""
    return min((d for d in range(1, dim + 1) if dim % d == 0), key=lambda d: abs(d - near))


def train_quantizer(sample: np.ndarray, cells: int, seed: int, threads: int = 1, gpu: bool = False) -> np.ndarray:
    """Centroids of the coarse quantizer by k-means (faiss.Clustering).

    Args:
        sample: float32 [n, D], n >= cells, in an order that does not depend on the cluster.
        cells: number of centroids.
        seed: of the choice of initial centroids and of the sub-sample.
        threads: OpenMP threads. Bits are reproducible for a fixed count only (the update step sums per thread).
        gpu: on the first GPU, if this faiss has GPUs at all.

    Returns:
        float32 [cells, D].

    Raises:
        UserError: fewer rows than cells.
    """
    n, dim = sample.shape
    if not 1 <= cells <= n:
        raise UserError(f"index.cells is {cells} for {n} rows to train on; set it to at most {n // ROWS_PER_CELL or 1}")
    faiss.omp_set_num_threads(threads)
    clustering = faiss.Clustering(dim, cells)
    clustering.seed, clustering.niter = seed, LLOYD_ITERATIONS
    clustering.min_points_per_centroid = 1  # default_cells sees to ROWS_PER_CELL; asking for more cells is the user's
    clustering.max_points_per_centroid = MAX_ROWS_PER_CELL
    assign = faiss.IndexFlatL2(dim)
    if gpu and HAS_GPUS and faiss.get_num_gpus() > 0:
        assign = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, assign)
    clustering.train(np.ascontiguousarray(sample, np.float32), assign)
    return faiss.vector_to_array(clustering.centroids).reshape(cells, dim).copy()


def quantizer_of(centroids: np.ndarray) -> Any:
    """The coarse quantizer, an IndexFlatL2 over float32 [cells, D]."""
    quantizer = faiss.IndexFlatL2(centroids.shape[1])
    quantizer.add(np.ascontiguousarray(centroids, np.float32))
    return quantizer


def centroids_of(template: Any) -> np.ndarray:
    """Centroids of an IVF index: float32 [cells, D]. Raises UserError: it is flat."""
    if isinstance(template, faiss.IndexIDMap2):
        raise UserError("an index file has no cells; it is damaged or not of this index, build it again")
    return faiss.downcast_index(template.quantizer).reconstruct_n(0, template.nlist)


def coarse_probes(quantizer: Any, queries: np.ndarray, nprobe: int) -> np.ndarray:
    """The nprobe nearest cells of every query, nearest first: int32 [m, nprobe] for float32 [m, D]."""
    assert 1 <= nprobe <= quantizer.ntotal, f"nprobe {nprobe} of {quantizer.ntotal} cells"
    block, m = 65536, len(queries)
    probes = np.empty((m, nprobe), np.int32)
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    for start in range(0, m, block):
        rows = np.ascontiguousarray(queries[start : start + block], np.float32)
        probes[start : start + block] = quantizer.search(rows, nprobe)[1]
    faiss.omp_set_num_threads(before)  # of the calling thread, which may be a user's
    return probes


def cell_of(quantizer: Any, features: np.ndarray) -> np.ndarray:
    """Cell of every row: int32 [n], the nearest centroid to float32 [n, D]."""
    return coarse_probes(quantizer, features, 1)[:, 0]


def train_template(
    kind: ShardKind,
    dim: int,
    centroids: np.ndarray | None = None,
    sample: np.ndarray | None = None,
    *,
    pq_bytes: int = 48,
    seed: int = 0,
    threads: int = 1,
) -> bytes:
    """An empty, trained index of the given kind, serialized: what every shard is filled from.

    Args:
        kind: flat needs neither centroids nor sample, ivf_flat no sample.
        dim: D.
        centroids: float32 [cells, D] of train_quantizer.
        sample: float32 [n, D]; trains the codec of ivf_sq8 and ivf_pq, by residual to the cell's centroid.
        pq_bytes: bytes per vector of ivf_pq (one sub-quantizer of 8 bits each); divides D.
        seed: of the codec's k-means and of the choice of training rows.
        threads: OpenMP threads.

    Raises:
        UserError: too few rows to train the codec.
    """
    faiss.omp_set_num_threads(threads)
    if kind == "flat":
        return serialize(faiss.IndexIDMap2(faiss.IndexFlatL2(dim)))
    assert centroids is not None, f"kind {kind} needs centroids"
    index = _empty_ivf(kind, quantizer_of(centroids), len(centroids), dim, pq_bytes, seed)
    if kind == "ivf_flat":
        index.is_trained = True  # nothing but the quantizer is learnt, and that is given
    else:
        assert sample is not None, f"kind {kind} needs a sample to train its codec"
        if kind == "ivf_pq" and len(sample) < 256:
            raise UserError(f"ivf_pq needs 256 rows to train on, there are {len(sample)}; use --index.kind flat")
        if len(sample) > _PQ_ROWS:
            rows = np.sort(np.random.default_rng(seed).choice(len(sample), _PQ_ROWS, replace=False))
            sample = sample[rows]
        index.train(np.ascontiguousarray(sample, np.float32))
    return serialize(index)


def _empty_ivf(kind: ShardKind, quantizer: Any, cells: int, dim: int, pq_bytes: int, seed: int) -> Any:
    if kind == "ivf_flat":
        return faiss.IndexIVFFlat(quantizer, dim, cells, faiss.METRIC_L2)
    if kind == "ivf_sq8":
        bits = faiss.ScalarQuantizer.QT_8bit
        return faiss.IndexIVFScalarQuantizer(quantizer, dim, cells, bits, faiss.METRIC_L2, True)
    assert kind == "ivf_pq", kind
    index = faiss.IndexIVFPQ(quantizer, dim, cells, pq_bytes, 8)
    index.pq.cp.seed = seed
    return index


def build_shard(template: bytes, features: np.ndarray, ids: np.ndarray, cells: np.ndarray | None = None) -> bytes:
    """A filled shard, as the bytes of a `.faiss` file: a function of the set of rows, not of their order.

    Its ids are the sample_ids, its rows are in order of (cell, id).

    Args:
        template: of train_template.
        features: float32 [n, D].
        ids: int64 [n], sample_id, each once.
        cells: int32 [n], of cell_of; None for kind flat.
    """
    n = len(ids)
    assert features.shape[0] == n and ids.dtype == np.int64 and features.dtype == np.float32
    faiss.omp_set_num_threads(1)
    index = deserialize(template)
    order = np.argsort(ids, kind="stable") if cells is None else np.lexsort((ids, cells))
    x, sorted_ids = np.ascontiguousarray(features[order]), np.ascontiguousarray(ids[order])
    if cells is None:
        index.add_with_ids(x, sorted_ids)
    else:
        assigned = cells[order].astype(np.int64)
        index.add_core(n, faiss.swig_ptr(x), faiss.swig_ptr(sorted_ids), faiss.swig_ptr(assigned))
    return serialize(index)


def serialize(index: Any) -> bytes:
    """The bytes of a `.faiss` file."""
    return faiss.serialize_index(index).tobytes()


def deserialize(data: bytes) -> Any:
    """The index in the bytes of a `.faiss` file. Raises UserError: it is none that `serialize` gives."""
    content = np.frombuffer(data, np.uint8)
    try:
        _check_layout(_Fields(content))
        return faiss.deserialize_index(content)
    except (_OtherLayout, struct.error, RuntimeError) as error:
        raise UserError(
            f"an index file is damaged, or was not written by pd_core ({one_line(error)}); do not use it, or build it "
            "again"
        ) from None


# --- what faiss is given to read --------------------------------------------------------------------------------------
#
# faiss makes whatever a file says: lists on disk that open any file for writing, arrays of any size. It is given only
# what `serialize` writes, with every count held to the file's own length (faiss/impl/index_write.cpp has the layout).

_NO_DIRECT_MAP = (0, 0)


class _OtherLayout(Exception):
    """Bytes are not of an index that is written here."""


class _Fields:
    """The fields of a `.faiss` file, one after the other. data: uint8 [n]."""

    def __init__(self, data: np.ndarray) -> None:
        self.data, self.at = data, 0

    @property
    def left(self) -> int:
        """Bytes that were not read yet."""
        return len(self.data) - self.at

    def skip(self, size: int) -> np.ndarray:
        """The next bytes, as they are."""
        if size > self.left:
            raise _OtherLayout(f"it ends {size - self.left} bytes too early")
        self.at += size
        return self.data[self.at - size : self.at]

    def numbers(self, form: str) -> tuple[Any, ...]:
        """The next fields, of a format of `struct`, little-endian."""
        return struct.unpack(f"<{form}", self.skip(struct.calcsize(f"<{form}")).tobytes())

    def array(self, count: int, width: int) -> None:
        """An array of so many elements of `width` bytes, with its length before it."""
        (found,) = self.numbers("Q")
        _hold(found == count, f"an array has {found} elements, not {count}")
        self.skip(count * width)


def _hold(condition: bool, otherwise: str) -> None:
    if not condition:
        raise _OtherLayout(otherwise)


def _check_layout(fields: _Fields) -> None:
    """Hold a whole file to the layout of one of the kinds of `train_template`, empty or filled. Raises _OtherLayout."""
    (kind,) = fields.numbers("4s")
    if kind == b"IxM2":
        dim, rows = _head(fields)
        _vectors(fields, (dim, rows), "it is not flat inside")
        fields.array(rows, 8)
    else:
        _hold(kind in _CODE_BYTES, "it is of another kind")
        _cells(fields, _CODE_BYTES[kind])
    _hold(not fields.left, f"{fields.left} bytes follow it")


def _head(fields: _Fields) -> tuple[int, int]:
    """(D, rows) of any index."""
    dim, rows, _, _, trained, metric = fields.numbers("iqqqBi")
    _hold(
        trained == 1 and metric == faiss.METRIC_L2 and 1 <= dim <= MAX_DIM and rows >= 0,
        "its header is of no index of ours",
    )
    return dim, rows


def _vectors(fields: _Fields, of: tuple[int, int], otherwise: str) -> None:
    """A flat index of vectors one after the other; of: (D, rows)."""
    _hold(fields.numbers("4s") == (b"IxF2",) and _head(fields) == of, otherwise)
    fields.array(of[0] * of[1], 4)


def _cells(fields: _Fields, code_bytes_of: Callable[[_Fields, int], int]) -> None:
    dim, rows = _head(fields)
    cells, _ = fields.numbers("QQ")
    _vectors(fields, (dim, cells), "its cells have no centroids")
    _hold(fields.numbers("BQ") == _NO_DIRECT_MAP, "it has a direct map")
    code_bytes = code_bytes_of(fields, dim)
    _hold(fields.numbers("4s") == (b"ilar",), "its rows are not in the file")
    _hold(fields.numbers("QQ") == (cells, code_bytes), "its lists are of other cells")
    sizes = _list_sizes(fields, cells)
    _hold(int(sizes.sum()) == rows, "its lists have other rows")
    fields.skip(rows * (code_bytes + 8))


def _list_sizes(fields: _Fields, cells: int) -> np.ndarray:
    """Rows of the cells that have some, uint64; none of them more than there are bytes left."""
    form, count = fields.numbers("4sQ")
    values = fields.skip(count * 8).view("<u8")
    if form == b"full":
        _hold(count == cells, "its lists are of other cells")
        sizes = values
    else:
        _hold(form == b"sprs" and count % 2 == 0, "its lists are in another form")
        numbers, sizes = values[::2], values[1::2]
        _hold(bool((numbers < cells).all() and (numbers[1:] > numbers[:-1]).all()), "its lists are of other cells")
    _hold(float(sizes.sum(dtype=np.float64)) <= fields.left, "its lists are longer than the file")
    return sizes


def _scalar_codes(fields: _Fields, dim: int) -> int:
    kind, _, _, own_dim, own_bytes = fields.numbers("iifQQ")
    _hold((kind, own_dim, own_bytes) == (faiss.ScalarQuantizer.QT_8bit, dim, dim), "its codes are of another codec")
    fields.array(2 * dim, 4)
    _hold(fields.numbers("QB") == (dim, 1), "its codes are of another codec")
    return dim


def _product_codes(fields: _Fields, dim: int) -> int:
    by_residual, code_bytes, own_dim, parts, bits = fields.numbers("BQQQQ")
    same = (by_residual, code_bytes, own_dim, bits) == (1, parts, dim, 8)
    _hold(same and parts >= 1 and dim % parts == 0, "its codes are of another codec")
    fields.array(256 * dim, 4)
    return int(code_bytes)


_CODE_BYTES = {
    b"IwFl": lambda _, dim: 4 * dim,
    b"IwSq": _scalar_codes,
    b"IwPQ": _product_codes,
}  # reads a codec; bytes of a code


# --- which shard owns which cell --------------------------------------------------------------------------------------


def assign_cells(centroids: np.ndarray, cell_rows: np.ndarray, shards: int) -> np.ndarray:
    """Shard of every cell: near cells together, shards of about equal row counts.

    Recursive bisection: the centroids of a part are ordered along their (row-weighted) top principal direction and cut
    where the row count comes nearest to the share of floor(s/2) out of s shards. A cut misses its share by at most half
    of the largest cell, so no shard exceeds rows/shards by more than 1.5 times the largest cell (an error is passed on
    scaled by the share, at most 2/3: 1/2 + 1/2·2/3 + ... = 3/2).

    Args:
        centroids: float32 [cells, D].
        cell_rows: int64 [cells], rows per cell.
        shards: number of shards; each gets a row where there are as many non-empty cells.

    Returns:
        int32 [cells].
    """
    shard_of = np.zeros(len(centroids), np.int32)
    points, weights = centroids.astype(np.float64), np.asarray(cell_rows, np.float64)
    parts = [(np.arange(len(centroids)), 0, shards)]
    while parts:
        members, first, count = parts.pop()
        if count == 1 or len(members) == 0:
            shard_of[members] = first
            continue
        left = count // 2
        ordered = members[_principal_order(points[members], weights[members])]
        cut = _cut(weights[ordered], left, count)
        parts += [(ordered[:cut], first, left), (ordered[cut:], first + left, count - left)]
    return shard_of


def _cut(weights: np.ndarray, left: int, count: int) -> int:
    """Where to cut ordered cells so that the first part holds nearest to left/count of the rows (and cells for all)."""
    before = np.concatenate([[0.0], np.cumsum(weights)])
    occupied = np.concatenate([[0], np.cumsum(weights > 0)])
    missed = np.abs(before - before[-1] * left / count)
    rest, right = occupied[-1] - occupied, count - left
    if occupied[-1] >= count:
        allowed = (occupied >= left) & (rest >= right)  # a cell for every shard
    else:
        allowed = (occupied <= left) & (rest <= right)  # a shard for every cell
    return int(np.argmin(np.where(allowed, missed, np.inf)))


def cell_order(centroids: np.ndarray) -> np.ndarray:
    """An order of the cells in which near cells follow each other: int64 [cells], a permutation.

    The same bisection, unweighted, down to a few cells. Searching cells in this order finds queries still in cache.
    """
    points = centroids.astype(np.float64)
    parts, leaves = [np.arange(len(points))], []
    while parts:
        members = parts.pop()
        ordered = members[_principal_order(points[members], np.ones(len(members)))]
        if len(members) <= _LEAF_CELLS:
            leaves.append(ordered)
        else:
            half = len(ordered) // 2
            parts += [ordered[half:], ordered[:half]]  # the last is taken next: depth first, left to right
    return np.concatenate(leaves)


def _principal_order(points: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Order of the points along their top principal direction, by power iteration from a fixed start."""
    if weights.sum() <= 0:
        weights = np.ones(len(points))
    centred = points - np.average(points, axis=0, weights=weights)
    far = centred[np.argmax((centred**2).sum(1))]  # a start that cannot be orthogonal to everything
    direction = far / (np.linalg.norm(far) or 1.0)
    for _ in range(16):
        step = (weights * (centred @ direction)) @ centred
        norm = np.linalg.norm(step)
        if norm == 0:
            break
        direction = step / norm
    return np.argsort(centred @ direction, kind="stable")


# --- opening shards ---------------------------------------------------------------------------------------------------


@dataclass
class Rows:
    """The rows of one or several shards, taken out of faiss: contiguous, near cells side by side.

    `rank_of[cell]` is the place of a cell in that order, rows `offsets[rank] : offsets[rank + 1]` are its own. Exactly
    one of `vectors` and `codes` is there; codes (with `codec`, `centroids`) are decoded when they are read.
    """

    dim: int
    ids: np.ndarray  # int64 [n]
    offsets: np.ndarray  # int64 [cells + 1]
    rank_of: np.ndarray  # int64 [cells]
    vectors: np.ndarray | None = None  # float32 [n, D]
    codes: np.ndarray | None = None  # uint8 [n, bytes]
    codec: Any = None  # faiss ScalarQuantizer or ProductQuantizer, of the residual to the centroid
    owner: Any = None  # the index that codec points into
    centroids: np.ndarray | None = None  # float32 [cells, D], in rank order

    def block(self, start: int, stop: int) -> np.ndarray:
        """Rows start:stop, float32 [stop - start, D]; a view where vectors are not compressed."""
        return self.vectors[start:stop] if self.vectors is not None else self.at(np.arange(start, stop))

    def at(self, positions: np.ndarray) -> np.ndarray:
        """Rows at int64 [p], float32 [p, D]."""
        if self.vectors is not None:
            return self.vectors[positions]
        assert self.codes is not None and self.centroids is not None
        ranks = np.searchsorted(self.offsets, positions, side="right") - 1
        decoded: np.ndarray = self.codec.decode(self.codes[positions])
        decoded += self.centroids[ranks]
        return decoded


Shard = bytes | Callable[[], bytes]  # a `.faiss` file: its bytes, or what reads it


def open_rows(sources: Sequence[Shard]) -> Rows:
    """Rows of the given shards, of one kind, without a common cell. Raises UserError: they are not, or are no shards.

    Memory: all rows once, plus twice the shard being read (its bytes and faiss's copy) where sources are not bytes held
        by the caller. With cells every shard but the first is read twice: for the sizes of its cells, then for its
        rows.
    """
    assert sources, "no shard to open"
    first = _read(sources[0])
    if isinstance(first, faiss.IndexIDMap2):
        return _flat_rows(first, sources[1:])
    cells, dim = first.nlist, first.d
    centroids = first.quantizer.reconstruct_n(0, cells)
    order = cell_order(centroids)
    rank_of = np.empty(cells, np.int64)
    rank_of[order] = np.arange(cells)
    sizes = np.zeros(cells, np.int64)
    for index in _each(first, sources[1:]):
        own = np.array([index.invlists.list_size(int(cell)) for cell in order], np.int64)
        if ((own > 0) & (sizes > 0)).any():
            raise UserError("two shards hold rows of one cell; they are damaged or not of one index, build it again")
        sizes += own
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    codes = np.empty((offsets[-1], first.code_size), np.uint8)
    ids = np.empty(offsets[-1], np.int64)
    for index in _each(first, sources[1:]):
        _copy_lists(index.invlists, order, offsets, codes, ids)
    if isinstance(first, faiss.IndexIVFFlat):
        return Rows(dim, ids, offsets, rank_of, vectors=codes.view(np.float32))
    assert first.by_residual, "codes are of the residual to the centroid"
    codec = first.pq if isinstance(first, faiss.IndexIVFPQ) else first.sq
    first.reset()  # its rows are copied; the codec lives in it and is kept alive by `owner`
    return Rows(dim, ids, offsets, rank_of, codes=codes, codec=codec, owner=first, centroids=centroids[order])


def _each(first: Any, others: Sequence[Shard]) -> Iterator[Any]:
    yield first
    for source in others:
        index = _read(source)
        if _form(index) != _form(first):
            raise UserError("two shards are of different kinds; they are damaged or not of one index, build it again")
        yield index


def _form(index: Any) -> tuple[Any, ...]:
    return type(index), index.d, getattr(index, "nlist", 0), getattr(index, "code_size", 0)


def _read(source: Shard) -> Any:
    return deserialize(source if isinstance(source, bytes) else source())


def _copy_lists(lists: Any, order: np.ndarray, offsets: np.ndarray, codes: np.ndarray, ids: np.ndarray) -> None:
    for rank, cell in enumerate(order.tolist()):
        size = lists.list_size(cell)
        if size:
            own = slice(offsets[rank], offsets[rank] + size)
            codes[own] = faiss.rev_swig_ptr(lists.get_codes(cell), size * codes.shape[1]).reshape(size, -1)
            ids[own] = faiss.rev_swig_ptr(lists.get_ids(cell), size)


def _flat_rows(first: Any, others: Sequence[Shard]) -> Rows:
    vectors, ids = [], []
    for index in _each(first, others):
        n = index.ntotal
        flat = faiss.downcast_index(index.index)
        vectors.append(flat.reconstruct_n(0, n) if n else np.empty((0, first.d), np.float32))
        ids.append(faiss.vector_to_array(index.id_map))
    return flat_rows(np.concatenate(ids), np.concatenate(vectors) if len(vectors) > 1 else vectors[0])


def flat_rows(ids: np.ndarray, vectors: np.ndarray) -> Rows:
    """Rows without cells (one that holds all): int64 [n], float32 [n, D]."""
    vectors = np.ascontiguousarray(vectors, np.float32)
    offsets = np.array([0, len(ids)], np.int64)
    return Rows(vectors.shape[1], np.ascontiguousarray(ids, np.int64), offsets, np.zeros(1, np.int64), vectors=vectors)
