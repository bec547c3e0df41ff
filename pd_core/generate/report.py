"""The report of generate: what its page shows of the samples, the pilot and the real images, gathered and drawn.

What was asked for, what the generator gives, and what of that was accepted, side by side on the axis of the real set's
densities.
"""

from __future__ import annotations

import datetime
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from pd_core.core import artifacts, files
from pd_core.core.errors import RunError, UserError
from pd_core.core.settings.generate import GenerateSettings
from pd_core.core.settings.load import to_yaml
from pd_core.density import originals as density_originals
from pd_core.density import weighting as density_weighting
from pd_core.engine import runs
from pd_core.generate import figures as generate_figures
from pd_core.generate import pilot as generate_pilot
from pd_core.generate import sampling
from pd_core.generate.candidates import Recipe
from pd_core.generate.tally import Count, Tally, tallied
from pd_core.images import listing, thumbnails
from pd_core.images.decode import BadImage
from pd_core.report import figures, page
from pd_core.report.page import Calibration

MAX_WEIGHTS_SHOWN = 60  # rows of the table of weights
MAX_COUNTS_SHOWN = 50  # labels, and prompts
Original = tuple[str | None, str | None, bytes | None, str]  # key, label, thumbnail, why there is none
NEAREST_SHOWN = 4  # pairs where no sample is a likely copy
BANDS = {
    "p0–p5": (0, 5),
    "around p25": (22.5, 27.5),
    "median": (47.5, 52.5),
    "around p75": (72.5, 77.5),
    "p95–p100": (95, 100),
}

SHOWN = [
    "sample_id",
    "seed",
    "density",
    "density_index",
    "percentile",
    "acceptance_probability",
    "label",
    "prompt",
    "image",
]


@dataclass(frozen=True)
class Sample:
    """One generated image with its numbers.

    Attributes:
        number: running number of the candidate. seed: that its image was made from.
        density: ρ. percentile: of it among the real set, in [0, 100].
        probability: a, of being accepted; None where nothing was to be decided (the pilot).
        label, prompt: what the generator was asked to show, or None.
        thumbnail: PNG or JPEG.
    """

    number: int
    seed: int
    density: float
    percentile: float
    probability: float | None
    label: str | None
    prompt: str | None
    thumbnail: bytes


@dataclass(frozen=True)
class Pair:
    """An accepted image beside the real image nearest to it.

    Attributes:
        distance: Euclidean, between their features. likely_copy: whether that is near enough to be flagged.
        key, label: of the real image; key None where the index does not name it any more.
        original: its thumbnail, or None, and then `missing` says why.
    """

    sample: Sample
    distance: float
    likely_copy: bool
    key: str | None
    label: str | None
    original: bytes | None
    missing: str = ""


@dataclass(frozen=True)
class Weight:
    """One step of a weight function: ω(ρ) = weight for low < ρ <= high, accepted with `probability` = ω / sup ω.

    Where log-volumes decide, of v instead of ρ.

    label: whose function it is; None is everybody's. low, high: None where the step has no end on that side.
    """

    label: str | None
    low: float | None
    high: float | None
    weight: float
    probability: float


@dataclass(frozen=True)
class SamplesData:
    """All that the page shows.

    Attributes:
        created: ISO 8601 time, given by the caller, so that `render` is a function of its argument alone.
        n: accepted images. candidates: up to and with the n-th accepted.
        score: `predictor`, `index` or `both`, what the densities of generated images are.
        weighting: settings of it: kind, and what that takes.
        weights: its steps, in ascending density within each label.
        expected: by the pilot, of `pilot_rows` candidates, `pilot_copies` of them likely copies.
        inverse_sum, inverse_square_sum: Σ 1/a and Σ 1/a² over the accepted.
        quantiles: float64 [1001], p0, p0.1 ... p100 of the real set's densities.
        generated: int64 [B], candidates in each of B bins of equally many real images; those beyond the real set count
            in the outermost. All candidates that were made, `candidates` of them or more. accepted: int64 [B], adds up
            to n.
        accepted_by_index: int64 [B], the accepted in the bins of their index-scored densities, where those are known.
        span: lowest and highest ρ among pilot and accepted, a few extremes apart: how far the axis must reach.
        bands: name of a range of percentiles of the accepted, and images from it in ascending density.
        unfiltered: images of the pilot, in ascending density.
        pilot_calibration: predicted against index-scored on the pilot; `accepted_calibration` on the accepted, or None.
        parts: (candidates, accepted) of each part in order; adds up to (candidates, n).
        copies: likely copies among what the weighting accepted. drop_copies: they were left out of the n.
        copy_distance: up to which an image is one. copies_quantile: share of real images that have a real one so near.
        pairs: flagged ones nearest first; where none is flagged, the nearest of all.
        originals_note: why originals can be read no more, or empty.
        labels, prompts: counts that add up to n each, or empty. choices: of how many labels was drawn.
        plan: the text that was printed before the run.
        facts: of generator and real set, in order of display, by heading.
    """

    title: str
    output: str
    index: str
    created: str
    n: int
    candidates: int
    score: str
    weighting: Mapping[str, Any]
    weights: Sequence[Weight]
    expected: generate_pilot.Expectation
    pilot_rows: int
    pilot_copies: int
    inverse_sum: float
    inverse_square_sum: float
    quantiles: np.ndarray
    generated: np.ndarray
    accepted: np.ndarray
    span: tuple[float, float]
    bands: Sequence[tuple[str, Sequence[Sample]]]
    unfiltered: Sequence[Sample]
    pilot_calibration: Calibration
    parts: Sequence[tuple[int, int]]
    copies: int
    copy_distance: float
    copies_quantile: float
    accepted_by_index: np.ndarray | None = None
    accepted_calibration: Calibration | None = None
    drop_copies: bool = False
    pairs: Sequence[Pair] = ()
    originals_note: str = ""
    labels: Sequence[Count] = ()
    prompts: Sequence[Count] = ()
    choices: Mapping[str, int] = field(default_factory=dict)
    plan: str = ""
    facts: Mapping[str, Sequence[tuple[str, str]]] = field(default_factory=dict)
    timings_s: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    settings_yaml: str = ""

    def __post_init__(self) -> None:
        """Conservation: what the page adds up must add up."""
        bins = len(self.generated)
        assert self.quantiles.shape == (1001,), self.quantiles.shape
        assert bins % generate_figures.TENTHS == 0 and 1000 % bins == 0, bins
        assert self.accepted.shape == (bins,) and self.accepted.sum() == self.n, (self.accepted.sum(), self.n)
        assert self.accepted_by_index is None or self.accepted_by_index.sum() == self.n
        assert self.generated.sum() >= self.candidates >= self.n, (self.generated.sum(), self.candidates, self.n)
        assert tuple(map(sum, zip(*self.parts, strict=True))) == (self.candidates, self.n), (self.parts, self.n)
        for counts in (self.labels, self.prompts):
            assert not counts or sum(count.rows for count in counts) == self.n

    @property
    def acceptance_rate(self) -> float:
        """Measured: n over candidates."""
        return self.n / self.candidates

    @property
    def measured_interval(self) -> tuple[float, float]:
        """Where the measured rate should lie with 95%, by the pilot: that of the true rate, and the run's own error."""
        expected = self.expected
        return density_weighting.measured_interval(expected.rate, expected.low, expected.high, self.candidates)

    @property
    def as_expected(self) -> bool:
        """Whether the measured rate lies in `measured_interval`."""
        low, high = self.measured_interval
        return low <= self.acceptance_rate <= high

    @property
    def effective_sample_size(self) -> float:
        """(Σ 1/a)² / Σ 1/a² (Kish 1965): as many equally weighted samples tell the generator's means as well."""
        return self.inverse_sum**2 / self.inverse_square_sum


@dataclass(frozen=True)
class Inputs:
    """What the stage reads; picklable.

    Attributes:
        job: the samples stage and what was drawn. sampled: its commit record.
        pilot: the pilot's candidates. expected: what was made of them. plan_text: what was printed before the run.
        settings: of the run. timings_s: of the stages so far.
    """

    job: sampling.Job
    sampled: artifacts.Artifact
    pilot: generate_pilot.Pilot
    expected: generate_pilot.Expectation
    plan_text: str
    settings: GenerateSettings
    timings_s: Mapping[str, float]


def stage_of(output: str, samples: artifacts.Stage, settings: GenerateSettings) -> artifacts.Stage:
    """The report stage under `output`."""
    identity = {"samples": samples.fingerprint, "images": settings.images, "pilot": settings.pilot}
    return runs.report_stage(output, identity)


def run(stage: artifacts.Stage, inputs: Inputs) -> runs.Made:
    """Make the page and its figures; returns the parts and totals to commit."""
    return runs.draw(stage, functools.partial(_draw, inputs))


def _draw(inputs: Inputs) -> runs.Drawn:
    data = gather(inputs)
    totals = {
        "effective_sample_size": data.effective_sample_size,
        "predictor_spearman": data.pilot_calibration.spearman,
    }
    return runs.Drawn(drawn(data), totals=totals)


def gather(inputs: Inputs) -> SamplesData:
    """All that the page shows: two passes over the parts, the second for the images of a few rows."""
    job, settings = inputs.job, inputs.settings
    recipe, totals, pilot = job.recipe, inputs.sampled.totals, inputs.pilot
    seen = tallied(job.samples.uri, inputs.sampled, recipe.realset, settings.score)
    shown = _choose(seen, settings.images)
    pairs, originals_note = _pairs(inputs, seen)
    pilot_densities = pilot.statistic("density", settings.score)
    return SamplesData(
        title="Generated images",
        output=str(settings.output),
        index=recipe.realset.uri,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        n=inputs.sampled.rows,
        candidates=totals["candidates"],
        score=settings.score,
        weighting=settings.weighting.model_dump(),
        weights=list(_weights(recipe)),
        expected=inputs.expected,
        pilot_rows=pilot.rows,
        pilot_copies=int(pilot.copies.sum()),
        inverse_sum=seen.inverse_sum,
        inverse_square_sum=seen.inverse_square_sum,
        quantiles=recipe.realset.density_quantiles,
        generated=np.array(totals["density_bins"]),
        accepted=seen.bins,
        accepted_by_index=seen.index_bins if settings.score == "both" else None,
        span=_span(np.concatenate([seen.rows["density"].to_numpy(), pilot_densities])),
        bands=_bands(inputs, shown),
        unfiltered=_unfiltered(inputs),
        pilot_calibration=_calibration(pilot.calibration()),
        accepted_calibration=_calibration(generate_pilot.agreement(*seen.both)) if settings.score == "both" else None,
        parts=_parts(inputs),
        copies=totals["copies"],
        copy_distance=recipe.copy_distance,
        copies_quantile=settings.copies_quantile,
        drop_copies=recipe.drop_copies,
        pairs=pairs,
        originals_note=originals_note,
        labels=seen.counts("label"),
        prompts=seen.counts("prompt"),
        choices={"label": len(recipe.classes), "prompt": len(recipe.prompts)},
        plan=inputs.plan_text,
        facts=_facts(inputs),
        timings_s=inputs.timings_s,
        versions=inputs.sampled.versions,
        settings_yaml=to_yaml(settings),
    )


# ---- numbers ---------------------------------------------------------------------------------------------------------


def _span(densities: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(densities, [0.005, 0.995])
    return float(low), float(high)


def _parts(inputs: Inputs) -> list[tuple[int, int]]:
    """(candidates, accepted) of each part; of the last one the candidates up to the n-th accepted."""
    parts = [(part.counts["candidates"], part.rows) for part in inputs.sampled.parts]
    before = sum(candidates for candidates, _ in parts[:-1])
    return [*parts[:-1], (inputs.sampled.totals["candidates"] - before, parts[-1][1])]


def _calibration(agreement: generate_pilot.Agreement) -> Calibration:
    found, left_out = agreement.figures, agreement.left_out
    more = {"left out, since ρ underflows to 0": float(left_out)} if left_out else {}
    if found is None:
        return Calibration(agreement.true, agreement.predicted, None, None, 0, more)
    tails = [f"{end}_decile_{what}" for end in ("low", "high") for what in ("spearman", "mean_abs_log_error")]
    figures = {name: getattr(found, name) for name in ("r2_density", *tails)}
    r2, spearman = found.r2_log_density, found.spearman
    return Calibration(agreement.true, agreement.predicted, r2, spearman, found.n, figures | more)


def _weights(recipe: Recipe) -> Iterator[Weight]:
    sup = density_weighting.supremum(recipe.weightings.values())
    for label, weighting in recipe.weightings.items():
        ends = [None, *weighting.edges, None]
        for low, high, weight in zip(ends, ends[1:], weighting.weights, strict=False):
            yield Weight(label or None, low, high, weight, weight / sup)


# ---- the images that are shown ---------------------------------------------------------------------------------------


def _choose(seen: Tally, many: int) -> dict[str, list[tuple[str, int]]]:
    """For each band of percentiles of the accepted the (part, row) of its share of `many` images, evenly over it."""
    table = seen.rows.sort_by([("density", "ascending"), ("sample_id", "ascending")])
    taken: set[int] = set()
    chosen = {}
    for place, (name, (low, high)) in enumerate(BANDS.items()):
        first, last = (round(end / 100 * (table.num_rows - 1)) for end in (low, high))
        wanted = max(1, many // len(BANDS) + (place < many % len(BANDS)))
        ranks = [rank for rank in _evenly(first, last, wanted) if rank not in taken]
        taken.update(ranks)
        rows = table.take(pa.array(ranks, pa.int64()))
        chosen[name] = list(zip(rows["part"].to_pylist(), rows["row"].to_pylist(), strict=True))
    return {name: rows for name, rows in chosen.items() if rows}


def _evenly(first: int, last: int, wanted: int) -> list[int]:
    """At most `wanted` different integers from first to last; one alone lies in the middle."""
    if wanted == 1:
        return [(first + last) // 2]
    return np.unique(np.linspace(first, last, wanted).round().astype(int)).tolist()


def _bands(inputs: Inputs, chosen: Mapping[str, Sequence[tuple[str, int]]]) -> list[tuple[str, list[Sample]]]:
    places = [place for rows in chosen.values() for place in rows]
    found = _read_rows(inputs.job.samples.uri, places)
    return [(name, [_sample(found[place], inputs, True) for place in rows]) for name, rows in chosen.items()]


def _unfiltered(inputs: Inputs) -> list[Sample]:
    """Images of the pilot, evenly over its candidates, in ascending density."""
    uri = files.join(str(inputs.settings.output), "pilot")
    pilot = artifacts.load_artifact(uri)
    assert pilot is not None
    numbered = [(part.name, row) for part in pilot.parts for row in range(part.rows)]
    places = [numbered[i] for i in _evenly(0, len(numbered) - 1, inputs.settings.images)]
    samples = [_sample(row, inputs, False) for row in _read_rows(uri, places).values()]
    return sorted(samples, key=lambda sample: (sample.density, sample.number))


def _read_rows(uri: str, places: Iterable[tuple[str, int]]) -> dict[tuple[str, int], dict[str, Any]]:
    """Rows with their images by (part, row), one part in memory at a time."""
    by_part: dict[str, set[int]] = {}
    for name, row in places:
        by_part.setdefault(name, set()).add(row)
    found = {}
    for name, wanted in sorted(by_part.items()):
        order = sorted(wanted)
        table = files.read_table(files.join(uri, name), SHOWN).take(pa.array(order, pa.int64()))
        rows = table.to_pylist()
        pictures = thumbnails.of_samples([values.pop("image") for values in rows], files.join(uri, name))
        for row, values, picture in zip(order, rows, pictures, strict=True):
            found[name, row] = values | {"thumbnail": picture}
    return found


def _sample(row: Mapping[str, Any], inputs: Inputs, decided: bool) -> Sample:
    density, percentile = row["density"], row["percentile"]
    if (
        not decided and inputs.settings.score == "index"
    ):  # the pilot is scored by both, its `density` is the predictor's
        density = row["density_index"]
        percentile = float(inputs.job.recipe.realset.percentile(np.array([density]))[0])
    return Sample(
        number=row["sample_id"],
        seed=row["seed"],
        density=density,
        percentile=percentile,
        probability=row["acceptance_probability"] if decided else None,
        label=row["label"],
        prompt=row["prompt"],
        thumbnail=row["thumbnail"],
    )


# ---- copies beside their originals -----------------------------------------------------------------------------------


def _pairs(inputs: Inputs, seen: Tally) -> tuple[list[Pair], str]:
    """The likely copies that are nearest, or the nearest of all where none is; and why originals cannot be read."""
    rows = seen.nearest.to_pylist()
    flagged = [row for row in rows if row["likely_copy"]]
    rows = flagged or rows[:NEAREST_SHOWN]
    pictures = _read_rows(inputs.job.samples.uri, [(row["part"], row["row"]) for row in rows])
    wanted = {row["nearest_real_id"] for row in rows}
    originals, note = _originals(inputs.job.recipe.realset.uri, wanted, inputs.settings.source)
    pairs = []
    for row in rows:
        original = originals.get(row["nearest_real_id"], (None, None, None, "the index no longer names it"))
        sample = _sample(pictures[row["part"], row["row"]], inputs, True)
        pairs.append(Pair(sample, row["nearest_real_distance"], row["likely_copy"], *original))
    return pairs, note


def _originals(uri: str, wanted: set[int], beside: str | None) -> tuple[dict[int, Original], str]:
    """Real images by id, from the source that build_index read; and why that cannot be read, or an empty text.

    The report is made all the same where a source has moved: what is missing is said in its place.
    """
    found: dict[int, Original] = {}
    try:
        for name, rows in listing.rows_of_ids(files.join(uri, "listing"), wanted):
            named = rows.select(["sample_id", "key", "label"]).to_pylist()
            for row in named:
                found[row["sample_id"]] = row["key"], row["label"], None, "the source cannot be read any more"
            source = density_originals.source_of(uri, beside)
            features = files.read_table(files.join(uri, "features", name), ["sample_id", "content_hash"])
            hashes = dict(zip(features["sample_id"].to_pylist(), features["content_hash"].to_pylist(), strict=True))
            made = thumbnails.of_originals(source, rows, hashes)
            found |= {row["sample_id"]: (row["key"], row["label"], *_seen(made[row["sample_id"]])) for row in named}
    except (UserError, RunError) as error:
        return found, str(error)
    except Exception as error:
        if not files.is_failure(error):
            raise
        return found, str(files.explain(error, uri))
    return found, ""


def _seen(picture: bytes | BadImage) -> tuple[bytes | None, str]:
    """The thumbnail of an original, or why there is none."""
    if not isinstance(picture, BadImage):
        return picture, ""
    changed = picture.detail == thumbnails.CHANGED
    return None, thumbnails.CHANGED if changed else f"can no longer be read: {picture}"


# ---- facts -----------------------------------------------------------------------------------------------------------


def _facts(inputs: Inputs) -> dict[str, list[tuple[str, str]]]:
    recipe, totals = inputs.job.recipe, inputs.sampled.totals
    real = recipe.realset
    given = recipe.generator.model_dump(mode="json", exclude_defaults=True)
    generator = {"kind": recipe.generator.kind} | given | dict(recipe.generator_identity)
    made = totals.get("actor_s_per_candidate")
    return {
        "Generator": [(name, _text(value)) for name, value in generator.items()]
        + [("run seed", str(recipe.seed)), ("candidates of one batch", f"{recipe.chunk:,}")]
        + ([] if made is None else [("seconds of one process per candidate", page.number(made))]),
        "Real set": [
            ("index", real.uri),
            ("images", f"{real.rows:,}"),
            ("extractor", real.extractor.model),
            ("neighbors k", str(real.k)),
            ("sharpness n", page.number(real.volume_dim)),
        ],
    }


def _text(value: Any) -> str:
    return page.shorten(value if isinstance(value, str) else artifacts.canonical(value), 120)


# ---- the page --------------------------------------------------------------------------------------------------------


def drawn(data: SamplesData) -> dict[str, bytes]:
    """Files of the report by name. The same data gives the same bytes."""
    shown = generate_figures.steps(data.quantiles, data.generated, data.accepted, data.span)
    tenths = generate_figures.tenths(data.quantiles, data.generated, data.accepted, data.accepted_by_index)
    named = [("label", data.labels), ("prompt", data.prompts)]
    context = {
        "d": data,
        "axis": {"low": float(shown.edges[0]), "high": float(shown.edges[-1]), "log": shown.log},
        "tenths": tenths,
        "threshold": dict(thresholds(data)),
        "weights": data.weights[:MAX_WEIGHTS_SHOWN],
        "counts": [(what, counts, counts_shown(counts)) for what, counts in named if counts],
        "snippets": _snippets(data),
    }
    drawings: dict[str, figures.Drawing] = {
        "sample_densities": functools.partial(generate_figures.histogram_png, shown, thresholds(data)),
        "acceptance": functools.partial(generate_figures.acceptance_png, data.parts, data.expected),
        "predictor_on_generated": functools.partial(figures.calibration_png, data.pilot_calibration),
    }
    if data.accepted_calibration is not None:
        drawings["predictor_on_accepted"] = functools.partial(figures.calibration_png, data.accepted_calibration)
    return figures.page_files("samples.html.j2", context, drawings)


def thresholds(data: SamplesData) -> list[tuple[str, float]]:
    """(as the user wrote it, τ) of a two-level weighting that is the same for all."""
    if data.weighting["kind"] != "two_level" or data.weighting["per_label"]:
        return []
    tau = data.weights[0].high
    assert tau is not None
    return [(str(data.weighting["threshold"]), tau)]


def counts_shown(counts: Sequence[Count]) -> list[Count]:
    """Most accepted first; where there are more than fit, those of most and of fewest."""
    ordered = sorted(counts, key=lambda count: (-count.rows, count.name))
    half = MAX_COUNTS_SHOWN // 2
    return ordered if len(ordered) <= MAX_COUNTS_SHOWN else [*ordered[:half], *ordered[-half:]]


def _snippets(data: SamplesData) -> dict[str, str]:
    """Code that reads the samples; records lie beside the tables, and the path may hold `name=value`."""
    folder = data.output.rstrip("/") + "/samples"
    return {
        "pandas": f"""\
import io

import fsspec
import pandas as pd
from PIL import Image

fs, folder = fsspec.url_to_fs({folder!r})
files = sorted(path for path in fs.ls(folder, detail=False) if path.endswith(".parquet"))
samples = pd.read_parquet(files, filesystem=fs, partitioning=None)  # columns=[...] leaves the images out
image = Image.open(io.BytesIO(samples["image"][0]["bytes"]))

# what the generator would have without the selection: each row counts 1/a times
weight = 1 / samples["acceptance_probability"]
mean_density = (weight * samples["density"]).sum() / weight.sum()
""",
        "datasets": f"""\
from datasets import load_dataset

samples = load_dataset("parquet", data_files={folder + "/*.parquet"!r}, split="train")
image = samples[0]["image"]  # a PIL image
""",
        "ray": f"""\
import ray

samples = ray.data.read_parquet({folder!r}, partitioning=None)
for batch in samples.iter_batches(batch_size=64):
    pictures = [image["bytes"] for image in batch["image"]]  # PNG
""",
    }
