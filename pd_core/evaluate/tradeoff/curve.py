"""The curve stage: every setting's draw from one pool of scored candidates, measured in every space; a task and a part each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pd_core.core import artifacts, files, schemas, seeds
from pd_core.core.settings.evaluate import MetricSettings
from pd_core.core.settings.generate import WeightingSettings
from pd_core.density import weighting as density_weighting
from pd_core.density.realset import RealSet
from pd_core.density.weighting import Weighting
from pd_core.engine import console, resources, tasks
from pd_core.evaluate import measure, metrics, spaces
from pd_core.evaluate.spaces import Features, Space
from pd_core.evaluate.tradeoff import points
from pd_core.evaluate.tradeoff.points import Setting
from pd_core.index import features

SCORED = ("sample_id", "density_predicted", "density_index", "log_volume")


@dataclass(frozen=True)
class Job:
    """The stage; picklable.

    Attributes:
        settings: part s · len(settings) + i is of setting i in space s.
        real, pool: features of the real images and of the candidates, by space.
        truncated: features of the images of each ψ, by (space, ψ).
        weightings: ω of each setting by its name, but of truncations.
        score: predictor or index, whose density decides. seed: of the run, which gives each candidate its u.
    """

    curve: artifacts.Stage
    settings: tuple[Setting, ...]
    spaces: tuple[Space, ...]
    real: Mapping[str, Features]
    pool: Mapping[str, Features]
    truncated: Mapping[tuple[str, float], Features]
    weightings: Mapping[str, Weighting]
    metrics: MetricSettings
    score: str
    seed: int
    n: int
    n_real: int | None

    def part(self, space: int, setting: int) -> str:
        """Name of a part."""
        return artifacts.part_name(space * len(self.settings) + setting)


def stage_of(
    output: str,
    settings: Sequence[Setting],
    weightings: Mapping[str, Weighting],
    fingerprints: Mapping[str, Any],
    metric_settings: MetricSettings,
    score: str,
    seed: int,
    n: int,
    n_real: int | None,
) -> artifacts.Stage:
    """The curve stage under `output`; fingerprints: of all features that it reads."""
    identity = {
        "settings": [asdict(setting) for setting in settings],
        "weightings": {name: weighting.to_json() for name, weighting in weightings.items()},
        "features": dict(fingerprints),
        "metrics": metric_settings.model_dump(),
        "score": score,
        "seed": seed,
        "n": n,
        "n_real": n_real,
    }
    return artifacts.Stage(files.join(output, "curve"), "curve", schemas.VERSIONS["curve"], identity)


def run(job: Job, now: resources.Cluster) -> tuple[list[artifacts.Part], dict[str, Any]]:
    """Make the missing parts; returns the parts and totals to commit.

    Raises:
        UserError: the real set, or n, is too small for k.
    """
    cpus = measure.measuring_cpus(now)
    task = measure.measuring_task(_measure_part, now, cpus)
    done = job.curve.finished_parts()
    many = len(job.settings)
    with console.progress("curve", many * len(job.spaces), "settings", len(done)) as bar:
        for number in range(len(job.spaces)):
            missing = [i for i in range(many) if job.part(number, i) not in done]
            if not missing:
                continue
            # read once, and kept where the tasks run
            reference = measure.measuring_task(_reference, now, cpus).remote(job, number, cpus)
            pool = tasks.task(read_pool, resources.IO_CPUS).remote(job, number)

            def submit(i: int, number: int = number, reference: Any = reference, pool: Any = pool) -> Any:
                return task.remote(job, number, i, reference, pool, cpus)

            for _ in tasks.bounded(submit, missing, lambda: measure.in_flight(now, cpus)):
                bar.update()
    done = job.curve.finished_parts()
    parts = [done[artifacts.part_name(i)] for i in range(many * len(job.spaces))]
    rows = read_curve(job.curve.uri, parts)
    return parts, {"settings": many, "measured": sum(row["precision"] is not None for row in rows)}


def read_curve(uri: str, parts: Sequence[artifacts.Part]) -> list[dict[str, Any]]:
    """Rows of a curve stage, of its spaces one after the other, with `frontier`: of precision and recall in its space."""
    rows = [row for part in parts for row in files.read_table(files.join(uri, part.name)).to_pylist()]
    for space in {row["space"] for row in rows}:
        own = [row for row in rows if row["space"] == space]
        coordinates = [[np.nan if row[m] is None else row[m] for row in own] for m in ("precision", "recall")]
        for row, best in zip(own, points.frontier(*coordinates).tolist(), strict=True):
            row["frontier"] = best
    return rows


# ---- the pool --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pool:
    """Candidates in their order, in one space.

    Attributes:
        number: int64 [M]. ids: int64 [M], by which features know them. density: float64 [M], that decides.
        log_volume: float64 [M], or None where it was not measured. features: float32 [M, D].
    """

    number: np.ndarray
    ids: np.ndarray
    density: np.ndarray
    log_volume: np.ndarray | None
    features: np.ndarray


def read_pool(job: Job, space: int, light: bool = False) -> Pool:
    """The pool in a space, `light` without its features; runs in a Ray task."""
    featured = job.pool[job.spaces[space].name]
    columns: dict[str, list[np.ndarray]] = {name: [] for name in (*SCORED, "id", "features")}
    for name, _ in featured.parts:
        uri = files.join(featured.uri, name)
        if light:
            table = files.read_table(uri, ["sample_id", schemas.METADATA])
            values = np.empty((table.num_rows, 0), np.float32)
        else:
            table, values = features.load_features(uri)
        for scored in SCORED:
            columns[scored].append(_metadata(table, scored))
        columns["id"].append(table["sample_id"].to_numpy())
        columns["features"].append(values)
    joined = {name: np.concatenate(values) for name, values in columns.items()}
    order = np.argsort(joined["sample_id"], kind="stable")
    volume = joined["log_volume"][order]
    return Pool(
        number=joined["sample_id"][order],
        ids=joined["id"][order],
        density=joined["density_predicted" if job.score == "predictor" else "density_index"][order],
        log_volume=None if np.isnan(volume).all() else volume,
        features=joined["features"][order],
    )


def _metadata(table: pa.Table, name: str) -> np.ndarray:
    column = table[schemas.METADATA].combine_chunks()
    if name not in [field.name for field in column.type]:
        return np.full(table.num_rows, np.nan)
    return pc.struct_field(column, name).to_numpy(zero_copy_only=False)


def weighting_of(setting: Setting, real: RealSet, log_volume: np.ndarray | None, bins: int) -> Weighting:
    """ω of a setting of any method but truncation; see `weighting.resolve`.

    log_volume: of the pilot's candidates, [M], for Polarity Sampling. bins: steps of its weight.

    Raises:
        UserError: the threshold cannot be read, or lies outside the real densities.
    """
    if setting.method == "polarity":
        asked = WeightingSettings(kind="polarity", polarity=setting.polarity, bins=bins)
    elif setting.method == "generator":
        asked = WeightingSettings(kind="none")
    else:
        asked = WeightingSettings(threshold=str(setting.threshold), weight=setting.weight)
    volumes = () if log_volume is None else log_volume
    return density_weighting.resolve(asked, real.density_quantiles, volumes, option="--thresholds")


@dataclass(frozen=True)
class Draw:
    """What a setting takes from the pool.

    Attributes:
        rows: int64 [n] of the pool, in candidate order; fewer where the pool does not give as many.
        candidates: that were looked at up to the last of them. rate: accepted share of all candidates of the pool.
        effective: rows of the pool that the weights are worth, Kish. exact: likewise of Polarity's without steps and cap, else None.
    """

    rows: np.ndarray
    candidates: int
    rate: float
    effective: float
    exact: float | None = None


def draw(setting: Setting, pool: Pool, job: Job) -> Draw:
    """The first n candidates that generate.py would accept with this setting."""
    many, weighting = len(pool.number), job.weightings[setting.name]
    deciding, exact = pool.density, None
    if setting.method == "polarity":
        assert pool.log_volume is not None and setting.polarity is not None, (
            "the pool of a run with polarities has volumes"
        )
        deciding = pool.log_volume
        exact = density_weighting.effective_size(density_weighting.exponential(deciding, setting.polarity))
    u = seeds.uniform(pool.number, seeds.stream(job.seed, "acceptance"))  # candidates_of draws it so
    rows = points.accepted(deciding, u, weighting)
    taken = rows[: job.n]
    looked_at = int(pool.number[taken[-1]]) + 1 if len(rows) >= job.n else many
    effective = density_weighting.effective_size(density_weighting.weight_of(deciding, weighting))
    return Draw(taken, looked_at, len(rows) / many, effective, exact)


# ---- measuring -------------------------------------------------------------------------------------------------------


def _reference(job: Job, space: int, threads: int) -> metrics.Reference:
    name = job.spaces[space].name
    real = spaces.read_rows(job.real[name], job.n_real)
    return measure.reference_of(real, job.metrics, threads, resources.assigned_device(), f"--index (space {name})")


def _measure_part(job: Job, space: int, i: int, reference: metrics.Reference, pool: Pool, threads: int) -> None:
    setting, where = job.settings[i], job.spaces[space]
    row: dict[str, Any] = {
        "space": where.name,
        "extractor": where.extractor,
        "setting": setting.name,
        "curve": setting.curve,
        **asdict(setting),
    }
    if setting.method == "truncation":
        assert setting.truncation is not None
        own = spaces.read_rows(job.truncated[where.name, setting.truncation], job.n)
        found, taken = Draw(np.arange(len(own.ids)), len(own.ids), 1.0, float(len(own.ids))), own
    else:
        found = draw(setting, pool, job)
        nothing = np.full(len(found.rows), None, dtype=object)
        taken = spaces.Rows(pool.ids[found.rows], nothing, nothing, pool.features[found.rows])
    row |= {
        "n": len(taken.ids),
        "n_real": reference.rows,
        "k_precision": reference.k_precision,
        "k_coverage": reference.k_coverage,
        "candidates": found.candidates,
        "acceptance_rate": found.rate,
        "effective_sample_size": found.effective,
        "exact_effective_size": found.exact,
    }
    if len(taken.ids) == job.n:  # a smaller set has other precision and recall for its size alone: it is left out
        measured = measure.measured(reference, taken, setting.name, threads, resources.assigned_device())
        for name in schemas.CURVE_METRICS:
            estimate = measured.estimates[name]
            row |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    job.curve.write_table(job.part(space, i), pa.Table.from_pylist([row], schema=schemas.curve()))
