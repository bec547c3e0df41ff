"""The curve stage: every setting's draw from one pool of candidates, measured in every space; a part each."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pd_core.core import artifacts, files, schemas, seeds
from pd_core.core.settings.evaluate import TradeoffSettings
from pd_core.core.settings.generate import WeightingSettings
from pd_core.density import weighting as density_weighting
from pd_core.density.realset import RealSet
from pd_core.density.weighting import Weighting
from pd_core.engine import resources, tasks
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
        settings: of the run: metrics, n, n_real, the score that decides, the seed that gives each candidate its u.
        swept: part s · len(swept) + i is of setting i in space s.
        real, pool: features of the real images and of the candidates, by space.
        truncated: features of the images of each ψ, by (space, ψ).
        weightings: ω of each setting by its name, but of truncations.
        densities: fingerprint of the densities of the real images.
    """

    output: str
    settings: TradeoffSettings
    swept: tuple[Setting, ...]
    spaces: tuple[Space, ...]
    real: Mapping[str, Features]
    pool: Mapping[str, Features]
    truncated: Mapping[tuple[str, float], Features]
    weightings: Mapping[str, Weighting]
    densities: str

    @functools.cached_property
    def stage(self) -> artifacts.Stage:
        """The curve stage under `output`."""
        settings = self.settings
        features: dict[str, Any] = {
            "real": {space: featured.fingerprint for space, featured in self.real.items()},
            "pool": {space: featured.fingerprint for space, featured in self.pool.items()},
            "truncated": {f"{space} {psi:g}": of.fingerprint for (space, psi), of in self.truncated.items()},
            "densities": self.densities,
        }
        identity = {
            "settings": [asdict(setting) for setting in self.swept],
            "weightings": {name: weighting.to_json() for name, weighting in self.weightings.items()},
            "features": features,
            "metrics": settings.metrics.model_dump(),
            **{name: getattr(settings, name) for name in ("score", "seed", "n", "n_real")},
        }
        return artifacts.Stage(files.join(self.output, "curve"), "curve", schemas.VERSIONS["curve"], identity)


def run(job: Job, now: resources.Cluster) -> tuple[list[artifacts.Part], dict[str, Any]]:
    """Make the missing parts; returns the parts and totals to commit.

    Raises:
        UserError: the real set, or n, is too small for k.
    """
    cpus, many = measure.measuring_cpus(now), len(job.swept)
    task, referring = (measure.measuring_task(function, now, cpus) for function in (_measure_part, _reference))
    reading = tasks.task(read_pool, resources.IO_CPUS)
    done = job.stage.finished_parts()
    for space in range(len(job.spaces)):
        numbers = {artifacts.part_name(space * many + i): i for i in range(many)}
        if numbers.keys() <= done.keys():
            continue
        # once for all settings in a space, and kept where the tasks run; those of one space at a time fit there
        shared = space, referring.remote(job, space, cpus), reading.remote(job, space)
        submit = lambda names, n=numbers, s=shared: task.remote(job, s[0], n[names[0]], *s[1:], cpus)  # noqa: E731
        groups = [[name] for name in numbers]
        tasks.make_missing(job.stage, groups, submit, lambda: measure.in_flight(now, cpus), unit="settings")
    done = job.stage.finished_parts()
    parts = [done[artifacts.part_name(i)] for i in range(many * len(job.spaces))]
    rows = read_curve(job.stage.uri, parts)
    return parts, {"settings": many, "measured": sum(row["precision"] is not None for row in rows)}


def read_curve(uri: str, parts: Sequence[artifacts.Part]) -> list[dict[str, Any]]:
    """Rows of a curve stage, space by space, with `frontier`: of precision and recall in the row's space."""
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
        density=joined["density_predicted" if job.settings.score == "predictor" else "density_index"][order],
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
        effective: rows of the pool that the weights are worth, Kish.
        exact: likewise of Polarity's without steps and cap, else None.
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
        assert pool.log_volume is not None and setting.polarity is not None, "the pool of a run with polarities"
        deciding = pool.log_volume
        exact = density_weighting.effective_size(density_weighting.exponential(deciding, setting.polarity))
    u = seeds.uniform(pool.number, seeds.stream(job.settings.seed, "acceptance"))  # candidates_of draws it so
    rows = points.accepted(deciding, u, weighting)
    taken = rows[: job.settings.n]
    looked_at = int(pool.number[taken[-1]]) + 1 if len(rows) >= job.settings.n else many
    effective = density_weighting.effective_size(density_weighting.weight_of(deciding, weighting))
    return Draw(taken, looked_at, len(rows) / many, effective, exact)


# ---- measuring -------------------------------------------------------------------------------------------------------


def _reference(job: Job, space: int, threads: int) -> metrics.Reference:
    name = job.spaces[space].name
    real, device = spaces.read_rows(job.real[name], job.settings.n_real), resources.assigned_device()
    return measure.reference_of(real, job.settings.metrics, threads, device, f"--index (space {name})")


def _measure_part(job: Job, space: int, i: int, reference: metrics.Reference, pool: Pool, threads: int) -> None:
    setting, where, n = job.swept[i], job.spaces[space], job.settings.n
    if setting.method == "truncation":
        assert setting.truncation is not None
        taken = spaces.read_rows(job.truncated[where.name, setting.truncation], n)
        many = len(taken.ids)
        found = Draw(np.arange(many), many, 1.0, float(many))
    else:
        found = draw(setting, pool, job)
        nothing = np.full(len(found.rows), None, dtype=object)
        taken = spaces.Rows(pool.ids[found.rows], nothing, nothing, pool.features[found.rows])
    row: dict[str, Any] = {
        "space": where.name,
        "extractor": where.extractor,
        "setting": setting.name,
        "curve": setting.curve,
        **asdict(setting),
        "n": len(taken.ids),
        "n_real": reference.rows,
        "k_precision": reference.k_precision,
        "k_coverage": reference.k_coverage,
        "candidates": found.candidates,
        "acceptance_rate": found.rate,
        "effective_sample_size": found.effective,
        "exact_effective_size": found.exact,
    }
    if len(taken.ids) == n:  # a smaller set has other precision and recall for its size alone: it is left out
        measured = measure.measured(reference, taken, setting.name, threads, resources.assigned_device())
        for name in schemas.CURVE_METRICS:
            estimate = measured.estimates[name]
            row |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    name = artifacts.part_name(space * len(job.swept) + i)
    job.stage.write_table(name, pa.Table.from_pylist([row], schema=schemas.curve()))
