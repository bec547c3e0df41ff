"""Connection to Ray, the resources of each stage, the retry policy, progress. The only place that sizes anything."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pd_core.errors import RunError, UserError

if TYPE_CHECKING:
    from tqdm import tqdm

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

# Infrastructure is retried, with a cap; a mistake in data or settings raises UserError, which Ray does not retry.
TASK_OPTIONS: dict[str, Any] = {"max_retries": 5, "retry_exceptions": False}
ACTOR_OPTIONS: dict[str, Any] = {"max_restarts": 20, "max_task_retries": 5}

# A task that mostly waits for storage or for actors claims little, so that it never keeps a computing actor off a core.
IO_CPUS = 0.25
DECODE_CPUS = 0.5
START_ATTEMPTS = 4
AUTOSCALED_ACTORS = 64  # replicas that the pool may ask an autoscaling cluster for
SMALL_CPUS = 8  # a joined cluster up to this size is treated as one machine that does not grow
FEED_CPUS = 1.0  # kept free of actors for the tasks that feed them


@dataclass(frozen=True)
class Cluster:
    """What the run can count on at its start. An autoscaling cluster may hold more later."""

    cpus: float
    gpus: float
    local: bool
    address: str


def connect() -> Cluster:
    """Join the cluster that RAY_ADDRESS or the Ray job names, else start one on this machine.

    A cluster that we start ourselves has twice as many logical CPUs as cores: stages that stream into each other
    (read, decode, extract) must all hold a slot at once, or a pool that fills the machine starves its own input.
    """
    import ray

    if ray.is_initialized():
        return _describe(local=False)
    address = os.environ.get("RAY_ADDRESS")
    quiet: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": True}
    if address:
        try:
            ray.init(address=address, **quiet)
        except ConnectionError as error:
            raise RunError(
                f"RAY_ADDRESS={address}: no Ray cluster answers there ({error}); start it or unset RAY_ADDRESS"
            ) from None
        return _describe(local=False)
    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            ray.init(address="local", num_cpus=2 * cores(), include_dashboard=False, **quiet)
            break
        except Exception as error:  # Ray has no type for it: a node that a busy machine did not start within 30 s
            ray.shutdown()
            if "timed out during startup" not in str(error) or attempt == START_ATTEMPTS:
                raise
            say("ray: the machine is busy and did not start a cluster within 30 s; trying again")
    return _describe(local=True)


@contextlib.contextmanager
def session(output: str) -> Iterator[Cluster]:
    """`connect` for the time of a run; a cluster that was started for it ends with it."""
    import ray

    joined = ray.is_initialized()
    now = connect()
    where = "on this machine" if now.local else f"at {now.address}"
    say(f"ray: {now.cpus:g} CPUs and {now.gpus:g} GPUs {where}")
    nodes = sum(node["Alive"] for node in ray.nodes())
    if nodes > 1 and "://" not in output:
        say(f"ray: {nodes} nodes and a local --output; every node must see {output} (a shared disk), or use s3://")
    try:
        yield now
    finally:
        if not joined:
            ray.shutdown()


def _describe(local: bool) -> Cluster:
    import ray

    resources = ray.cluster_resources()
    return Cluster(
        cpus=resources.get("CPU", 0.0),
        gpus=resources.get("GPU", 0.0),
        local=local,
        address=ray.get_runtime_context().gcs_address,
    )


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def computing_cpus(cluster: Cluster) -> float:
    """CPUs that computing actors may fill: cores on a cluster of our own, else all but a quarter, kept for input."""
    return max(1.0, float(cores()) if cluster.local else cluster.cpus * 0.75)


def extractor_pool(
    cluster: Cluster, actors: int | None, cpus: int, gpus: float | None
) -> tuple[int, int, float, float]:
    """(fewest actors, most actors, CPUs each, GPUs each) of the feature stage.

    Without `actors` the pool grows from 1: on this machine to what fits, on a cluster that was joined as far as Ray Data
    finds work and the autoscaler finds nodes. GPUs are used where there are any.
    """
    per_gpu = gpus if gpus is not None else (1.0 if cluster.gpus else 0.0)
    if per_gpu:
        fits = int(cluster.gpus / per_gpu) if cluster.local else max(int(cluster.gpus / per_gpu), AUTOSCALED_ACTORS)
        fits = fits or 1
        return actors or 1, actors or fits, _claim(cluster, actors or fits, 1), per_gpu
    fits = int(computing_cpus(cluster) // cpus) or 1
    if not cluster.local and cluster.cpus > SMALL_CPUS:
        fits = max(fits, AUTOSCALED_ACTORS)
    return (actors or 1), (actors or fits), _claim(cluster, actors or fits, cpus), 0.0


def _claim(cluster: Cluster, actors: int, cpus: int) -> float:
    """CPUs that each actor claims: `cpus`, or less where that would leave nothing for the tasks that feed the actors.

    Actors that fill the cluster starve their own input, a silent deadlock; that they share cores only makes them slower.
    """
    if not cluster.local and (cluster.cpus < 1 or cluster.cpus >= actors * cpus + FEED_CPUS):
        return float(cpus)  # what is missing is for the autoscaler to add, and it adds what is asked for
    if not cluster.local and cluster.cpus > SMALL_CPUS:
        return float(cpus)
    share = min(float(cpus), max(cluster.cpus - FEED_CPUS, cluster.cpus / 2) / actors)
    return float(int(share)) if share >= 1 else round(share, 3)


def search_actors(cluster: Cluster, actors: int | None, cpus: int, shards: int) -> tuple[int, float]:
    """Number of search processes and CPUs each: as many as asked for or as fit, never more than shards."""
    count = min(shards, actors or int(computing_cpus(cluster) // cpus) or 1)
    return count, _claim(cluster, count, cpus)


def bounded(submit: Callable[[Any], Any], items: Iterable[Any], in_flight: int) -> Iterator[tuple[Any, Any]]:
    """Submit `items` as Ray tasks, at most `in_flight` at once; yield (item, result) as they finish.

    The driver never holds more than `in_flight` references, whatever the number of items.
    """
    import ray

    pending: dict[Any, Any] = {}
    iterator = iter(items)
    for item in itertools.islice(iterator, in_flight):
        pending[submit(item)] = item
    try:
        while pending:
            (done,), _ = ray.wait(list(pending), num_returns=1)
            item = pending.pop(done)
            for following in itertools.islice(iterator, 1):
                pending[submit(following)] = following
            yield item, get(done)
    finally:
        for reference in pending:  # after an error nothing goes on writing
            ray.cancel(reference)


def get(reference: Any) -> Any:
    """`ray.get` that raises the task's own UserError or RunError instead of Ray's wrapping of it."""
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        raise_cause(error)
        raise


def in_flight() -> int:
    """Tasks of one CPU worth keeping submitted: what the cluster holds now, and one more that waits."""
    import ray

    return int(ray.cluster_resources().get("CPU", 1)) + 1


def feasible_cpus(cpus: int) -> float:
    """`cpus`, or as many as the largest node has: a task that fits on no node would wait for ever."""
    import ray

    largest = max((node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]), default=0.0)
    return float(min(cpus, int(largest))) if largest >= 1 else float(cpus)


def assigned_device() -> str:
    """The torch device that Ray gave this worker; one that holds no GPU must not use those it can see."""
    import ray

    return "cuda" if ray.get_runtime_context().get_accelerator_ids().get("GPU") else "cpu"


def raise_cause(error: BaseException) -> None:
    """Raise the UserError or RunError that a Ray error wraps, at any depth; return if there is none."""
    seen: set[int] = set()
    chain: list[BaseException | None] = [error]
    while chain:
        current = chain.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        if type(current) in (UserError, RunError):  # Ray's own wrappers are made subclasses of the cause's type
            raise current from None
        chain += [getattr(current, "cause", None), current.__cause__, current.__context__]


@contextlib.contextmanager
def progress(stage: str, total: int, unit: str, done: int = 0) -> Iterator[tqdm[Any]]:
    """A progress bar on standard error; on a non-terminal one line per 10 s."""
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    with tqdm(
        total=total,
        initial=done,
        desc=stage,
        unit=f" {unit}",
        mininterval=0.2 if terminal else 10.0,
        ascii=None if terminal else True,
        dynamic_ncols=terminal,
        file=sys.stderr,
    ) as bar:
        yield bar


def say(line: str) -> None:
    """One line to the user, on standard output, at once."""
    print(line, flush=True)
