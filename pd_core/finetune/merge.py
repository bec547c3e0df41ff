"""The merging stage: the linear combination of saved averages that is best by a metric, found by evolutionary search.

LCSC, Liu et al. 2024 (arXiv 2404.02241): combine the checkpoints of a training as Σ α_k θ_k with Σ α_k = 1, α_k of any sign,
and search α by generating images and measuring them, without gradients. Sizes of the search and the form of its mutation are
ours: it has some dozens of candidates to spend, not the paper's thousands.

What is best among many by one set of seeds looks better on these seeds than it is. So combination and best single step are
judged on seeds that the search has not seen, each image of one against the same seed's of the other.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pd_core.core import artifacts, files, schemas, seeds
from pd_core.core.errors import UserError, one_line
from pd_core.density import formula
from pd_core.engine import console, resources, tasks
from pd_core.evaluate import metrics
from pd_core.evaluate.halfsamples import Estimate
from pd_core.finetune import checkpoints
from pd_core.finetune import judge as finetune_judge
from pd_core.finetune.judge import Plan
from pd_core.generate.candidates import picture

if TYPE_CHECKING:
    import torch

SEARCH_STREAM, HOLDOUT_STREAM = (
    "finetune/merge",
    "finetune/merge-holdout",
)  # of the seeds that candidates are measured on
MERGED, CANDIDATES, SAMPLES = "merged.safetensors", "candidates.parquet", "samples.parquet"
GENERATION = 8  # candidates of each generation after the first
PARENTS = 4  # best candidates that the next generation is bred from
KEPT = (0.3, 0.5, 0.7, 0.9)  # decays of the first generation's exponential averages, per checkpoint
SMALLEST_MUTATION = 0.03  # standard deviation of a coefficient
_RECORD = re.compile(r"candidate-(\d+)\.parquet")


# ---- the search ------------------------------------------------------------------------------------------------------


@dataclass
class Search:
    """Evolutionary search over coefficients, told nothing but values. A generation is a function of the seed and of the values before it.

    Attributes:
        checkpoints: K, which are combined. budget: candidates in all.
        seed: of crossover and mutation. lower_is_better: of the values.
        coefficients: of the candidates told so far, float64 [K] each. values: theirs, None where a candidate has none.
        generations: number of each candidate's generation.
    """

    checkpoints: int
    budget: int
    seed: int
    lower_is_better: bool
    coefficients: list[np.ndarray] = field(default_factory=list)
    values: list[float | None] = field(default_factory=list)
    generations: list[int] = field(default_factory=list)

    @property
    def generation(self) -> int:
        """Number of the next one."""
        return self.generations[-1] + 1 if self.generations else 0

    def propose(self) -> np.ndarray:
        """The next generation, float64 [m, K], each row adding up to 1; m = 0 when the budget is spent."""
        left = self.budget - len(self.values)
        if not self.values:
            return first_generation(self.checkpoints)[:left]
        rng = np.random.default_rng([self.seed, self.generation])
        parents = np.stack([self.coefficients[place] for place in self._order()[:PARENTS]])
        return np.array([bred(parents, rng) for _ in range(min(GENERATION, left))]).reshape(-1, self.checkpoints)

    def tell(self, coefficients: np.ndarray, values: Sequence[float | None]) -> None:
        """What came out of a generation that was proposed."""
        self.generations += [self.generation] * len(coefficients)
        self.coefficients += list(coefficients)
        self.values += values

    @property
    def best(self) -> int:
        """Place of the best candidate; of equals the first, so that a combination never displaces a single that is as good."""
        return self._order()[0]

    def table(self) -> pa.Table:
        """`schemas.candidates` of those told so far."""
        columns = {
            "number": list(range(len(self.values))),
            "generation": self.generations,
            "coefficients": self.coefficients,
            "value": self.values,
        }
        return pa.table(columns, schema=schemas.candidates())

    def _order(self) -> list[int]:
        sign = 1.0 if self.lower_is_better else -1.0
        keys = np.array([math.inf if value is None else sign * value for value in self.values])
        return np.argsort(keys, kind="stable").tolist()


def first_generation(checkpoints: int) -> np.ndarray:
    """float64 [K + 1 + len(KEPT), K]: each checkpoint alone, their plain mean, and exponential averages that favour the last."""
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


# ---- combining -------------------------------------------------------------------------------------------------------


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
        stage: where it goes. training: uri of the training stage.
        averages: its parts with the averages, in the order of their `steps`. single: place of the best one among them.
        open_model: device and threads to an object with `Trainable.sampler`.
        open_scorer: device and threads to a scorer with the index's predictor.
        plan: of the evaluations while training; the search takes seeds of its own.
        metric: that is searched by. candidates: that are tried.
        seed: of the run. threads: of CPU arithmetic, of each actor.
    """

    stage: artifacts.Stage
    training: str
    averages: tuple[str, ...]
    steps: tuple[int, ...]
    single: int
    open_model: Callable[[str, int], Any]
    open_scorer: Callable[[str, int], Any]
    plan: Plan
    metric: str
    candidates: int
    seed: int
    threads: int

    def weights(self, coefficients: np.ndarray) -> dict[str, torch.Tensor]:
        """The combination; checkpoints that have no part in it are not read."""
        used = [k for k, alpha in enumerate(coefficients) if alpha != 0 or k == self.single]
        return combine(self._read(used), coefficients[used].tolist(), used.index(self.single))

    def _read(self, places: Sequence[int]) -> Iterator[dict[str, torch.Tensor]]:
        import safetensors.torch

        for place in places:
            yield safetensors.torch.load(files.read_bytes(files.join(self.training, self.averages[place])))


def job_of(
    output: str,
    training: str,
    trained: artifacts.Artifact,
    open_model: Callable[[str, int], Any],
    open_scorer: Callable[[str, int], Any],
    plan: Plan,
    *,
    metric: str,
    candidates: int,
    seed: int,
    threads: int,
    device: str,
) -> Job:
    """The stage under `output` of a finished training stage, whose fingerprint covers model, real set and metrics.

    Raises:
        UserError: there is nothing to combine, or the candidates do not suffice to try each average alone and a mixture.
    """
    by_step = {step: part.name for part in trained.parts if (step := checkpoints.step_of(part.name)) is not None}
    steps = tuple(sorted(by_step))
    averages = tuple(by_step[step] for step in steps)
    if len(averages) < 2:
        raise UserError("--merge best-of: the training saved one average only; lower --evaluation.every")
    if candidates <= len(averages):
        raise UserError(
            f"--merge_candidates {candidates}: the training saved {len(averages)} averages, each of which is tried alone before "
            f"any mixture; give {len(averages) + len(KEPT) + 1 + GENERATION} or more, or raise --evaluation.every"
        )
    single = steps.index(trained.totals["best"])
    identity = {
        "training": trained.fingerprint,
        "averages": list(averages),
        "single": single,
        "plan": asdict(plan) | {"spec": plan.spec.identity(), "classes": list(plan.classes)},
        "metric": metric,
        "candidates": candidates,
        "seed": seed,
        "threads": threads,
        "device": device,
    }
    stage = artifacts.Stage(files.join(output, "merging"), "merging", schemas.VERSIONS["merging"], identity)
    return Job(
        stage, training, averages, steps, single, open_model, open_scorer, plan, metric, candidates, seed, threads
    )


def run(
    job: Job, now: resources.Cluster, reference: Any, actors: int | None = None, gpus: float | None = None
) -> tuple[list[artifacts.Part], dict[str, Any]]:
    """Make what is missing; returns the parts and totals to commit.

    Args:
        job: the stage.
        now: the cluster.
        reference: the real side, a metrics.Reference or an ObjectRef of one.
        actors: processes that generate and measure; no number depends on them. None: as many as fit.
        gpus: of each, None: 1 where there are any.

    Raises:
        UserError: of the model or the extractor; or images of the best single step, or on held-out seeds of the combination,
            cannot be measured.
    """
    totals: dict[str, Any] = {}

    def execute() -> None:
        with _open(job, now, reference, actors, gpus) as judges:
            totals.update(_merge(job, judges))

    tasks.persist("merging", execute, lambda: len(job.stage.finished_parts()))
    done = job.stage.finished_parts()
    return [done[name] for name in (MERGED, CANDIDATES, SAMPLES)], totals


@contextmanager
def _open(
    job: Job, now: resources.Cluster, reference: Any, actors: int | None, gpus: float | None
) -> Iterator[list[Any]]:
    import ray

    _, most, cpus, per_gpu = resources.actor_pool(now, actors, job.threads, gpus, job.candidates)
    count = most if actors else max(1, min(most, resources.actors_that_fit(now, job.threads, gpus)))
    actor = ray.remote(_Judge).options(num_cpus=cpus, num_gpus=per_gpu, **tasks.ACTOR_OPTIONS)
    judges: list[Any] = [actor.remote(job, reference) for _ in range(count)]
    try:
        tasks.wait_for(judges, "merging")
        yield judges
    finally:
        for judge in judges:
            ray.kill(judge)


def _merge(job: Job, judges: Sequence[Any]) -> dict[str, Any]:
    """Search, save and judge; the totals."""
    search = _search(job, judges)
    _write_candidates(job, search)
    best, single = search.coefficients[search.best], np.eye(len(job.averages))[job.single]
    first, last = judges[0], judges[-1]
    tasks.get(first.save.remote(best))
    held_out = first.held_out.remote(best), last.held_out.remote(single)
    totals = tasks.get(first.judge.remote(*held_out))
    return totals | {
        "metric": job.metric,
        "coefficients": best.tolist(),
        "steps": list(job.steps),
        "single_step": job.steps[job.single],
        "candidates": len(search.values),
        "unmeasured": sum(value is None for value in search.values),
        "search": {"merged": search.values[search.best], "single": search.values[job.single]},
    }


def _search(job: Job, judges: Sequence[Any]) -> Search:
    """The search with all its candidates told: those of the records, and the others measured now."""
    known = _recorded(job)
    lower = job.metric in finetune_judge.LOWER_IS_BETTER
    search = Search(len(job.averages), job.candidates, seeds.stream(job.seed, "finetune/merge-search"), lower)
    with console.progress("merging", job.candidates, "combinations", len(known)) as bar:
        while len(proposed := search.propose()):
            first, generation = len(search.values), search.generation
            numbers = range(first, first + len(proposed))

            def submit(number: int, first: int = first, generation: int = generation, rows: Any = proposed) -> Any:
                return judges[number % len(judges)].measure.remote(number, generation, rows[number - first])

            missing = [number for number in numbers if number not in known]
            for number, value in tasks.bounded(submit, missing, lambda: len(judges)):
                known[number] = value
                bar.update()
            search.tell(proposed, [known[number] for number in numbers])
    return search


def _record(number: int) -> str:
    return f"candidate-{number:04d}.parquet"


def _recorded(job: Job) -> dict[int, float | None]:
    """Values by number of the candidates that an earlier run has measured."""
    done = job.stage.finished_parts()
    names = [CANDIDATES] if CANDIDATES in done else [name for name in done if _RECORD.fullmatch(name)]
    rows = [row for name in names for row in files.read_table(files.join(job.stage.uri, name)).to_pylist()]
    return {row["number"]: row["value"] for row in rows}


def _write_candidates(job: Job, search: Search) -> None:
    """All candidates as one table, which from now on stands for their records."""
    job.stage.write_table(CANDIDATES, search.table())
    for name in job.stage.finished_parts():
        if _RECORD.fullmatch(name):
            job.stage.drop_part(name)


# ---- on an actor -----------------------------------------------------------------------------------------------------


class _Judge:
    """Ray actor: combinations to images to numbers."""

    def __init__(self, job: Job, reference: metrics.Reference) -> None:
        self.job, self.reference = job, reference
        self.device = resources.assigned_device()
        self.model = job.open_model(self.device, job.threads)
        self.scorer = job.open_scorer(self.device, job.threads)

    def ready(self) -> None:
        """Answers when the models are loaded."""

    def measure(self, number: int, generation: int, coefficients: np.ndarray) -> float | None:
        """The metric of a candidate on the search's seeds, also as a record in the stage."""
        value: float | None = None
        try:
            value = self._value(coefficients)
        except ValueError as error:  # weights beyond those that were trained may give images that are not finite
            if number == self.job.single:
                raise _explained(f"step {self.job.steps[number]}", error) from error
        row = {"number": number, "generation": generation, "coefficients": coefficients.tolist(), "value": value}
        self.job.stage.write_table(_record(number), pa.Table.from_pylist([row], schema=schemas.candidates()))
        return value

    def _value(self, coefficients: np.ndarray) -> float | None:
        found = self._features(coefficients, SEARCH_STREAM)
        value = finetune_judge.measure(self.reference, [found], self.job.threads, self.device)[self.job.metric].value
        return float(value) if math.isfinite(value) else None

    def _features(self, coefficients: np.ndarray, stream: str) -> np.ndarray:
        """Float32 [n, D] of a combination's images from the seeds of a stream."""
        plan = replace(self.job.plan, stream=stream)
        sampler = self.model.sampler(self.job.weights(coefficients))
        found = finetune_judge.features(plan, sampler, self.scorer, range(plan.chunks))
        return np.concatenate([found[chunk] for chunk in range(plan.chunks)])

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
            metrics.evaluate(self.reference, features, rows, threads=self.job.threads, device=self.device)
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
        import safetensors.torch

        weights = self.job.weights(coefficients)
        self.job.stage.write_part(MERGED, safetensors.torch.save(weights), 0)
        table = self._samples(self.model.sampler(weights))
        self.job.stage.write_table(SAMPLES, table)

    def _samples(self, sampler: Any) -> pa.Table:
        plan = self.job.plan
        name = checkpoints.samples_name(self.job.steps[self.job.single])
        shown = files.read_table(files.join(self.job.training, name), ["number", "seed", "label"])
        columns: dict[str, list[Any]] = {"density_predicted": [], "image": []}
        for chunk in range(-(-shown.num_rows // plan.chunk)):
            images = finetune_judge.generate(plan, sampler, chunk, self.device).to(self.scorer.extractor.device)
            predicted = formula.density_of(self.scorer.log_density(self.scorer.features(images)).cpu().numpy())
            columns["density_predicted"] += predicted.tolist()
            columns["image"] += [
                picture(pixels, f"{number:012d}")
                for number, pixels in zip(plan.numbers(chunk).tolist(), images.cpu().numpy(), strict=True)
            ]
        many = shown.num_rows
        numbers = np.arange(many)
        assert shown["number"].to_pylist() == numbers.tolist() and shown["seed"].to_pylist() == plan.seeds(numbers)
        values = shown.to_pydict() | {name: column[:many] for name, column in columns.items()}
        return pa.table(values, schema=schemas.finetuned_samples())


def _explained(what: str, error: ValueError) -> UserError:
    return UserError(f"merging: images of {what} cannot be measured ({one_line(error)}); run again with --merge none")


def beats(difference: Estimate, metric: str) -> bool:
    """Whether an interval of a difference lies on the good side of 0; without interval there is nothing to go by."""
    if difference.low is None or difference.high is None:
        return False
    return bool(difference.high < 0 if metric in finetune_judge.LOWER_IS_BETTER else difference.low > 0)
