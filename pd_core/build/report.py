"""The report stage: gather what the report shows from the committed artifacts and the source's images."""

from __future__ import annotations

import datetime
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pd_core.build import page as build_page
from pd_core.core import artifacts, files, seeds
from pd_core.core.settings.index import BuildIndexSettings
from pd_core.core.settings.load import to_yaml
from pd_core.density import estimator as density_estimator
from pd_core.density import formula
from pd_core.engine import runs as engine_runs
from pd_core.images import listing, sources, thumbnails
from pd_core.index.features import reasons_of
from pd_core.report import page as report_page

SAMPLE_ROWS = 1_000_000  # densities that histogram and label quantiles are drawn from
NEIGHBORS_SHOWN = 8
QUARANTINE_EXAMPLES = 12
LIGHT_COLUMNS = ["sample_id", "key", "label", "mean_knn_distance", "density", "percentile"]


@dataclass(frozen=True)
class Inputs:
    """What the stage reads; picklable."""

    source: sources.Source
    listing: listing.Listing
    settings: BuildIndexSettings
    listed: artifacts.Artifact
    features: artifacts.Artifact
    index: artifacts.Artifact
    densities: artifacts.Artifact
    estimator: artifacts.Artifact
    timings_s: Mapping[str, float]


def stage_of(
    output: str, densities: artifacts.Stage, estimator: artifacts.Stage, settings: BuildIndexSettings
) -> artifacts.Stage:
    """The report stage under `output`."""
    identity = {
        "densities": densities.fingerprint,
        "estimator": estimator.fingerprint,
        "settings": settings.report.model_dump(mode="json"),
    }
    return engine_runs.report_stage(output, identity)


def run(stage: artifacts.Stage, output: str, inputs: Inputs) -> engine_runs.Made:
    """Make the page and its figures; returns the parts and totals to commit."""
    return engine_runs.draw(stage, functools.partial(_draw, output, inputs))


def _draw(output: str, inputs: Inputs) -> engine_runs.Drawn:
    data = _gather(output, inputs)
    return engine_runs.Drawn({**build_page.figures(data), engine_runs.REPORT: build_page.render(data)})


def _gather(output: str, inputs: Inputs) -> build_page.ReportData:
    settings = inputs.settings
    uri = files.join(output, "densities")
    chosen = _choose(uri, inputs)
    pictures = _Pictures(inputs, chosen)
    totals = inputs.densities.totals
    quantiles = np.asarray(totals["density_quantiles"])
    quarantined = reasons_of(inputs.features.parts)
    extractor = inputs.features.totals["extractor"]
    return build_page.ReportData(
        title="Pseudo density",
        source=str(settings.data.source),
        output=output,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        n_images=inputs.densities.rows,
        n_quarantined=sum(quarantined.values()),
        k=totals["k"],
        volume_dim=totals["volume_dim"],
        log_normalizer=totals["log_normalizer"],
        floored_rows=totals["floored_rows"],
        density=chosen.sample["density"].to_numpy(),
        quantiles=quantiles,
        thresholds=[(text, formula.parse_threshold(text).density(quantiles)) for text in settings.report.thresholds],
        index=_index_facts(inputs.index),
        lowest=[pictures.of(row) for row in chosen.lowest],
        highest=[pictures.of(row) for row in chosen.highest],
        neighbors=[(pictures.of(row), pictures.neighbors_of(row)) for row in chosen.shown],
        labels=_labels(chosen),
        calibration=_calibration(output, inputs.estimator),
        quarantine=quarantined,
        quarantine_examples=_examples(output, inputs.features),
        skipped=inputs.listed.totals["skipped"],
        timings_s=inputs.timings_s,
        versions=inputs.densities.versions,
        settings_yaml=to_yaml(settings),
        feature={
            "model": extractor["model"],
            "checkpoint": extractor["checkpoint"] or "timm's hub",
            "precision": extractor["precision"],
            "dimension": str(extractor["feature_dim"]),
            "preprocessing": artifacts.canonical(extractor["preprocess"]),
            "weights sha256": extractor["weights_sha256"],
            "library": extractor["library"],
        },
    )


@dataclass(frozen=True)
class _Chosen:
    """Rows of the densities that the report shows (as dicts), and a sample of all."""

    lowest: list[dict[str, Any]]
    highest: list[dict[str, Any]]
    shown: list[dict[str, Any]]  # with their neighbors
    sample: pa.Table
    label_counts: Mapping[str, int]
    label_sums: Mapping[str, float]


def _choose(uri: str, inputs: Inputs) -> _Chosen:
    """One pass over the densities, holding one part, the extremes and a sample."""
    many = min(inputs.settings.report.images, -(-inputs.densities.rows // 2))  # a small set fills no picture twice
    targets = np.linspace(0, 100, inputs.settings.report.neighbors + 2)[1:-1]
    fraction = SAMPLE_ROWS / max(1, inputs.densities.rows)
    lowest: pa.Table | None = None
    highest: pa.Table | None = None
    nearest: pa.Table | None = None
    sample: list[pa.Table] = []
    counts: dict[str, int] = {}
    sums: dict[str, float] = {}
    for part in inputs.densities.parts:
        table = files.read_table(files.join(uri, part.name), LIGHT_COLUMNS)
        table = table.append_column("part", pa.array([part.name] * table.num_rows))
        lowest = _first(lowest, table, [("density", "ascending"), ("sample_id", "ascending")], many)
        highest = _first(highest, table, [("density", "descending"), ("sample_id", "ascending")], many)
        nearest = _closest(nearest, table, targets)
        keep = seeds.uniform(table["sample_id"].to_numpy(), seed=0) < fraction
        sample.append(table.select(["label", "density"]).filter(pa.array(keep)))
        for group in table.group_by("label").aggregate([("density", "count"), ("density", "sum")]).to_pylist():
            if group["label"] is not None:
                counts[group["label"]] = counts.get(group["label"], 0) + group["density_count"]
                sums[group["label"]] = sums.get(group["label"], 0.0) + group["density_sum"]
    assert lowest is not None and highest is not None and nearest is not None
    shown = [_with_neighbors(uri, row) for row in nearest.to_pylist()]
    return _Chosen(lowest.to_pylist(), highest.to_pylist(), shown, pa.concat_tables(sample), counts, sums)


def _first(best: pa.Table | None, table: pa.Table, order: list[tuple[str, str]], many: int) -> pa.Table:
    both = table if best is None else pa.concat_tables([best, table])
    return both.take(pc.select_k_unstable(both, k=min(many, both.num_rows), sort_keys=order))


def _closest(best: pa.Table | None, table: pa.Table, percentiles: np.ndarray) -> pa.Table:
    """For each wanted percentile the row nearest to it."""
    both = table if best is None else pa.concat_tables([best, table])
    at = np.abs(both["percentile"].to_numpy()[:, None] - percentiles[None]).argmin(axis=0)
    return both.take(pa.array(at))


def _with_neighbors(uri: str, row: dict[str, Any]) -> dict[str, Any]:
    table = files.read_table(files.join(uri, row["part"]), ["sample_id", "neighbor_ids", "neighbor_distances"])
    full = table.filter(pc.equal(table["sample_id"], row["sample_id"])).to_pylist()[0]
    return row | {
        "neighbors": list(zip(full["neighbor_ids"], full["neighbor_distances"], strict=True))[:NEIGHBORS_SHOWN]
    }


class _Pictures:
    """Thumbnails of the chosen rows and their neighbors, each image read once."""

    def __init__(self, inputs: Inputs, chosen: _Chosen) -> None:
        rows = {row["sample_id"]: row for row in [*chosen.lowest, *chosen.highest, *chosen.shown]}
        others = {i for row in chosen.shown for i, _ in row["neighbors"]} - set(rows)
        self.rows: dict[int, dict[str, Any]] = rows | _find_densities(inputs, others)
        self.thumbnails = _thumbnails(inputs, set(self.rows))

    def of(self, row: Mapping[str, Any], distance: float | None = None) -> report_page.Picture:
        """The picture of a densities row."""
        return report_page.Picture(
            key=row["key"],
            label=row["label"],
            density=row["density"],
            percentile=row["percentile"],
            mean_knn_distance=row["mean_knn_distance"],
            thumbnail=self.thumbnails.get(row["sample_id"]),
            distance=distance,
        )

    def neighbors_of(self, row: Mapping[str, Any]) -> list[report_page.Picture]:
        """Pictures of a row's neighbors with their distances."""
        return [self.of(self.rows[i], distance) for i, distance in row["neighbors"] if i in self.rows]


def _find_densities(inputs: Inputs, wanted: Iterable[int]) -> dict[int, dict[str, Any]]:
    """Densities rows by id: one pass over the parts, light columns only."""
    value_set = pa.array(sorted(wanted), pa.int64())
    found: dict[int, dict[str, Any]] = {}
    uri = files.join(str(inputs.settings.output), "densities")
    for part in inputs.densities.parts:
        if len(found) == len(value_set):
            break
        table = files.read_table(files.join(uri, part.name), LIGHT_COLUMNS)
        for row in table.filter(pc.is_in(table["sample_id"], value_set=value_set)).to_pylist():
            found[row["sample_id"]] = row
    return found


def _thumbnails(inputs: Inputs, wanted: set[int]) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    for _, rows in listing.rows_of_ids(inputs.listing.uri, wanted):
        found |= thumbnails.readable(thumbnails.of_originals(inputs.source, rows))
    return found


def _labels(chosen: _Chosen) -> list[report_page.LabelRow]:
    order = pc.sort_indices(chosen.sample, sort_keys=[("label", "ascending")])
    ordered = chosen.sample.take(order)
    ordered = ordered.filter(pc.is_valid(ordered["label"]))
    runs = pc.value_counts(ordered["label"].combine_chunks()).to_pylist()
    ends = np.cumsum([run["counts"] for run in runs]).astype(np.int64)
    densities = ordered["density"].to_numpy()
    rows = []
    for run, end in zip(runs, ends, strict=True):
        label = run["values"]
        p10, p50, p90 = np.percentile(densities[end - run["counts"] : end], [10, 50, 90])
        mean = chosen.label_sums[label] / chosen.label_counts[label]
        rows.append(report_page.LabelRow(label, chosen.label_counts[label], mean, float(p10), float(p50), float(p90)))
    return rows


def _index_facts(index: artifacts.Artifact) -> build_page.IndexFacts:
    totals = index.totals
    exact = totals["nprobe"] == 0
    return build_page.IndexFacts(
        kind=totals["kind"],
        exact=exact,
        shards=totals["shards"],
        cells=totals.get("cells"),
        nprobe=None if exact else totals["nprobe"],
        target_recall=totals.get("target_recall"),
        measured_recall=totals.get("recall"),
        recall_lower=totals.get("recall_lower"),
        distance_error=totals.get("mean_distance_relative_error"),
        calibration_queries=totals.get("calibration_queries"),
    )


def _calibration(output: str, estimator: artifacts.Artifact) -> report_page.Calibration:
    heldout = files.read_table(files.join(output, "estimator", density_estimator.HELDOUT))
    facts = dict(estimator.totals["heldout"])
    return report_page.Calibration(
        log_density=heldout["log_density"].to_numpy(),
        predicted_log_density=heldout["predicted_log_density"].to_numpy(),
        r2=facts.pop("r2_log_density"),
        spearman=facts.pop("spearman"),
        n_holdout=estimator.totals["n_heldout"],
        more=facts,
    )


def _examples(output: str, features: artifacts.Artifact) -> list[tuple[str, str, str]]:
    rows: list[tuple[str, str, str]] = []
    for part in features.parts:
        if len(rows) >= QUARANTINE_EXAMPLES:
            break
        if part.counts:
            table = files.read_table(files.join(output, "quarantine", part.name))
            rows += [(row["key"], row["reason"], row["detail"]) for row in table.to_pylist()]
    return rows[:QUARANTINE_EXAMPLES]
