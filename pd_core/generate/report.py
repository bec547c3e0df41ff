"""The report stage of generate: gather what its page shows from the samples, the pilot and the real images' source."""

from __future__ import annotations

import datetime
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pd_core.core import artifacts, files, seeds
from pd_core.core.errors import RunError, UserError
from pd_core.core.settings.generate import GenerateSettings
from pd_core.core.settings.load import to_yaml
from pd_core.density import originals as density_originals
from pd_core.density import weighting as density_weighting
from pd_core.engine import runs
from pd_core.generate import page as generate_page
from pd_core.generate import pilot as generate_pilot
from pd_core.generate import sampling
from pd_core.generate.candidates import Recipe
from pd_core.generate.page import Count, Pair, Sample, SamplesData, Weight
from pd_core.generate.sampling import DENSITY_BINS
from pd_core.images import listing, thumbnails
from pd_core.images.decode import BadImage
from pd_core.report import page

SAMPLE_ROWS = 1_000_000  # accepted rows that the shown ones are chosen from
CALIBRATION_ROWS = 20_000  # accepted rows that the predictor is held against the index on
PAIRS_SHOWN = 12
Original = tuple[str | None, str | None, bytes | None, str]  # key, label, thumbnail, why there is none
NEAREST_SHOWN = 4  # pairs where no sample is a likely copy
BANDS = {
    "p0–p5": (0, 5),
    "around p25": (22.5, 27.5),
    "median": (47.5, 52.5),
    "around p75": (72.5, 77.5),
    "p95–p100": (95, 100),
}

LIGHT = ["sample_id", "density", "density_predicted", "density_index", "percentile", "acceptance_probability"]
LIGHT += ["label", "prompt", "nearest_real_id", "nearest_real_distance", "likely_copy"]
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
    return runs.Drawn({**generate_page.figures(data), runs.REPORT: generate_page.render(data)}, totals=totals)


def gather(inputs: Inputs) -> SamplesData:
    """All that the page shows: two passes over the parts, the second for the images of a few rows."""
    job, settings, expected = inputs.job, inputs.settings, inputs.expected
    recipe, totals, pilot = job.recipe, inputs.sampled.totals, inputs.pilot
    seen = _look_through(inputs)
    shown = _choose(seen, settings.images)
    pairs, originals_note = _pairs(inputs, seen)
    pilot_densities = pilot.densities(settings.score)
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
        expected=generate_page.Expected(
            expected.rate, expected.low, expected.high, expected.above, pilot.rows, int(pilot.copies.sum())
        ),
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


# ---- one pass over the samples ---------------------------------------------------------------------------------------


@dataclass
class _Seen:
    """What one pass keeps: sums, and tables whose size does not grow with n.

    Attributes:
        bins: accepted in each density bin. index_bins: by their index-scored densities.
        rows: part, row, density of a sample of the accepted. nearest: those nearest to real images.
        scored: (index-scored, predicted) densities of a sample of the accepted.
        tallies: rows and summed density by name, for label and prompt.
    """

    bins: np.ndarray
    index_bins: np.ndarray
    rows: pa.Table
    nearest: pa.Table
    scored: list[np.ndarray]
    inverse_sum: float = 0.0
    inverse_square_sum: float = 0.0
    tallies: dict[str, dict[str, tuple[int, float]]] = field(default_factory=lambda: {"label": {}, "prompt": {}})

    @property
    def both(self) -> tuple[np.ndarray, np.ndarray]:
        """Index-scored and predicted densities, float64 [M] each."""
        true, predicted = np.concatenate(self.scored, axis=1)
        return true, predicted

    def counts(self, what: str) -> list[Count]:
        """Rows and mean density by label or prompt."""
        return [Count(name, rows, total / rows) for name, (rows, total) in self.tallies[what].items()]

    def tally(self, what: str, table: pa.Table) -> None:
        """Add a part's labels or prompts."""
        tallied = self.tallies[what]
        for group in table.group_by(what).aggregate([("density", "count"), ("density", "sum")]).to_pylist():
            if (name := group[what]) is not None:
                rows, total = tallied.get(name, (0, 0.0))
                tallied[name] = rows + group["density_count"], total + group["density_sum"]


def _look_through(inputs: Inputs) -> _Seen:
    """One pass over the light columns, holding one part at a time."""
    real, sampled = inputs.job.recipe.realset, inputs.sampled
    zeros = np.zeros(DENSITY_BINS, np.int64)
    chosen: list[pa.Table] = []
    seen = _Seen(zeros.copy(), zeros.copy(), pa.table({}), pa.table({}), [])
    for part in sampled.parts:
        if not part.rows:
            continue
        table = files.read_table(files.join(inputs.job.samples.uri, part.name), LIGHT)
        place = {"part": pa.array([part.name] * table.num_rows), "row": pa.array(np.arange(table.num_rows))}
        table = pa.table({name: table[name] for name in table.column_names} | place)
        seen.bins += _binned(table["percentile"].to_numpy())
        if inputs.settings.score == "both":
            true, predicted = (table[name].to_numpy() for name in ("density_index", "density_predicted"))
            seen.index_bins += _binned(real.percentile(true))
            seen.scored.append(np.stack([true, predicted])[:, _drawn(table, CALIBRATION_ROWS / sampled.rows)])
        inverse = 1.0 / table["acceptance_probability"].to_numpy()
        seen.inverse_sum += float(inverse.sum())
        seen.inverse_square_sum += float((inverse**2).sum())
        seen.nearest = _nearest(seen.nearest, table)
        keep = _drawn(table, SAMPLE_ROWS / sampled.rows)
        chosen.append(table.select(["part", "row", "sample_id", "density"]).filter(pa.array(keep)))
        seen.tally("label", table)
        seen.tally("prompt", table)
    seen.rows = pa.concat_tables(chosen)
    return seen


def _binned(percentile: np.ndarray) -> np.ndarray:
    """Counts int64 [DENSITY_BINS] of percentiles, in the bins that the candidates were counted in."""
    bins = (percentile / 100 * DENSITY_BINS).astype(np.int64).clip(0, DENSITY_BINS - 1)
    return np.bincount(bins, minlength=DENSITY_BINS)


def _drawn(table: pa.Table, fraction: float) -> np.ndarray:
    return seeds.uniform(table["sample_id"].to_numpy(), seeds.stream(0, "report")) < fraction


def _nearest(best: pa.Table, table: pa.Table) -> pa.Table:
    """The rows nearest to a real image, nearest first; a flagged one is at most as far as any that is not."""
    columns = ["part", "row", "sample_id", "nearest_real_id", "nearest_real_distance", "likely_copy"]
    both = table.select(columns) if best.num_rows == 0 else pa.concat_tables([best, table.select(columns)])
    order = [("nearest_real_distance", "ascending"), ("sample_id", "ascending")]
    return both.take(pc.select_k_unstable(both, k=min(PAIRS_SHOWN, both.num_rows), sort_keys=order))


def _span(densities: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(densities, [0.005, 0.995])
    return float(low), float(high)


def _parts(inputs: Inputs) -> list[tuple[int, int]]:
    """(candidates, accepted) of each part; of the last one the candidates up to the n-th accepted."""
    parts = [(part.counts["candidates"], part.rows) for part in inputs.sampled.parts]
    before = sum(candidates for candidates, _ in parts[:-1])
    return [*parts[:-1], (inputs.sampled.totals["candidates"] - before, parts[-1][1])]


def _calibration(agreement: generate_pilot.Agreement) -> page.Calibration:
    found, left_out = agreement.figures, agreement.left_out
    more = {"left out, since ρ underflows to 0": float(left_out)} if left_out else {}
    if found is None:
        return page.Calibration(agreement.true, agreement.predicted, None, None, 0, more)
    tails = [f"{end}_decile_{what}" for end in ("low", "high") for what in ("spearman", "mean_abs_log_error")]
    figures = {name: getattr(found, name) for name in ("r2_density", *tails)}
    r2, spearman = found.r2_log_density, found.spearman
    return page.Calibration(agreement.true, agreement.predicted, r2, spearman, found.n, figures | more)


def _weights(recipe: Recipe) -> Iterator[Weight]:
    sup = density_weighting.supremum(recipe.weightings.values())
    for label, weighting in recipe.weightings.items():
        ends = [None, *weighting.edges, None]
        for low, high, weight in zip(ends, ends[1:], weighting.weights, strict=False):
            yield Weight(label or None, low, high, weight, weight / sup)


# ---- the images that are shown ---------------------------------------------------------------------------------------


def _choose(seen: _Seen, many: int) -> dict[str, list[tuple[str, int]]]:
    """For each band of percentiles of the accepted the (part, row) of its share of `many` images, evenly over the band."""
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


def _pairs(inputs: Inputs, seen: _Seen) -> tuple[list[Pair], str]:
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
