"""Which generated rows lie in which balls of real rows, and the reverse: one exact pass over pairs, in bounded memory.

A ball reaches from a row to its k-th nearest other row of the same set. Of every pair the pass asks a score, the
squared distance by a float32 matrix product with a proved bound on its rounding error (knn.score_error). Where the
bound leaves an answer open, the distance is computed from the differences as the radii were, with the same bits: a pair
on the boundary of a ball is decided like the neighbor that defines it. What a pair answers is reduced at once.

Half-samples (halfsamples.py) ride along as the bits of a word. Without some rows, the k-th neighbor is the k-th
*present* one of a list somewhat longer than k, and so a distance has only to be placed in that list: `inside` turns the
place into the word of replicates in which the ball holds it. Bit FULL is the set itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pd_core.evaluate import halfsamples
from pd_core.index import knn
from pd_core.index.shards import flat_rows

if TYPE_CHECKING:
    import torch

NOBODY = 255  # group of what pads a list of neighbors
TILES = {"cpu": (1024, 2048), "cuda": (8192, 8192)}  # generated x real rows of one block of scores
PAIRS = 1 << 15  # pairs that are answered together, arrays of a list's length each
_UP = 1 + 2.0**-20  # makes up for the rounding of a few float32 operations, upwards
_POINT = 1e-15  # a radius whose square float32 still has room to divide by
_IN_FULL = np.uint64(1 << halfsamples.FULL)


@dataclass(frozen=True)
class Side:
    """One set of rows and the nearest others of each: what balls are made of.

    Attributes:
        features: float32 [N, D].
        groups: of the rows, uint8 [N].
        distances: Euclidean to the nearest others, ascending, float32 [N, K], padded with inf.
        neighbor_groups: groups of these, uint8 [N, K], padded with NOBODY.
    """

    features: np.ndarray
    groups: np.ndarray
    distances: np.ndarray
    neighbor_groups: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray, row_ids: np.ndarray, neighbors: int, threads: int, device: str) -> Side:
        """Exact search, leave-one-out by row id: a duplicate is a neighbor."""
        found = knn.ShardSearch(flat_rows(row_ids, features), threads, device).search_all(features, neighbors + 1)
        distances, ids = knn.merge_topk([found], neighbors, row_ids)
        groups = np.where(ids == knn.MISSING_ID, NOBODY, halfsamples.groups_of(ids.ravel()).reshape(ids.shape))
        return cls(features, halfsamples.groups_of(row_ids), distances, groups.astype(np.uint8))


def inside(side: Side, rows: slice, bits: np.ndarray, k: int) -> np.ndarray:
    """Replicates in which the ball of each row exists and holds a point further than p entries of the row's list.

    The ball of row j holds it if fewer than k of those p entries are present. A list that ends before its k-th present
    neighbor counts as ending with it, about one in 10,000 of a list of 4k + 8; with fewer than k others in all, the
    ball is everything.

    Args:
        side: the set.
        rows: of it.
        bits: halfsamples.presence of its groups, uint64 [GROUPS].
        k: of the ball.

    Returns:
        uint64 [rows, K + 1], by p.
    """
    word_of = np.zeros(256, np.uint64)
    word_of[: len(bits)] = bits
    present = word_of[side.neighbor_groups[rows]]
    n, length = present.shape
    seen = np.zeros((k, n), np.uint64)  # seen[c]: where at least c + 1 were present so far
    held = np.empty((n, length + 1), np.uint64)
    held[:, 0] = ~np.uint64(0)
    for p in range(length):
        for c in range(k - 1, 0, -1):
            seen[c] |= seen[c - 1] & present[:, p]
        seen[0] |= present[:, p]
        held[:, p + 1] = ~seen[-1]
    held[:, -1] = 0  # beyond the list
    held &= word_of[side.groups[rows], None]
    return held


def _reach(distances: np.ndarray, held: np.ndarray) -> np.ndarray:
    """Largest squared radius of each row over replicates, float64 [n], rounded up: `held` only falls with p."""
    last = (held != 0).sum(1) - 1
    return distances[np.arange(len(distances)), last].astype(np.float64) ** 2 * _UP


@dataclass
class Answers:
    """What the pairs told, about M generated and N real rows.

    Attributes:
        precise: replicates in which the generated row is in some real ball of k_precision, uint64 [M].
        recalled: replicates in which the real row is in some generated ball, uint64 [N].
        covered: replicates in which some generated row is in the ball of k_coverage of the real row, uint64 [N].
        held: pairs of a generated row and such a ball that holds it, per replicate, int64 [FULL + 1].
        nearest_distance: from the generated to the nearest real row, float32 [M].
        nearest: that row, the first of several, int64 [M].
        realism: largest ratio of radius to distance over real rows with a radius of at most the median, 0 for none;
            above 1: within such a ball; inf: a copy of the real row itself. float64 [M].
        rarity: smallest radius of the real balls of k_precision that hold the generated row; inf for none, float64 [M].
    """

    precise: np.ndarray
    recalled: np.ndarray
    covered: np.ndarray
    held: np.ndarray
    nearest_distance: np.ndarray
    nearest: np.ndarray
    realism: np.ndarray
    rarity: np.ndarray

    @classmethod
    def empty(cls, m: int, recalled: np.ndarray, covered: np.ndarray) -> Answers:
        """Before the first pair; the arrays by real rows are the caller's."""
        return cls(
            np.zeros(m, np.uint64),
            recalled,
            covered,
            np.zeros(halfsamples.FULL + 1, np.int64),
            np.full(m, np.inf, np.float32),
            np.full(m, np.iinfo(np.int64).max),
            np.zeros(m),
            np.full(m, np.inf),
        )

    def merge(self, other: Answers) -> None:
        """Take over what another thread has found for the same generated rows and other real ones."""
        self.precise |= other.precise
        self.held += other.held
        self.nearer(np.arange(len(self.nearest)), other.nearest, other.nearest_distance)
        np.maximum(self.realism, other.realism, out=self.realism)
        np.minimum(self.rarity, other.rarity, out=self.rarity)

    def nearer(self, i: np.ndarray, j: np.ndarray, distance: np.ndarray) -> None:
        """Real rows j at these distances from generated rows i, each i at most once."""
        old, old_row = self.nearest_distance[i], self.nearest[i]
        better = (distance < old) | ((distance == old) & (j < old_row))
        self.nearest_distance[i[better]], self.nearest[i[better]] = distance[better], j[better]


@dataclass(frozen=True)
class _Block:
    """Real rows first : first + B, ready to be compared."""

    first: int
    columns: torch.Tensor  # float32 [B, D + 1], such that (q, 1)·row is the score less its slack
    reach: torch.Tensor  # float32 [B]
    inverse: torch.Tensor  # 1/radius² of balls that count for realism, 0 for others, float32 [B]
    penalty: torch.Tensor  # 0 for these, inf for others
    slack: np.ndarray  # float64 [B]
    precision: np.ndarray  # `inside` for k_precision
    coverage: np.ndarray  # `inside` for k_coverage


@dataclass
class _Bounds:
    """Upper bounds, of one thread: nothing above them can be nearest, or most realistic."""

    nearest: torch.Tensor  # squared distance, float32 [M]
    ratio: torch.Tensor  # (distance/radius)², float32 [M]


class Crossing:
    """The pass over all pairs of two sets.

    Memory beyond the sides: a centred copy of the generated features, 8·(K + 3) bytes per generated row, 16 per real
    row, and per thread 44·M bytes, a few tiles of TILES (with 45 bytes for each pair in one that may matter: 94 MB at
    most on the CPU) and arrays of PAIRS; nothing grows with N·M. Time is that of the matrix product where balls are
    sparse; where most pairs lie in each other's balls (a blurred set amid a high-dimensional one) each of these pairs
    takes about half a µs more.

    Args:
        real: Side.
        generated: Side.
        k_precision: neighbors of the balls on either side.
        k_coverage: neighbors of the real balls of density and coverage.
        halves: also answer for the replicates; else only for the sets themselves.
        threads: real rows are shared out among them.
        device: torch device of the products, from `resolve`.
    """

    def __init__(
        self,
        real: Side,
        generated: Side,
        k_precision: int,
        k_coverage: int,
        halves: bool,
        threads: int,
        device: str,
    ) -> None:
        import torch

        self.device, self.tile = device, TILES[device.partition(":")[0]]
        self.real, self.generated, self.threads = real, generated, threads
        self.k_precision, self.k_coverage, self.halves = k_precision, k_coverage, halves
        none = np.zeros((0, halfsamples.GROUPS), bool)
        self.real_bits = halfsamples.presence(halfsamples.REAL_HALVES if halves else none)
        self.bits = halfsamples.presence(halfsamples.GENERATED_HALVES if halves else none)
        self.gamma = knn.score_error(real.features.shape[1])
        self.center = real.features[:: max(1, len(real.features) // 4096)].mean(0, dtype=np.float64).astype(np.float32)
        self.radii = real.distances[:, k_precision - 1]
        self.median = float(np.median(self.radii))
        q, norms = self._centred(generated.features, 1.0)
        self.queries = torch.from_numpy(q).to(self.device)
        self.base = torch.from_numpy(((1 - 2 * self.gamma) * norms).astype(np.float32)).to(self.device)
        self.slack = 2 * self.gamma * norms
        self.recall = inside(generated, slice(None), self.bits, k_precision)
        self.reach = _reach(generated.distances, self.recall)

    def run(self) -> Answers:
        """Every pair once. The same bits whatever the tiles and threads."""
        import torch

        n, m = len(self.real.features), len(self.generated.features)
        recalled, covered = np.zeros(n, np.uint64), np.zeros(n, np.uint64)
        starts = range(0, n, self.tile[1])

        def share(thread: int) -> Answers:
            answers = Answers.empty(m, recalled, covered)
            bounds = _Bounds(*(torch.full((m,), torch.inf, device=self.device) for _ in range(2)))
            for first in starts[thread :: self.threads]:
                block = self._block(first, min(first + starts.step, n))
                for begin, i, j, low in self._tiles(block, bounds):
                    self._answer(block, bounds, answers, begin, i, j, low)
            return answers

        with knn.single_threaded_torch(), ThreadPoolExecutor(self.threads) as pool:
            first, *others = pool.map(share, range(self.threads))
        for other in others:
            first.merge(other)
        return first

    def _centred(self, features: np.ndarray, factor: float) -> tuple[np.ndarray, np.ndarray]:
        """(factor·centred, 1) float32 [n, D + 1], and the squared norms of the centred rows, float64 [n]."""
        out = np.ones((len(features), features.shape[1] + 1), np.float32)
        np.subtract(features, self.center, out=out[:, :-1])
        norms = np.empty(len(out))
        for start in range(0, len(out), 2048):
            some = out[start : start + 2048, :-1].astype(np.float64)
            norms[start : start + 2048] = np.einsum("nd,nd->n", some, some)
        out[:, :-1] *= factor
        return out, norms

    def _block(self, first: int, last: int) -> _Block:
        import torch

        rows = slice(first, last)
        x, norms = self._centred(self.real.features[rows], -2.0)
        x[:, -1] = (1 - 2 * self.gamma) * norms
        precision = inside(self.real, rows, self.real_bits, self.k_precision)
        coverage = inside(self.real, rows, self.real_bits, self.k_coverage)
        reach = _reach(self.real.distances[rows], precision | coverage)
        radii = self.radii[rows].astype(np.float64)
        counts = self._realistic(radii)
        inverse = np.divide(1.0, radii**2, out=np.zeros(len(radii)), where=counts)
        penalty = np.where(counts, 0.0, np.inf)
        on = lambda values: torch.from_numpy(values.astype(np.float32)).to(self.device)  # noqa: E731
        slack = 2 * self.gamma * norms
        return _Block(first, on(x), on(reach * _UP), on(inverse), on(penalty), slack, precision, coverage)

    def _realistic(self, radii: np.ndarray) -> np.ndarray:
        """Balls that realism asks: no larger than the median, and not a point, which no ratio is worth."""
        return (radii > _POINT) & (radii <= self.median)

    def _tiles(self, block: _Block, bounds: _Bounds) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
        """Pairs that may matter: first generated row of a tile, rows i and columns j in it, lower bounds of squares."""
        import torch

        size = self.tile[0]
        own = torch.from_numpy((self.reach * _UP).astype(np.float32)).to(self.device)
        extra = torch.from_numpy((2 * block.slack).astype(np.float32)).to(self.device)
        realistic = bool((block.inverse > 0).any())
        for begin in range(0, len(self.queries), size):
            part = slice(begin, begin + size)
            low = torch.mm(self.queries[part], block.columns.T).add_(self.base[part, None]).clamp_(min=0)
            slack = torch.from_numpy((2 * self.slack[part]).astype(np.float32)).to(self.device)
            least, at = low.min(1)
            bounds.nearest[part] = torch.minimum(bounds.nearest[part], (least + slack + extra[at]) * _UP)
            wanted = low <= torch.maximum(own[part], bounds.nearest[part])[:, None]
            wanted |= low <= block.reach
            if realistic:
                ratio = torch.addcmul(block.penalty, low, block.inverse)
                at = ratio.argmin(1)
                above = (low.gather(1, at[:, None])[:, 0] + slack + extra[at]) * block.inverse[at] + block.penalty[at]
                bounds.ratio[part] = torch.minimum(bounds.ratio[part], above * _UP)
                wanted |= ratio <= bounds.ratio[part, None]
            found = torch.nonzero(wanted)
            values = low[found[:, 0], found[:, 1]]
            yield begin, found[:, 0].cpu().numpy(), found[:, 1].cpu().numpy(), values.cpu().numpy()

    def _answer(
        self,
        block: _Block,
        bounds: _Bounds,
        answers: Answers,
        begin: int,
        i: np.ndarray,
        j: np.ndarray,
        low: np.ndarray,
    ) -> None:
        """Reduce the pairs of a tile, some at a time."""
        tile = slice(begin, begin + self.tile[0])
        nearest, ratio = bounds.nearest[tile].cpu().numpy(), bounds.ratio[tile].cpu().numpy()
        inverse = block.inverse.cpu().numpy().astype(np.float64)
        for start in range(0, len(i), PAIRS):
            some = slice(start, start + PAIRS)
            rows, columns, lower = i[some], j[some], low[some].astype(np.float64)
            best = (lower <= nearest[rows]) | ((inverse[columns] > 0) & (lower * inverse[columns] <= ratio[rows]))
            self._reduce(block, answers, begin + rows, columns, lower, best)

    def _reduce(
        self,
        block: _Block,
        answers: Answers,
        i: np.ndarray,
        column: np.ndarray,
        lower: np.ndarray,
        best: np.ndarray,
    ) -> None:
        """Place the pairs (i, column) in both rows' lists, add up what follows. `best`: may be nearest or most real."""
        j = block.first + column
        upper = lower + 2 * (self.slack[i] + block.slack[column])
        low, high = np.sqrt(lower).astype(np.float32), np.sqrt(upper).astype(np.float32)  # γ has room for this rounding
        in_real, unsure = _place(self.real.distances, j, low, high)
        in_generated, open_too = _place(self.generated.distances, i, low, high)
        exact = np.flatnonzero(unsure | open_too | best)
        distance = knn.pair_distances(self.generated.features, self.real.features, i[exact], j[exact])
        in_real[exact], _ = _place(self.real.distances, j[exact], distance, distance)
        in_generated[exact], _ = _place(self.generated.distances, i[exact], distance, distance)
        mine, theirs = self.bits[self.generated.groups[i]], self.real_bits[self.real.groups[j]]
        precise = block.precision[column, in_real] & mine
        covered = block.coverage[column, in_real] & mine
        np.bitwise_or.at(answers.precise, i, precise)
        np.bitwise_or.at(answers.covered, j, covered)
        np.bitwise_or.at(answers.recalled, j, self.recall[i, in_generated] & theirs)
        answers.held += halfsamples.count_bits(covered[covered != 0])
        holding = (precise & _IN_FULL) != 0
        np.minimum.at(answers.rarity, i[holding], self.radii[j[holding]].astype(np.float64))
        self._best(answers, i[exact], j[exact], distance)

    def _best(self, answers: Answers, i: np.ndarray, j: np.ndarray, distance: np.ndarray) -> None:
        order = np.lexsort((j, distance, i))
        first = order[np.flatnonzero(np.diff(i[order], prepend=-1))]
        answers.nearer(i[first], j[first], distance[first])
        radii = self.radii[j].astype(np.float64)
        counts = self._realistic(radii)
        ratio = np.divide(radii, distance, out=np.full(len(radii), np.inf), where=distance > 0)
        np.maximum.at(answers.realism, i[counts], ratio[counts])


def _place(distances: np.ndarray, rows: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many entries of the lists of `rows` are below `low`, int64 [p]; where one is from there to `high`, bool [p].

    By bisection of the lists, which are ascending; low and high are float32 [p].
    """
    length = distances.shape[1]
    flat, start = distances.ravel(), rows * length - 1
    place = np.zeros(len(rows), np.int64)
    for step in (1 << bit for bit in reversed(range(length.bit_length()))):
        further = np.minimum(place + step, length)
        place = np.where(flat[start + further] < low, further, place)
    return place, (place < length) & (flat[start + np.minimum(place + 1, length)] <= high)


def resolve(device: str) -> str:
    """The torch device that "auto" means here."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device
