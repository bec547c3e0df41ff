"""Batches of weighted real images, drawn (`draws`), read and decoded by Ray Data in the worker that trains on them.

One task makes the batches of a run of consecutive steps, each image read once for it however often it is drawn. Which images,
and what stands in for one that cannot be read any more, depends on the position of a draw alone.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pd_core.core import artifacts, files
from pd_core.core.errors import UserError
from pd_core.engine import console, resources
from pd_core.engine import tasks as engine_tasks
from pd_core.finetune.draws import Draws, Window
from pd_core.finetune.protocol import Batch, Share
from pd_core.finetune.weights import Drawable
from pd_core.images import child, decode, resize, sources

TASK_BYTES = 32 << 20  # pixels that a task hands over at most, unless one step has more
TASK_IMAGES = (
    4096  # of a task: Ray Data's own work of some 0.1 s a task halved the rate of small images at 512 (docs/log.md)
)
EXECUTION_TASKS = 2048  # of one execution: the plan stays this small for any number of steps
AHEAD_BYTES = 256 << 20  # of pixels that wait for a slow consumer; Ray Data alone would fill half of the object store
AHEAD_BLOCKS = 2  # fetched before they are asked for
WINDOWS_KEPT = 2  # tables of so many windows stay in a process that decodes
ELASTIC_TASKS = 4  # of each worker, where an autoscaler finds room for them
MOST_TRIES = 100  # images in a row that cannot be read

Place = tuple[int, int]  # of an image: its part, and its row in that part of weights/


@dataclass(frozen=True)
class Feed:
    """Where a worker's tasks run: at most so many at once, each claiming so many CPUs."""

    tasks: int
    cpus: float


@dataclass(frozen=True)
class _Plan:
    """What a task needs to know; picklable. share: rank and world of the worker. b: images of its share of a step."""

    drawable: Drawable
    rank: int
    batch_size: int
    b: int
    mirror: bool
    preprocess: resize.Preprocess

    @property
    def step_bytes(self) -> int:
        """Pixels of its share of a step, bytes."""
        return self.b * self.preprocess.height * self.preprocess.width * 3

    def positions(self, step: int) -> np.ndarray:
        """Of this worker's draws of a step, int64 [b]."""
        first = step * self.batch_size + self.rank * self.b
        return np.arange(first, first + self.b)


def check_share(batch_size: int, world: int) -> int:
    """Images of each worker's share of a step. Raises UserError: they cannot be shared equally."""
    if batch_size % world:
        raise UserError(
            f"--training.batch_size {batch_size}: cannot be shared equally by --workers {world}; it must be a multiple of --workers {world}"
        )
    return batch_size // world


def feed_of(now: resources.Cluster, world: int) -> Feed:
    """Tasks for each of `world` workers that train on this cluster at the same time.

    now: with what the workers claim in `held_cpus`. Where they have claimed everything the tasks claim nothing: they would
    wait for ever.
    """
    if now.elastic:  # what is there now says little; what is asked for is added
        return Feed(ELASTIC_TASKS, resources.DECODE_CPUS)
    tasks = max(1, int(resources.computing_cpus(now) / world))
    return Feed(tasks, resources.DECODE_CPUS if tasks * world * resources.DECODE_CPUS <= now.free_cpus else 0.0)


def batches(
    drawable: Drawable,
    first_step: int,
    steps: int,
    batch_size: int,
    share: Share,
    mirror: bool,
    size: tuple[int, int],
    feed: Feed,
) -> Generator[Batch, None, None]:
    """This worker's share of steps first_step ... first_step + steps - 1, in order. Closing it ends its tasks.

    Of step t it is draws [t B + rank b, t B + (rank + 1) b), b = B / world.

    Args:
        drawable: which images.
        batch_size: B.
        mirror: show half of the draws mirrored.
        size: (height, width) of the model's images, px: the shorter side is resized to it and the centre cut out.
        feed: where the tasks run.

    Raises:
        UserError: B cannot be shared, or more images than `data.max_bad_fraction` of the draws cannot be read any more.
        RunError: the store does not answer.
    """
    settings, b = drawable.pictures.source.settings, check_share(batch_size, share.world)
    preprocess = resize.Preprocess(*size, "bicubic", 1.0, "center", (0.0,) * 3, (1.0,) * 3)
    plan = _Plan(drawable, share.rank, batch_size, b, mirror, preprocess)
    stop, together = first_step + steps, _steps_together(plan)
    most_replaced, replaced = int(settings.max_bad_fraction * stop * b), 0
    for first in range(first_step, stop, together * EXECUTION_TASKS):
        last = min(stop, first + together * EXECUTION_TASKS)
        runs = [{"first": step, "stop": min(step + together, last)} for step in range(first, last, together)]
        with contextlib.closing(_execution(plan, runs, feed)) as made:
            for batch in made:
                replaced += batch.replaced
                if replaced > most_replaced:
                    raise UserError(
                        f"data: {replaced} of the images drawn up to step {batch.step} cannot be read any more, "
                        f"--data.max_bad_fraction allows {most_replaced} of {stop * b} draws; bring them back, or raise it"
                    )
                yield batch


def _steps_together(plan: _Plan) -> int:
    """Steps of one task: what fits into TASK_BYTES; fewer where images are read one by one, which a task may do as well."""
    together = TASK_BYTES // plan.step_bytes
    if plan.drawable.pictures.source.kind != "parquet":  # there a row group is decoded whole for any of its images
        together = min(together, TASK_IMAGES // plan.b)
    return max(1, together)


def _execution(plan: _Plan, runs: Sequence[dict[str, int]], feed: Feed) -> Generator[Batch, None, None]:
    """Batches of consecutive runs of steps by one execution of Ray Data; its settings are its own, not the process's."""
    import ray.data

    console.silence_ray_data()
    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    block_bytes = _steps_together(plan) * plan.step_bytes
    context.execution_options.resource_limits = ray.data.ExecutionResources(
        object_store_memory=max(
            AHEAD_BYTES, 2 * (feed.tasks + AHEAD_BLOCKS) * block_bytes
        )  # or tasks wait for each other
    )
    context.enable_progress_bars = False
    context.raise_original_map_exception = True  # else our errors arrive as text inside Ray's
    with ray.data.DataContext.current(context):
        made = ray.data.from_items(list(runs), override_num_blocks=len(runs)).map_batches(
            functools.partial(_make, plan),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=feed.cpus,
            memory=resources.decode_memory(decode.limits_of(plan.drawable.pictures.source.settings).memory_bytes),
            compute=ray.data.TaskPoolStrategy(size=min(feed.tasks, len(runs))),
        )
    blocks: Any = iter(made.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=AHEAD_BLOCKS))
    try:
        for block in blocks:
            for row in range(block.num_rows):
                yield _batch(plan, block.slice(row, 1))
    except ray.exceptions.RayError as error:
        engine_tasks.raise_cause(error)
        raise
    finally:
        blocks.close()


# A batch is one row.
_BATCH = pa.schema(
    [
        ("step", pa.int64()),
        ("sample_id", pa.list_(pa.int64())),
        ("density", pa.list_(pa.float64())),
        ("label", pa.list_(pa.string())),
        ("replaced", pa.int64()),
        ("pixels", pa.large_binary()),
    ]
)


def _batch(plan: _Plan, row: pa.Table) -> Batch:
    step = row["step"][0].as_py()
    shape = (plan.b, plan.preprocess.height, plan.preprocess.width, 3)
    raw = np.frombuffer(row["pixels"][0].as_buffer(), np.uint8).reshape(shape)
    return Batch(
        step=step,
        first=int(plan.positions(step)[0]),
        sample_id=row["sample_id"].combine_chunks().flatten().to_numpy(),
        density=row["density"].combine_chunks().flatten().to_numpy(),
        label=tuple(row["label"][0].as_py()),
        pixels=raw.copy(),  # so that nobody holds a block of the object store, and it may be written to
        replaced=row["replaced"][0].as_py(),
    )


# ---- a task ----------------------------------------------------------------------------------------------------------


def _make(plan: _Plan, runs: pa.Table) -> Iterator[pa.Table]:
    """Runs of steps (first, stop) to batches."""
    for run in runs.to_pylist():
        steps = range(run["first"], run["stop"])
        maker = _Maker(plan)
        drawn = maker.draw(np.concatenate([plan.positions(step) for step in steps]))
        for i, step in enumerate(steps):
            yield maker.batch(step, drawn[i * plan.b : (i + 1) * plan.b])


@dataclass(frozen=True)
class _Drawn:
    """What a draw came to: an image, and whether that stands in for another."""

    image: Place
    replaced: bool


class _Maker:
    """Makes the batches of one run of steps; each image is read and decoded once, and kept by its place.

    Attributes:
        pixels: uint8 [H, W, 3] each. facts: sample_id, density and label. bad: why an image cannot be had.
    """

    def __init__(self, plan: _Plan) -> None:
        drawable = plan.drawable
        self.plan = plan
        self.draws = Draws(drawable.part_weights, drawable.rows, drawable.seed)
        self.pixels: dict[Place, np.ndarray] = {}
        self.facts: dict[Place, tuple[int, float, str | None]] = {}
        self.bad: dict[Place, decode.BadImage] = {}

    def draw(self, positions: np.ndarray) -> list[_Drawn]:
        """The image of each draw at ascending positions, or the one that stands in for it."""
        drawn: list[_Drawn] = []
        for window, inside in self.draws.windows(positions):
            wanted = self._locate(window, inside)
            self._fetch(window, wanted)
            for position, image in zip(inside.tolist(), wanted, strict=True):
                shown = image if image in self.pixels else self._stand_in(window, position, image)
                drawn.append(_Drawn(shown, shown != image))
        return drawn

    def _tables(self, window: Window) -> dict[int, pa.Table]:
        drawable = self.plan.drawable
        parts = tuple(part for part in window.parts if drawable.part_weights[part])
        return _read_tables(drawable.uri, drawable.fingerprint, drawable.pictures.listing.uri, parts)

    def _locate(self, window: Window, positions: np.ndarray) -> list[Place]:
        tables = self._tables(window)
        part, row = window.locate(positions, lambda number: tables[number]["weight"].to_numpy())
        return list(zip(part.tolist(), row.tolist(), strict=True))

    def _stand_in(self, window: Window, position: int, image: Place) -> Place:
        """The image of the next draw of the window that has one, after its last draw its first."""
        following = window.first + np.roll(np.arange(window.draws), window.first - position - 1)[:-1]
        tried = {image}
        for other in dict.fromkeys(self._locate(window, following)):
            self._fetch(window, [other])
            if other in self.pixels:
                return other
            tried.add(other)
            if len(tried) == MOST_TRIES:
                break
        part, row = image
        key = self._tables(window)[part]["key"][row].as_py()
        raise UserError(
            f"{self.plan.drawable.pictures.source.root}: {len(tried)} images that were drawn one after the other cannot be "
            f"read any more (first: {key!r}, {self.bad[image]}); bring them back, then run the same command again"
        )

    def _fetch(self, window: Window, wanted: Sequence[Place]) -> None:
        """Read and decode those that were not yet, in the order of the listing."""
        missing = sorted({image for image in wanted if image not in self.pixels and image not in self.bad})
        if not missing:
            return
        source, tables = self.plan.drawable.pictures.source, self._tables(window)
        rows = pa.concat_tables(
            [
                tables[part].take(pa.array([row for _, row in places], pa.int64()))
                for part, places in itertools.groupby(missing, key=lambda place: place[0])
            ]
        )
        columns = (rows[name].to_pylist() for name in ("sample_id", "density", "label"))
        made = child.prepared(sources.read(source, rows), decode.limits_of(source.settings), self.plan.preprocess)
        for image, facts, one in zip(missing, zip(*columns, strict=True), made, strict=True):
            if isinstance(one, decode.BadImage):
                self.bad[image] = one
            else:
                self.pixels[image], self.facts[image] = one.pixels, facts

    def batch(self, step: int, drawn: Sequence[_Drawn]) -> pa.Table:
        """One row of _BATCH."""
        plan = self.plan
        pixels = np.stack([self.pixels[one.image] for one in drawn])
        if plan.mirror:
            mirrored = self.draws.mirrored(plan.positions(step))
            pixels[mirrored] = pixels[mirrored, :, ::-1]
        sample_id, density, label = zip(*(self.facts[one.image] for one in drawn), strict=True)
        values = {
            "step": [step],
            "sample_id": [list(sample_id)],
            "density": [list(density)],
            "label": [list(label)],
            "replaced": [sum(one.replaced for one in drawn)],
            "pixels": [pixels.tobytes()],
        }
        return pa.table(values, schema=_BATCH)


@functools.lru_cache(
    maxsize=WINDOWS_KEPT
)  # consecutive runs of steps are of one window, and meet the same few processes
def _read_tables(uri: str, fingerprint: str, listing_uri: str, parts: tuple[int, ...]) -> dict[int, pa.Table]:
    """Rows of parts of weights/ at a URI, with what the listing says of where their images are; by part.

    fingerprint: of weights/, so that a table which was overwritten is not taken for the one that is there.
    """
    return {part: _read_table(uri, listing_uri, artifacts.part_name(part)) for part in parts}


def _read_table(uri: str, listing_uri: str, name: str) -> pa.Table:
    with files.explained(files.join(uri, name)):
        table = files.read_table(files.join(uri, name))
    with files.explained(files.join(listing_uri, name)):
        listed = files.read_table(files.join(listing_uri, name), ["container", "offset", "size"])
    places = listed.take(table["row"])
    for column in places.column_names:
        table = table.append_column(column, places[column])
    return table.combine_chunks()
