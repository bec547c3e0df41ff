"""The pilot: a few hundred candidates that tell acceptance rate, cost and weighting before the run is paid for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pyarrow.compute as pc

from pd_core.core import artifacts, files, seeds
from pd_core.core.errors import UserError, printable
from pd_core.core.settings.generate import GenerateSettings, WeightingSettings
from pd_core.density import fit, predictor
from pd_core.density import weighting as density_weighting
from pd_core.density.realset import RealSet
from pd_core.density.weighting import EVERYTHING, Weighting
from pd_core.engine import runs, tasks
from pd_core.generate import chunks as generate_chunks
from pd_core.generate import sampling
from pd_core.generate.candidates import Origin
from pd_core.generate.volume import FLOOR, Volume
from pd_core.index import search

PART_CHUNKS = 8  # of the pilot
SMALLEST_PARTS = 20  # parts that a small n is cut into, so that little is made beyond it
PART_CANDIDATES = 4096  # of one part, more only where a run would have more than MOST_PARTS of them
MOST_PARTS = 1000
PART_BYTES = 256 << 20  # of one part's images
SMALLEST_FLOOR = 1e-9  # of the acceptance probabilities that are tried for an advice
MEASURED = 10  # a rate is taken to be at least this fraction of what the pilot measured, for planning


@dataclass(frozen=True)
class Agreement:
    """Predicted against index-scored densities of the same generated images.

    Attributes:
        true, predicted: log densities float64 [M], -inf where ρ underflows to 0.
        figures: of the rows where both are finite, None where there is none.
    """

    true: np.ndarray
    predicted: np.ndarray
    figures: predictor.Calibration | None

    @property
    def left_out(self) -> int:
        """Rows that the figures know nothing of."""
        return len(self.true) - (self.figures.n if self.figures else 0)


def agreement(by_index: np.ndarray, predicted: np.ndarray) -> Agreement:
    """Of densities float64 [M] by index and by predictor; one that is 0, far from the real images, has no logarithm."""
    with np.errstate(divide="ignore"):
        true, guessed = np.log(by_index), np.log(predicted)
    finite = np.isfinite(true) & np.isfinite(guessed)
    return Agreement(true, guessed, fit.calibration(true[finite], guessed[finite]) if finite.any() else None)


@dataclass(frozen=True)
class Pilot:
    """What the pilot's candidates were, a row each, scored by predictor and index.

    Attributes:
        label: names, or None. predicted, by_index: densities float64 [M]. copies: bool [M].
        log_volume: float64 [M], or None where densities decide. degenerate: candidates whose log-volume holds a zero.
        actor_s: seconds of an actor per candidate. png_bytes: mean size of an image, bytes.
    """

    label: np.ndarray | None
    predicted: np.ndarray
    by_index: np.ndarray
    copies: np.ndarray
    actor_s: float
    png_bytes: float
    log_volume: np.ndarray | None = None
    degenerate: int = 0

    @property
    def rows(self) -> int:
        """M."""
        return len(self.predicted)

    def statistic(self, name: str, score: str = "predictor") -> np.ndarray:
        """float64 [M]: log_volume, or the density that decides where `score` does."""
        if name == "log_volume":
            assert self.log_volume is not None, "a pilot for weights of volumes has volumes"
            return self.log_volume
        return self.by_index if score == "index" else self.predicted

    def calibration(self) -> Agreement:
        """How the predictor fares off the real manifold, against the index (docs/method.md, section 2)."""
        return agreement(self.by_index, self.predicted)


def make(
    run: runs.Run,
    origin: Origin,
    pool: generate_chunks.Pool,
    open_index: Callable[[], search.SearchPool],
    candidates: int,
    folder: str = "pilot",
) -> Pilot:
    """The pilot stage in a folder of the run's output: so many candidates, rounded up to whole chunks, all accepted.

    They are drawn by a seed of their own, which that of `origin` decides.
    """
    recipe = replace(origin, seed=seeds.stream(origin.seed, "pilot")).everyone()
    chunks = -(-candidates // recipe.chunk)
    rows = chunks * recipe.chunk
    stage = sampling.stage_of(files.join(run.output, folder), "pilot", recipe, {"n": rows})
    job = sampling.Job(recipe, stage, None, min(chunks, PART_CHUNKS), rows)
    artifact = run.stage(stage, lambda: sampling.run(job, run.now, pool, open_index(), 1.0, sampling.Budget()))
    with runs.failures("pilot", stage.uri):
        return tasks.get(tasks.task(read).remote(stage, artifact))


def read(stage: artifacts.Stage, artifact: artifacts.Artifact) -> Pilot:
    """The pilot that a finished stage holds; a few hundred rows."""
    columns = ["label", "density_predicted", "density_index", "log_volume", "likely_copy", "image"]
    tables = list(sampling.iterate_rows(stage.uri, artifact.parts, columns))
    join = lambda name: np.concatenate([table[name].to_numpy() for table in tables])  # noqa: E731
    labels = [label for table in tables for label in table["label"].to_pylist()]
    sizes = [pc.sum(pc.binary_length(pc.struct_field(table["image"], "bytes"))).as_py() for table in tables]
    return Pilot(
        label=None if labels[0] is None else np.array(labels),
        predicted=join("density_predicted"),
        by_index=join("density_index"),
        copies=join("likely_copy").astype(bool),
        actor_s=artifact.totals.get("actor_s_per_candidate", math.nan),
        png_bytes=sum(sizes) / artifact.rows,
        log_volume=join("log_volume") if tables[0]["log_volume"].null_count == 0 else None,
        degenerate=sum(part.counts.get("degenerate", 0) for part in artifact.parts),
    )


# ---- weightings ------------------------------------------------------------------------------------------------------


def volume_of(settings: WeightingSettings) -> Volume | None:
    """How log-volumes are measured, where they decide."""
    return None if settings.exponent is None else Volume(settings.rank, settings.output_size)


def weightings_of(
    settings: WeightingSettings, real: RealSet, by_label: Mapping[str, np.ndarray], pilot: Pilot, score: str
) -> dict[str, Weighting]:
    """ω for all candidates, or for each label. by_label: real quantiles of those generated; empty: not by label."""
    generated = pilot.statistic(settings.statistic, score)
    if not by_label:
        return {EVERYTHING: density_weighting.resolve(settings, real.density_quantiles, generated)}
    return density_weighting.resolve_labels(settings, by_label, generated, pilot.label)


# ---- what to expect --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expectation:
    """What the pilot says of the run: acceptance rate with its 95% interval, and P = Pr(ρ > τ) for two levels."""

    rate: float
    low: float
    high: float
    above: float | None

    @property
    def planning_rate(self) -> float:
        """A rate to prepare work by, above 0: no bound that was tested, unlike `low`, which may be 0."""
        return max(self.low, self.rate / MEASURED)

    def candidates(self, n: int) -> int:
        """Expected candidates for n accepted."""
        return math.ceil(n / self.rate)

    def candidates_surely(self, n: int) -> float:
        """`weighting.candidates_surely` of these."""
        return density_weighting.candidates_surely(n, self.rate, self.low)

    def chunks_per_part(self, n: int, part_rows: int, chunk: int, png_bytes: float) -> int:
        """Chunks of one part: what is lost at most when a run is ended, and how often it looks at its limits.

        Accepted rows of a part are about `part_rows`, or an n-th of SMALLEST_PARTS where n is small, or as many images
        of `png_bytes` as fill PART_BYTES, whichever is least. Its candidates are at most PART_CANDIDATES, however few
        of them are accepted, or a MOST_PARTS-th of the whole run, which bounds the number of files; parts without rows
        are fine. No measured time enters: the same settings give the same files on any machine.
        """
        rows = max(1.0, min(part_rows, n // SMALLEST_PARTS, PART_BYTES // max(1.0, png_bytes)))
        most = max(PART_CANDIDATES, n / self.rate / MOST_PARTS)
        chunks = min(round(rows / (self.rate * chunk)), int(most // chunk), generate_chunks.MAX_CHUNKS)
        return max(1, chunks)


def expect(settings: GenerateSettings, weightings: Mapping[str, Weighting], pilot: Pilot) -> Expectation:
    """Acceptance rate of the pilot's candidates under these weightings.

    Raises:
        UserError: not one of them could be accepted.
    """
    statistic = pilot.statistic(settings.weighting.statistic, settings.score)
    fitted = settings.weighting.kind == "match"
    sup = density_weighting.supremum(weightings.values())
    chances = np.empty(pilot.rows)
    for label, weighting in weightings.items():
        rows = np.full(pilot.rows, True) if label == EVERYTHING else np.asarray(pilot.label == label)
        seen_from = density_weighting.unseen(weighting, statistic[rows]) if fitted else weighting
        chances[rows] = density_weighting.acceptance_probability(statistic[rows], seen_from, sup)
    if settings.drop_copies:
        chances = chances * ~pilot.copies
    rate = float(chances.mean())
    if rate == 0:
        raise UserError(
            f"weighting: none of the {pilot.rows} pilot candidates could be accepted ({_axis(settings)} "
            f"{statistic.min():.4g} ... {statistic.max():.4g}); choose other weights or raise --pilot"
        )
    lowest = 0.0 if settings.drop_copies else min(min(w.weights) for w in weightings.values()) / sup
    bins = sum(weighting.bins for weighting in weightings.values()) if fitted else 0
    low, high = density_weighting.rate_interval(chances, lowest, 1.0, bins)
    above = None
    if settings.weighting.kind == "two_level" and len(weightings) == 1:
        (weighting,) = weightings.values()
        above = float(density_weighting.bin_shares(statistic, weighting)[1])
    return Expectation(rate, low, high, above)


def check_affordable(
    settings: GenerateSettings, real: RealSet, by_label: Mapping[str, np.ndarray], pilot: Pilot, expected: Expectation
) -> None:
    """Raise UserError where n cannot be expected from --max-candidates, with a weighting that surely fits, if one does.

    by_label: as for `weightings_of`.
    """
    n, most = settings.n, settings.max_candidates
    assert n is not None
    if most is None or expected.candidates(n) <= _usable(settings, pilot, expected):
        return
    advice = _fitting(settings, real, by_label, pilot)
    surely = expected.candidates_surely(n) + _part(settings, pilot, expected)
    raised = f"raise it to {math.ceil(surely)}" if math.isfinite(surely) else "raise it"
    ways = f"{raised}, lower --n, or use {advice}, with which it fits" if advice else f"{raised} or lower --n"
    raise UserError(
        f"--max-candidates {most}: {n} accepted images need about {expected.candidates(n)} candidates, generated in "
        f"parts of {_part(settings, pilot, expected)}, at the pilot's acceptance rate {_interval(expected)}; {ways}"
    )


def _part(settings: GenerateSettings, pilot: Pilot, expected: Expectation) -> int:
    assert settings.n is not None
    per_part = expected.chunks_per_part(settings.n, settings.part_rows, settings.chunk, pilot.png_bytes)
    return per_part * settings.chunk


def _usable(settings: GenerateSettings, pilot: Pilot, expected: Expectation) -> int:
    """Candidates that --max-candidates allows: whole parts."""
    assert settings.max_candidates is not None
    part = _part(settings, pilot, expected)
    return settings.max_candidates // part * part


def _fitting(settings: GenerateSettings, real: RealSet, by_label: Mapping[str, np.ndarray], pilot: Pilot) -> str | None:
    """The mildest change of the weighting with which the pilot says that n surely come from --max-candidates, or None.

    That is bisection over a floor under all acceptance probabilities; every step asks what the run itself would ask.
    """
    assert settings.n is not None

    def fits(floor: float) -> bool:
        eased = settings.model_copy(update={"weighting": _eased(settings.weighting, floor)})
        found = expect(eased, weightings_of(eased.weighting, real, by_label, pilot, settings.score), pilot)
        return found.candidates_surely(n) <= _usable(eased, pilot, found)

    n = settings.n
    if settings.weighting.kind in ("none", "magnet") or not fits(1.0):
        return None
    low, high = math.log(SMALLEST_FLOOR), 0.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(math.exp(middle)) else (middle, high)
    eased = _eased(settings.weighting, math.exp(high))
    names = {"two_level": "weight", "quantiles": "weights", "match": "max_weight", "polarity": "polarity"}
    name = names[settings.weighting.kind]
    value = getattr(eased, name)
    return f"--weighting.{name} " + (
        f"{value:g}" if name != "weights" else "[" + ",".join(f"{w:g}" for w in value) + "]"
    )


def _eased(weighting: WeightingSettings, floor: float) -> WeightingSettings:
    """The same weighting with no acceptance probability below `floor` in (0, 1], in numbers that can be typed.

    What polarity keeps above a floor depends on the pilot: there it is a polarity that goes to 0 as `floor` goes to 1.
    """
    if weighting.kind == "polarity":
        assert weighting.polarity is not None
        milder = abs(weighting.polarity) * math.log(floor) / math.log(SMALLEST_FLOOR)
        eased = math.copysign(_digits(milder, False), weighting.polarity) if milder else 0.0
        return weighting.model_copy(update={"polarity": eased})
    if weighting.kind == "two_level":
        assert weighting.weight is not None
        w = weighting.weight
        return weighting.model_copy(
            update={"weight": min(w, _digits(1 / floor, False)) if w >= 1 else max(w, _digits(floor, True))}
        )
    if weighting.kind == "match":
        return weighting.model_copy(
            update={"max_weight": min(weighting.max_weight, max(1.01, _digits(1 / floor, False)))}
        )
    assert weighting.weights
    least = _digits(floor * max(weighting.weights), True)
    return weighting.model_copy(
        update={"weights": [min(max(w, least), max(weighting.weights)) for w in weighting.weights]}
    )


def _digits(value: float, up: bool) -> float:
    """Three significant digits, rounded up or down."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    steps = value / unit
    return float(f"{(math.ceil(steps - 1e-9) if up else math.floor(steps + 1e-9)) * unit:.3g}")


# ---- the plan --------------------------------------------------------------------------------------------------------


def plan(
    settings: GenerateSettings,
    expected: Expectation,
    pilot: Pilot,
    actors: int,
    weightings: Mapping[str, Weighting],
    copy_distance: float,
) -> str:
    """What a run will take, for a person.

    actors: generator processes that fit the cluster as it is now.
    """
    n, copies, figures = settings.n, int(pilot.copies.sum()), pilot.calibration().figures
    assert n is not None
    candidates, part = expected.candidates(n), _part(settings, pilot, expected)
    lines = [
        f"acceptance: {_interval(expected)}, {pilot.rows} pilot candidates"
        + (f"; P(density > threshold) {expected.above:.3g}" if expected.above is not None else ""),
        f"candidates: about {candidates:,} for {n:,} accepted, in parts of {part:,}",
        f"time:       {_time(candidates * pilot.actor_s, pilot.actor_s, actors)}",
        f"disk:       about {n * (pilot.png_bytes + 200) / 2**20:,.1f} MiB",
        f"copies:     {copies} of {pilot.rows} pilot candidates ({copies / pilot.rows:.2g}) are likely copies of real "
        "images, "
        + (
            "which are exact ones: the copy distance is 0"
            if copy_distance == 0
            else f"within {copy_distance:.4g} of one"
        ),
        *_of_volumes(settings, pilot),
        f"predictor:  Spearman {_shown(figures.spearman if figures else None)} against the index on generated images",
        *_warnings(settings, expected, pilot),
    ]
    for label, weighting in list(weightings.items())[:10]:
        name = f" of {printable(label)}" if label else ""
        edges = ", ".join(f"{edge:.4g}" for edge in weighting.edges[:5]) + (", ..." if weighting.bins > 6 else "")
        weights = ", ".join(f"{w:.3g}" for w in weighting.weights[:6]) + (", ..." if weighting.bins > 6 else "")
        lines.append(f"weights{name}:    {weights}" + (f" ({_axis(settings)} cut at {edges})" if edges else ""))
    return "\n".join(lines)


def _of_volumes(settings: GenerateSettings, pilot: Pilot) -> list[str]:
    """What the weights are, how far they reach, and what they are worth, where log-volumes decide."""
    v, exponent = pilot.log_volume, settings.weighting.exponent
    if v is None or exponent is None:
        return []
    weighting = density_weighting.tilted(v, exponent, settings.weighting.bins)
    ends = f"{v.min():.4g} ... {v.max():.4g}"
    lines = [f"volumes:    exp({exponent:g} v) in {weighting.bins} steps, log-volumes v of the pilot in {ends}"]
    if exponent and weighting.edges:
        side, edge = ("above", weighting.edges[-1]) if exponent > 0 else ("up to", weighting.edges[0])
        exact, steps = density_weighting.exponential(v, exponent), density_weighting.weight_of(v, weighting)
        size, capped = (density_weighting.effective_size(w) for w in (exact, steps))
        lines.append(
            f"cap:        all v {side} {edge:.4g} have the weight {max(weighting.weights):.3g} (1 is the generator's "
            f"mean); effective sample size of the pilot {capped:.1f} of {pilot.rows}, without steps and cap {size:.1f}"
        )
    return lines


def _axis(settings: GenerateSettings) -> str:
    return {"density": "densities", "log_volume": "log-volumes"}[settings.weighting.statistic]


def _interval(expected: Expectation) -> str:
    return f"{expected.rate:.4g} (95%: {expected.low:.4g} ... {expected.high:.4g})"


def _time(seconds: float, each: float, actors: int) -> str:
    if math.isnan(seconds):
        return "not known: the pilot was interrupted, and its seconds are lost"
    together = f", {seconds / actors:,.0f} s on the {actors} that fit now" if actors > 1 else ""
    return (
        f"about {seconds:,.0f} s on one generator process{together}, start-up apart ({each * 1e3:.3g} ms per candidate)"
    )


def _warnings(settings: GenerateSettings, expected: Expectation, pilot: Pilot) -> list[str]:
    assert settings.n is not None
    lines, calibration = [], pilot.calibration()
    most, surely = settings.max_candidates, expected.candidates_surely(settings.n)
    if most is not None and surely > _usable(settings, pilot, expected):
        need = f"up to {math.ceil(surely):,}" if math.isfinite(surely) else "many more"
        lines.append(
            f"warning:    --max-candidates {most} may not be enough: at the low end of the interval it takes {need} "
            "candidates"
        )
    r2 = calibration.figures.r2_log_density if calibration.figures else None
    if r2 is not None and r2 < 0:
        lines.append(
            f"warning:    on generated images the predictor is worse than a constant (R² {r2:.3g}); "
            "they lie far from the real ones: --score index decides by true neighbors"
        )
    if calibration.left_out:
        lines.append(
            f"warning:    {calibration.left_out} of {pilot.rows} pilot candidates are left out of what is said of the "
            "predictor: they lie so far from the real images that their density underflows to 0, by the index or by "
            "the predictor; an index with a smaller --density.volume_dim would tell such images apart"
        )
    if pilot.degenerate:
        lines.append(
            f"warning:    {pilot.degenerate} of {pilot.rows} pilot candidates have singular values that are zero up to "
            f"rounding among their top {settings.weighting.rank}, and count as {FLOOR:g} of the largest; lower "
            "--weighting.rank"
        )
    if expected.above in (0.0, 1.0):
        side = "above" if expected.above else "below"
        lines.append(f"warning:    every pilot candidate lies {side} the threshold, so the weight changes nothing")
    return lines


def _shown(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"
