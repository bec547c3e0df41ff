"""Tasks and actors on Ray: submitted within bounds, tried again, and their failures told from those of the cluster."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from pd_core.core import artifacts, files
from pd_core.core.errors import CredentialsRefused, RunError, UserError, one_line
from pd_core.engine import telemetry
from pd_core.engine.console import progress, say

# Infrastructure is retried, with a cap; a mistake in data or settings raises UserError, which Ray does not retry.
TASK_OPTIONS: dict[str, Any] = {"max_retries": 5, "retry_exceptions": False}
ACTOR_OPTIONS: dict[str, Any] = {"max_restarts": 20, "max_task_retries": 5}
WAIT_S = 60.0  # between two lines that say what a stage waits for
ROUND_DELAYS_S = (0.0, 1.0, 10.0, 30.0)  # before each execution; infrastructure ended those before it


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
            f"{what}: {len(waiting)} of {len(actors)} processes do not run yet; free are {free.get('CPU', 0):g} CPUs "
            f"and {free.get('GPU', 0):g} GPUs"
        )


def in_flight() -> int:
    """Tasks of one CPU worth keeping submitted: as many again as the cluster runs, for an autoscaler to see."""
    import ray

    return max(4, 2 * int(ray.cluster_resources().get("CPU", 0)))


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


def make_missing(
    stage: artifacts.Stage,
    groups: Iterable[Sequence[str]],
    submit: Callable[[Sequence[str]], Any],
    width: Callable[[], int] = in_flight,
    heard: Callable[[Any], None] = lambda result: None,
    unit: str = "parts",
) -> list[artifacts.Part]:
    """Make the parts of a begun stage that are not there yet; returns the records of all, in their order.

    Args:
        groups: names of all its parts; one task makes those of a group.
        submit: starts the task that writes the parts of these names, those of a group that are missing.
        width: tasks at once.
        heard: is called with what each task returned.
        unit: what a part is, for the progress bar.

    Raises:
        RunError: a part is not there when every task is done.
    """
    groups, done = list(groups), stage.finished_parts()
    names = [name for group in groups for name in group]
    todo = [missing for group in groups if (missing := [name for name in group if name not in done])]
    telemetry.PARTS.add(0, stage=stage.kind)
    with progress(stage.kind, len(names), unit, sum(name in done for name in names)) as bar:
        for missing, result in bounded(submit, todo, width):
            bar.update(len(missing))
            telemetry.PARTS.add(len(missing), stage=stage.kind)
            heard(result)
    if todo:
        done = stage.finished_parts()
    if absent := [name for name in names if name not in done]:
        raise RunError(
            f"{stage.uri}: {len(absent)} of {len(names)} {unit} are missing ({absent[0]}); run the same command again"
        )
    return [done[name] for name in names]


def persist(stage: str, execute: Callable[[], None], done: Callable[[], int]) -> None:
    """Call `execute`, which makes what is missing of a stage; where infrastructure ends it, after a pause again.

    Args:
        stage: name, for messages.
        execute: raises what ends it.
        done: parts that are known to be made. Patience begins anew with every execution that made some: a run of days
            may meet any number of failures.

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
        # Ray Data's execution is in reference cycles, and an actor that it started last lives as long: with the CPUs
        # and the GPU that the next execution waits for.
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


def task(function: Any, cpus: float = 1, gpus: float = 0, memory: int | None = None, num_returns: int = 1) -> Any:
    """A Ray task of the function that survives the loss of its node; `.remote(...)` submits it."""
    import ray

    remote = ray.remote(function)
    return remote.options(num_cpus=cpus, num_gpus=gpus, memory=memory, num_returns=num_returns, **TASK_OPTIONS)


def get(reference: Any) -> Any:
    """`ray.get` that raises the task's own UserError or RunError instead of Ray's wrapping of it."""
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        raise_cause(error)
        raise


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
