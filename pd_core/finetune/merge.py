"""The merging stage: the linear combination of saved averages that is best by a metric, found by evolutionary search.

LCSC, Liu et al. 2024 (arXiv 2404.02241): combine the checkpoints of a training as Σ α_k θ_k with Σ α_k = 1, α_k of any
sign, and search α by generating images and measuring them, without gradients. Sizes of the search and the form of its
mutation are ours: it has some dozens of candidates to spend, not the paper's thousands.

What is best among many by one set of seeds looks better on these seeds than it is. So combination and best single step
are judged on seeds that the search has not seen, each image of one against the same seed's of the other.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pd_core.core import artifacts, files, schemas, seeds
from pd_core.core.errors import UserError, one_line
from pd_core.density import formula
from pd_core.engine import console, resources, tasks
from pd_core.evaluate import metrics
from pd_core.evaluate.halfsamples import Estimate
from pd_core.finetune import checkpoints, loop
from pd_core.finetune import judge as finetune_judge
from pd_core.finetune.protocol import Share

if TYPE_CHECKING:
    import torch

SEARCH_STREAM = "finetune/merge"  # of the seeds that candidates are measured on
HOLDOUT_STREAM = "finetune/merge-holdout"
MERGED, CANDIDATES, SAMPLES = "merged.safetensors", "candidates.parquet", "samples.parquet"
GENERATION = 8  # candidates of each generation after the first
PARENTS = 4  # best candidates that the next generation is bred from
KEPT = (0.3, 0.5, 0.7, 0.9)  # decays of the first generation's exponential averages, per checkpoint
SMALLEST_MUTATION = 0.03  # standard deviation of a coefficient
_RECORD = re.compile(r"candidate-(\d+)\.parquet")

Row = Mapping[str, Any]
"""A candidate: number, generation, coefficients and value of `schemas.candidates`; its value is None where it has none.
"""


# ---- the search ------------------------------------------------------------------------------------------------------


def search(
    checkpoints: int, budget: int, seed: int, lower_is_better: bool, measure: Callable[[Sequence[Row]], Sequence[Row]]
) -> list[Row]:
    """All candidates of an evolutionary search, in their order: a function of its seed and of their values.

    Args:
        checkpoints: K, which are combined. budget: candidates in all.
        seed: of crossover and mutation. lower_is_better: of the values.
        measure: gives the candidates of a generation their values.
    """
    rows: list[Row] = []
    while len(rows) < budget:
        generation = rows[-1]["generation"] + 1 if rows else 0
        if rows:
            rng = np.random.default_rng([seed, generation])
            parents = np.array([row["coefficients"] for row in ranked(rows, lower_is_better)[:PARENTS]])
            proposed = np.array([bred(parents, rng) for _ in range(GENERATION)])
        else:
            proposed = first_generation(checkpoints)
        numbered = enumerate(proposed[: budget - len(rows)].tolist(), len(rows))
        rows += measure([{"number": i, "generation": generation, "coefficients": row} for i, row in numbered])
    return rows


def ranked(rows: Sequence[Row], lower_is_better: bool) -> list[Row]:
    """The best first; of equals the first, so that a combination never displaces a single that is as good."""
    sign = 1.0 if lower_is_better else -1.0
    return sorted(rows, key=lambda row: math.inf if row["value"] is None else sign * row["value"])


def first_generation(checkpoints: int) -> np.ndarray:
    """float64 [K + 1 + len(KEPT), K]: each checkpoint alone, their plain mean, and averages that favour the last."""
    age = np.arange(checkpoints)[::-1]
    exponentials = np.stack([decay**age / (decay**age).sum() for decay in KEPT])
    return np.concatenate([np.eye(checkpoints), np.full((1, checkpoints), 1 / checkpoints), exponentials])


def bred(parents: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A child of two of float64 [p, K]: each coefficient somewhere between theirs, plus Gaussian noise; adds up to 1.

    The noise is as wide as the parents are apart, so that steps get small where the search closes in.
    """
    one, other = parents[rng.choice(len(parents), 2, replace=False)]
    mixed = one + rng.random(one.size) * (other - one)
    width = max(float(parents.std(axis=0).mean()), SMALLEST_MUTATION)
    child = mixed + width * rng.standard_normal(one.size)
    return child + (1 - child.sum()) / one.size


def combine(
    averages: Iterable[Mapping[str, torch.Tensor]], coefficients: Sequence[float], single: int
) -> dict[str, torch.Tensor]:
    """Σ α_k θ_k, name by name: added up in float64, given in the dtype that came.

    Memory: the sum in float64, and one of `averages` at a time where these come from a generator.

    Args:
        averages: K weights on the CPU with the same names, shapes and dtypes.
        coefficients: α, [K]. One of 0 leaves no trace, not even of weights that are not finite.
        single: place of those that counters, masks and whatever else is not floating point are taken from.

    Raises:
        ValueError: weights that do not fit each other.
    """
    import torch

    kinds: dict[str, tuple[torch.Size, torch.dtype]] = {}
    total: dict[str, torch.Tensor] = {}
    for place, (weights, alpha) in enumerate(zip(averages, coefficients, strict=True)):
        found = {name: (tensor.shape, tensor.dtype) for name, tensor in weights.items()}
        kinds = kinds or found
        if found != kinds:
            raise ValueError(f"weights {place} have other names, shapes or dtypes than weights 0")
        for name, tensor in weights.items():
            if tensor.is_floating_point():
                if name not in total:
                    total[name] = torch.zeros(tensor.shape, dtype=torch.float64)
                if alpha != 0:
                    total[name].add_(tensor.double(), alpha=float(alpha))
            elif place == single:
                total[name] = tensor.clone()
    return {name: total[name].to(dtype) for name, (_, dtype) in kinds.items()}


# ---- the stage -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """The stage; picklable.

    Attributes:
        stage: where it goes. training: whose averages are merged.
        steps: of the averages, ascending. single: place of the best one among them.
    """

    stage: artifacts.Stage
    training: loop.Job
    steps: tuple[int, ...]
    single: int

    @property
    def metric(self) -> str:
        """That is searched by."""
        return self.training.settings.evaluation.metric

    def weights(self, coefficients: np.ndarray) -> dict[str, torch.Tensor]:
        """The combination; checkpoints that have no part in it are not read."""
        used = [k for k, alpha in enumerate(coefficients) if alpha != 0 or k == self.single]
        names = (checkpoints.average_name(self.steps[place]) for place in used)
        averages = (checkpoints.read_weights(files.join(self.training.stage.uri, name)) for name in names)
        return combine(averages, coefficients[used].tolist(), used.index(self.single))


def job_of(output: str, training: loop.Job, trained: artifacts.Artifact, device: str) -> Job:
    """The stage under `output` of a finished training stage, whose fingerprint covers model, real set and metrics.

    Raises:
        UserError: there is nothing to combine, or the candidates do not suffice to try each average alone and a
            mixture.
    """
    steps = tuple(checkpoints.by_step((part.name for part in trained.parts), "average"))
    settings, plan = training.settings, training.plan
    if len(steps) < 2:
        raise UserError("--merge best-of: the training saved one average only; lower --evaluation.every")
    if settings.merge_candidates <= len(steps):
        raise UserError(
            f"--merge_candidates {settings.merge_candidates}: the training saved {len(steps)} averages, each of which "
            f"is tried alone before any mixture; give {len(steps) + len(KEPT) + 1 + GENERATION} or more, or raise "
            "--evaluation.every"
        )
    single = steps.index(trained.totals["best"])
    identity = {
        "training": trained.fingerprint,
        "averages": [checkpoints.average_name(step) for step in steps],
        "single": single,
        "plan": asdict(plan) | {"spec": plan.spec.identity(), "classes": list(plan.classes.values())},
        "metric": settings.evaluation.metric,
        "candidates": settings.merge_candidates,
        "seed": settings.seed,
        "threads": settings.worker_cpus,
        "device": device,
    }
    stage = artifacts.Stage(files.join(output, "merging"), "merging", schemas.VERSIONS["merging"], identity)
    return Job(stage, training, steps, single)


def run(
    job: Job, now: resources.Cluster, reference: Any, gpus: float | None
) -> tuple[list[artifacts.Part], dict[str, Any]]:
    """Make what is missing; returns the parts and totals to commit.

    Args:
        job: the stage. It is made by as many processes as trained; no number depends on them.
        now: the cluster.
        reference: the real side, a metrics.Reference or an ObjectRef of one.
        gpus: of each process, None: 1 where there are any.

    Raises:
        UserError: of the model or the extractor; or images of the best single step, or on held-out seeds of the
            combination, cannot be measured.
    """
    import ray

    settings, totals = job.training.settings, {}
    _, count, cpus, per_gpu = resources.actor_pool(
        now, settings.workers, settings.worker_cpus, gpus, settings.merge_candidates
    )
    actor = ray.remote(_Judge).options(num_cpus=cpus, num_gpus=per_gpu, **tasks.ACTOR_OPTIONS)

    def execute() -> None:
        judges: list[Any] = [actor.remote(job, reference) for _ in range(count)]
        try:
            tasks.wait_for(judges, "merging")
            totals.update(_merge(job, judges))
        finally:
            for judge in judges:
                ray.kill(judge)

    tasks.persist("merging", execute, lambda: len(job.stage.finished_parts()))
    done = job.stage.finished_parts()
    return [done[name] for name in (MERGED, CANDIDATES, SAMPLES)], totals


def _merge(job: Job, judges: Sequence[Any]) -> dict[str, Any]:
    """Search, save and judge; the totals."""
    rows = _search(job, judges)
    best, single = ranked(rows, job.metric in finetune_judge.LOWER_IS_BETTER)[0], np.eye(len(job.steps))[job.single]
    merged, first, last = np.array(best["coefficients"]), judges[0], judges[-1]
    tasks.get(first.save.remote(merged))
    totals = tasks.get(first.judge.remote(first.held_out.remote(merged), last.held_out.remote(single)))
    return totals | {
        "metric": job.metric,
        "coefficients": best["coefficients"],
        "steps": list(job.steps),
        "single_step": job.steps[job.single],
        "candidates": len(rows),
        "unmeasured": sum(row["value"] is None for row in rows),
        "search": {"merged": best["value"], "single": rows[job.single]["value"]},
    }


def _search(job: Job, judges: Sequence[Any]) -> list[Row]:
    """All candidates: those that an earlier run has recorded, and the others measured now; as one table, which from
    then on stands for their records.
    """
    settings, stage, done = job.training.settings, job.stage, job.stage.finished_parts()
    names = [CANDIDATES] if CANDIDATES in done else list(filter(_RECORD.fullmatch, done))
    recorded = [row for name in names for row in files.read_table(files.join(stage.uri, name)).to_pylist()]
    known = {row["number"]: row["value"] for row in recorded}
    with console.progress("merging", settings.merge_candidates, "combinations", len(known)) as bar:

        def measure(rows: Sequence[Row]) -> list[Row]:
            missing = (row for row in rows if row["number"] not in known)
            submit = lambda row: judges[row["number"] % len(judges)].measure.remote(row)  # noqa: E731
            for row, value in tasks.bounded(submit, missing, lambda: len(judges)):
                known[row["number"]] = value
                bar.update()
            return [{**row, "value": known[row["number"]]} for row in rows]

        seed, lower = seeds.stream(settings.seed, "finetune/merge-search"), job.metric in finetune_judge.LOWER_IS_BETTER
        rows = search(len(job.steps), settings.merge_candidates, seed, lower, measure)
    stage.write_table(CANDIDATES, pa.Table.from_pylist(rows, schema=schemas.candidates()))
    for name in filter(_RECORD.fullmatch, stage.finished_parts()):
        stage.drop_part(name)
    return rows


class _Judge:
    """Ray actor: combinations to images to numbers."""

    def __init__(self, job: Job, reference: metrics.Reference) -> None:
        self.job, self.reference = job, reference
        self.device, self.threads = resources.assigned_device(), job.training.settings.worker_cpus
        self.model = job.training.model.open(Share(0, 1, self.device, self.threads))
        self.scorer = job.training.model.scorer(self.device, self.threads)

    def ready(self) -> None:
        """Answers when the models are loaded."""

    def measure(self, row: Row) -> float | None:
        """The metric of a candidate on the search's seeds, also as a record in the stage."""
        value: float | None = None
        try:
            found = [self._features(np.array(row["coefficients"]), SEARCH_STREAM)]
            value = finetune_judge.measure(self.reference, found, self.threads, self.device)[self.job.metric].value
        except ValueError as error:  # weights beyond those that were trained may give images that are not finite
            if row["number"] == self.job.single:
                raise _explained(f"step {self.job.steps[self.job.single]}", error) from error
        value = None if value is None or not math.isfinite(value) else float(value)
        table = pa.Table.from_pylist([{**row, "value": value}], schema=schemas.candidates())
        self.job.stage.write_table(f"candidate-{row['number']:04d}.parquet", table)
        return value

    def _features(self, coefficients: np.ndarray, stream: str) -> np.ndarray:
        """float32 [n, D] of a combination's images from the seeds of a stream."""
        plan = replace(self.job.training.plan, stream=stream)
        sampler = self.model.sampler(self.job.weights(coefficients))
        images = (finetune_judge.generate(plan, sampler, chunk, self.device) for chunk in range(plan.chunks))
        return np.concatenate([finetune_judge.features_of(self.scorer, batch) for batch in images])

    def held_out(self, coefficients: np.ndarray) -> np.ndarray:
        """Features float32 [n, D] of a combination's images from seeds that the search has not seen."""
        try:
            return self._features(coefficients, HOLDOUT_STREAM)
        except ValueError as error:
            raise _explained("the combination, on held-out seeds,", error) from error

    def judge(self, merged: np.ndarray, single: np.ndarray) -> dict[str, Any]:
        """Metrics of both, float32 [n, D] each, and whether the one beats the other beyond doubt."""
        rows = np.arange(len(merged))
        one, other = (
            metrics.evaluate(self.reference, features, rows, threads=self.threads, device=self.device)
            for features in (merged, single)
        )
        difference = metrics.difference(one, other, self.job.metric)
        return {
            "merged": {name: asdict(estimate) for name, estimate in one.estimates.items()},
            "single": {name: asdict(estimate) for name, estimate in other.estimates.items()},
            "difference": asdict(difference),
            "beats": beats(difference, self.job.metric),
            "n_real": one.n_real,
            "n_generated": one.n_generated,
        }

    def save(self, coefficients: np.ndarray) -> None:
        """The combined weights, and images from them from the seeds of the images that the training stage shows."""
        weights, plan, many = self.job.weights(coefficients), self.job.training.plan, self.job.training.settings.images
        self.job.stage.write_part(MERGED, checkpoints.to_safetensors(weights), 0)
        images = finetune_judge.generate(plan, self.model.sampler(weights), 0, self.device)
        features = self.scorer.features(images.to(self.scorer.extractor.device))
        densities = formula.density_of(self.scorer.log_density(features).cpu().numpy())
        self.job.stage.write_table(SAMPLES, finetune_judge.samples(plan, images[:many], densities[:many]))


def _explained(what: str, error: ValueError) -> UserError:
    return UserError(f"merging: images of {what} cannot be measured ({one_line(error)}); run again with --merge none")


def beats(difference: Estimate, metric: str) -> bool:
    """Whether an interval of a difference lies on the good side of 0; without interval there is nothing to go by."""
    if difference.low is None or difference.high is None:
        return False
    return bool(difference.high < 0 if metric in finetune_judge.LOWER_IS_BETTER else difference.low > 0)
