"""Chunks of generated images on Ray: made by actors that hold the models, finished by tasks, committed part by part.

A part holds a fixed run of chunks and a chunk is always made as one batch, so what is committed does not depend on the
number of actors, on who died meanwhile, or on where a run was taken up again. What a chunk holds is the affair of a
`Work`.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from pd_core.core import artifacts
from pd_core.core.errors import RunError, UserError, one_line
from pd_core.engine import console, resources, telemetry
from pd_core.index import search

if TYPE_CHECKING:
    from tqdm import tqdm

WRITE_CPUS = resources.IO_CPUS / 2  # another share than that of the tasks before, or Ray Data would make one of both
LATE = "--max-hours is over"  # what is said of a chunk that was not begun any more
ATTEMPTS = 2  # of a chunk before it is reported
MOST_FAILED = 3  # parts that may fail before a run gives up, or a tenth of all, if that is more
MAX_CHUNKS = 8192  # of one execution: the driver's plan stays this small for any number of candidates


class Work(Protocol):
    """What is made of chunks, and how; picklable."""

    @property
    def name(self) -> str:
        """Of what is made, for messages."""
        ...

    @property
    def kind(self) -> str:
        """Of the stage, for metrics."""
        ...

    @property
    def chunks_per_part(self) -> int:
        """Of every part but, perhaps, the last."""
        ...

    @property
    def made(self) -> pa.Schema:
        """What `make` gives, a row per chunk."""
        ...

    @property
    def finished(self) -> pa.Schema:
        """What `finish` gives, a row per chunk."""
        ...

    def chunks_of(self, part: int) -> range:
        """Numbers of the chunks of a part, which begin at part * chunks_per_part."""
        ...

    def open(self, device: str) -> Any:
        """The models of one replica."""
        ...

    def make(self, opened: Any, chunk: int) -> Mapping[str, Any]:
        """A chunk, on the actor that holds the models."""
        ...

    def finish(self, pool: search.SearchPool, chunk: int, made: Mapping[str, Any]) -> Mapping[str, Any]:
        """What needs no model: search and encoding, in a task."""
        ...

    def write(self, part: int, chunks: pa.Table) -> int:
        """Commit a part of finished chunks, in their order; its rows."""
        ...

    def count(self, chunks: int, rows: int) -> None:
        """Tell the metrics of a committed part."""
        ...


# ---- a chunk on its actor --------------------------------------------------------------------------------------------

_HEAD = [
    ("chunk", pa.int64()),
    ("error", pa.string()),  # null where it was made
    ("busy_s", pa.float64()),
]


def _row(schema: pa.Schema, values: Mapping[str, Any]) -> pa.Table:
    """A row of the Ray Data stream."""
    whole = pa.schema([*(pa.field(*head) for head in _HEAD), *schema])
    return pa.table({name: [values.get(name)] for name in whole.names}, schema=whole)


class _MakeChunk:
    """Ray Data actor: a chunk's number to what it holds. A chunk that fails twice goes on as an error, not raised."""

    def __init__(self, work: Work, deadline: float | None, workflow: str = "") -> None:
        """deadline: in seconds since the epoch; chunks that come later are not made. workflow: for the metrics."""
        telemetry.hold(workflow, work.kind)
        self.work, self.deadline = work, deadline
        self.failure: UserError | RunError | None = None
        self.broken = False
        try:
            self.device = resources.assigned_device()
            self.maker = work.open(self.device)
        except (UserError, RunError) as error:  # an actor that dies in its constructor would take the reason with it
            self.failure = error

    def __call__(self, numbers: pa.Table) -> pa.Table:
        if self.failure is not None:
            raise self.failure
        if self.broken:  # Ray starts the actor again and gives it this chunk
            os._exit(1)
        assert numbers.num_rows == 1, numbers.num_rows
        chunk = numbers["chunk"][0].as_py()
        if self.deadline is not None and time.time() > self.deadline:
            return _row(self.work.made, {"chunk": chunk, "busy_s": 0.0, "error": LATE})
        watch = artifacts.Stopwatch()
        made: Mapping[str, Any] | None = None
        for _ in range(ATTEMPTS):
            try:
                made = self.work.make(self.maker, chunk)
                break
            except UserError:
                raise
            except Exception as error:  # whatever a generator raises: the chunk is reported, the others go on
                reason = f"{type(error).__name__}: {one_line(error)}"
                if "out of memory" in reason:
                    reason += "; lower --chunk"
        self.broken = made is None and "CUDA error" in reason  # no later chunk of this process can succeed
        telemetry.busy(watch.seconds, self.work.kind, self.device)
        values = {"chunk": chunk, "busy_s": watch.seconds} | ({"error": reason} if made is None else dict(made))
        return _row(self.work.made, values)


# ---- a chunk off its actor -------------------------------------------------------------------------------------------


def _finish_chunk(work: Work, pool: search.SearchPool, chunks: pa.Table) -> pa.Table:
    (row,) = chunks.to_pylist()
    values = {name: row[name] for name, _ in _HEAD}
    if row["error"] is None:
        values |= work.finish(pool, row["chunk"], row)
    return _row(work.finished, values)


def to_stream(table: pa.Table) -> bytes:
    """A table as one value of another: an Arrow stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def from_streams(values: pa.ChunkedArray) -> pa.Table:
    """Inverse of `to_stream`, of many one after the other."""
    return pa.concat_tables([pa.ipc.open_stream(data.as_buffer()).read_all() for data in values])


def _write_part(work: Work, chunks: pa.Table) -> pa.Table:
    """All chunks of one part, in order, to its committed file; nothing is written where one of them failed."""
    numbers = chunks["chunk"].to_numpy()
    part = int(numbers[0]) // work.chunks_per_part
    expected = np.array(work.chunks_of(part))
    if not np.array_equal(numbers, expected):
        raise RunError(
            f"{work.name}: part {part} arrived with chunks {numbers.tolist()[:8]}, expected {expected[:8].tolist()}"
        )
    failed = [(n, e) for n, e in zip(numbers.tolist(), chunks["error"].to_pylist(), strict=True) if e is not None]
    rows = 0 if failed else work.write(part, chunks)
    error = f"chunk {failed[0][0]}: {failed[0][1]}" if failed else None
    return pa.table(
        {
            "part": pa.array([part], pa.int64()),
            "rows": pa.array([rows], pa.int64()),
            "error": pa.array([error], pa.string()),
            "late": pa.array([any(e == LATE for _, e in failed)]),
            "busy_s": pa.array([chunks["busy_s"].to_pylist()], pa.list_(pa.float64())),
        }
    )


# ---- the driver ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pool:
    """The generator actors that are wanted, as in the settings."""

    actors: int | None
    actor_cpus: int
    actor_gpus: float | None


@dataclass
class Progress:
    """What the driver knows of this run: rows of every part so far, parts that failed, actors' seconds for each chunk,
    whether its time is over.
    """

    rows: dict[int, int]
    failed: dict[int, str]
    busy_s: list[float] = field(default_factory=list)
    late: bool = False

    @property
    def hopeless(self) -> bool:
        """Whether so many parts failed that more of the same will not help."""
        return len(self.failed) > max(MOST_FAILED, (len(self.rows) + len(self.failed)) // 10)


def execute(
    work: Work,
    wanted: Sequence[int],
    now: resources.Cluster,
    pool: Pool,
    index: search.SearchPool,
    state: Progress,
    n: int,
    bar: tqdm[Any],
    enough: Callable[[], bool],
    deadline: float | None = None,
) -> None:
    """Make the wanted parts, in ascending order, until all are made, `enough` says so, or `state` says that it is no
    use.

    n: rows at which the progress bar ends.
    """
    _count(work, 0, 0, 0, 0)
    for record in _stream(work, wanted, now, pool, index, deadline).iter_rows():
        part = record["part"]
        state.late = record["late"] or (deadline is not None and time.time() > deadline)
        if record["late"]:
            return
        if record["error"] is None:
            state.rows[part] = record["rows"]
            _count(work, 1, 0, len(record["busy_s"]), record["rows"])
        else:
            state.failed[part] = record["error"]
            _count(work, 0, 1, 0, 0)
            console.say(f"{work.name}: {record['error']}; its part is left out for now, the others go on")
        state.busy_s += record["busy_s"]
        bar.update(min(record["rows"], n - bar.n))
        if state.late or state.hopeless or enough():
            return


def _count(work: Work, parts: int, failed: int, chunks: int, rows: int) -> None:
    telemetry.PARTS.add(parts, stage=work.kind)
    telemetry.FAILED_PARTS.add(failed, stage=work.kind)
    work.count(chunks, rows)


def _stream(
    work: Work,
    wanted: Sequence[int],
    now: resources.Cluster,
    pool: Pool,
    index: search.SearchPool,
    deadline: float | None,
) -> Any:
    """The Ray Data plan: chunk numbers -> made -> searched and encoded -> committed parts, in order."""
    import ray.data

    console.silence_ray_data()
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.raise_original_map_exception = True  # else our errors arrive as text inside Ray's
    free = replace(now, held_cpus=index.cpus)  # the search actors are there all the while
    numbers = [{"chunk": chunk} for part in wanted for chunk in work.chunks_of(part)]
    fewest, most, cpus, gpus = resources.actor_pool(free, pool.actors, pool.actor_cpus, pool.actor_gpus, len(numbers))
    made = ray.data.from_items(numbers, override_num_blocks=len(numbers)).map_batches(
        _MakeChunk,
        fn_constructor_args=(work, deadline, telemetry.workflow()),
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(min_size=fewest, max_size=most),
        num_cpus=cpus,
        num_gpus=gpus or None,
    )
    # on this machine each more is a process more, whose imports take seconds from the actors
    together = resources.cores() if now.local else None
    finished = made.map_batches(
        functools.partial(_finish_chunk, work, index),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=index.io_cpus,
        concurrency=together,
    )
    # Finished chunks are blocks of one row in their order, so that each batch is one part (`_write_part` checks it).
    # Ray Data's repartition would do the same in tasks of a whole CPU, for which there is none while the actors work.
    return finished.map_batches(
        functools.partial(_write_part, work),
        batch_size=work.chunks_per_part,
        batch_format="pyarrow",
        num_cpus=WRITE_CPUS,
        concurrency=together,
    )


def by_number(parts: Mapping[str, artifacts.Part]) -> dict[int, artifacts.Part]:
    """Tables of a stage by the numbers in their names."""
    return {number: part for name, part in parts.items() if (number := artifacts.part_number(name)) is not None}


def failed_line(work: Work, failed: Mapping[int, str], seeds_of: Callable[[int], np.ndarray], run_seed: int) -> str:
    """What is said at the end of a run in which parts failed, with the seeds of the first chunk that did."""
    number, reason = min(failed.items())
    seeds = seeds_of(int(reason.removeprefix("chunk ").partition(":")[0]))
    return (
        f"{work.name}: {len(failed)} parts are missing, since the generator failed {ATTEMPTS} times on a chunk: "
        f"{reason} (part {number}, seeds {seeds[0]} ... {seeds[-1]}, run seed {run_seed}); the others are kept, mend "
        "the generator or run the same command again"
    )
