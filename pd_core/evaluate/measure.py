"""The metrics stage: every set against the real one in every space, a part each; tasks on Ray, features never on the driver."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from pd_core.core import artifacts, files, schemas
from pd_core.core.errors import UserError
from pd_core.core.settings.evaluate import MetricSettings
from pd_core.engine import console, resources, tasks
from pd_core.evaluate import metrics, spaces
from pd_core.evaluate.spaces import Features, Rows, Space

MEASURING_CPUS = 8  # of one task at most: its matrix products gain little from more


@dataclass(frozen=True)
class Comparison:
    """One set in one space; picklable.

    Attributes:
        set: name of the set. space: of the features. real, generated: of them. selected_here: see `schemas.metrics`.
    """

    set: str
    space: Space
    real: Features
    generated: Features
    selected_here: bool


@dataclass(frozen=True)
class Job:
    """The stage of metrics, and that of the images' scores beside it.

    Attributes:
        comparisons: part i of both stages is of the i-th.
        n: images of each set. n_real: real images; None: all.
    """

    metrics: artifacts.Stage
    scores: artifacts.Stage
    comparisons: tuple[Comparison, ...]
    settings: MetricSettings
    n: int
    n_real: int | None
    per_label: bool

    def finished(self) -> dict[str, artifacts.Part]:
        """Parts of metrics/ whose scores are there too."""
        beside = self.scores.finished_parts()
        return {name: part for name, part in self.metrics.finished_parts().items() if name in beside}


def job_of(
    output: str,
    comparisons: Iterable[Comparison],
    settings: MetricSettings,
    n: int,
    n_real: int | None,
    per_label: bool,
) -> Job:
    """The stages under `output`."""
    chosen = tuple(comparisons)
    identity = {
        "sets": [
            {
                "set": c.set,
                "space": c.space.name,
                "real": c.real.fingerprint,
                "generated": c.generated.fingerprint,
                "selected_here": c.selected_here,
            }
            for c in chosen
        ],
        "settings": settings.model_dump(),
        "n": n,
        "n_real": n_real,
        "per_label": per_label,
    }
    metrics, scores = (
        artifacts.Stage(files.join(output, kind), kind, schemas.VERSIONS[kind], identity)
        for kind in ("metrics", "scores")
    )
    metrics = replace(metrics, beside=(scores.uri,))
    return Job(metrics, scores, chosen, settings, n, n_real, per_label)


def run(job: Job, now: resources.Cluster) -> tuple[list[artifacts.Part], dict[str, Any]]:
    """Make the missing parts; returns the parts and totals of metrics/ to commit.

    Raises:
        UserError: a set, or the real set, is too small for k, or has a feature that is all zero.
    """
    job.scores.begin(overwrite=True)  # the metrics stage has been begun: what lies here is its, or stale
    done = job.finished()
    missing = [i for i in range(len(job.comparisons)) if artifacts.part_name(i) not in done]
    cpus = measuring_cpus(now)
    task, prepare = measuring_task(_measure_part, now, cpus), measuring_task(_prepare, now, cpus)
    with console.progress("metrics", len(job.comparisons), "sets", len(done)) as bar:
        for space in dict.fromkeys(job.comparisons[i].space.name for i in missing):
            own = [i for i in missing if job.comparisons[i].space.name == space]
            prepared = prepare.remote(job, own[0], cpus)  # once for all sets, and kept where the tasks run

            def submit(i: int, prepared: Any = prepared) -> Any:
                return task.remote(job, i, prepared, cpus)

            for _ in tasks.bounded(submit, own, lambda: in_flight(now, cpus)):
                bar.update()
    scored = job.scores.finished_parts()
    job.scores.commit(scored.values(), {"rows": sum(part.rows for part in scored.values())}, {})
    parts = [job.finished()[artifacts.part_name(i)] for i in range(len(job.comparisons))]
    totals: dict[str, Any] = {}
    for row in read_metrics(job.metrics.uri, parts):
        if row["label"] is None:
            totals.setdefault(row["space"], {}).setdefault(row["set"], {})[row["metric"]] = row["value"]
    return parts, totals


def measuring_cpus(now: resources.Cluster) -> int:
    """Threads, and CPUs claimed, of a task that measures; one beside a GPU, which does the work then."""
    if now.gpus:
        return 1
    return max(1, min(MEASURING_CPUS, resources.cores() if now.local else int(now.node_cpus or 1)))


def in_flight(now: resources.Cluster, cpus: int) -> int:
    """Tasks that measure at once: each holds the features of a set, and all share those of the real images of their node."""
    return max(1, int(now.gpus)) if now.gpus else max(1, int((resources.cores() if now.local else now.cpus) // cpus))


def measuring_task(function: Any, now: resources.Cluster, cpus: int) -> Any:
    """A Ray task that measures: on a GPU where there is one."""
    return tasks.task(function, cpus, 1 if now.gpus else 0)


def read_metrics(uri: str, parts: Iterable[artifacts.Part]) -> list[dict[str, Any]]:
    """Rows of a metrics stage; one for each number, so few."""
    return [row for part in parts for row in files.read_table(files.join(uri, part.name)).to_pylist()]


def _prepare(job: Job, number: int, threads: int) -> tuple[Rows, metrics.Reference]:
    """The real side of the comparison's space; its rows without features, which are in the reference."""
    compared = job.comparisons[number]
    real = spaces.read_rows(compared.real, job.n_real)
    name = f"--real (space {compared.space.name})"
    reference = reference_of(real, job.settings, threads, resources.assigned_device(), name)
    return Rows(real.ids, real.labels, real.keys, real.features[:, :0]), reference


def _measure_part(job: Job, number: int, prepared: tuple[Rows, metrics.Reference], threads: int) -> None:
    compared = job.comparisons[number]
    device = resources.assigned_device()
    light, reference = prepared
    real = Rows(light.ids, light.labels, light.keys, reference.features)
    generated = spaces.read_rows(compared.generated, job.n)
    whole = measured(reference, generated, compared.set, threads, device)
    rows = _rows(compared, None, whole)
    for label in _labels(generated) if job.per_label else ():
        own, of_label = real.of(label), generated.of(label)
        rows += _rows(compared, label, _measured_label(own, of_label, job.settings, threads, device))
    scores = _scores(compared, real, generated, whole.per_sample)
    job.scores.write_table(artifacts.part_name(number), scores)  # first: a part of metrics without it is not finished
    job.metrics.write_table(artifacts.part_name(number), pa.Table.from_pylist(rows, schema=schemas.metrics()))


def reference_of(real: Rows, settings: MetricSettings, threads: int, device: str, name: str) -> metrics.Reference:
    """The real side of many comparisons. Raises UserError where it has too few rows, or a feature that is all zero."""
    _check_directions(real, name)
    try:
        return metrics.prepare(
            real.features, real.ids, settings.k_precision, settings.k_coverage, threads=threads, device=device
        )
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def measured(reference: metrics.Reference, generated: Rows, name: str, threads: int, device: str) -> metrics.Evaluation:
    """A set against the real side. Raises UserError where it has too few rows, or a feature that is all zero."""
    _check_directions(generated, f"--samples {name}")
    try:
        return metrics.evaluate(reference, generated.features, generated.ids, threads=threads, device=device)
    except UserError as error:
        raise UserError(f"--samples {name}: {error}") from None


def _check_directions(rows: Rows, name: str) -> None:
    zero = np.flatnonzero(~rows.features.any(axis=1))
    if len(zero):
        first = rows.keys[zero[0]] or int(rows.ids[zero[0]])
        raise UserError(
            f"{name}: the features of {len(zero)} of {len(rows.ids)} images are all zero, the first is {first!r}: they have no "
            "direction, which the Vendi score needs; leave these images out, or take another extractor"
        )


def _labels(generated: Rows) -> list[str]:
    return sorted({label for label in generated.labels.tolist() if label is not None})


def _measured_label(
    real: Rows, generated: Rows, settings: MetricSettings, threads: int, device: str
) -> metrics.Evaluation | None:
    """None where a side has too few images of the label for k: such a label is not measured, and its numbers are not there."""
    least = max(settings.k_precision, settings.k_coverage) + 1
    if min(len(real.ids), len(generated.ids)) < least:
        return None
    reference = metrics.prepare(
        real.features, real.ids, settings.k_precision, settings.k_coverage, threads=threads, device=device
    )
    return metrics.evaluate(reference, generated.features, generated.ids, threads=threads, device=device)


def neighbors_of(metric: str, settings: MetricSettings) -> int | None:
    """k of a metric, None where it has none."""
    if metric in ("precision", "recall"):
        return settings.k_precision
    return settings.k_coverage if metric in ("density", "coverage") else None


def _rows(compared: Comparison, label: str | None, found: metrics.Evaluation | None) -> list[dict[str, Any]]:
    if found is None:
        return []
    settings = MetricSettings(k_precision=found.k_precision, k_coverage=found.k_coverage)
    return [
        {
            "set": compared.set,
            "space": compared.space.name,
            "extractor": compared.space.extractor,
            "selected_here": compared.selected_here,
            "label": label,
            "metric": name,
            "value": estimate.value,
            "low": estimate.low,
            "high": estimate.high,
            "k": neighbors_of(name, settings),
            "n_real": found.n_real,
            "n_generated": found.n_generated,
        }
        for name, estimate in found.estimates.items()
    ]


def _scores(compared: Comparison, real: Rows, generated: Rows, found: metrics.SampleScores) -> pa.Table:
    many = len(generated.ids)
    columns: Mapping[str, Any] = {
        "set": [compared.set] * many,
        "space": [compared.space.name] * many,
        "sample_id": generated.ids,
        "key": generated.keys.tolist(),
        "label": generated.labels.tolist(),
        "realism": pa.array(
            np.where(np.isfinite(found.realism), found.realism, np.nan), pa.float64(), from_pandas=True
        ),
        "rarity": pa.array(found.rarity, pa.float64(), from_pandas=True),  # NaN, outside the real manifold, is null
        "in_real_manifold": found.in_real_manifold,
        "nearest_real_id": real.ids[found.nearest_real],
        "nearest_real_distance": found.nearest_real_distance.astype(np.float64),
    }
    schema = schemas.scores()
    return pa.table([pa.array(columns[field.name], field.type) for field in schema], schema=schema)
