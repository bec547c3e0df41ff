"""The training stage: workers of Ray Train from the last checkpoint to the last step, through the loss of any
of them.
"""

from __future__ import annotations

import contextlib
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pd_core.core import artifacts, files
from pd_core.core.errors import RunError, UserError, one_line
from pd_core.engine import console, tasks, telemetry, tracking
from pd_core.engine import resources as engine_resources
from pd_core.evaluate.report import METRICS
from pd_core.finetune import checkpoints, loop

if TYPE_CHECKING:
    from tqdm import tqdm

POLL_S = 1.0
SHOWN = ("loss", "d_loss", "g_loss", "acceptance")  # beside the progress bar
TOLD = ("frechet_distance", "precision", "recall", "coverage")  # of an evaluation
PEER_GONE = ("Connection closed by peer", "Connection reset by peer", "gloo", "NCCL")  # in what torch.distributed says


@dataclass(frozen=True)
class Workers:
    """How many, and what each claims. gpus: 0 on CPUs."""

    count: int
    cpus: float
    gpus: float


def workers_of(now: engine_resources.Cluster, count: int, cpus: int, gpus: float | None) -> Workers:
    """What the settings ask for, on this cluster.

    Raises:
        UserError: there are not so many GPUs, or several workers are to share one.
    """
    _, _, claimed, per_gpu = engine_resources.actor_pool(now, count, cpus, gpus)
    if now.local and per_gpu and now.gpus < per_gpu * count:
        raise UserError(
            f"--workers {count}: {per_gpu:g} GPUs each, and this machine has {now.gpus:g}; lower one of them"
        )
    return Workers(count, claimed, per_gpu)


class Monitor:
    """Ray actor: what workers tell, until the driver asks."""

    def __init__(self) -> None:
        self._messages: list[tuple[Any, ...]] = []
        self._failure: tuple[str, str] | None = None

    def failed(self, message: str, kind: str) -> None:
        """What ended all workers. kind: name of the class of the error."""
        self._failure = message, kind

    def failure(self) -> tuple[str, str] | None:
        """What they said of it."""
        return self._failure

    def tell(self, *message: Any) -> None:
        """(`line`, text), (`step`, step, numbers) or (`evaluation`, step, rows)."""
        self._messages.append(message)

    def drain(self) -> list[tuple[Any, ...]]:
        """What was told since the last call."""
        messages, self._messages = self._messages, []
        return messages


def run(
    job: loop.Job, now: engine_resources.Cluster, workers: Workers, reference: Any, tracker: tracking.Tracker
) -> tuple[list[artifacts.Part], dict[str, Any]]:
    """Train; returns the parts and totals to commit.

    Args:
        job: what is trained.
        now: the cluster.
        workers: on what.
        reference: reference to the metrics.Reference in Ray's object store.
        tracker: gets the numbers of steps and evaluations.

    Raises:
        UserError: of the model or the data. RunError: the loss is not finite, or workers kept dying.
    """
    stage, total = job.stage, job.settings.steps

    def done() -> int:
        return checkpoints.newest(stage) + 1

    hopeless: list[RunError] = []

    def execute() -> None:
        checkpoints.drop_after_loss(stage)
        if checkpoints.read_summary(stage) is None:
            try:
                _execute(job, now, workers, reference, tracker)
            except loop.HopelessError as error:  # which `persist` would take for one that passes
                good = checkpoints.newest(stage)
                kept = f"; the last good checkpoint is that of step {good}" if good >= 0 else ""
                hopeless.append(RunError(f"{error}{kept}"))

    tasks.persist("training", execute, done)
    if hopeless:
        raise hopeless[0]
    summary = checkpoints.read_summary(stage)
    assert summary is not None, "the workers end with it"
    if summary["stopped_early"]:
        patience = job.settings.evaluation.patience
        console.say(
            f"training: stopped at step {summary['steps']} of {total}, {patience} evaluations after the best one"
        )
    if summary["replaced"]:
        console.say(
            f"training: {summary['replaced']} drawn images could not be read any more, others took their places"
        )
    return list(stage.finished_parts().values()), summary | {"metric": job.settings.evaluation.metric}


def _execute(
    job: loop.Job, now: engine_resources.Cluster, workers: Workers, reference: Any, tracker: tracking.Tracker
) -> None:
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig

    monitor: Any = ray.remote(Monitor).options(num_cpus=0, max_restarts=tasks.ACTOR_OPTIONS["max_restarts"]).remote()
    resources = {"CPU": workers.cpus} | ({"GPU": workers.gpus} if workers.gpus else {})
    values = {"job": job, "reference": reference, "monitor": monitor, "workflow": telemetry.workflow()}
    with tempfile.TemporaryDirectory() as scratch, _watched(monitor, job, tracker):
        trainer = _trainer_class(now.local)(
            loop.work,
            train_loop_config=values,
            torch_config=TorchConfig(backend="nccl" if workers.gpus else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=workers.count, use_gpu=bool(workers.gpus), resources_per_worker=resources
            ),
            # our checkpoints are parts of the stage; whoever dies, `tasks.persist` begins anew at the last of them
            run_config=RunConfig(
                name=job.stage.fingerprint[:16],
                storage_path=scratch,
                failure_config=FailureConfig(max_failures=0),
            ),
        )
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise _failure(error) from None
    if (told := tasks.get(monitor.failure.remote())) is not None:
        message, kind = told
        raise {"UserError": UserError, "HopelessError": loop.HopelessError}.get(kind, RunError)(message)


def _trainer_class(own: bool) -> Any:
    """Ray Train's trainer; on a cluster of our own without its cleaner, which asks the dashboard that such a cluster
    has not, once a second and in vain, for what ends with the cluster anyway.
    """
    from ray.train.torch import TorchTrainer

    base: Any = TorchTrainer

    class Trainer(base):
        def _create_default_callbacks(self) -> list[Any]:
            return [
                c for c in super()._create_default_callbacks() if type(c).__name__ != "PlacementGroupCleanerCallback"
            ]

    return Trainer if own else TorchTrainer


def _failure(error: Exception) -> Exception:
    """What ended a training: our own error of any worker, a defect as it was raised, or else infrastructure, which is
    tried again.
    """
    import torch

    raised: list[Any] = [*getattr(error, "worker_failures", {}).values()]
    raised += [e for e in (getattr(error, "controller_failure", None),) if e is not None]
    found: list[BaseException] = [getattr(failure, "_base_exc", failure) for failure in raised]
    for failure in found:
        if (ours := tasks.cause(failure)) is not None:
            return ours
    if any(isinstance(failure, torch.OutOfMemoryError) for failure in found):
        return UserError(
            "training: a GPU has too little memory for its share of a step; lower --training.batch_size, raise "
            "--training.accumulate, or set --training.gradient_checkpointing"
        )
    lost = [failure for failure in found if _passes(failure)]
    if lost or not found:
        return RunError(f"training: a worker was lost ({one_line(lost[0] if lost else error)})")
    return error  # a defect, of this program or of the user's own network


def _passes(failure: BaseException) -> bool:
    """Whether it is one of machines and networks: of Ray and Ray Train, of a store, or of a worker whose peer
    has gone.
    """
    import ray
    import torch

    if isinstance(failure, ray.exceptions.RayTaskError):  # what a task of ours has raised
        return files.is_failure(failure.cause)
    if type(failure).__module__.partition(".")[0] == "ray" or files.is_failure(failure):
        return True
    if isinstance(failure, torch.distributed.DistError):
        return True
    return isinstance(failure, RuntimeError) and any(word in str(failure) for word in PEER_GONE)


@contextlib.contextmanager
def _watched(monitor: Any, job: loop.Job, tracker: tracking.Tracker) -> Iterator[None]:
    """Show progress while the body runs, in a thread, since the body waits for Ray Train."""
    over = threading.Event()
    begun = max(0, checkpoints.newest(job.stage))
    telemetry.STEPS.add(0, stage="training")
    with console.progress("training", job.settings.steps, "steps") as bar:
        watcher = threading.Thread(target=_watch, args=(monitor, begun, tracker, bar, over.wait), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join(timeout=30)


def _watch(monitor: Any, begun: int, tracker: tracking.Tracker, bar: tqdm[Any], over: Callable[[float], bool]) -> None:
    """begun: step from which the workers go on."""
    import ray

    last = False
    while not last:
        last = over(POLL_S)
        try:
            messages = ray.get(monitor.drain.remote(), timeout=30)
        except (ray.exceptions.RayError, TimeoutError):  # the run itself tells what is wrong
            time.sleep(POLL_S)
            continue
        steps = [message[1:] for message in messages if message[0] == "step"]
        for step, values in steps:
            if not bar.n:  # starting up and the first evaluation are no steps
                bar.reset()
                bar.initial = step
            bar.update(step - bar.n)
            telemetry.STEPS.add(max(0, step - begun), stage="training")
            begun = max(begun, step)
            bar.set_postfix({name: f"{values[name]:.3g}" for name in SHOWN if name in values})
        if steps:
            tracker.metrics(steps[-1][1], step=steps[-1][0])
        for kind, *told in messages:
            if kind == "line":
                console.say(*told)
            elif kind == "evaluation":
                step, rows = told
                values = {row["metric"]: row["value"] for row in rows}
                console.say(f"step {step}: {', '.join(f'{METRICS[name]} {values[name]:.4g}' for name in TOLD)}")
                tracker.metrics({f"evaluation.{name}": value for name, value in values.items()}, step=step)
