"""Weight functions ω(ρ), how settings name them, and the probabilities of rejection sampling by them; float64 inside.

What is said of densities here holds for any other number that is known of each sample: `tilted` is of log-volumes.

Importance sampling at inference (arXiv 2407.08659, Algorithm 2): from a generator with distribution p_G draw the target
q(x) ∝ ω(ρ(x)) p_G(x) by accepting x with probability a = ω(ρ(x)) / sup ω. Every weighting here is a step function of
the density, the paper's rule (weight w above a threshold τ, 1 elsewhere) being the one with a single step.

Where each label y has a weighting of its own the target is q(x, y) ∝ ω_y(ρ(x)) p_G(x, y), and sup ω is that of all of
them: labels divided by a supremum each would be reweighted against each other by what no one asked for.

Each accepted sample keeps its a: with weights 1/a an average over the accepted is one over p_G again (Horvitz &
Thompson).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pd_core.core import artifacts, files, seeds
from pd_core.core.errors import UserError
from pd_core.core.settings.generate import WeightingSettings
from pd_core.density import formula

Float64Array = NDArray[np.float64]

Z = 1.959963984540054  # normal quantile of intervals of 95%
EVERYTHING = ""  # name of the weighting of samples without one of their own
LABEL_ROWS = 1_000_000  # real densities that the quantiles of labels are taken from
FEWEST_OF_LABEL = 20  # real images of a label, or pilot candidates of it: fewer tell no quantiles


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


# --- weight functions -------------------------------------------------------------------------------------------------


def uniform() -> Weighting:
    """ω = 1: every sample is accepted."""
    return Weighting((), (1.0,))


def two_level(threshold: float, weight: float) -> Weighting:
    """The paper's: `weight` where ρ > `threshold`, 1 elsewhere (arXiv 2407.08659, Algorithm 2). Raises UserError: w <=
    0.
    """
    if not (math.isfinite(weight) and weight > 0):
        raise UserError(f"weight {weight}: must be finite and > 0 (above 1 for typical, below 1 for varied samples)")
    return Weighting((float(threshold),), (1.0, float(weight)))


def by_quantile(real_quantiles: ArrayLike, weights: Sequence[float]) -> Weighting:
    """One weight for each of len(weights) bins that hold equally many real images, lowest densities first.

    real_quantiles: `formula.density_quantiles` of the real set. Real images of one and the same density cannot be
        parted:
    where they fill several bins they have the weight of the lowest, and the weights of bins that are left without a
    real image are not used, nor is sup ω taken over them. The weighting then has fewer bins than there are weights.
    Raises UserError: no weight that is used is above 0.
    """
    given = tuple(float(w) for w in weights)
    bins = _equal_bins(real_quantiles, len(given), least=0.0)
    used = tuple(given[place] for place in bins.places)
    if max(used) == 0 < max(given):
        raise UserError(
            f"weights {list(weights)}: those above 0 are of bins without a real image, since so many real images have "
            "the same density; give fewer weights, or give one above 0 to the bin where these images begin"
        )
    return Weighting(bins.edges, used)


def match(real_quantiles: ArrayLike, generated_density: ArrayLike, bins: int, most: float) -> Weighting:
    """ω ∝ min(p_real / p_G, C) over `bins` bins of equally many real images: the accepted have the real set's
    densities.

    real_quantiles: `formula.density_quantiles` of the real set. Real images of one and the same density cannot be
        parted:
    bins that they fill are one, and so is what is left of a bin above them with the next, unless it is half a bin.
    p_real of these is the share of the real set that the quantiles tell, of the others 1/B.
    generated_density: [M], densities of samples of the generator (a pilot), c_j of them in bin j of B.
    p_real / p_G = p_real / ((c_j + 1) / (M + 1)), a candidate being counted with the pilot it is compared with: finite
    where the pilot has none, and without the bias of c_j / M, since E[(M + 1) / (c_j + 1)] p_j = 1 - (1 - p_j)^(M + 1).
    ω is divided by its mean over the generator (`unseen`), so that the generator's labels, each matched by itself, keep
    their shares, and C is the largest cap with which no weight is then above `most`: the acceptance rate that the pilot
    tells is at least 1/most. Bins at the cap stay under-represented, in proportion to p_G among themselves.
    """
    equal = _equal_bins(real_quantiles, bins, least=0.5)
    edges, filled = equal.edges, np.array(equal.filled)
    counts = np.bincount(_bin(generated_density, edges), minlength=len(filled))
    ratios = filled * (counts.sum() + 1) / (bins * (counts + 1))
    seen = counts > 0
    shares, own = counts[seen] / counts.sum(), filled[seen] * counts.sum() / (bins * counts[seen])  # those of `unseen`
    cap = _cap(shares, own, most, float(ratios.max()))
    mean = shares @ np.minimum(own, cap)
    return Weighting(edges, tuple((np.minimum(ratios, cap) / mean).tolist()))


def _cap(shares: Float64Array, ratios: Float64Array, most: float, top: float) -> float:
    """The largest C <= top with Σ shares min(ratios, C) >= C / most; shares sum to 1, ratios > 0, most > 1."""

    def excess(cap: float) -> float:
        return float(shares @ np.minimum(ratios, cap)) - cap / most

    if excess(top) >= 0:
        return top
    # concave in C and positive at the smallest ratio, so it crosses zero once, above the last ratio where it is not
    # negative
    start = max(ratio for ratio in ratios.tolist() if excess(ratio) >= 0)
    return start + excess(start) / (1 / most - float(shares[ratios > start].sum()))


def tilted(generated: ArrayLike, exponent: float, bins: int) -> Weighting:
    """ω = exp(exponent · v) as steps over at most `bins` bins of equally many samples of the generator (a pilot), 1 in
    the mean.

    Polarity Sampling (arXiv 2203.01993) draws from a pool with chances ∝ exp(polarity · v). A bin's weight is the mean
    of these over its samples, so that each bin gets the share that a draw from the pilot as the pool would give it;
    within a bin all are alike. The outermost bins reach on beyond the pilot: that bounds ω, which exp does not, and
    since the bin of the largest weight holds one in `bins` of the pilot, its acceptance rate is at least 1/bins.

    Args:
        generated: v, [M], finite. Values that are equal are in one bin, so there may be fewer.
        exponent: of any sign; 0 gives ω = 1.
        bins: B >= 1.
    """
    v = np.sort(np.asarray(generated, dtype=np.float64))
    last = (
        np.ceil(np.arange(1, bins) / bins * len(v)).astype(np.int64) - 1
    )  # sample at the upper end of each bin but the top
    edges = np.unique(v[last[last >= 0]])
    edges = edges[edges < v[-1]]  # no bin is without a sample
    inside = np.searchsorted(edges, v, side="left")
    weights = exponential(v, exponent)
    means = np.bincount(inside, weights) / np.bincount(inside)
    return Weighting(tuple(edges.tolist()), tuple((means / weights.mean()).tolist()))


def exponential(v: ArrayLike, exponent: float) -> Float64Array:
    """exp(exponent · v) of [M] values over its largest, float64 [M]; Polarity Sampling (arXiv 2203.01993)."""
    tilt = exponent * np.asarray(v, dtype=np.float64)
    return np.exp(tilt - tilt.max())


def effective_size(weights: ArrayLike) -> float:
    """(Σ ω)² / Σ ω² of [M] weights (Kish 1965): as many samples of equal weight tell a mean as well."""
    w = np.asarray(weights, dtype=np.float64)
    return float(w.sum() ** 2 / np.square(w).sum())


def unseen(weighting: Weighting, generated_density: ArrayLike) -> Weighting:
    """The weights that `match` would have given each of the samples it was made from, had that one not been among them.

    With them the mean over those samples tells that over new ones. With the weights themselves it would tell too
    little: a sample makes its own bin look frequent, and so its weight small.
    """
    counts = np.bincount(_bin(generated_density, weighting.edges), minlength=weighting.bins)
    m, seen = counts.sum(), np.maximum(counts, 1)
    raised = np.asarray(weighting.weights) * ((counts + 1) / (m + 1)) * (m / seen)
    return Weighting(weighting.edges, tuple(np.minimum(raised, max(weighting.weights)).tolist()))


@dataclass(frozen=True)
class _EqualBins:
    """Bins of equally many real images, fewer than asked for where real densities are tied.

    Attributes:
        edges: strictly ascending, all below the highest real density, [b]: no bin is without a real image.
        filled: p_real of each bin in units of 1/B, [b + 1]; adds up to B, and is 1 exactly where nothing is tied.
        places: number of each bin among the B that were asked for, of the lowest of those it stands for, [b + 1].
    """

    edges: tuple[float, ...]
    filled: tuple[float, ...]
    places: tuple[int, ...]


def _equal_bins(real_quantiles: ArrayLike, bins: int, least: float) -> _EqualBins:
    """Edge j of B - 1 is the real density of rank j/B; edges on one tie are one, which has all of the tie below it.

    How far up a tie reaches is known to one step of the quantiles, and what lies within that step is interpolated: a
    bin above a tie that holds no more may hold no real image at all. It is joined with the next one up, or at the top
    with the tie, and so is one that is smaller than `least` of a 1/B.
    """
    quantiles = np.asarray(real_quantiles, dtype=np.float64)
    if bins < 1:
        raise UserError(f"a weighting needs at least one bin, has {bins}")
    steps = len(quantiles) - 1
    ranks = np.arange(1, bins) / bins * steps
    edges = np.interp(ranks, np.arange(len(quantiles)), quantiles)
    last = np.searchsorted(quantiles, edges, side="right") - 1  # quantile that is not above the edge
    tied = last - ranks > 1e-6  # more than the rounding of a rank that is an integer
    apart = max(1.0, least * steps / bins)
    kept: list[int] = []
    tops, free = [0.0], 0.0  # upper ends of the bins, in units of 1/B; rank above which the next edge may lie
    for j in range(bins - 1):
        if tied[j] and last[j] >= steps - apart:
            break
        if max(ranks[j], last[j]) > free:
            kept.append(j)
            tops.append((last[j] + 0.5) * bins / steps if tied[j] else j + 1)
            free = last[j] + apart if tied[j] else ranks[j]
    else:
        j = bins - 1
    return _EqualBins(tuple(edges[kept].tolist()), tuple(np.diff([*tops, bins]).tolist()), (*kept, j))


# --- from the settings ------------------------------------------------------------------------------------------------


def check(settings: WeightingSettings, labels: str) -> None:
    """Refuse what can be refused of a weighting without the real set. labels: those of the samples, or "none".

    Raises:
        UserError: a weight is missing, the threshold cannot be read, or weights per label of samples without labels.
    """
    if settings.kind == "two_level":
        formula.parse_threshold(settings.threshold)
        if settings.weight is None:
            raise UserError(
                "--weighting.weight: not set; above 1 asks for typical images, below 1 for varied ones "
                "(or --weighting.kind none)"
            )
    if settings.kind == "quantiles":
        if not settings.weights:
            raise UserError("--weighting.weights: not set; kind quantiles needs a weight for each bin, e.g. [1,1,2,4]")
        Weighting(tuple(map(float, range(1, len(settings.weights)))), tuple(settings.weights))
    if settings.kind == "polarity" and settings.polarity is None:
        raise UserError(
            "--weighting.polarity: not set; below 0 asks for the generator's modes, above 0 for its anti-modes, e.g. "
            "-0.5"
        )
    if settings.per_label and labels == "none":
        raise UserError("--weighting.per_label: the samples have no labels; set --generator.labels or leave it out")


def resolve(
    settings: WeightingSettings,
    quantiles: ArrayLike,
    generated: ArrayLike = (),
    option: str = "--weighting.threshold",
    where: str = "the index",
) -> Weighting:
    """The weight function that settings, once `check` has passed them, ask for against one set of real densities.

    Args:
        settings: kind and numbers.
        quantiles: `formula.density_quantiles` of the real set.
        generated: `settings.statistic` of samples of the generator (a pilot), [M], for `match`, `polarity` and
            `magnet`.
        option, where: the setting of the threshold and the real set, for the message.

    Raises:
        UserError: the threshold lies outside the real densities, or no weight that is used is above 0.
    """
    if settings.kind == "none":
        return uniform()
    if settings.exponent is not None:
        return tilted(generated, settings.exponent, settings.bins)
    if settings.kind == "match":
        return match(quantiles, generated, settings.bins, settings.max_weight)
    if settings.kind == "quantiles":
        assert settings.weights, "check refuses none"
        return by_quantile(quantiles, settings.weights)
    assert settings.weight is not None, "check refuses none"
    return two_level(formula.threshold_inside(settings.threshold, quantiles, option, where), settings.weight)


def resolve_labels(
    settings: WeightingSettings,
    by_label: Mapping[str, ArrayLike],
    generated: NDArray[Any] | None = None,
    labels: NDArray[Any] | None = None,
) -> dict[str, Weighting]:
    """`resolve` for each label by itself, against the quantiles of its own real densities.

    generated, labels: statistic and label of each sample of a pilot, [M]; None where there is no pilot.

    Raises:
        UserError: as `resolve`; the pilot has too few samples of a label to be matched.
    """
    found = {}
    for label, quantiles in by_label.items():
        own = np.empty(0) if generated is None else generated[labels == label]
        if settings.kind == "match" and len(own) < FEWEST_OF_LABEL:
            raise UserError(
                f"--weighting.kind match: the pilot has {len(own)} candidates of label {label!r}, fewer than "
                f"{FEWEST_OF_LABEL}; raise --pilot"
            )
        found[label] = resolve(settings, quantiles, own, where=f"label {label!r}")
    return found


def label_quantiles(uri: str) -> dict[str, Float64Array]:
    """p0, p0.1 ... p100 of the real densities of each label that has enough of them, by at most LABEL_ROWS rows.

    uri: of an output of build_index. Reads all its densities: for a Ray task.
    """
    uri = files.join(uri, "densities")
    artifact = artifacts.load_artifact(uri)
    assert artifact is not None, "an index without densities is not opened"
    fraction = LABEL_ROWS / max(1, artifact.rows)
    found: dict[str, list[Float64Array]] = {}
    for part in artifact.parts:
        table = files.read_table(files.join(uri, part.name), ["sample_id", "label", "density"])
        keep = seeds.uniform(table["sample_id"].to_numpy(), seed=0) < fraction
        labels, values = np.array(table["label"].to_pylist(), dtype=object)[keep], table["density"].to_numpy()[keep]
        for label in {label for label in labels if label is not None}:
            found.setdefault(label, []).append(values[labels == label])
    joined = {label: np.concatenate(values) for label, values in found.items()}
    return {label: formula.density_quantiles(v) for label, v in joined.items() if len(v) >= FEWEST_OF_LABEL}


# --- acceptance -------------------------------------------------------------------------------------------------------


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


def rate_interval(chances: ArrayLike, lowest: float, highest: float, fitted_bins: int = 0) -> tuple[float, float]:
    """95% confidence interval of the acceptance rate from the acceptance probabilities of a pilot, within [lowest,
    highest].

    Agresti & Coull (1998) for values that are not 0 and 1 alone: z²/2 observations are added at each end of what a can
    be, then mean ± z standard errors. For two levels that is theirs for P = Pr(ρ > τ), mapped through P + (1 - P)/w, or
    through P w + (1 - P) for w < 1; its centre is Wilson's, and it contains Wilson's interval, which for rare events
    misses the rate on one side far more often than it says. The added observations keep it from being a point where all
    values are equal, while others are possible.

    Args:
        chances: a of each candidate, [M].
        lowest, highest: bounds of a that hold whatever the density, seen in the pilot or not.
        fitted_bins: B where ω was estimated from the same candidates over B bins (`match`; `chances` then by `unseen`);
            of all labels together. Where p_G has the real densities already the standard error above is next to
            nothing, and the mean of ω errs by Σ_j (c_j / M - p_j)² / p_j, which is χ² of B over M: a standard deviation
            of sqrt(2 B) / M.
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


def measured_interval(rate: float, low: float, high: float, candidates: float) -> tuple[float, float]:
    """Where the measured rate of a run of so many candidates lies with 95%, if a pilot told its true rate: (low, high).

    Mean ± sqrt(e² + z² rate (1 - rate) / candidates), e being the pilot's error on that side, `rate - low` or `high -
    rate` of `rate_interval`: those of the pilot and of the run's own draws are independent. Within [0, 1].
    """
    own = Z * Z * rate * (1 - rate) / candidates
    return max(0.0, rate - math.sqrt((rate - low) ** 2 + own)), min(1.0, rate + math.sqrt((high - rate) ** 2 + own))


def candidates_surely(n: int, rate: float, low: float) -> float:
    """Candidates that are enough for n accepted with a probability of 97.5%; inf where the rate may be 0.

    The c of which n is the low end of `measured_interval`: rate c - sqrt((rate - low)² c² + z² rate (1 - rate) c) = n.
    The pilot's error grows as c, that of the run's own draws as sqrt(c).
    """
    if low == 0:
        return math.inf
    a = low * (2 * rate - low)  # rate² - (rate - low)²
    b = rate * n + Z**2 * rate * (1 - rate) / 2
    return (b + math.sqrt(max(0.0, b * b - a * n * n))) / a


def _bin(density: ArrayLike, edges: Sequence[float]) -> NDArray[np.int64]:
    values = np.asarray(density, dtype=np.float64)
    if np.isnan(values).any():
        raise ValueError("a density is NaN")
    return np.searchsorted(np.asarray(edges, dtype=np.float64), values, side="left")
