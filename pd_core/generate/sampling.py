"""Rejection sampling on Ray: chunks of candidates are made by generator actors, finished by tasks, committed part by
part.

A part holds what was accepted of a fixed run of chunks, so the rows do not depend on the number of actors, on who died
meanwhile, or on where a run was taken up again. The samples are the first n accepted in candidate order.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pd_core.core import artifacts, files, schemas
from pd_core.core.errors import RunError
from pd_core.engine import console, resources, tasks, telemetry
from pd_core.generate import chunks as generate_chunks
from pd_core.generate.candidates import Batch, ChunkMaker, Recipe, Scored, candidates_of, finish
from pd_core.generate.chunks import LATE, MAX_CHUNKS, Pool, Progress
from pd_core.index import search

DENSITY_BINS = 50  # bins of equally many real images in which all candidates are counted


# ---- a chunk between actor and part ----------------------------------------------------------------------------------

_MADE = pa.schema(
    [
        ("rows", pa.list_(pa.int64())),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("pixels", pa.large_binary()),
        ("features", pa.large_binary()),
        ("density", pa.list_(pa.float64())),  # this and the next: of all candidates, as in `Scored`
        ("statistic", pa.list_(pa.float64())),
        ("probability", pa.list_(pa.float64())),
        ("accepted", pa.list_(pa.bool_())),
        ("degenerate", pa.int64()),
    ]
)
_FINISHED = pa.schema(
    [
        ("accepted", pa.large_binary()),  # Arrow streams: of schemas.samples()
        ("rejected", pa.large_binary()),  # of schemas.rejected()
        ("degenerate", pa.int64()),
        ("copies", pa.int64()),  # likely copies among what the weighting accepted
    ]
)


def _made_values(made: Batch) -> dict[str, Any]:
    _, height, width, _ = made.pixels.shape
    return {
        "rows": made.rows,
        "height": height,
        "width": width,
        "pixels": made.pixels.tobytes(),
        "features": made.features.tobytes(),
        "degenerate": made.degenerate,
        **({} if made.scored is None else vars(made.scored)),
    }


def _read_made(row: Mapping[str, Any], dim: int) -> Batch:
    rows = np.asarray(row["rows"], dtype=np.int64)
    pixels = np.frombuffer(row["pixels"], np.uint8).reshape(len(rows), row["height"], row["width"], 3)
    features = np.frombuffer(row["features"], np.float32).reshape(len(rows), dim)
    names = [field.name for field in dataclasses.fields(Scored)]
    scored = None if row["density"] is None else Scored(**{name: np.asarray(row[name]) for name in names})
    return Batch(rows, pixels, features, scored, row["degenerate"])


# ---- parts -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A stage of samples: what is drawn, and where it goes; picklable, a `chunks.Work`.

    Attributes:
        recipe: what is drawn.
        samples: the stage.
        rejected: the stage of the rejected candidates' densities beside it, or None.
        chunks_per_part: chunks whose accepted rows make one part.
        n: rows wanted.
    """

    recipe: Recipe
    samples: artifacts.Stage
    rejected: artifacts.Stage | None
    chunks_per_part: int
    n: int

    @property
    def candidates_per_part(self) -> int:
        """Candidates of one part."""
        return self.chunks_per_part * self.recipe.chunk

    name = "samples"
    made = _MADE
    finished = _FINISHED

    def chunks_of(self, part: int) -> range:
        """All parts have the same number of chunks."""
        return range(part * self.chunks_per_part, (part + 1) * self.chunks_per_part)

    def open(self, device: str) -> ChunkMaker:
        """Generator, extractor and predictor."""
        return ChunkMaker(self.recipe, device)

    def make(self, opened: ChunkMaker, chunk: int) -> dict[str, Any]:
        """Generated and scored."""
        return _made_values(opened.make(chunk))

    def finish(self, pool: search.SearchPool, chunk: int, made: Mapping[str, Any]) -> dict[str, Any]:
        """Nearest real images, index-scored densities where they are asked for, and PNG encoding."""
        batch = _read_made(made, self.recipe.realset.extractor.feature_dim)
        found = finish(self.recipe, pool, chunk, batch)
        tables = {"accepted": found.accepted, "rejected": found.rejected}
        streams = {name: generate_chunks.to_stream(table) for name, table in tables.items()}
        return streams | {"copies": found.copies, "degenerate": batch.degenerate}

    def write(self, part: int, finished: pa.Table) -> int:
        """What was accepted of the part's chunks, and beside it what was not."""
        accepted, rejected = (generate_chunks.from_streams(finished[name]) for name in ("accepted", "rejected"))
        accepted = accepted.replace_schema_metadata(schemas.samples().metadata)
        densities = np.concatenate([table["density"].to_numpy() for table in (accepted, rejected)])
        counts = {"candidates": len(densities), "copies": int(pc.sum(finished["copies"]).as_py())}
        if self.recipe.volume is not None:
            counts["degenerate"] = int(pc.sum(finished["degenerate"]).as_py())
        if self.rejected is not None:  # first: a part of samples without it is not finished
            self.rejected.write_table(artifacts.part_name(part), rejected.combine_chunks())
        counts |= histogram(self.recipe.realset.percentile(densities))
        self.samples.write_table(artifacts.part_name(part), accepted, counts)
        return accepted.num_rows

    @property
    def kind(self) -> str:
        """samples, or pilot."""
        return self.samples.kind

    def count(self, chunks: int, rows: int) -> None:
        """Candidates and those accepted; the run may need fewer of its last part."""
        telemetry.CANDIDATES.add(chunks * self.recipe.chunk, stage=self.kind)
        telemetry.ACCEPTED.add(rows, stage=self.kind)

    def done(self) -> dict[int, artifacts.Part]:
        """Finished parts by number; where rejected rows are kept, both files are there."""
        done = generate_chunks.by_number(self.samples.finished_parts())
        if self.rejected is None:
            return done
        beside = generate_chunks.by_number(self.rejected.finished_parts())
        return {number: part for number, part in done.items() if number in beside}

    def prefix(self, rows: Mapping[int, int]) -> int | None:
        """The part in which the n-th row lies, or None while parts before it are missing or rows too few."""
        total = number = 0
        while number in rows:
            total += rows[number]
            if total >= self.n:
                return number
            number += 1
        return None


def stage_of(uri: str, kind: str, recipe: Recipe, more: Mapping[str, Any]) -> artifacts.Stage:
    """A stage of samples: its identity is that of the recipe, and `more`."""
    return artifacts.Stage(uri, kind, schemas.VERSIONS[kind], {**recipe.identity(), **more})


def binned(percentile: np.ndarray) -> np.ndarray:
    """Rows in each of DENSITY_BINS bins of equally many real images, int64 [B], by their percentiles."""
    bins = (percentile / 100 * DENSITY_BINS).astype(np.int64).clip(0, DENSITY_BINS - 1)
    return np.bincount(bins, minlength=DENSITY_BINS)


def histogram(percentile: np.ndarray) -> dict[str, int]:
    """The filled ones of `binned` by `bin_NN`."""
    return {f"bin_{b:02d}": int(count) for b, count in enumerate(binned(percentile)) if count}


# ---- the run ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """What a run may use: candidates of the whole stage, and seconds of this run; None is no limit."""

    candidates: int | None = None
    seconds: float | None = None


def run(
    job: Job, now: resources.Cluster, pool: Pool, index: search.SearchPool, rate: float, budget: Budget
) -> tuple[list[artifacts.Part], dict[str, Any]]:
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
        done = job.done()
        state.rows, state.failed = {number: part.rows for number, part in done.items()}, {}
        while job.prefix(state.rows | dict.fromkeys(state.failed, 0)) is None:
            wanted = _next_parts(job, state, rate, budget.candidates)
            if not wanted or state.hopeless or state.late:
                return
            _execute(job, wanted, now, pool, index, state, deadline)

    tasks.persist("samples", execute, lambda: len(state.rows))
    if state.failed:
        raise RunError(
            generate_chunks.failed_line(
                job, state.failed, lambda chunk: candidates_of(job.recipe, chunk).seed, job.recipe.seed
            )
        )
    last = job.prefix(state.rows)
    if last is None:
        raise RunError(_spent_line(job, state.rows, budget, state.late))
    facts = tasks.get(tasks.task(_trim, resources.IO_CPUS).remote(job, last))
    _drop_after(job, last)
    done = job.done()
    parts = [done[number] for number in range(last + 1)]
    assert sum(part.rows for part in parts) == job.n
    totals = {"rows": job.n, "candidates": facts["candidates"], "copies": sum(part.counts["copies"] for part in parts)}
    totals |= {"acceptance_rate": job.n / facts["candidates"], "density_bins": _sum_bins(parts)}
    if state.busy_s:  # the median: the first chunk of an actor takes longer
        totals["actor_s_per_candidate"] = float(np.median(state.busy_s)) / job.recipe.chunk
    return parts, totals


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
    now: resources.Cluster,
    pool: Pool,
    index: search.SearchPool,
    state: Progress,
    deadline: float | None,
) -> None:
    accepted = min(job.n, sum(state.rows.values()))
    unit = "accepted" if job.samples.kind == "samples" else "candidates"
    enough = lambda: job.prefix(state.rows | dict.fromkeys(state.failed, 0)) is not None  # noqa: E731
    with console.progress(job.samples.kind, job.n, unit, accepted) as bar:
        generate_chunks.execute(job, wanted, now, pool, index, state, job.n, bar, enough, deadline)


def _trim(job: Job, last: int) -> dict[str, int]:
    """Cut the last part to the n-th row; returns the candidates up to it."""
    done = job.done()
    before = sum(done[number].rows for number in range(last))
    name = artifacts.part_name(last)
    table = files.read_table(files.join(job.samples.uri, name))
    surplus = before + table.num_rows - job.n
    table = table.slice(0, job.n - before)
    candidates = table["sample_id"][-1].as_py() + 1
    if job.rejected is not None:  # first, and even without surplus: the n-th row may have rejected ones behind it
        beside = files.read_table(files.join(job.rejected.uri, name))
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
        names = {*files.sizes(stage.uri), *stage.finished_parts()}
        for name in sorted(names):
            if (number := artifacts.part_number(name)) is not None and number > last:
                stage.drop_part(name)


def _sum_bins(parts: Sequence[artifacts.Part]) -> list[int]:
    return [sum(part.counts.get(f"bin_{b:02d}", 0) for part in parts) for b in range(DENSITY_BINS)]


def _spent_line(job: Job, rows: Mapping[int, int], budget: Budget, late: bool) -> str:
    made, candidates = sum(rows.values()), len(rows) * job.candidates_per_part
    spent = LATE if late else f"--max-candidates {budget.candidates} would be passed by the next part"
    return (
        f"samples: {made} of {job.n} rows accepted of {candidates} candidates when {spent}; they are kept: raise the "
        "limit and run the same command again"
    )


def iterate_rows(job_uri: str, parts: Sequence[artifacts.Part], columns: Sequence[str]) -> Iterator[pa.Table]:
    """Columns of a samples stage, part by part."""
    for part in parts:
        if part.rows:
            yield files.read_table(files.join(job_uri, part.name), columns)
