"""From k-NN distances to pseudo densities and thresholds on them: pure functions, float64 inside.

Pseudo density (arXiv 2407.08659): a real image i takes the volume of an n-ball whose radius is its mean k-NN distance,
V_i = pi^(n/2) / Gamma(n/2 + 1) * d_i^n, and rho_i is proportional to 1 / V_i with mean 1 over the real set. All of it
is computed in logs, log rho_i = -n log d_i + c, because d^n leaves float64 long before n reaches the size of a feature.

n (`volume_dim`) is a sharpness, not the feature dimension. (n, c, floor) are stored with the index and used again for
every other image: densities compare only under one (extractor, k, n, c).

A real set:   d, n_floored = apply_distance_floor(d, floor := distance_floor(d)); c = log_normalizer(d, n)
Anything:     d, n_floored = apply_distance_floor(d, floor); log_rho = log_pseudo_density(d, n, c)
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pd_core.core.errors import UserError

Float64Array = NDArray[np.float64]

N_QUANTILES = 1001  # p0, p0.1 ... p100
_LOG_FLOAT64_MAX = math.log(np.finfo(np.float64).max)
_DISTANCE_FLOOR_OF_MEDIAN = 1e-3
_THRESHOLD_TEXT = re.compile(r"(p?)([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)")


# --- distances --------------------------------------------------------------------------------------------------------


def mean_knn_distance(neighbor_distances: ArrayLike) -> Float64Array:
    """Mean distance to the k nearest neighbours: d_i = (1/k) sum_j ||x_i - x_j||.

    neighbor_distances: [N, k], Euclidean, NOT squared (take the root of what a FAISS L2 index returns), self left out.
    Returns float64 [N]. Raises ValueError if the array is not [N, k >= 1], or holds a negative or non-finite value
    (search libraries pad missing neighbours with inf).
    """
    distances = np.asarray(neighbor_distances, dtype=np.float64)
    if distances.ndim != 2 or distances.shape[1] == 0:
        raise ValueError(f"neighbor_distances must be [N, k] with k >= 1, has shape {distances.shape}")
    _check_distances(distances, "neighbor_distances")
    return distances.mean(axis=1)


def distance_floor(mean_knn_distance: ArrayLike) -> float:
    """The distance that stands in for zero: 1e-3 of the median positive one, or the smallest positive one if smaller.

    A row has d = 0 when its k neighbours are all exact duplicates, and its density would be infinite. With the floor it
    gets at most max(1000^n times the median row's density, the density of the densest other row), which keeps a few
    duplicates from taking over the mean. As no positive distance lies below the floor, it touches zeros only, keeps the
    order of the rows, and changes nothing in a set without such duplicates.

    mean_knn_distance: [N], of the whole real set. Raises UserError if no distance is positive.
    """
    distances = _distance_vector(mean_knn_distance)
    positive = distances[distances > 0]
    if positive.size == 0:
        raise UserError(
            f"all {distances.size} images are identical in feature space (every k-NN distance is 0); "
            "check the data source for copies of one image, or use another extractor"
        )
    # The floor itself must not underflow to 0 where distances are near the smallest float64.
    return float(min(_DISTANCE_FLOOR_OF_MEDIAN * np.median(positive), positive.min()) or positive.min())


def apply_distance_floor(mean_knn_distance: ArrayLike, floor: float) -> tuple[Float64Array, int]:
    """Raises every distance below `floor` (see `distance_floor`) to it.

    Returns (float64 [N], all > 0; the number of rows that were raised, to be reported).
    """
    if not (math.isfinite(floor) and floor > 0):
        raise ValueError(f"floor must be finite and > 0, is {floor}")
    distances = _distance_vector(mean_knn_distance)
    return np.maximum(distances, floor), int(np.count_nonzero(distances < floor))


# --- densities --------------------------------------------------------------------------------------------------------


def log_normalizer(mean_knn_distance: ArrayLike, volume_dim: float) -> float:
    """The c for which the mean of exp(-n log d_i + c) over the real set is 1: log N - logsumexp(-n log d).

    The constants pi^(n/2) / Gamma(n/2 + 1) of the volume are the same for every row and cancel in this scaling, so c is
    defined without them. The sum is rounded once (math.fsum), so c does not hang on the order of the rows.
    mean_knn_distance: [N], N >= 1, all > 0.
    """
    log_density = _log_inverse_power(mean_knn_distance, volume_dim)
    if log_density.size == 0:
        raise ValueError("the normaliser of an empty set of distances is not defined")
    log_max = float(log_density.max())
    return math.log(log_density.size) - log_max - math.log(math.fsum(np.exp(log_density - log_max)))


def log_pseudo_density(mean_knn_distance: ArrayLike, volume_dim: float, log_normalizer: float) -> Float64Array:
    """log rho = -n log d + c, for real images and for any other image alike.

    mean_knn_distance: [N], all > 0 (see `apply_distance_floor`): of a real image to the other real features, of another
    image to its k nearest real features. log_normalizer: the c of the real set. Returns float64 [N], finite.
    """
    if not math.isfinite(log_normalizer):
        raise ValueError(f"log_normalizer must be finite, is {log_normalizer}")
    return _log_inverse_power(mean_knn_distance, volume_dim) + log_normalizer


def density_of(log_density: ArrayLike) -> Float64Array:
    """rho = exp(log rho), float64, held at the largest float64 instead of inf; far below the mean it may be 0.

    Over the real set rho <= N, so the limit is never met; an image that is a copy of a real one can meet it when n is
    in the hundreds. Rank and compare by log_density where that matters.
    """
    return np.exp(np.minimum(np.asarray(log_density, dtype=np.float64), _LOG_FLOAT64_MAX))


def pseudo_density(mean_knn_distance: ArrayLike, volume_dim: float = 1.0) -> Float64Array:
    """Pseudo densities of a whole real set, with mean 1 (arXiv 2407.08659).

    mean_knn_distance: [N], N >= 1, Euclidean. Zeros are raised to `distance_floor`. Returns float64 [N], finite. For
    n = 1 and without zeros this is the authors' rho_i = N (1/d_i) / sum(1/d). Raises UserError if all are zero.
    """
    distances, _ = apply_distance_floor(mean_knn_distance, distance_floor(mean_knn_distance))
    return density_of(log_pseudo_density(distances, volume_dim, log_normalizer(distances, volume_dim)))


# --- ranks and thresholds ---------------------------------------------------------------------------------------------


def mid_ranks(log_density: Float64Array, sorted_log_density: Float64Array) -> Float64Array:
    """Percentile of each log density among those of the real set, float64 [M] in [0, 100].

    log_density: [M]. sorted_log_density: [N], ascending. Ties take their mid-rank: 100 (number below + half the number
    equal) / N; so the real set's own percentiles have mean 50, and 0 and 100 are reached only outside its range.
    """
    below = np.searchsorted(sorted_log_density, log_density, side="left")
    below_or_equal = np.searchsorted(sorted_log_density, log_density, side="right")
    return 50.0 * (below + below_or_equal) / sorted_log_density.size


def density_quantiles(density: ArrayLike) -> Float64Array:
    """p0, p0.1 ... p100 of the real set's densities, or of any values, float64 [1001]: linear between ranks.

    Raises ValueError: there are none, or one is not finite.
    """
    values = np.asarray(density, dtype=np.float64)
    if values.ndim != 1 or values.size == 0 or not np.all(np.isfinite(values)):
        raise ValueError(f"quantiles are of finite values [N], N >= 1, not of shape {values.shape}, NaN or infinity")
    # Interpolation can miss the order by one rounding between equal values.
    return np.maximum.accumulate(np.quantile(values, np.linspace(0.0, 1.0, N_QUANTILES)))


@dataclass(frozen=True)
class Threshold:
    """A threshold tau on the pseudo density: a percentile of the real set in [0, 100], or a density > 0."""

    kind: Literal["percentile", "density"]
    value: float

    def density(self, quantiles_or_sorted_density: ArrayLike) -> float:
        """tau on the rho scale.

        quantiles_or_sorted_density: ascending densities at equal steps of rank from p0 to p100, that is the result of
        `density_quantiles` or the sorted densities of the whole real set. Interpolates linearly between ranks.
        """
        if self.kind == "density":
            return self.value
        densities = np.asarray(quantiles_or_sorted_density, dtype=np.float64)
        rank = self.value * (densities.size - 1) / 100.0
        return float(np.interp(rank, np.arange(densities.size), densities))


def parse_threshold(text: str | float) -> Threshold:
    """Reads "p80" (a percentile of the real set) or "1.1869" (a density). Raises UserError on anything else."""
    match = _THRESHOLD_TEXT.fullmatch(str(text).strip())
    forms = "give a percentile of the real images such as p80, or a density such as 1.1869"
    if match is None:
        raise UserError(f"threshold {str(text)!r} cannot be read; {forms}")
    value = float(match[2])
    if match[1]:
        if not 0.0 <= value <= 100.0:
            raise UserError(f"threshold {str(text)!r}: a percentile lies between p0 and p100; {forms}")
        return Threshold("percentile", value)
    if not (math.isfinite(value) and value > 0.0):
        raise UserError(f"threshold {str(text)!r}: a density is finite and greater than 0; {forms}")
    return Threshold("density", value)


def threshold_inside(text: str | float, quantiles: ArrayLike, option: str, where: str) -> float:
    """tau on the rho scale, within the real densities.

    quantiles: `density_quantiles` of the real set. option, where: the setting and the set, for the message.
    Raises UserError: as `parse_threshold`, or tau lies outside of them, where the weight would change nothing.
    """
    tau = parse_threshold(text).density(quantiles)
    low, high = np.asarray(quantiles, dtype=np.float64)[[0, -1]]
    if not low <= tau <= high:
        raise UserError(
            f"{option} {text}: outside the densities of {where}, which lie in {low:.4g} ... {high:.4g}; choose one "
            "inside, or a percentile such as p80"
        )
    return tau


# --- checks -----------------------------------------------------------------------------------------------------------


def _log_inverse_power(mean_knn_distance: ArrayLike, volume_dim: float) -> Float64Array:
    """-n log d."""
    distances = _distance_vector(mean_knn_distance)
    if np.any(distances == 0):
        raise ValueError("mean_knn_distance holds zeros; call apply_distance_floor first")
    return -_volume_dim(volume_dim) * np.log(distances)


def _volume_dim(volume_dim: float) -> float:
    if not (math.isfinite(volume_dim) and volume_dim > 0):
        raise UserError(f"volume_dim is {volume_dim}; it must be finite and > 0 (the default is 1)")
    return float(volume_dim)


def _distance_vector(mean_knn_distance: ArrayLike) -> Float64Array:
    distances = np.asarray(mean_knn_distance, dtype=np.float64)
    if distances.ndim != 1:
        raise ValueError(f"mean_knn_distance must be [N], has shape {distances.shape}")
    _check_distances(distances, "mean_knn_distance")
    return distances


def _check_distances(distances: Float64Array, name: str) -> None:
    # One expression catches NaN, inf and negatives: a NaN fails both comparisons.
    if not np.all((distances >= 0) & (distances < np.inf)):
        raise ValueError(f"{name} must be finite and >= 0; it holds a NaN, an infinite or a negative value")
