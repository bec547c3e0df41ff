"""Rejection sampling on Ray: chunks of candidates are made by generator actors, finished by tasks, committed part by part.

A part holds what was accepted of a fixed run of chunks, so the rows do not depend on the number of actors, on who died
meanwhile, or on where a run was taken up again. The samples are the first n accepted in candidate order.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc

from pd_core import cluster, schemas, search, storage
from pd_core.candidates import Batch, ChunkMaker, Recipe, Scores, candidates_of, finish, probabilities
from pd_core.errors import RunError, UserError, one_line

WRITE_CPUS = cluster.IO_CPUS / 2  # another share than that of the tasks before, or Ray Data would make one of both
LATE = "--max-hours is over"  # what is said of a chunk that was not begun any more
ATTEMPTS = 2  # of a chunk before it is reported
MOST_FAILED = 3  # parts that may fail before a run gives up, or a tenth of all, if that is more
DENSITY_BINS = 50  # bins of equally many real images in which all candidates are counted
MAX_CHUNKS = 8192  # of one execution: the driver's plan stays this small for any number of candidates


# ---- a chunk on its actor --------------------------------------------------------------------------------------------


# A generated chunk is one row of the Ray Data stream.
_MADE = pa.schema(
    [
        ("chunk", pa.int64()),
        ("error", pa.string()),  # null where it was generated
        ("busy_s", pa.float64()),
        ("rows", pa.list_(pa.int64())),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("pixels", pa.large_binary()),
        ("features", pa.large_binary()),
        ("log_density", pa.list_(pa.float64())),
        ("log_volume", pa.list_(pa.float64())),
        ("degenerate", pa.int64()),
    ]
)


class _MakeChunk:
    """Ray Data actor: a chunk's number to its batch. A chunk that fails twice goes on as an error, not as an exception."""

    def __init__(self, recipe: Recipe, deadline: float | None) -> None:
        """deadline: in seconds since the epoch; chunks that come later are not made."""
        self.deadline = deadline
        self.failure: UserError | RunError | None = None
        self.broken = False
        try:
            self.maker = ChunkMaker(recipe, cluster.assigned_device())
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
            return _made_table({"chunk": chunk, "busy_s": 0.0, "error": LATE})
        watch = storage.Stopwatch()
        made: Batch | None = None
        for _ in range(ATTEMPTS):
            try:
                made = self.maker.make(chunk)
                break
            except UserError:
                raise
            except Exception as error:  # whatever a generator raises: the chunk is reported, the others go on
                reason = f"{type(error).__name__}: {one_line(error)}"
                if "out of memory" in reason:
                    reason += "; lower --chunk"
        self.broken = made is None and "CUDA error" in reason  # no later chunk of this process can succeed
        values: dict[str, Any] = {"chunk": chunk, "busy_s": watch.seconds}
        if made is None:
            values |= {"error": reason}
        else:
            _, height, width, _ = made.pixels.shape
            values |= {
                "rows": made.rows,
                "height": height,
                "width": width,
                "pixels": made.pixels.tobytes(),
                "features": made.features.tobytes(),
                "log_density": made.log_density,
                "log_volume": made.log_volume,
                "degenerate": made.degenerate,
            }
        return _made_table(values)


def _made_table(values: Mapping[str, Any]) -> pa.Table:
    return pa.table({name: [values.get(name)] for name in _MADE.names}, schema=_MADE)


def _read_made(row: Mapping[str, Any], dim: int) -> Batch:
    rows = np.asarray(row["rows"], dtype=np.int64)
    pixels = np.frombuffer(row["pixels"], np.uint8).reshape(len(rows), row["height"], row["width"], 3)
    features = np.frombuffer(row["features"], np.float32).reshape(len(rows), dim)
    log_density, log_volume = (
        None if row[name] is None else np.asarray(row[name]) for name in ("log_density", "log_volume")
    )
    return Batch(rows, pixels, features, log_density, log_volume, row["degenerate"])


# ---- a chunk off its actor -------------------------------------------------------------------------------------------

_FINISHED = pa.schema(
    [
        ("chunk", pa.int64()),
        ("error", pa.string()),
        ("busy_s", pa.float64()),
        ("accepted", pa.large_binary()),  # Arrow stream of schemas.samples()
        ("density", pa.list_(pa.float64())),  # of all candidates, as in `Scores`
        ("log_volume", pa.list_(pa.float64())),
        ("degenerate", pa.int64()),
        ("copies", pa.int64()),  # likely copies among what the weighting accepted
    ]
)


def _finish_chunk(recipe: Recipe, pool: search.SearchPool, chunks: pa.Table) -> pa.Table:
    """Nearest real images, index-scored densities where they are asked for, and PNG encoding."""
    (row,) = chunks.to_pylist()
    values = {name: row[name] for name in ("chunk", "error", "busy_s")}
    if row["error"] is None:
        made = _read_made(row, recipe.realset.extractor.feature_dim)
        table, scores, copies = finish(recipe, pool, row["chunk"], made)
        values |= {"accepted": _to_stream(table), "copies": copies, "degenerate": made.degenerate}
        values |= {"density": scores.density, "log_volume": scores.log_volume}
    return pa.table({name: [values.get(name)] for name in _FINISHED.names}, schema=_FINISHED)


def _to_stream(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


# ---- parts -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A stage of samples: what is drawn, and where it goes; picklable.

    Attributes:
        recipe: what is drawn.
        samples: the stage.
        rejected: the stage of the rejected candidates' densities beside it, or None.
        chunks_per_part: chunks whose accepted rows make one part.
        n: rows wanted.
    """

    recipe: Recipe
    samples: storage.Stage
    rejected: storage.Stage | None
    chunks_per_part: int
    n: int

    @property
    def candidates_per_part(self) -> int:
        """Candidates of one part."""
        return self.chunks_per_part * self.recipe.chunk

    def finished(self) -> dict[int, storage.Part]:
        """Finished parts by number; where rejected rows are kept, both files are there."""
        done = _by_number(self.samples.finished_parts())
        if self.rejected is None:
            return done
        beside = _by_number(self.rejected.finished_parts())
        return {number: part for number, part in done.items() if number in beside}

    def prefix(self, rows: Mapping[int, int]) -> int | None:
        """The number of the part in which the n-th row lies, or None while parts before it are missing or rows too few."""
        total = number = 0
        while number in rows:
            total += rows[number]
            if total >= self.n:
                return number
            number += 1
        return None


def stage_of(uri: str, kind: str, recipe: Recipe, more: Mapping[str, Any]) -> storage.Stage:
    """A stage of samples: its identity is that of the recipe, and `more`."""
    return storage.Stage(uri, kind, schemas.VERSIONS[kind], {**recipe.identity(), **more})


def _by_number(parts: Mapping[str, storage.Part]) -> dict[int, storage.Part]:
    return {number: part for name, part in parts.items() if (number := storage.part_number(name)) is not None}


def _write_part(job: Job, chunks: pa.Table) -> pa.Table:
    """All chunks of one part, in order, to its committed file; nothing is written where one of them failed."""
    numbers = chunks["chunk"].to_numpy()
    part = int(numbers[0]) // job.chunks_per_part
    expected = np.arange(part * job.chunks_per_part, (part + 1) * job.chunks_per_part)
    if not np.array_equal(numbers, expected):
        raise RunError(
            f"samples: part {part} arrived with chunks {numbers.tolist()[:8]}, expected {expected[:8].tolist()}"
        )
    rows = 0
    failed = [(n, e) for n, e in zip(numbers.tolist(), chunks["error"].to_pylist(), strict=True) if e is not None]
    if not failed:
        tables = [pa.ipc.open_stream(data.as_buffer()).read_all() for data in chunks["accepted"]]
        table = pa.concat_tables(tables).replace_schema_metadata(schemas.samples().metadata)
        scores = _scores(job.recipe, chunks)
        counts = {"candidates": len(scores.density), "copies": int(pc.sum(chunks["copies"]).as_py())}
        if job.recipe.volume is not None:
            counts["degenerate"] = int(pc.sum(chunks["degenerate"]).as_py())
        if job.rejected is not None:  # first: a part of samples without it is not finished
            job.rejected.write_table(storage.part_name(part), _rejected(job.recipe, part, job, table, scores))
        job.samples.write_table(storage.part_name(part), table, counts | _histogram(job.recipe, scores.density))
        rows = table.num_rows
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


def _scores(recipe: Recipe, chunks: pa.Table) -> Scores:
    """Those of all chunks of a part together."""
    join = lambda name: np.concatenate([np.asarray(values) for values in chunks[name].to_pylist()])  # noqa: E731
    return Scores(join("density"), None if recipe.volume is None else join("log_volume"))


def _rejected(recipe: Recipe, part: int, job: Job, accepted: pa.Table, scores: Scores) -> pa.Table:
    drawn = [candidates_of(recipe, part * job.chunks_per_part + i) for i in range(job.chunks_per_part)]
    number = np.concatenate([d.number for d in drawn])
    split = np.split(scores.deciding, job.chunks_per_part)
    chances = np.concatenate([probabilities(recipe, d, values) for d, values in zip(drawn, split, strict=True)])
    out = ~np.isin(number, accepted["sample_id"].to_numpy())
    seed = np.concatenate([d.seed for d in drawn])
    columns = {"sample_id": number, "seed": seed, "density": scores.density, "acceptance_probability": chances}
    if scores.log_volume is not None:
        columns["log_volume"] = scores.log_volume
    schema = schemas.rejected()
    arrays = [pa.array(columns[f.name][out]) if f.name in columns else pa.nulls(int(out.sum()), f.type) for f in schema]
    return pa.table(arrays, schema=schema)


def _histogram(recipe: Recipe, densities: np.ndarray) -> dict[str, int]:
    """Candidates in each of DENSITY_BINS bins of equally many real images, by `bin_NN`."""
    bins = (recipe.realset.percentile(densities) / 100 * DENSITY_BINS).astype(np.int64).clip(0, DENSITY_BINS - 1)
    return {f"bin_{b:02d}": int(count) for b, count in enumerate(np.bincount(bins, minlength=DENSITY_BINS)) if count}


# ---- the run ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pool:
    """The generator actors that are wanted, as in the settings."""

    actors: int | None
    actor_cpus: int
    actor_gpus: float | None


@dataclass(frozen=True)
class Budget:
    """What a run may use: candidates of the whole stage, and seconds of this run; None is no limit."""

    candidates: int | None = None
    seconds: float | None = None


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


def run(
    job: Job, now: cluster.Cluster, pool: Pool, index: search.SearchPool, rate: float, budget: Budget
) -> tuple[list[storage.Part], dict[str, Any]]:
    """Make what is missing until n rows are there; returns the parts and totals to commit.

    Args:
        job: the stage.
        now: the cluster.
        pool: generator actors.
        index: the opened index.
        rate: an acceptance rate that the generator surely reaches, from the pilot.
        budget: limits of the run.

    Raises:
        RunError: a chunk failed twice (with its seeds), or the budget is spent; what was made is kept.
    """
    state = Progress({}, {})
    deadline = budget.seconds and time.time() + budget.seconds

    def execute() -> None:
        done = job.finished()
        state.rows, state.failed = {number: part.rows for number, part in done.items()}, {}
        while job.prefix(state.rows | dict.fromkeys(state.failed, 0)) is None:
            wanted = _next_parts(job, state, rate, budget.candidates)
            if not wanted or state.hopeless or state.late:
                return
            _execute(job, wanted, now, pool, index, state, deadline)

    cluster.persist("samples", execute, lambda: len(state.rows))
    if state.failed:
        raise RunError(_failed_line(job, state.failed))
    last = job.prefix(state.rows)
    if last is None:
        raise RunError(_spent_line(job, state.rows, budget, state.late))
    facts = cluster.get(_task(_trim).remote(job, last))
    _drop_after(job, last)
    done = job.finished()
    parts = [done[number] for number in range(last + 1)]
    assert sum(part.rows for part in parts) == job.n
    totals = {"rows": job.n, "candidates": facts["candidates"], "copies": sum(part.counts["copies"] for part in parts)}
    totals |= {"acceptance_rate": job.n / facts["candidates"], "density_bins": _sum_bins(parts)}
    if state.busy_s:  # the median: the first chunk of an actor takes longer
        totals["actor_s_per_candidate"] = float(np.median(state.busy_s)) / job.recipe.chunk
    return parts, totals


def _task(function: Any) -> Any:
    import ray

    return ray.remote(function).options(num_cpus=cluster.IO_CPUS, **cluster.TASK_OPTIONS)


def _next_parts(job: Job, state: Progress, rate: float, most: int | None) -> list[int]:
    """The parts to make next: the gaps, then as many more as the missing rows need at this rate, within the budget."""
    missing = job.n - sum(state.rows.values())
    known = state.rows.keys() | state.failed.keys()
    end = max(known, default=-1) + 1
    gaps = [number for number in range(end) if number not in known]
    more = max(0, math.ceil(missing / (rate * job.candidates_per_part)) - len(gaps)) + 1
    limit = end + more if most is None else min(end + more, most // job.candidates_per_part)
    wanted = [*gaps, *range(end, limit)]
    return wanted[: max(1, MAX_CHUNKS // job.chunks_per_part)]


def _execute(
    job: Job,
    wanted: Sequence[int],
    now: cluster.Cluster,
    pool: Pool,
    index: search.SearchPool,
    state: Progress,
    deadline: float | None,
) -> None:
    accepted = min(job.n, sum(state.rows.values()))
    unit = "accepted" if job.samples.kind == "samples" else "candidates"
    with cluster.progress(job.samples.kind, job.n, unit, accepted) as bar:
        for record in _stream(job, wanted, now, pool, index, deadline).iter_rows():
            part = record["part"]
            state.late = record["late"] or (deadline is not None and time.time() > deadline)
            if record["late"]:
                return
            if record["error"] is None:
                state.rows[part] = record["rows"]
            else:
                state.failed[part] = record["error"]
                cluster.say(f"samples: {record['error']}; its part is left out for now, the others go on")
            state.busy_s += record["busy_s"]
            bar.update(min(record["rows"], job.n - bar.n))
            if state.late or state.hopeless or job.prefix(state.rows | dict.fromkeys(state.failed, 0)) is not None:
                return


def _stream(
    job: Job,
    wanted: Sequence[int],
    now: cluster.Cluster,
    pool: Pool,
    index: search.SearchPool,
    deadline: float | None = None,
) -> Any:
    """The Ray Data plan: chunk numbers -> generated and scored -> searched and encoded -> committed parts, in order."""
    import ray.data

    # its plans are not for the user; set after the import, which sets another level
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.raise_original_map_exception = True  # else our errors arrive as text inside Ray's
    free = replace(now, held_cpus=index.cpus)  # the search actors are there all the while
    per_part = job.chunks_per_part
    numbers = [{"chunk": part * per_part + i} for part in wanted for i in range(per_part)]
    fewest, most, cpus, gpus = cluster.actor_pool(free, pool.actors, pool.actor_cpus, pool.actor_gpus, len(numbers))
    made = ray.data.from_items(numbers, override_num_blocks=len(numbers)).map_batches(
        _MakeChunk,
        fn_constructor_args=(job.recipe, deadline),
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(min_size=fewest, max_size=most),
        num_cpus=cpus,
        num_gpus=gpus or None,
    )
    # on this machine each more is a process more, whose imports take seconds from the actors
    together = cluster.cores() if now.local else None
    finished = made.map_batches(
        functools.partial(_finish_chunk, job.recipe, index),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=index.io_cpus,
        concurrency=together,
    )
    # Finished chunks are blocks of one row in their order, so that each batch is one part (`_write_part` checks it).
    # Ray Data's repartition would do the same in tasks of a whole CPU, for which there is none while the actors work.
    return finished.map_batches(
        functools.partial(_write_part, job),
        batch_size=per_part,
        batch_format="pyarrow",
        num_cpus=WRITE_CPUS,
        concurrency=together,
    )


def _trim(job: Job, last: int) -> dict[str, int]:
    """Cut the last part to the n-th row; returns the candidates up to it."""
    done = job.finished()
    before = sum(done[number].rows for number in range(last))
    name = storage.part_name(last)
    table = storage.read_table(storage.join(job.samples.uri, name))
    surplus = before + table.num_rows - job.n
    table = table.slice(0, job.n - before)
    candidates = table["sample_id"][-1].as_py() + 1
    if job.rejected is not None:  # first, and even without surplus: the n-th row may have rejected ones behind it
        beside = storage.read_table(storage.join(job.rejected.uri, name))
        if (kept := beside.filter(pc.less(beside["sample_id"], candidates))).num_rows < beside.num_rows:
            job.rejected.write_table(name, kept)
    if surplus:
        counts = dict(done[last].counts)
        if not job.recipe.drop_copies:  # else they are not in the table, and the count stays that of the whole part
            counts["copies"] = int(pc.sum(table["likely_copy"].cast(pa.int64())).as_py())
        job.samples.write_table(name, table, counts)
    return {"candidates": candidates}


def _drop_after(job: Job, last: int) -> None:
    """Delete parts beyond the n-th row, recorded or not: whoever opens the directory must not meet them.

    No task writes one any more: an execution that is left early has waited for the end of its tasks.
    """
    for stage in filter(None, (job.samples, job.rejected)):
        names = {*storage.sizes(stage.uri), *stage.finished_parts()}
        for name in sorted(names):
            if (number := storage.part_number(name)) is not None and number > last:
                stage.drop_part(name)


def _sum_bins(parts: Sequence[storage.Part]) -> list[int]:
    return [sum(part.counts.get(f"bin_{b:02d}", 0) for part in parts) for b in range(DENSITY_BINS)]


def _failed_line(job: Job, failed: Mapping[int, str]) -> str:
    number, reason = min(failed.items())
    chunk = int(reason.removeprefix("chunk ").partition(":")[0])
    seeds = candidates_of(job.recipe, chunk).seed
    return (
        f"samples: {len(failed)} parts are missing, since the generator failed {ATTEMPTS} times on a chunk: {reason} "
        f"(part {number}, seeds {seeds[0]} ... {seeds[-1]}, run seed {job.recipe.seed}); the others are kept, mend the "
        "generator or run the same command again"
    )


def _spent_line(job: Job, rows: Mapping[int, int], budget: Budget, late: bool) -> str:
    made, candidates = sum(rows.values()), len(rows) * job.candidates_per_part
    spent = LATE if late else f"--max-candidates {budget.candidates} would be passed by the next part"
    return (
        f"samples: {made} of {job.n} rows accepted of {candidates} candidates when {spent}; they are kept: raise the limit "
        "and run the same command again"
    )


def iterate_rows(job_uri: str, parts: Sequence[storage.Part], columns: Sequence[str]) -> Iterator[pa.Table]:
    """Columns of a samples stage, part by part."""
    for part in parts:
        if part.rows:
            yield storage.read_table(storage.join(job_uri, part.name), columns)
