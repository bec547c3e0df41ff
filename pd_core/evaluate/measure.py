"""The metrics stage: every set against the real one in every space, a part each; no features are on the driver."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pd_core.core import artifacts, files, schemas
from pd_core.core.errors import UserError
from pd_core.core.settings.evaluate import MetricSettings
from pd_core.engine import resources, tasks
from pd_core.evaluate import metrics, spaces
from pd_core.evaluate.manifold import Answers
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
    scores = artifacts.Stage(files.join(output, "scores"), "scores", schemas.VERSIONS["scores"], identity)
    uri, beside = files.join(output, "metrics"), (scores.uri,)
    metrics = artifacts.Stage(uri, "metrics", schemas.VERSIONS["metrics"], identity, beside)
    return Job(metrics, scores, chosen, settings, n, n_real, per_label)


def run(job: Job, now: resources.Cluster) -> tuple[list[artifacts.Part], dict[str, Any]]:
    """Make the missing parts; returns the parts and totals of metrics/ to commit.

    Raises:
        UserError: a set, or the real set, is too small for k, or has a feature that is all zero.
    """
    job.scores.begin(overwrite=True)  # the metrics stage has been begun: what lies here is its, or stale
    for name in job.metrics.finished_parts().keys() - job.scores.finished_parts().keys():
        job.metrics.drop_part(name)  # its scores, which were written first, are lost
    cpus = measuring_cpus(now)
    task, preparing = measuring_task(_measure_part, now, cpus), measuring_task(_prepare, now, cpus)
    done = job.metrics.finished_parts()
    for space in dict.fromkeys(comparison.space.name for comparison in job.comparisons):
        numbers = {artifacts.part_name(i): i for i, other in enumerate(job.comparisons) if other.space.name == space}
        if numbers.keys() <= done.keys():
            continue
        # once for all sets of a space, and kept where the tasks run; those of one space at a time fit there
        prepared = preparing.remote(job, space, cpus)
        submit = lambda names, n=numbers, p=prepared: task.remote(job, n[names[0]], p, cpus)  # noqa: E731
        tasks.make_missing(job.metrics, [[n] for n in numbers], submit, lambda: in_flight(now, cpus), unit="sets")
    done = job.metrics.finished_parts()
    parts = [done[artifacts.part_name(i)] for i in range(len(job.comparisons))]
    scored = job.scores.finished_parts()
    job.scores.commit(scored.values(), {"rows": sum(part.rows for part in scored.values())}, {})
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
    """Tasks that measure at once: each holds the features of a set; those of a node share the real images' features."""
    return max(1, int(now.gpus)) if now.gpus else max(1, int((resources.cores() if now.local else now.cpus) // cpus))


def measuring_task(function: Any, now: resources.Cluster, cpus: int) -> Any:
    """A Ray task that measures: on a GPU where there is one."""
    return tasks.task(function, cpus, 1 if now.gpus else 0)


def read_metrics(uri: str, parts: Iterable[artifacts.Part]) -> list[dict[str, Any]]:
    """Rows of a metrics stage; one for each number, so few."""
    return [row for part in parts for row in files.read_table(files.join(uri, part.name)).to_pylist()]


def _prepare(job: Job, space: str, threads: int) -> tuple[Rows, metrics.Reference]:
    """The real side of a space; its rows without features, which are in the reference."""
    featured = next(c.real for c in job.comparisons if c.space.name == space)
    real = spaces.read_rows(featured, job.n_real)
    device = resources.assigned_device()
    reference = reference_of(real, job.settings, threads, device, f"--real (space {space})")
    return Rows(real.ids, real.labels, real.keys, real.features[:, :0]), reference


def _measure_part(job: Job, number: int, prepared: tuple[Rows, metrics.Reference], threads: int) -> None:
    compared, settings, device = job.comparisons[number], job.settings, resources.assigned_device()
    light, reference = prepared
    real = Rows(light.ids, light.labels, light.keys, reference.features)
    generated = spaces.read_rows(compared.generated, job.n)
    whole = measured(reference, generated, compared.set, threads, device)
    rows = _rows(compared, None, whole, settings)
    for label in sorted(set(generated.labels) - {None}) if job.per_label else ():
        own, of_label = real.of(label), generated.of(label)
        if min(len(own.ids), len(of_label.ids)) > max(settings.k_precision, settings.k_coverage):  # else no numbers
            of = metrics.prepare(own.features, own.ids, settings.k_precision, settings.k_coverage, threads, device)
            found = metrics.evaluate(of, of_label.features, of_label.ids, threads, device)
            rows += _rows(compared, label, found, settings)
    scores = _scores(compared, real, generated, whole.answers)
    job.scores.write_table(artifacts.part_name(number), scores)  # first: a part of metrics without it is not finished
    job.metrics.write_table(artifacts.part_name(number), pa.Table.from_pylist(rows, schema=schemas.metrics()))


def reference_of(real: Rows, settings: MetricSettings, threads: int, device: str, name: str) -> metrics.Reference:
    """The real side of many comparisons. Raises UserError where it has too few rows, or a feature that is all zero."""
    with _named(name, real):
        return metrics.prepare(real.features, real.ids, settings.k_precision, settings.k_coverage, threads, device)


def measured(reference: metrics.Reference, generated: Rows, name: str, threads: int, device: str) -> metrics.Evaluation:
    """A set against the real side. Raises UserError where it has too few rows, or a feature that is all zero."""
    with _named(f"--samples {name}", generated):
        return metrics.evaluate(reference, generated.features, generated.ids, threads, device)


@contextlib.contextmanager
def _named(name: str, rows: Rows) -> Iterator[None]:
    """A refusal of these rows begins with their name; the first without a direction is named by its key."""
    zero = np.flatnonzero(~rows.features.any(axis=1))
    if len(zero):
        first = rows.keys[zero[0]] or int(rows.ids[zero[0]])
        raise UserError(
            f"{name}: the features of {len(zero)} of {len(rows.ids)} images are all zero, the first is {first!r}: they "
            "have no direction, which the Vendi score needs; leave these images out, or take another extractor"
        )
    try:
        yield
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def neighbors_of(metric: str, settings: MetricSettings) -> int | None:
    """k of a metric, None where it has none."""
    if metric in ("precision", "recall"):
        return settings.k_precision
    return settings.k_coverage if metric in ("density", "coverage") else None


def _rows(
    compared: Comparison, label: str | None, found: metrics.Evaluation, settings: MetricSettings
) -> list[dict[str, Any]]:
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


def _scores(compared: Comparison, real: Rows, generated: Rows, found: Answers) -> pa.Table:
    many = len(generated.ids)
    finite = lambda values: pa.array(np.where(np.isfinite(values), values, np.nan), from_pandas=True)  # noqa: E731
    columns: Mapping[str, Any] = {
        "set": [compared.set] * many,
        "space": [compared.space.name] * many,
        "sample_id": generated.ids,
        "key": generated.keys.tolist(),
        "label": generated.labels.tolist(),
        "realism": finite(found.realism),  # of a copy null
        "rarity": finite(found.rarity),  # outside the real manifold null
        "in_real_manifold": np.isfinite(found.rarity),
        "nearest_real_id": real.ids[found.nearest],
        "nearest_real_distance": found.nearest_distance.astype(np.float64),
    }
    schema = schemas.scores()
    return pa.table([pa.array(columns[field.name], field.type) for field in schema], schema=schema)
