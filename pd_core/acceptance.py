"""Weight functions ω(ρ) and the probabilities of rejection sampling by them: pure functions, float64 inside.

Importance sampling at inference (arXiv 2407.08659, Algorithm 2): from a generator with distribution p_G draw the target
q(x) ∝ ω(ρ(x)) p_G(x) by accepting x with probability a = ω(ρ(x)) / sup ω. Every weighting here is a step function of the
density, the paper's rule (weight w above a threshold τ, 1 elsewhere) being the one with a single step.

Where each label y has a weighting of its own the target is q(x, y) ∝ ω_y(ρ(x)) p_G(x, y), and sup ω is that of all of them:
labels divided by a supremum each would be reweighted against each other by what no one asked for.

Each accepted sample keeps its a: with weights 1/a an average over the accepted is one over p_G again (Horvitz & Thompson).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pd_core.errors import UserError

Float64Array = NDArray[np.float64]

Z = 1.959963984540054  # normal quantile of intervals of 95%


@dataclass(frozen=True)
class Weighting:
    """A step function of the pseudo density: ω(ρ) = weights[j] for edges[j - 1] < ρ <= edges[j].

    Attributes:
        edges: densities where the weight changes, ascending, [B].
        weights: relative weights, finite and >= 0, not all of them 0, [B + 1].
    """

    edges: tuple[float, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.weights) != len(self.edges) + 1:
            raise ValueError(
                f"{len(self.edges)} edges need {len(self.edges) + 1} weights, there are {len(self.weights)}"
            )
        if any(b < a for a, b in zip(self.edges, self.edges[1:], strict=False)) or not all(
            map(math.isfinite, self.edges)
        ):
            raise ValueError(f"edges must be finite and ascending, are {self.edges}")
        if not all(math.isfinite(w) and w >= 0 for w in self.weights) or max(self.weights) == 0:
            raise UserError(f"weights must be finite, >= 0 and not all 0, are {list(self.weights)}; mend the weighting")

    @property
    def bins(self) -> int:
        """Number of steps."""
        return len(self.weights)

    def to_json(self) -> dict[str, Any]:
        """JSON-able."""
        return {"edges": list(self.edges), "weights": list(self.weights)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Weighting:
        """Inverse of `to_json`."""
        return cls(tuple(values["edges"]), tuple(values["weights"]))


# --- weight functions ---------------------------------------------------------------------------------------------------


def uniform() -> Weighting:
    """ω = 1: every sample is accepted."""
    return Weighting((), (1.0,))


def two_level(threshold: float, weight: float) -> Weighting:
    """The paper's: `weight` where ρ > `threshold`, 1 elsewhere (arXiv 2407.08659, Algorithm 2). Raises UserError: w <= 0."""
    if not (math.isfinite(weight) and weight > 0):
        raise UserError(f"weight {weight}: must be finite and > 0 (above 1 for typical, below 1 for varied samples)")
    return Weighting((float(threshold),), (1.0, float(weight)))


def by_quantile(real_quantiles: ArrayLike, weights: Sequence[float]) -> Weighting:
    """One weight for each of len(weights) bins that hold equally many real images, lowest densities first.

    real_quantiles: `density.density_quantiles` of the real set.
    """
    return Weighting(_equal_edges(real_quantiles, len(weights)), tuple(float(w) for w in weights))


def match(real_quantiles: ArrayLike, generated_density: ArrayLike, bins: int, most: float) -> Weighting:
    """ω ∝ min(p_real / p_G, C) over `bins` bins of equally many real images: the accepted have the real set's densities.

    generated_density: [M], densities of samples of the generator (a pilot), c_j of them in bin j of B.
    p_real / p_G = (1/B) / ((c_j + 1) / (M + 1)), a candidate being counted with the pilot it is compared with: finite where
    the pilot has none, and without the bias of c_j / M, since E[(M + 1) / (c_j + 1)] p_j = 1 - (1 - p_j)^(M + 1).
    ω is divided by its mean over the generator (`unseen`), so that the generator's labels, each matched by itself, keep their
    shares, and C is the largest cap with which no weight is then above `most`: the acceptance rate that the pilot tells is
    at least 1/most. Bins at the cap stay under-represented, in proportion to p_G among themselves.
    """
    edges = _equal_edges(real_quantiles, bins)
    counts = np.bincount(_bin(generated_density, edges), minlength=bins)
    ratios = (counts.sum() + 1) / (bins * (counts + 1))
    seen = counts > 0
    shares, own = counts[seen] / counts.sum(), counts.sum() / (bins * counts[seen])  # those of `unseen`
    cap = _cap(shares, own, most, float(ratios.max()))
    mean = shares @ np.minimum(own, cap)
    return Weighting(edges, tuple((np.minimum(ratios, cap) / mean).tolist()))


def _cap(shares: Float64Array, ratios: Float64Array, most: float, top: float) -> float:
    """The largest C <= top with Σ shares min(ratios, C) >= C / most; shares sum to 1, ratios > 0, most > 1."""

    def excess(cap: float) -> float:
        return float(shares @ np.minimum(ratios, cap)) - cap / most

    if excess(top) >= 0:
        return top
    # concave in C and positive at the smallest ratio, so it crosses zero once, above the last ratio where it is not negative
    start = max(ratio for ratio in ratios.tolist() if excess(ratio) >= 0)
    return start + excess(start) / (1 / most - float(shares[ratios > start].sum()))


def unseen(weighting: Weighting, generated_density: ArrayLike) -> Weighting:
    """The weights that `match` would have given each of the samples it was made from, had that one not been among them.

    With them the mean over those samples tells that over new ones. With the weights themselves it would tell too little: a
    sample makes its own bin look frequent, and so its weight small.
    """
    counts = np.bincount(_bin(generated_density, weighting.edges), minlength=weighting.bins)
    m, seen = counts.sum(), np.maximum(counts, 1)
    raised = np.asarray(weighting.weights) * ((counts + 1) / (m + 1)) * (m / seen)
    return Weighting(weighting.edges, tuple(np.minimum(raised, max(weighting.weights)).tolist()))


def _equal_edges(real_quantiles: ArrayLike, bins: int) -> tuple[float, ...]:
    quantiles = np.asarray(real_quantiles, dtype=np.float64)
    if bins < 1:
        raise UserError(f"a weighting needs at least one bin, has {bins}")
    ranks = np.arange(1, bins) / bins * (len(quantiles) - 1)
    return tuple(np.interp(ranks, np.arange(len(quantiles)), quantiles).tolist())


# --- acceptance ---------------------------------------------------------------------------------------------------------


def weight_of(density: ArrayLike, weighting: Weighting) -> Float64Array:
    """ω(ρ): float64 [N] for densities [N]."""
    return np.asarray(weighting.weights, dtype=np.float64)[_bin(density, weighting.edges)]


def supremum(weightings: Iterable[Weighting]) -> float:
    """sup ω over all labels' weightings, which divides each of them."""
    return max(max(weighting.weights) for weighting in weightings)


def acceptance_probability(density: ArrayLike, weighting: Weighting, sup: float | None = None) -> Float64Array:
    """a = ω(ρ) / sup ω: float64 [N] in [0, 1] for densities [N] (arXiv 2407.08659, Algorithm 2, for any bounded ω).

    sup: `supremum` where the weighting is one of several, for as many labels; None: its own.
    For two levels: w > 1 gives 1 above τ and 1/w elsewhere; w < 1 gives w above τ and 1 elsewhere.
    Raises ValueError on a density that is NaN.
    """
    own = max(weighting.weights)
    assert sup is None or sup >= own, (sup, own)
    return weight_of(density, weighting) / (own if sup is None else sup)


def bin_shares(density: ArrayLike, weighting: Weighting) -> Float64Array:
    """Share of the densities in each bin of the weighting, float64 [bins]; for two levels (1 - P, P), P = Pr(ρ > τ)."""
    inside = _bin(density, weighting.edges)
    if inside.size == 0:
        raise ValueError("the shares of no densities are not defined")
    return np.bincount(inside, minlength=weighting.bins) / inside.size


def acceptance_rate(shares: ArrayLike, weighting: Weighting) -> float:
    """Expected share of accepted samples: Σ share_j a_j.

    For two levels: P + (1 - P)/w for w >= 1, P w + (1 - P) for w < 1.
    """
    return float(np.dot(np.asarray(shares, dtype=np.float64), weighting.weights) / max(weighting.weights))


def rate_interval(chances: ArrayLike, lowest: float, highest: float, fitted_bins: int = 0) -> tuple[float, float]:
    """95% confidence interval of the acceptance rate from the acceptance probabilities of a pilot, within [lowest, highest].

    Agresti & Coull (1998) for values that are not 0 and 1 alone: z²/2 observations are added at each end of what a can be,
    then mean ± z standard errors. For two levels that is theirs for P = Pr(ρ > τ), mapped through P + (1 - P)/w, or through
    P w + (1 - P) for w < 1; its centre is Wilson's, and it contains Wilson's interval, which for rare events misses the rate
    on one side far more often than it says. The added observations keep it from being a point where all values are equal,
    while others are possible.

    Args:
        chances: a of each candidate, [M].
        lowest, highest: bounds of a that hold whatever the density, seen in the pilot or not.
        fitted_bins: B where ω was estimated from the same candidates over B bins (`match`; `chances` then by `unseen`); of all
            labels together. Where p_G has the real densities already the standard error above is next to nothing, and the
            mean of ω errs by Σ_j (c_j / M - p_j)² / p_j, which is χ² of B over M: a standard deviation of sqrt(2 B) / M.
    """
    a = np.asarray(chances, dtype=np.float64)
    if a.size == 0:
        raise ValueError("an interval needs at least one candidate")
    if lowest == highest:
        return lowest, highest
    pseudo = Z * Z / 2
    weight = a.size + 2 * pseudo
    mean = (a.sum() + pseudo * (lowest + highest)) / weight
    variance = (np.sum((a - mean) ** 2) + pseudo * ((lowest - mean) ** 2 + (highest - mean) ** 2)) / weight
    error = math.sqrt(variance / weight + float(np.mean(a * a)) * 2 * fitted_bins / a.size**2)
    return max(lowest, float(mean - Z * error)), min(highest, float(mean + Z * error))


def _bin(density: ArrayLike, edges: Sequence[float]) -> NDArray[np.int64]:
    values = np.asarray(density, dtype=np.float64)
    if np.isnan(values).any():
        raise ValueError("a density is NaN")
    return np.searchsorted(np.asarray(edges, dtype=np.float64), values, side="left")
