"""One worker of a training: steps, evaluations and checkpoints, from wherever the last checkpoint is to the
last step.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pd_core.core import artifacts
from pd_core.core.errors import RunError, UserError, one_line
from pd_core.core.settings.finetune import FinetuneSettings
from pd_core.engine import resources, telemetry
from pd_core.evaluate import measure
from pd_core.finetune import checkpoints, judge, parallel, stream, weights
from pd_core.finetune.checkpoints import Progress
from pd_core.finetune.models import opened
from pd_core.finetune.protocol import Batch, Share, Trainable

if TYPE_CHECKING:
    import torch

REPORT_S = 0.5  # between two messages to the driver


@dataclass(frozen=True)
class Job:
    """What is trained, on what, and how it is judged; picklable.

    Attributes:
        model: how the model is opened.
        data: the images that are drawn. feed: where each worker reads and decodes its share.
        plan: of the evaluations.
        stage: where the training's parts go.
        settings: of the workflow.
    """

    model: opened.ModelSpec
    data: weights.Drawable
    feed: stream.Feed
    plan: judge.Plan
    stage: artifacts.Stage
    settings: FinetuneSettings


class HopelessError(RunError):
    """What another attempt would only repeat."""


def work(values: Mapping[str, Any]) -> None:
    """What Ray Train runs in each worker. values: job (Job), reference (of metrics.Reference), monitor (actor),
    workflow.
    """
    import ray
    import ray.train
    import torch
    from ray.train.torch import get_device

    job: Job = values["job"]
    telemetry.hold(values["workflow"], "training")
    context = ray.train.get_context()
    threads = job.settings.worker_cpus
    torch.set_num_threads(threads)
    device = str(get_device()) if resources.assigned_device() == "cuda" else "cpu"
    share = Share(context.get_world_rank(), context.get_world_size(), device, threads)
    training = Loop(job, share, values["reference"], values["monitor"])
    try:
        training.run()
    except (UserError, RunError) as error:
        ray.get(values["monitor"].failed.remote(str(error), type(error).__name__))
        # What all workers have is told, and they leave: Ray Train would print the exception four times, and take it for
        # a failure of its own. What this one alone has must end the others, which wait for it.
        if not training.agreed:
            raise


class Loop:
    """A worker's part of the training.

    Args:
        job: what is trained.
        share: this worker.
        reference: reference to the metrics.Reference in Ray's object store; rank 0 reads it.
        monitor: handle of the driver's `training.Monitor`.
    """

    def __init__(self, job: Job, share: Share, reference: Any, monitor: Any):
        self.job, self.share, self.settings = job, share, job.settings
        self.model: Trainable
        self.progress = Progress()
        self.agreed = False  # whether the error that ends this worker ends all of them
        self._reference, self._monitor = reference, monitor
        self._told_s = 0.0
        # seconds of each step made here, and of them of waiting for its images
        self._times: list[tuple[float, float]] = []

    def run(self) -> None:
        """To the last step.

        Raises:
            UserError, RunError: of any worker, on all of them. HopelessError: those of a step.
        """
        with self._together():
            self.model = self.job.model.open(self.share)
            self.scorer = self.job.model.scorer(self.share.device, self.share.threads)
        self._restore()
        if not self.progress.evaluations:
            self._evaluate()
            self._checkpoint()
        if not self.progress.finished:
            self._train()
        if self.share.rank == 0:
            checkpoints.write_results(self.job.stage, self.progress, self.settings.evaluation.metric, self._rates())

    def _restore(self) -> None:
        name: str | None = None
        with self._together():
            if self.share.rank == 0:
                name = checkpoints.newest_state(self.job.stage)
        name = parallel.from_first(name, self.share.world)
        if name is not None:
            self.progress, state = checkpoints.read_state(self.job.stage, name, self.share.device)
            self.model.load_state(state)
            if self.share.rank == 0 and self.progress.step:
                self._monitor.tell.remote("line", f"training: goes on from step {self.progress.step}")

    def _train(self) -> None:
        settings, progress = self.settings, self.progress
        batches = stream.batches(
            self.job.data,
            first_step=progress.step,
            steps=settings.steps - progress.step,
            batch_size=settings.training.batch_size,
            share=self.share,
            mirror=settings.training.mirror,
            size=self.model.size,
            feed=self.job.feed,
        )
        with contextlib.closing(batches):
            while not progress.finished:
                watch = artifacts.Stopwatch()
                batch: Batch | None = None
                with self._together():
                    batch = next(batches)
                assert batch is not None
                data_s = watch.seconds
                try:
                    logged = self.model.step(batch)
                except RunError as error:  # of numbers that all workers have added up
                    self.agreed = True
                    raise HopelessError(str(error)) from None
                progress.step += 1
                counted = parallel.sum_of({"replaced": batch.replaced}, self.share.world, self.share.device)
                progress.replaced += round(counted["replaced"])
                telemetry.busy(watch.seconds - data_s, "training", self.share.device)
                self._times.append((watch.seconds, data_s))
                self._log(logged | {"step_s": watch.seconds, "data_s": data_s})
                self._pause()

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """What one worker raises in the body, all raise."""
        failure: Exception | None = None
        try:
            yield
        except (UserError, RunError) as error:
            failure = error
        try:
            parallel.raise_together(failure, self.share.world, self.share.device)
        except Exception:
            self.agreed = True
            raise

    def _pause(self) -> None:
        """What is due after a step."""
        settings, progress = self.settings, self.progress
        last = progress.step == settings.steps
        judged = last or progress.step % settings.evaluation.every == 0
        if judged:
            self._evaluate()
        progress.finished = last or progress.stopped_early
        if judged or progress.step % settings.checkpoint_every == 0:
            self._checkpoint()

    def _log(self, values: Mapping[str, float]) -> None:
        step = self.progress.step
        if step % max(1, math.ceil(self.settings.steps / checkpoints.HISTORY_ROWS)) == 0:
            self.progress.history += [(step, n, float(v)) for n, v in values.items() if n not in ("step_s", "data_s")]
        if self.share.rank == 0 and (time.monotonic() - self._told_s > REPORT_S or step == self.settings.steps):
            self._told_s = time.monotonic()
            self._monitor.tell.remote("step", step, dict(values))

    def _rates(self) -> dict[str, float]:
        """Medians of the steps made by this process, without its first, which warms up."""
        if len(self._times) < 2:
            return {}
        step_s, data_s = np.median(np.array(self._times[1:]), axis=0)
        return {
            "step_s": float(step_s),
            "data_s": float(data_s),
            "images_s": self.settings.training.batch_size / float(step_s),
        }

    def _checkpoint(self) -> None:
        with self._together():
            if self.share.rank == 0:
                checkpoints.write_state(self.job.stage, self.progress, self.model.state(), self.settings.keep)

    def _evaluate(self) -> None:
        """Every worker makes its chunks of the images; the first measures all of them and tells the others."""
        share, plan, progress = self.share, self.job.plan, self.progress
        weights = self.model.averaged()
        own: dict[int, np.ndarray] = {}
        with self._together():
            sampler = self.model.sampler(weights)
            try:
                for chunk in range(share.rank, plan.chunks, share.world):
                    images = judge.generate(plan, sampler, chunk, share.device)
                    own[chunk] = judge.features_of(self.scorer, images)
                    if chunk == 0:
                        self._keep(images[: self.settings.images], own[chunk][: self.settings.images])
            except UserError:
                raise
            except ValueError as error:  # images of weights that have left all bounds
                raise self._unmeasurable(error) from None
        found, rows = parallel.gathered(own, share.world), None
        with self._together():
            if share.rank == 0:
                checkpoints.write_average(self.job.stage, progress.step, weights, self.model.companions())
                rows = self._rows([found[chunk] for chunk in range(plan.chunks)])
                self._monitor.tell.remote("evaluation", progress.step, rows)
        progress.evaluations += parallel.from_first(rows, share.world)
        progress.judge(self.settings.evaluation.metric, self.settings.evaluation.patience)

    def _unmeasurable(self, error: ValueError) -> HopelessError:
        return HopelessError(
            f"training: images of step {self.progress.step} (seed {self.settings.seed}) cannot be measured "
            f"({one_line(error)}); lower --training.learning_rate"
        )

    def _rows(self, found: list[np.ndarray]) -> list[dict[str, Any]]:
        """Rows of schemas.evaluations() of the features of all images, by chunk."""
        import ray

        real = ray.get(self._reference)
        try:
            estimates = judge.measure(real, found, self.share.threads, self.share.device)
        except ValueError as error:  # features that are not finite, or without a direction
            raise self._unmeasurable(error) from None
        return [
            {
                "step": self.progress.step,
                "metric": name,
                **asdict(estimate),
                "k": measure.neighbors_of(name, self.settings.evaluation.metrics),
                "n_real": real.rows,
                "n_generated": self.job.plan.n,
            }
            for name, estimate in estimates.items()
        ]

    def _keep(self, images: torch.Tensor, features: np.ndarray) -> None:
        """Write the first images, with their predicted densities."""
        import torch

        densities = self.scorer.log_density(torch.from_numpy(features).to(self.share.device)).exp()
        table = judge.samples(self.job.plan, images, densities.cpu().numpy())
        self.job.stage.write_table(checkpoints.samples_name(self.progress.step), table)
