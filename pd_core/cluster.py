"""Connection to Ray, the resources of each stage, the retry policy, progress. The only place that sizes anything."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import logging
import os
import re
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pd_core import telemetry
from pd_core.core import files
from pd_core.core.errors import CredentialsRefused, RunError, UserError, one_line, printable, shown

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
HEAD = "node:__internal_head__"  # a resource that Ray gives the head, and no other node
UNTYPED = re.compile(r"node_[0-9a-f]{20,}")  # Ray's type of a node that no autoscaler brought: its id
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray for the driver of a job
LISTENS_S = 15.0  # a head that restarts is not there for some seconds
LOOPBACK_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
WORKERS_PER_CORE = 8  # idle processes that a cluster of our own keeps, unless memory for that is short
WORKER_BYTES = 1 << 30
WAIT_S = 60.0  # between two lines that say what a stage waits for
ROUND_DELAYS_S = (0.0, 1.0, 10.0, 30.0)  # before each execution; infrastructure ended those before it
FEED_CPUS = 1.0  # kept free of actors for the tasks that feed them


_shared: Cluster | None = None  # by a run whose parts are runs themselves


@dataclass(frozen=True)
class Cluster:
    """What the run can count on at its start. One that is elastic may hold more later: an autoscaler adds what is asked for."""

    cpus: float
    gpus: float
    local: bool
    address: str
    node_cpus: float = 0.0  # of the largest node
    held_cpus: float = 0.0  # of `cpus`, what actors claim that stay for the whole run
    elastic: bool = False

    @property
    def free_cpus(self) -> float:
        """CPUs that another stage's actors and tasks can claim."""
        return max(0.0, self.cpus - self.held_cpus)


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """A handler of SIGTERM that was set before the body is so after it: Ray's start sets its own, which aborts or exits, and its
    end the system's.
    """
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


@_own_sigterm()
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
        # the nodes of a cluster need what pd_core imports, not pd_core itself; in a job Ray has taken care of that
        package = {"py_modules": [os.path.dirname(__file__)], "excludes": ["**/__pycache__"]}
        _check_that_somebody_listens(address)
        try:
            ray.init(address=address, runtime_env=None if JOB_VARIABLE in os.environ else package, **quiet)
        except ConnectionError as error:
            raise RunError(
                f"RAY_ADDRESS={address}: no Ray cluster answers there ({error}); start it or unset RAY_ADDRESS"
            ) from None
        return _describe(local=False)
    # Nobody scrapes the metrics of such a cluster, and their exporter leaves a thread behind (one per session) that can
    # crash a process that is done: seen as a segmentation fault in its exit.
    os.environ.setdefault(telemetry.SWITCH, "0")
    # Tasks of a fraction of a CPU make more workers than CPUs; Ray would end the idle ones of these after a second, and
    # start them again for the next task, at 2 s of imports each (a fifth of the machine while small images stream).
    os.environ.setdefault("RAY_num_workers_soft_limit", str(_idle_workers()))
    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            with _on_loopback(), _own_token():
                ray.init(address="local", num_cpus=2 * cores(), include_dashboard=False, **quiet)
            break
        except Exception as error:  # Ray has no type for it: a node that a busy machine did not start within 30 s
            ray.shutdown()
            if "timed out during startup" not in str(error) or attempt == START_ATTEMPTS:
                raise
            say("ray: the machine is busy and did not start a cluster within 30 s; trying again")
    return _describe(local=True)


def _check_that_somebody_listens(address: str) -> None:
    """Raise RunError where nobody does: Ray itself would try for minutes without a word of ours."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdigit():  # auto: Ray looks for the address
        return
    deadline = time.monotonic() + LISTENS_S
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=LISTENS_S).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise RunError(
                    f"RAY_ADDRESS={address}: no Ray cluster answers there ({error}); start it or unset RAY_ADDRESS"
                ) from None
            time.sleep(1)


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """A Ray that is started inside listens on 127.0.0.1; by itself it would on every interface.

    The variable is Ray's, for laptops with a firewall that asks; its processes inherit it, this one has read it already.
    """
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        with _variables({LOOPBACK_VARIABLE: "0"}):
            yield
    finally:  # the next one may be a cluster of many nodes
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextlib.contextmanager
def _own_token() -> Iterator[None]:
    """A Ray that is started inside asks for a token that nobody else has; its processes inherit it.

    By itself Ray would write one for all clusters of a user into a file in the home directory that everybody can read.
    """
    with _variables({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}):
        _read_token_anew()
        yield


def _read_token_anew() -> None:
    """Let Ray's client look in the environment whether there is a token, and which; it asks once in the life of a process."""
    try:
        from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]  # of C++
    except (
        ImportError
    ):  # of another Ray; where it still asks once, a second cluster of this process refuses its own client
        return
    AuthenticationTokenLoader.instance().reset_cache()
    Config.initialize("")


@contextlib.contextmanager
def _variables(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for processes that are started inside; as they were before afterwards."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def session(output: str, workflow: str = "") -> Iterator[Cluster]:
    """`connect` for the time of a run; a cluster that was started for it ends with it.

    workflow: whose run it is, for the metrics; empty where it is none's.
    """
    import ray

    if _shared is not None:
        yield refreshed(_shared)
        return
    joined = ray.is_initialized()
    now = connect()
    cpus = f"{cores()} cores" if now.local else f"{now.cpus:g} CPUs"
    say(f"ray: {cpus} and {now.gpus:g} GPUs {'of this machine' if now.local else f'at {now.address}'}")
    nodes = sum(node["Alive"] for node in ray.nodes())
    if nodes > 1 and "://" not in output:
        say(f"ray: {nodes} nodes and a local --output; every node must see {output} (a shared disk), or use s3://")
    try:
        with telemetry.running(workflow), _counted() if workflow else contextlib.nullcontext():
            yield now
    finally:
        if not joined:
            _disconnect()


def _disconnect() -> None:
    import ray

    with _own_sigterm():
        ray.shutdown()
    _read_token_anew()  # a cluster that is joined next has another, or none


@contextlib.contextmanager
def _counted() -> Iterator[None]:
    """Count how the run inside ends."""
    for outcome in telemetry.OUTCOMES:
        telemetry.RUNS.add(0, outcome=outcome)
    outcome = "failed"
    try:
        yield
        outcome = "done"
    except UserError:
        outcome = "refused"
        raise
    finally:
        telemetry.RUNS.add(1, outcome=outcome)


@contextlib.contextmanager
def shared(now: Cluster) -> Iterator[None]:
    """Sessions inside the body are that of `now`: the runs in it are parts of one."""
    global _shared
    before, _shared = _shared, now
    try:
        yield
    finally:
        _shared = before


def is_shared() -> bool:
    """Whether this is part of a run that has a session already."""
    return _shared is not None


def _describe(local: bool, was_elastic: bool = False) -> Cluster:
    """The cluster as it is now.

    was_elastic: what is known from before, for when Ray does not tell.
    """
    import ray

    resources = ray.cluster_resources()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    elastic = False
    if not local:
        told = _scales()
        elastic = was_elastic or _looks_elastic(nodes) if told is None else told
    return Cluster(
        cpus=resources.get("CPU", 0.0),
        gpus=resources.get("GPU", 0.0),
        local=local,
        address=ray.get_runtime_context().gcs_address,
        node_cpus=_largest(nodes),
        elastic=elastic,
    )


def _scales() -> bool | None:
    """Whether an autoscaler adds nodes, from the report that `ray status` prints; None where there is none.

    Ray's monitor writes it every few seconds, in a cluster that does not scale too, but there each node is a type of its own.
    Ray's second autoscaler (RAY_enable_autoscaler_v2, KubeRay's default) writes none.
    """
    from ray._private import ray_constants
    from ray.experimental import internal_kv

    written = internal_kv._internal_kv_get(ray_constants.DEBUG_AUTOSCALING_STATUS)
    return scales(json.loads(written)) if written else None


def scales(status: Mapping[str, Any]) -> bool | None:
    """The same of what Ray's monitor wrote; None before it has looked at the nodes."""
    report = status.get("autoscaler_report") or {}
    types = [*(report.get("active_nodes") or ()), *(report.get("pending_launches") or ())]
    return any(not UNTYPED.fullmatch(kind) for kind in types) if types else None


def _looks_elastic(nodes: Sequence[Mapping[str, float]]) -> bool:
    """Where nobody tells: a head that runs no task is that of a cluster, and so is one that is not alone."""
    return len(nodes) > 1 or not any(HEAD in node and node.get("CPU") for node in nodes)


def _largest_node() -> float:
    """CPUs of the node that has most; 0 where no node has any."""
    import ray

    return _largest([node["Resources"] for node in ray.nodes() if node["Alive"]])


def _largest(nodes: Sequence[Mapping[str, float]]) -> float:
    return max((node.get("CPU", 0.0) for node in nodes), default=0.0)


def refreshed(cluster: Cluster) -> Cluster:
    """The cluster as it is now: it may have grown since the run began."""
    return _describe(cluster.local, cluster.elastic)


def _idle_workers() -> int:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(2 * cores(), min(WORKERS_PER_CORE * cores(), memory // WORKER_BYTES))


def in_job_copy() -> bool:
    """Whether this is the driver of a Ray job in a temporary copy of its --working-dir, which Ray deletes after the job."""
    job = json.loads(os.environ.get(JOB_VARIABLE, "{}"))
    return bool((job.get("runtime_env") or {}).get("working_dir"))


def cores() -> int:
    """Cores that this process may use: those of its affinity, or fewer where a container has a CPU quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):  # no cgroup v2
        return allowed
    return allowed if quota == "max" else min(allowed, max(1, int(quota) // int(period)))


def computing_cpus(cluster: Cluster) -> float:
    """CPUs that computing actors may fill: cores on a cluster of our own, else all but a quarter, kept for input."""
    return max(1.0, float(cores()) if cluster.local else cluster.free_cpus * 0.75)


def device_of(cluster: Cluster, gpus: float | None) -> str:
    """Type of the device, cpu or cuda, that the actors of a model run on; `gpus` of each as in the settings."""
    return "cuda" if _gpus_each(cluster, gpus) else "cpu"


def gpus_to_ask(cluster: Cluster, gpus: float | None, before: str | None) -> float | None:
    """GPUs of each actor, as in the settings, or None for what there is.

    Args:
        cluster: as it is now.
        gpus: as in the settings.
        before: device, cpu or cuda, of what is taken up again, or None. Where GPUs made it and have scaled away since, the
            autoscaler is asked for one each.
    """
    if gpus is None and not cluster.gpus and not cluster.local:
        if before == "cuda":
            return 1.0
        if cluster.elastic:
            say("ray: no GPU is up, so models run on CPUs; where GPUs scale from zero, set actor_gpus")
    return gpus


def _gpus_each(cluster: Cluster, gpus: float | None) -> float:
    if gpus is None:
        return 1.0 if cluster.gpus else 0.0
    if cluster.local and gpus > cluster.gpus:  # nobody would ever add what an actor waits for
        raise UserError(
            f"actor_gpus {gpus:g}: this machine has {cluster.gpus:g} GPUs; leave it out, or join a cluster that has more "
            "(RAY_ADDRESS)"
        )
    return gpus


def actors_that_fit(cluster: Cluster, cpus: int, gpus: float | None) -> int:
    """Actors of a model for which there is room now, on GPUs where they use any, else on CPUs."""
    per_gpu = _gpus_each(cluster, gpus)
    return int(cluster.gpus / per_gpu) if per_gpu else int(computing_cpus(cluster) // cpus)


def actor_pool(
    cluster: Cluster, actors: int | None, cpus: int, gpus: float | None, work: int | None = None
) -> tuple[int, int, float, float]:
    """(fewest actors, most actors, CPUs each, GPUs each) of a stage whose actors run a model; never more than `work`, its
    batches, where they are counted.

    Without `actors` the pool grows from 1: on this machine to what fits, on a cluster that was joined as far as Ray Data
    finds work and the autoscaler finds nodes. GPUs are used where there are any; where they scale from zero, `gpus` says
    so. Actors asked for on a joined cluster are what the pool grows to, since Ray Data keeps room for its other tasks only
    while it decides on the growth.

    Raises:
        UserError: more GPUs are asked for than this machine has, and it stands alone.
    """
    per_gpu = _gpus_each(cluster, gpus)
    each, fits = 1 if per_gpu else cpus, actors_that_fit(cluster, cpus, gpus)
    if cluster.elastic:
        fits = max(fits, AUTOSCALED_ACTORS)
    most = actors or fits or 1
    if work is not None:
        most = min(most, work)
    return (most if actors and cluster.local else 1), most, _claim(cluster, most, each), per_gpu


def _claim(cluster: Cluster, actors: int, cpus: int) -> float:
    """CPUs that each actor claims: `cpus`, or less where that would leave nothing for the tasks that feed the actors.

    Actors that fill the cluster starve their own input, a silent deadlock; that they share cores only makes them slower.
    No actor claims more than the largest node has, or it would wait for ever.
    """
    if cluster.node_cpus >= 1:
        cpus = min(cpus, int(cluster.node_cpus))
    if cluster.elastic:  # what is missing is for the autoscaler to add, and it adds what is asked for
        return float(cpus)
    share = min(float(cpus), max(cluster.free_cpus - FEED_CPUS, 0.0) / actors)
    return float(int(share)) if share >= 1 else int(share * 1000) / 1000


def search_actors(
    cluster: Cluster, actors: int | None, cpus: int, shards: int, share: float = 1.0
) -> tuple[int, int, float, int]:
    """Number of search processes, threads of each, and CPUs and GPUs that each claims.

    As many processes as asked for or as fit into a share of the cluster, never more than shards; where they are fewer than
    cores, each gets more threads, on which no number depends. Those are not claimed: a claim of many CPUs may fit on no
    node beside the others. GPUs are for searches that have the cluster to themselves; a generator beside them needs them.
    """
    computing = max(1.0, computing_cpus(cluster) * share)
    count = min(shards, actors or int(computing // cpus) or 1)
    threads = max(cpus, int(computing // count))
    if cluster.node_cpus >= 1 and not cluster.local:
        threads = max(cpus, min(threads, int(cluster.node_cpus)))
    return count, threads, _claim(cluster, count, cpus), int(share == 1.0 and cluster.gpus >= count)


def io_cpus(cluster: Cluster, claimed: float) -> float:
    """CPUs that a task claims which waits for actors: next to nothing, and nothing where the actors have claimed all."""
    return IO_CPUS if cluster.cpus < 1 or cluster.free_cpus - claimed >= IO_CPUS else 0.0


def wait_for(actors: Sequence[Any], what: str) -> None:
    """Return when every actor answers its `ready`; say once a minute which resources it waits for.

    Raises:
        UserError, RunError: of an actor's constructor.
    """
    import ray

    waiting = [actor.ready.remote() for actor in actors]
    while True:
        done, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=WAIT_S)
        for reference in done:
            get(reference)
        if not waiting:
            return
        free = ray.available_resources()
        say(
            f"{what}: {len(waiting)} of {len(actors)} processes do not run yet; free are {free.get('CPU', 0):g} CPUs and "
            f"{free.get('GPU', 0):g} GPUs"
        )


def bounded(
    submit: Callable[[Any], Any], items: Iterable[Any], in_flight: Callable[[], int]
) -> Iterator[tuple[Any, Any]]:
    """Submit `items` as Ray tasks, at most `in_flight()` at once; yield (item, result) as they finish.

    The driver never holds more references than that, whatever the number of items; the cluster may grow meanwhile.
    """
    import ray

    pending: dict[Any, Any] = {}
    iterator = iter(items)

    def fill() -> None:
        for item in itertools.islice(iterator, max(0, in_flight() - len(pending))):
            pending[submit(item)] = item

    try:
        fill()
        while pending:
            (done,), _ = ray.wait(list(pending), num_returns=1)
            item = pending.pop(done)
            result = get(done)
            fill()
            yield item, result
    finally:
        for reference in pending:  # after an error nothing goes on writing
            ray.cancel(reference)


def persist(stage: str, execute: Callable[[], None], done: Callable[[], int]) -> None:
    """Call `execute`, which makes what is missing of a stage; where infrastructure ends it, after a pause again.

    Args:
        stage: name, for messages.
        execute: raises what ends it.
        done: parts that are known to be made. Patience begins anew with every execution that made some: a run of days may
            meet any number of failures.

    Raises:
        UserError: of `execute`, at once. A defect of this program likewise, as it was raised.
        RunError: after as many executions in a row as `ROUND_DELAYS_S` that made nothing, the last failure.
    """
    import ray

    failure: Exception | None = None
    delays, before = iter(ROUND_DELAYS_S), 0
    telemetry.RETRIES.add(0, stage=stage)
    while (delay_s := next(delays, None)) is not None:
        if failure is not None:
            telemetry.RETRIES.add(1, stage=stage)
            say(f"{stage}: {_told(failure)}; trying what is missing again in {delay_s:g} s")
            time.sleep(delay_s)
        failure = None
        try:
            execute()
        except (ray.exceptions.RayError, RunError) as error:
            failure = cause(error) or error
            if isinstance(failure, UserError) or _is_defect(failure):
                raise failure from None
            failure.__traceback__ = failure.__context__ = None  # its frames hold the execution
        # Ray Data's execution is in reference cycles, and an actor that it started last lives as long: with the CPUs and the
        # GPU that the next execution waits for.
        gc.collect()
        if failure is None:
            return
        if (now := done()) > before:
            delays, before = iter(ROUND_DELAYS_S[1:]), now
    if isinstance(failure, RunError):
        raise failure
    assert failure is not None
    raise RunError(f"{stage}: repeated failures ({_told(failure)}); what is done is kept, run the same command again")


def _told(failure: Exception) -> str:
    """A failure in one line; of a store's the words of the store, without what Ray and Ray Data put around them."""
    cause = getattr(failure, "cause", None)
    if not files.is_failure(cause):
        return one_line(failure)
    own, _, _ = str(cause).partition(": 'Failed to apply UDF")
    return f"{type(cause).__name__}: {one_line(own)}"


def _is_defect(error: Exception) -> bool:
    """Whether our own code raised what it never should: another round would only raise it again."""
    import ray

    return isinstance(error, ray.exceptions.RayTaskError) and not files.is_failure(error.cause)


def task(function: Any, cpus: float = 1, gpus: float = 0, memory: int | None = None) -> Any:
    """A Ray task of the function that survives the loss of its node; `.remote(...)` submits it."""
    import ray

    return ray.remote(function).options(num_cpus=cpus, num_gpus=gpus, memory=memory, **TASK_OPTIONS)


def get(reference: Any) -> Any:
    """`ray.get` that raises the task's own UserError or RunError instead of Ray's wrapping of it."""
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        raise_cause(error)
        raise


def in_flight() -> int:
    """Tasks of one CPU worth keeping submitted: as many again as the cluster runs, for an autoscaler to see."""
    import ray

    return max(4, 2 * int(ray.cluster_resources().get("CPU", 0)))


def feasible_cpus(cpus: int) -> float:
    """`cpus`, or as many as the largest node has: a task that fits on no node would wait for ever."""
    largest = _largest_node()
    return float(min(cpus, int(largest))) if largest >= 1 else float(cpus)


def decode_memory(most: int) -> int | None:
    """`share_of_memory` of the nodes that run tasks now."""
    import ray

    return share_of_memory(most, [node["Resources"] for node in ray.nodes() if node["Alive"]])


def share_of_memory(most: int, nodes: Sequence[Mapping[str, float]]) -> int | None:
    """Bytes that a task claims which decodes images, of which one may take up to `most`; None where Ray counts no memory.

    Never more than any of the nodes, by their resources, has for what such a task takes of its CPUs, or half of it where it has
    one: a task that fits on no node would wait for ever, and cores would idle for the sake of images that are rare. Where several
    of these meet, the kernel ends a decoder before anything else, and its image is tried again.
    """
    shares = [
        node.get("memory", 0.0) * DECODE_CPUS / max(2 * DECODE_CPUS, node["CPU"]) for node in nodes if node.get("CPU")
    ]
    return min(most, int(min(shares, default=0.0))) or None


def assigned_device() -> str:
    """The torch device that Ray gave this worker; one that holds no GPU must not use those it can see."""
    import ray

    return "cuda" if ray.get_runtime_context().get_accelerator_ids().get("GPU") else "cpu"


def raise_cause(error: BaseException) -> None:
    """Raise the UserError or RunError that a Ray error wraps; return if there is none."""
    found = cause(error)
    if found is not None:
        raise found from None


def cause(error: BaseException) -> UserError | RunError | None:
    """The UserError or RunError that a Ray error wraps, at any depth; credentials that were refused are one."""
    seen: set[int] = set()
    chain: list[BaseException | None] = [error]
    while chain:
        current = chain.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, UserError | RunError) and type(current) in (UserError, RunError):
            return current  # Ray's own wrappers are made subclasses of the cause's type
        if type(current) is CredentialsRefused:  # in another process: no storage.explained was around it
            return files.explain(current, current.uri)
        chain += [getattr(current, "cause", None), current.__cause__, current.__context__]
    return None


@contextlib.contextmanager
def progress(stage: str, total: int, unit: str, done: int = 0) -> Iterator[tqdm[Any]]:
    """A progress bar on standard error; on a non-terminal one line per 10 s."""
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    with tqdm(
        total=total,
        initial=done,
        desc=printable(stage),
        unit=f" {unit}",
        mininterval=0.2 if terminal else 10.0,
        ascii=None if terminal else True,
        dynamic_ncols=terminal,
        file=sys.stderr,
    ) as bar:
        yield bar


def silence_ray_data() -> None:
    """Keep its plans and tracebacks from the user: what ends an execution reaches `persist`, which tells it in one line."""
    import ray.data  # noqa: F401 - it sets another level

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)


def say(line: str) -> None:
    """One line to the user, or several of a table or of settings, on standard output, at once."""
    print(shown(line), flush=True)
