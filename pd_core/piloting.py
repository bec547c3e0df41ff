"""The pilot: a few hundred candidates that tell the acceptance rate, the cost and the weighting before the run is paid for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import pyarrow.compute as pc

from pd_core import acceptance, density, estimator, ids, sampling, schemas, storage
from pd_core.acceptance import Weighting
from pd_core.config import WeightingSettings
from pd_core.errors import UserError
from pd_core.realset import RealSet

LABEL_ROWS = 1_000_000  # real densities that the quantiles of labels are taken from
FEWEST_OF_LABEL = 20  # real images of a label, or pilot candidates of it: fewer tell no quantiles
SMALLEST_PARTS = 20  # parts that a small n is cut into, so that little is made beyond it


@dataclass(frozen=True)
class Pilot:
    """What the pilot's candidates were, a row each, scored by predictor and index.

    Attributes:
        label: names, or None. predicted, by_index: densities float64 [M]. copies: bool [M].
        actor_s: seconds of an actor per candidate. png_bytes: mean size of an image, bytes.
    """

    label: np.ndarray | None
    predicted: np.ndarray
    by_index: np.ndarray
    copies: np.ndarray
    actor_s: float
    png_bytes: float

    @property
    def rows(self) -> int:
        """M."""
        return len(self.predicted)

    def deciding(self, score: str) -> np.ndarray:
        """The densities that decide in the run."""
        return self.by_index if score == "index" else self.predicted

    def calibration(self) -> estimator.Calibration:
        """How the predictor fares off the real manifold: predicted against index-scored log density (METHOD 2b)."""
        return estimator.calibration(np.log(self.by_index), np.log(self.predicted))


def read(stage: storage.Stage, artifact: storage.Artifact) -> Pilot:
    """The pilot that a finished stage holds; a few hundred rows."""
    columns = ["label", "density_predicted", "density_index", "likely_copy", "image"]
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
    )


# ---- weightings ------------------------------------------------------------------------------------------------------


def label_quantiles(real: RealSet, parts: Mapping[str, Any] | list[str]) -> dict[str, np.ndarray]:
    """p0, p0.1 ... p100 of the real densities of each label, from at most LABEL_ROWS rows; runs in a Ray task."""
    uri = storage.join(real.uri, "densities")
    fraction = LABEL_ROWS / max(1, real.rows)
    found: dict[str, list[np.ndarray]] = {}
    for name in parts:
        table = storage.read_table(storage.join(uri, name), ["sample_id", "label", "density"])
        keep = ids.uniform(table["sample_id"].to_numpy(), seed=0) < fraction
        labels, values = np.array(table["label"].to_pylist(), dtype=object)[keep], table["density"].to_numpy()[keep]
        for label in {label for label in labels if label is not None}:
            found.setdefault(label, []).append(values[labels == label])
    joined = {label: np.concatenate(values) for label, values in found.items()}
    return {label: density.density_quantiles(v) for label, v in joined.items() if len(v) >= FEWEST_OF_LABEL}


def check_settings(settings: WeightingSettings, labels: str) -> None:
    """Refuse before anything is paid for what needs no real set to be refused.

    Raises:
        UserError: a weight is missing, the threshold cannot be read, or weights per label of samples without labels.
    """
    if settings.kind == "two_level":
        density.parse_threshold(settings.threshold)
        if settings.weight is None:
            raise UserError(
                "--weighting.weight: not set; above 1 asks for typical images, below 1 for varied ones "
                "(or --weighting.kind none)"
            )
    if settings.kind == "quantiles":
        if not settings.weights:
            raise UserError("--weighting.weights: not set; kind quantiles needs a weight for each bin, e.g. [1,1,2,4]")
        acceptance.Weighting(tuple(map(float, range(1, len(settings.weights)))), tuple(settings.weights))
    if settings.per_label and labels == "none":
        raise UserError("--weighting.per_label: the samples have no labels; set --generator.labels or leave it out")


def weighting_of(settings: WeightingSettings, quantiles: np.ndarray, generated: np.ndarray, where: str) -> Weighting:
    """The weight function of the settings for one set of real densities.

    Args:
        settings: kind and numbers.
        quantiles: of the real densities, [1001].
        generated: densities of the pilot's candidates, for `match`.
        where: what the set is, for messages: `the index` or `label '3'`.

    Raises:
        UserError: the threshold lies outside the real densities.
    """
    if settings.kind == "none":
        return acceptance.uniform()
    if settings.kind == "match":
        return acceptance.match(quantiles, generated, settings.bins, settings.max_weight)
    if settings.kind == "quantiles":
        assert settings.weights, "check_settings refuses none"
        return acceptance.by_quantile(quantiles, settings.weights)
    assert settings.weight is not None, "check_settings refuses none"
    threshold = density.parse_threshold(settings.threshold).density(quantiles)
    if not quantiles[0] <= threshold <= quantiles[-1]:
        raise UserError(
            f"--weighting.threshold {settings.threshold}: outside the densities of {where}, which lie in "
            f"{quantiles[0]:.4g} ... {quantiles[-1]:.4g}; choose one inside, or a percentile such as p80"
        )
    return acceptance.two_level(threshold, settings.weight)


def weightings_of(
    settings: WeightingSettings, real: RealSet, by_label: Mapping[str, np.ndarray], pilot: Pilot, score: str
) -> dict[str, Weighting]:
    """ω for all candidates, or for each label.

    by_label: quantiles of each label that is generated, empty unless `settings.per_label`.
    """
    generated = pilot.deciding(score)
    if not by_label:
        return {sampling.EVERYTHING: weighting_of(settings, real.density_quantiles, generated, "the index")}
    assert pilot.label is not None
    made = {}
    for label, quantiles in by_label.items():
        own = generated[pilot.label == label]
        if settings.kind == "match" and len(own) < FEWEST_OF_LABEL:
            raise UserError(
                f"--weighting.kind match: the pilot has {len(own)} candidates of label {label!r}, fewer than "
                f"{FEWEST_OF_LABEL}; raise --pilot"
            )
        made[label] = weighting_of(settings, quantiles, own, f"label {label!r}")
    return made


# ---- what to expect --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expectation:
    """What the pilot says of the run: acceptance rate with its 95% interval, and P = Pr(ρ > τ) for two levels."""

    rate: float
    low: float
    high: float
    above: float | None

    def candidates(self, n: int) -> int:
        """Expected candidates for n accepted."""
        return math.ceil(n / self.rate)

    def chunks_per_part(self, n: int, part_rows: int, chunk: int) -> int:
        """Chunks whose accepted rows make about `part_rows`, or an n-th of SMALLEST_PARTS where n is small."""
        rows = min(part_rows, max(1, n // SMALLEST_PARTS))
        return max(1, round(rows / (self.rate * chunk)))


def expect(pilot: Pilot, weightings: Mapping[str, Weighting], score: str, drop_copies: bool) -> Expectation:
    """Acceptance rate of the pilot's candidates under these weightings.

    Raises:
        UserError: not one of them could be accepted.
    """
    densities = pilot.deciding(score)
    chances = np.empty(pilot.rows)
    for label, weighting in weightings.items():
        rows = np.full(pilot.rows, True) if label == sampling.EVERYTHING else np.asarray(pilot.label == label)
        chances[rows] = acceptance.acceptance_probability(densities[rows], weighting)
    if drop_copies:
        chances = chances * ~pilot.copies
    rate = float(chances.mean())
    if rate == 0:
        raise UserError(
            f"weighting: none of the {pilot.rows} pilot candidates could be accepted (densities "
            f"{densities.min():.4g} ... {densities.max():.4g}); choose other weights or raise --pilot"
        )
    low, high = acceptance.rate_interval(rate, pilot.rows)
    (weighting, *others) = weightings.values()
    above = None
    if not others and weighting.bins == 2:
        above = float(acceptance.bin_shares(densities, weighting)[1])
    return Expectation(rate, max(low, rate / 10), high, above)


def check_affordable(
    expected: Expectation, pilot: Pilot, weightings: Mapping[str, Weighting], score: str, n: int, most: int | None
) -> None:
    """Raise UserError, with weights that would fit, where n cannot be had from `most` candidates."""
    if most is None or n <= expected.high * most:
        return
    needed = n / most
    line = (
        f"--max-candidates {most}: {n} accepted images need about {expected.candidates(n)} candidates at the pilot's "
        f"acceptance rate {expected.rate:.3g} (95%: {expected.low:.3g} ... {expected.high:.3g})"
    )
    if needed > 1 or len(weightings) > 1:
        raise UserError(f"{line}; raise it or lower --n")
    (weighting,) = weightings.values()
    fitting = acceptance.weighting_that_accepts(
        acceptance.bin_shares(pilot.deciding(score), weighting), weighting, needed
    )
    if weighting.bins == 2:
        advice = f"--weighting.weight {fitting.weights[1] / fitting.weights[0]:.4g}"
    else:
        advice = f"weights {[float(f'{w:.3g}') for w in fitting.weights]}"
    raise UserError(f"{line}; raise it, lower --n, or use {advice}, with which it would fit")


def plan(
    expected: Expectation, pilot: Pilot, n: int, actors: int, weightings: Mapping[str, Weighting], job: sampling.Job
) -> str:
    """What a run will take, for a person."""
    candidates = expected.candidates(n)
    quality = pilot.calibration()
    seconds = candidates * pilot.actor_s / max(1, actors)
    lines = [
        f"acceptance: {expected.rate:.4g} (95%: {expected.low:.4g} ... {expected.high:.4g}, {pilot.rows} pilot candidates)"
        + (f"; P(density > threshold) {expected.above:.3g}" if expected.above is not None else ""),
        f"candidates: about {candidates:,} for {n:,} accepted, in parts of {job.candidates_per_part:,}",
        f"time:       about {seconds:,.0f} s of {actors} generator processes, start-up apart "
        f"({pilot.actor_s * 1e3:.3g} ms per candidate)",
        f"disk:       about {n * (pilot.png_bytes + 200) / 2**20:,.1f} MiB",
        f"copies:     {int(pilot.copies.sum())} of {pilot.rows} pilot candidates are likely copies of real images",
        f"predictor:  Spearman {_shown(quality.spearman)} against the index on generated images",
    ]
    if quality.r2_log_density is not None and quality.r2_log_density < 0:
        lines.append(
            f"warning:    on generated images the predictor is worse than a constant (R² {quality.r2_log_density:.3g}); "
            "they lie far from the real ones: --score index decides by true neighbors"
        )
    if expected.above in (0.0, 1.0):
        side = "above" if expected.above else "below"
        lines.append(f"warning:    every pilot candidate lies {side} the threshold, so the weight changes nothing")
    for label, weighting in list(weightings.items())[:10]:
        name = f" of {label}" if label else ""
        edges = ", ".join(f"{edge:.4g}" for edge in weighting.edges[:5]) + (", ..." if weighting.bins > 6 else "")
        weights = ", ".join(f"{w:.3g}" for w in weighting.weights[:6]) + (", ..." if weighting.bins > 6 else "")
        lines.append(f"weights{name}:    {weights}" + (f" (densities cut at {edges})" if edges else ""))
    return "\n".join(lines)


def _shown(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"


def stage_of(uri: str, kind: str, recipe: sampling.Recipe, more: Mapping[str, Any]) -> storage.Stage:
    """A stage of samples: its identity is the recipe, the versions that move pixels, and `more`."""
    import PIL

    identity = {
        "generator": recipe.generator_identity,
        "settings": recipe.generator.model_dump(mode="json", exclude={"path", "code", "prompts", "allow_pickle"}),
        "realset": dict(recipe.realset.fingerprints),
        "weightings": {label: weighting.to_json() for label, weighting in recipe.weightings.items()},
        "score": recipe.score,
        "seed": recipe.seed,
        "chunk": recipe.chunk,
        "device": recipe.device,
        "threads": recipe.threads,
        "classes": list(recipe.classes),
        "class_names": list(recipe.class_names),
        "prompts": storage.sha256("\n".join(recipe.prompts).encode()),
        "copy_distance": recipe.copy_distance,
        "drop_copies": recipe.drop_copies,
        "torch": version("torch"),  # not torch.__version__: every task would import torch to unpickle it
        "pillow": PIL.__version__,
        **more,
    }
    return storage.Stage(uri, kind, schemas.VERSIONS[kind], identity)
