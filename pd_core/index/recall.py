"""Recall of approximate search, and the choice of how many cells are probed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pd_core.index.knn import MISSING_ID

# --- recall and its calibration ---------------------------------------------------------------------------------------
Z_95 = 1.6448536269514722  # one-sided 95%
TIE = 1e-6  # relative; distances of two paths to one pair differ by float32 rounding at most
# Cost in pairs of search_all, measured on 2 CPU cores at N = 20k to 50k, D = 384, k = 20 where the two searches cost
# the same (a quarter of the rows scanned): small products and gathered queries make a pair of search_cells dearer; the
# coarse step keeps a long list of cells per query.
PAIR_COST_RATIO = 3.0
COARSE_COST_RATIO = 5.0


def neighbor_ranks(neighbor_cells: np.ndarray, probes_ranked: np.ndarray) -> np.ndarray:
    """Place of each true neighbor's cell in the query's order of cells: the neighbor is found iff nprobe > rank.

    Args:
        neighbor_cells: int32 [q, k], cells of the exact neighbors.
        probes_ranked: int32 [q, cells], all cells, nearest first (coarse_probes with nprobe = cells).

    Returns:
        int32 [q, k].
    """
    ranks = np.empty_like(neighbor_cells, dtype=np.int32)
    rank_of = np.empty(probes_ranked.shape[1], np.int32)
    places = np.arange(probes_ranked.shape[1], dtype=np.int32)
    for i in range(len(ranks)):
        rank_of[probes_ranked[i]] = places
        ranks[i] = rank_of[neighbor_cells[i]]
    return ranks


@dataclass(frozen=True)
class RecallCurve:
    """Recall@k at nprobe = 1 .. cells (index 0 .. cells − 1): mean over queries and its lower 95% confidence bound."""

    mean: np.ndarray  # float64 [cells]
    lower: np.ndarray  # float64 [cells]


def recall_curve(ranks: np.ndarray, cells: int) -> RecallCurve:
    """Recall of an index of uncompressed vectors at every nprobe, from neighbor_ranks int32 [q, k] alone.

    Queries are the independent units: neighbors of one query are found or missed together.
    """
    q, k = ranks.shape
    # of a query, the j-th found neighbor raises found by 1 and found² by 2j + 1
    ordered = np.sort(ranks, axis=1)
    found = np.cumsum(np.bincount(ordered.ravel(), minlength=cells)[:cells])
    odd = np.broadcast_to(2.0 * np.arange(k) + 1.0, (q, k))
    found_squared = np.cumsum(np.bincount(ordered.ravel(), weights=odd.ravel(), minlength=cells)[:cells])
    mean = found / (q * k)
    variance = np.maximum(found_squared / (q * k * k) - mean**2, 0.0) * q / max(q - 1, 1)
    lower = lower_bound(mean, variance, q, k)
    lower[-1] = mean[-1]  # all cells: nothing is left to chance
    return RecallCurve(mean, lower)


def lower_bound(mean: np.ndarray, variance: np.ndarray, queries: int, k: int) -> np.ndarray:
    """One-sided 95% lower bound of a mean recall over independent queries.

    Wilson's score interval (JASA 22, 1927) with the effective sample size m(1 − m)/(variance/q) of cluster sampling
    (Korn and Graubard, Survey Methodology 24, 1998), between q and q·k; q where all queries agree.

    Args:
        mean: float64 [...], mean over queries of per-query recall.
        variance: float64 [...], variance of per-query recall.
        queries: q.
        k: neighbors per query.
    """
    spread = np.asarray(mean * (1.0 - mean), np.float64)
    n = np.full(spread.shape, float(queries))
    np.divide(spread * queries, variance, out=n, where=variance > 0)
    n = np.clip(n, queries, queries * k)
    z2 = Z_95**2
    return (mean + z2 / (2 * n) - Z_95 * np.sqrt(spread / n + z2 / (4 * n * n))) / (1 + z2 / n)


def choose_nprobe(curve: RecallCurve, target_recall: float) -> int | None:
    """Smallest nprobe whose lower confidence bound reaches the target; None where none does."""
    reached = np.flatnonzero(curve.lower >= target_recall)
    return int(reached[0]) + 1 if len(reached) else None


def scan_fraction(probes: np.ndarray, cell_rows: np.ndarray) -> float:
    """Mean share of all rows that a query scans: probes int32 [q, nprobe], cell_rows int64 [cells]."""
    return float(cell_rows[probes].sum(axis=1).mean() / cell_rows.sum())


def relative_cost(scanned: float, rows: int, cells: int) -> float:
    """Cost of searching cells over the cost of comparing with every row: exact is cheaper where this is 1 or more.

    Counted, not timed, so that the same data always decides the same. The coarse step compares with every centroid.

    Args:
        scanned: scan_fraction at the nprobe chosen.
        rows: N.
        cells: number of cells.
    """
    return scanned * PAIR_COST_RATIO + COARSE_COST_RATIO * cells / rows


@dataclass(frozen=True)
class Recall:
    """What an approximate search lost against the exact one, on a sample of queries."""

    queries: int
    k: int
    recall: float  # mean share of the k nearest that were found
    recall_lower: float  # one-sided 95% bound
    mean_relative_error: float  # of the mean k-NN distance, |approximate / exact − 1|
    max_relative_error: float


def recall_and_error(
    exact_ids: np.ndarray, exact_distances: np.ndarray, approx_ids: np.ndarray, approx_distances: np.ndarray
) -> Recall:
    """Compare an approximate with the exact search of the same queries; all arrays [q, k], distances Euclidean.

    A neighbor counts as found if its id is among the exact ones or its distance equals the k-th exact distance: of ties
    at the k-th place any will do, since the mean distance is the same. A mean distance of 0 is met by 0 only (error inf
    otherwise).
    """
    q, k = exact_ids.shape
    hits = (approx_ids[:, :, None] == exact_ids[:, None, :]).any(2) & (approx_ids != MISSING_ID)
    last = exact_distances[:, -1:].astype(np.float64)
    tied = np.abs(approx_distances - last) <= TIE * last
    share = np.minimum((hits | tied).sum(1), k) / k
    exact = exact_distances.mean(1, dtype=np.float64)
    gap = np.abs(approx_distances.mean(1, dtype=np.float64) - exact)
    error = np.divide(gap, exact, out=np.where(gap > 0, np.inf, 0.0), where=exact > 0)
    variance = share.var(ddof=1) if q > 1 else 0.0
    lower = float(lower_bound(share.mean(), np.asarray(variance), q, k))
    return Recall(q, k, float(share.mean()), lower, float(error.mean()), float(error.max()))
