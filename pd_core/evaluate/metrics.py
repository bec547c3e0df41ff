"""From features to numbers: fidelity and diversity of generated against real images (docs/method.md, section 7).

precision, recall   improved precision and recall, Kynkäänniemi et al. 2019 (arXiv 1904.06991), k = 3
density, coverage   Naeem et al. 2020 (arXiv 2002.09797), k = 5
frechet_distance    Heusel et al. 2017; FID only where the features are those of the standard Inception network
vendi_*             Vendi score with the cosine kernel, Friedman & Dieng 2022 (arXiv 2210.02410)
realism, rarity     of each generated row, Kynkäänniemi et al. 2019 section 5 and Han et al. 2022 (arXiv 2206.08549)

Precision is the share of *generated* rows within balls of real rows, recall the share of *real* rows within balls of
generated rows. Balls are closed (distance <= radius), as in the papers; the package prdc takes open ones, which differ
on ties only, such as a set against itself. Radii leave out the row itself by its id: an exact duplicate is a neighbor.

Intervals (95%) are of the metric's expectation with as many rows: Fréchet distance, Vendi score and the balls' metrics
depend on N by their definition, the Fréchet distance with a bias upwards that grows as rows get few, so compare at
equal N. By simulation (tests/evaluate/test_metrics.py) they hold it in 91% to 100% of draws, most often where rows are
fewest. Where rows are fewer than dimensions that is so while features spread over few of them, as those of networks do;
for noise that fills them all the intervals of density hold in 81% to 84%, those of the Vendi score in 86% to 89%.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pd_core.core.errors import UserError
from pd_core.evaluate import halfsamples, manifold, moments
from pd_core.evaluate.halfsamples import Estimate as Estimate
from pd_core.evaluate.manifold import Answers, Side
from pd_core.evaluate.moments import Float64Array
from pd_core.evaluate.moments import Moments as Moments
from pd_core.index.knn import single_threaded_torch

K_PRECISION, K_COVERAGE = 3, 5
METRICS = ("precision", "recall", "density", "coverage", "frechet_distance", "vendi_generated", "vendi_real")


@dataclass(frozen=True)
class Evaluation:
    """A generated set measured against a reference.

    Attributes:
        n_real: rows of the reference.
        n_generated: rows measured.
        k_precision: neighbors of the balls of precision, recall, realism and rarity.
        k_coverage: neighbors of the balls of density and coverage.
        estimates: by METRICS.
        answers: what is said of each row.
        replicates: by METRICS, float64 [halfsamples.REPLICATES], of half of the rows of each side; [0] where rows are
            too few.
    """

    n_real: int
    n_generated: int
    k_precision: int
    k_coverage: int
    estimates: dict[str, Estimate]
    answers: Answers
    replicates: dict[str, Float64Array]


@dataclass(frozen=True)
class Reference:
    """The real side, prepared once, for any number of evaluations; arrays only, so it can be pickled and shared.

    Attributes:
        side: features, groups and the nearest others of each row.
        moments: of the features. root: of their covariance, float64 [D, D].
        vendi: Vendi score of all rows, and of each replicate's half, float64 [1 + halfsamples.REPLICATES].
        k_precision, k_coverage: see Evaluation.
    """

    side: Side
    moments: Moments
    root: Float64Array
    vendi: Float64Array
    k_precision: int
    k_coverage: int

    @property
    def rows(self) -> int:
        """N."""
        return len(self.side.features)

    @property
    def features(self) -> np.ndarray:
        """float32 [N, D]."""
        return self.side.features


def prepare(
    features: np.ndarray,
    row_ids: np.ndarray,
    k_precision: int = K_PRECISION,
    k_coverage: int = K_COVERAGE,
    threads: int = 1,
    device: str = "auto",
) -> Reference:
    """Neighbors of every real row by exact search, and moments.

    Memory: the features, 5·(4·k + 8) bytes per row, 1.2 GB at D = 768 for moments (of which half stays) and that of the
    search.

    Args:
        features: float32 [N, D].
        row_ids: int64 [N], each once.
        k_precision, k_coverage: see Evaluation.
        threads: of the search; linear algebra has one.
        device: torch device; "auto" is cuda where torch sees one. Untested on a real GPU.

    Raises:
        UserError: too few rows, or a feature that is all zero.
        ValueError: not what the arguments say, a feature that is not finite.
    """
    if min(k_precision, k_coverage) < 1:
        raise ValueError(f"k must be at least 1, is {k_precision} and {k_coverage}")
    k = max(k_precision, k_coverage)
    device = manifold.resolve(device)
    features = _checked("real", features, row_ids)
    _require_rows("real", len(features), k)
    side = Side.of(features, row_ids, _list_length(k), threads, device)
    plain, unit = (Moments.of(features, side.groups, unit) for unit in (False, True))
    halves = halfsamples.REAL_HALVES if halfsamples.enough_rows(len(features), k) else _NO_HALVES
    with single_threaded_torch():  # the bytes must not depend on how many cores a node has
        root = moments.root(plain.covariance(), device)
        return Reference(side, plain, root, _vendi(unit, None, halves, device), k_precision, k_coverage)


def evaluate(
    reference: Reference, features: np.ndarray, row_ids: np.ndarray, threads: int = 1, device: str = "auto"
) -> Evaluation:
    """All metrics of a generated set, with intervals where both sides have halfsamples.enough_rows.

    Memory: that of manifold.Crossing, moments of the generated set (1.2 GB at D = 768) and per thread a few D x D
    matrices. The same bytes with any number of threads.

    Args:
        reference: of `prepare`.
        features: float32 [M, D].
        row_ids: int64 [M], each once; they need not differ from those of the reference.
        threads: of searches; linear algebra has one.
        device: torch device; "auto" is cuda where torch sees one. Untested on a real GPU.

    Raises:
        UserError: too few rows, or a feature that is all zero.
        ValueError: not what the arguments say, other D than the reference, a feature that is not finite.
    """
    device = manifold.resolve(device)
    features = _checked("generated", features, row_ids)
    m, dim = features.shape
    if dim != reference.features.shape[1]:
        raise ValueError(f"generated features have D = {dim}, real ones {reference.features.shape[1]}")
    _require_rows("generated", m, reference.k_precision)
    halves = halfsamples.enough_rows(m, reference.k_precision) and len(reference.vendi) > 1
    side = Side.of(features, row_ids, _list_length(reference.k_precision), threads, device)
    crossing = manifold.Crossing(
        reference.side, side, reference.k_precision, reference.k_coverage, halves, threads, device
    )
    answers = crossing.run()
    series = _manifold_metrics(crossing, answers)
    plain, unit = (Moments.of(features, side.groups, unit) for unit in (False, True))
    with single_threaded_torch():  # the bytes must not depend on how many cores a node has
        few = features if m < dim else None
        series["frechet_distance"] = _frechet(reference.moments, reference.root, plain, few, halves, device)
        own_halves = halfsamples.GENERATED_HALVES if halves else _NO_HALVES
        series["vendi_generated"] = _vendi(unit, few, own_halves, device)
    series["vendi_real"] = reference.vendi if halves else reference.vendi[:1]
    estimates = {name: _estimate(name, series[name], reference.rows, m, dim) for name in METRICS}
    return Evaluation(
        reference.rows,
        m,
        reference.k_precision,
        reference.k_coverage,
        estimates,
        answers,
        {name: series[name][1:] for name in METRICS},
    )


def difference(one: Evaluation, other: Evaluation, metric: str) -> Estimate:
    """`one` − `other`, two sets measured against the same reference: what its choice of rows did to both cancels.

    No range is applied. Rows that both sets share (the same ids) cancel too.
    """
    if (one.n_real, one.k_precision, one.k_coverage) != (other.n_real, other.k_precision, other.k_coverage):
        raise ValueError("the two sets were not measured against the same reference")
    value = one.estimates[metric].value - other.estimates[metric].value
    pair = one.replicates[metric], other.replicates[metric]
    return halfsamples.estimate(value, pair[0] - pair[1] if all(map(len, pair)) else np.empty(0))


# --- single metrics ---------------------------------------------------------------------------------------------------


def precision_recall(
    real: np.ndarray, generated: np.ndarray, k: int = K_PRECISION, threads: int = 1, device: str = "auto"
) -> tuple[float, float]:
    """(precision, recall) of float32 [N, D] and [M, D] (Kynkäänniemi et al. 2019, equations 1 and 2)."""
    series = _cross(real, generated, k, threads, device)
    return float(series["precision"][0]), float(series["recall"][0])


def density_coverage(
    real: np.ndarray, generated: np.ndarray, k: int = K_COVERAGE, threads: int = 1, device: str = "auto"
) -> tuple[float, float]:
    """(density, coverage) of float32 [N, D] and [M, D] (Naeem et al. 2020, equations 3 and 4)."""
    series = _cross(real, generated, k, threads, device)
    return float(series["density"][0]), float(series["coverage"][0])


def frechet_distance(real: np.ndarray, generated: np.ndarray) -> float:
    """Fréchet distance of float32 [N, D] and [M, D]: moments.frechet of their means and covariances, in float64."""
    one, other = (_moments(name, rows, 1) for name, rows in (("real", real), ("generated", generated)))
    if one.total.shape != other.total.shape:
        raise ValueError(f"real features have D = {real.shape[1]}, generated ones {generated.shape[1]}")
    return float(_frechet(one, moments.root(one.covariance()), other, None, False, "cpu")[0])


def vendi_score(features: np.ndarray) -> float:
    """Effective number of different rows: exp of the entropy of the eigenvalues of their cosine similarities over N.

    Friedman and Dieng 2022, arXiv 2210.02410, equation 1; docs/method.md, section 7.

    Args:
        features: float32 [N, D], finite, no row all zero.

    Returns:
        1, where all rows have one direction, to min(N, D).

    Raises:
        ValueError: another shape or type, no row, or values that are not finite.
        UserError: a row is all zero.
    """
    return float(_vendi(_moments("given", features, 0, unit=True), None, _NO_HALVES, "cpu")[0])


def _cross(real: np.ndarray, generated: np.ndarray, k: int, threads: int, device: str) -> dict[str, Float64Array]:
    sides, device = [], manifold.resolve(device)
    for name, features in (("real", real), ("generated", generated)):
        row_ids = np.arange(len(features))
        features = _checked(name, features, row_ids)
        _require_rows(name, len(features), k)
        sides.append(Side.of(features, row_ids, k, threads, device))
    if real.shape[1] != generated.shape[1]:
        raise ValueError(f"real features have D = {real.shape[1]}, generated ones {generated.shape[1]}")
    crossing = manifold.Crossing(sides[0], sides[1], k, k, False, threads, device)
    return _manifold_metrics(crossing, crossing.run())


def _moments(name: str, features: np.ndarray, k: int, unit: bool = False) -> Moments:
    features = _checked(name, features, np.arange(len(features)))
    _require_rows(name, len(features), k)
    return Moments.of(features, np.zeros(len(features), np.uint8), unit)


# --- the metric of all rows, then of each replicate -------------------------------------------------------------------

_NO_HALVES = np.zeros((0, halfsamples.GROUPS), bool)


def _manifold_metrics(crossing: manifold.Crossing, answers: Answers) -> dict[str, Float64Array]:
    """float64 [1 + replicates] each; k of density is crossing.k_coverage."""
    counts = halfsamples.count_bits
    n, m = counts(crossing.real_bits[crossing.real.groups]), counts(crossing.bits[crossing.generated.groups])
    # a replicate without a row exists only where none is asked for
    n, m = np.maximum(n, 1), np.maximum(m, 1)
    by_bit = {
        "precision": counts(answers.precise) / m,
        "recall": counts(answers.recalled) / n,
        "density": answers.held / (m * crossing.k_coverage),
        "coverage": counts(answers.covered) / n,
    }
    used = halfsamples.REPLICATES if crossing.halves else 0
    return {name: np.append(values[-1:], values[:used]) for name, values in by_bit.items()}


def _frechet(
    real: Moments, root: np.ndarray, generated: Moments, rows: np.ndarray | None, halves: bool, device: str
) -> Float64Array:
    """rows: the generated ones where they are fewer than dimensions."""
    if not halves:
        return np.array([moments.frechet(real.mean(), root, generated.mean(), generated.covariance(), device)])
    return moments.frechet_with_halves(
        real, root, generated, halfsamples.REAL_HALVES, halfsamples.GENERATED_HALVES, rows, device
    )


def _vendi(unit: Moments, rows: np.ndarray | None, halves: np.ndarray, device: str) -> Float64Array:
    """Of all rows, then of each of the halves, bool [R, GROUPS]; rows: where they are fewer than dimensions."""
    if not len(halves):
        return np.array([moments.vendi(unit.second_moment(), device)])
    if rows is not None:
        rows = rows.astype(np.float64)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return moments.vendi_with_halves(unit, halves, rows, device)


def _estimate(name: str, series: Float64Array, n: int, m: int, dim: int) -> Estimate:
    """Of all rows and replicates, within the range of the metric."""
    value, replicates = float(series[0]), series[1:]
    if name in ("precision", "recall", "coverage"):
        return halfsamples.share_estimate(value, replicates, m if name == "precision" else n)
    if name.startswith("vendi"):
        most = min(m if name == "vendi_generated" else n, dim)
        return halfsamples.estimate(value, replicates, 1.0, float(most))
    return halfsamples.estimate(value, replicates, 0.0)


# --- checks -----------------------------------------------------------------------------------------------------------


def _list_length(k: int) -> int:
    """Neighbors kept so that half of them, drawn, hold k but for one list in some thousands."""
    return 4 * k + 8


def _require_rows(name: str, rows: int, k: int) -> None:
    if rows <= k:
        raise UserError(f"{rows} {name} images are too few for k = {k}; at least {k + 1} are needed")


def _checked(name: str, features: np.ndarray, row_ids: np.ndarray) -> np.ndarray:
    """The features, contiguous."""
    if features.ndim != 2 or features.dtype != np.float32 or features.shape[1] == 0:
        raise ValueError(f"{name} features must be float32 [N, D], are {features.dtype} {list(features.shape)}")
    if row_ids.dtype != np.int64 or row_ids.shape != features.shape[:1]:
        raise ValueError(f"ids of {len(features)} {name} rows are {row_ids.dtype} {list(row_ids.shape)}, not int64")
    if len(np.unique(row_ids)) < len(row_ids):
        raise ValueError(f"two {name} rows have the same id")
    if not np.isfinite(features).all():
        bad = int(np.flatnonzero(~np.isfinite(features).all(1))[0])
        raise ValueError(f"the feature of {name} row {bad} is not finite")
    if not features.any(1).all():
        bad = int(np.flatnonzero(~features.any(1))[0])
        raise UserError(
            f"the feature of {name} row {bad} is all zero: it has no direction, which the Vendi score needs; leave "
            "it out"
        )
    return np.ascontiguousarray(features)
