"""Batches of weighted real images, drawn (`draws`), read and decoded by tasks of the worker that trains on them.

One task makes the batches of a run of consecutive steps, each image read once for it however often it is drawn. Which
images, and what stands in for one that cannot be read any more, depends on the position of a draw alone.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from pd_core.core import artifacts, files
from pd_core.core.errors import UserError
from pd_core.engine import resources
from pd_core.engine import tasks as engine_tasks
from pd_core.finetune.draws import Draws, Window
from pd_core.finetune.protocol import Batch, Share
from pd_core.finetune.weights import Drawable
from pd_core.images import child, decode, resize, sources

TASK_BYTES = 32 << 20  # pixels that a task hands over at most, unless one step has more
TASK_IMAGES = 4096  # of a task: at 512, starting tasks and handing over took as long as decoding small images
AHEAD_TASKS = 2  # whose batches wait for a slow consumer, beside those that run
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
    """What a task needs to know; picklable. rank: of the worker. b: images of its share of a step."""

    drawable: Drawable
    rank: int
    batch_size: int
    b: int
    mirror: bool
    preprocess: resize.Preprocess

    @property
    def steps_together(self) -> int:
        """Steps of one task: what fits into TASK_BYTES; fewer where images are read one by one, which a task may do as
        well.
        """
        together = TASK_BYTES // (self.b * self.preprocess.height * self.preprocess.width * 3)
        if self.drawable.pictures.source.kind != "parquet":  # there a row group is decoded whole for any of its images
            together = min(together, TASK_IMAGES // self.b)
        return max(1, together)

    def positions(self, step: int) -> np.ndarray:
        """Of this worker's draws of a step, int64 [b]."""
        first = step * self.batch_size + self.rank * self.b
        return np.arange(first, first + self.b)


def check_share(batch_size: int, world: int) -> int:
    """Images of each worker's share of a step. Raises UserError: they cannot be shared equally."""
    if batch_size % world:
        raise UserError(
            f"--training.batch_size {batch_size}: cannot be shared equally by --workers {world}; it must be a "
            f"multiple of --workers {world}"
        )
    return batch_size // world


def feed_of(now: resources.Cluster, world: int) -> Feed:
    """Tasks for each of `world` workers that train on this cluster at the same time.

    now: with what the workers claim in `held_cpus`. Where they have claimed everything the tasks claim nothing: they
    would wait for ever.
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
    stop, replaced = first_step + steps, 0
    most_replaced = int(settings.max_bad_fraction * stop * b)
    with contextlib.closing(_in_order(plan, range(first_step, stop), feed)) as made:
        for batch in made:
            replaced += batch.replaced
            if replaced > most_replaced:
                raise UserError(
                    f"data: {replaced} of the images drawn up to step {batch.step} cannot be read any more, "
                    f"--data.max_bad_fraction allows {most_replaced} of {stop * b} draws; bring them back, or raise it"
                )
            yield batch


def _in_order(plan: _Plan, steps: range, feed: Feed) -> Generator[Batch, None, None]:
    """The batches of these steps; at most `feed.tasks` tasks run, and the batches of AHEAD_TASKS more are kept."""
    import ray

    make = ray.remote(_make).options(
        num_cpus=feed.cpus,
        memory=resources.decode_memory(decode.limits_of(plan.drawable.pictures.source.settings).memory_bytes),
        scheduling_strategy="SPREAD",  # anywhere, not in what this worker has claimed for itself
        **engine_tasks.TASK_OPTIONS,
    )
    together, shared = plan.steps_together, ray.put(plan)
    runs = (steps[i : i + together] for i in range(0, len(steps), together))
    pending: collections.deque[ray.ObjectRef] = collections.deque()
    try:
        while True:
            done, running = ray.wait(list(pending), num_returns=len(pending), timeout=0) if pending else ([], [])
            room = min(feed.tasks - len(running), feed.tasks + AHEAD_TASKS - len(pending))
            started = [make.remote(shared, run) for run in itertools.islice(runs, max(0, room))]
            pending.extend(started)
            if not pending:
                return
            if pending[0] not in done:
                ray.wait(running + started, num_returns=1)
                continue
            for batch in engine_tasks.get(pending.popleft()):
                # copies, so that nobody holds a block of the object store, and they may be written to
                arrays = {name: getattr(batch, name).copy() for name in ("sample_id", "density", "pixels")}
                yield replace(batch, **arrays)
    finally:
        for reference in pending:
            ray.cancel(reference)


# ---- a task ----------------------------------------------------------------------------------------------------------


def _make(plan: _Plan, steps: range) -> list[Batch]:
    """The batches of a run of steps."""
    maker = _Maker(plan)
    drawn = maker.draw(np.concatenate([plan.positions(step) for step in steps]))
    return [maker.batch(step, drawn[i * plan.b : (i + 1) * plan.b]) for i, step in enumerate(steps)]


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

    def draw(self, positions: np.ndarray) -> list[tuple[Place, bool]]:
        """The image of each draw at ascending positions, or the one that stands in for it, and whether it does."""
        drawn: list[tuple[Place, bool]] = []
        for window, inside in self.draws.windows(positions):
            wanted = self._locate(window, inside)
            self._fetch(window, wanted)
            for position, image in zip(inside.tolist(), wanted, strict=True):
                shown = image if image in self.pixels else self._stand_in(window, position, image)
                drawn.append((shown, shown != image))
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
            f"{self.plan.drawable.pictures.source.root}: {len(tried)} images that were drawn one after the other "
            "cannot be read any more "
            f"(first: {key!r}, {self.bad[image]}); bring them back, then run the same command again"
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

    def batch(self, step: int, drawn: Sequence[tuple[Place, bool]]) -> Batch:
        """Of a step, what its draws came to."""
        positions = self.plan.positions(step)
        pixels = np.stack([self.pixels[image] for image, _ in drawn])
        if self.plan.mirror:
            mirrored = self.draws.mirrored(positions)
            pixels[mirrored] = pixels[mirrored, :, ::-1]
        sample_id, density, label = zip(*(self.facts[image] for image, _ in drawn), strict=True)
        return Batch(
            step=step,
            first=int(positions[0]),
            sample_id=np.array(sample_id, dtype=np.int64),
            density=np.array(density, dtype=np.float64),
            label=label,
            pixels=pixels,
            replaced=sum(stands_in for _, stands_in in drawn),
        )


# consecutive runs of steps are of one window, and meet the same few processes
@functools.lru_cache(maxsize=WINDOWS_KEPT)
def _read_tables(uri: str, fingerprint: str, listing_uri: str, parts: tuple[int, ...]) -> dict[int, pa.Table]:
    """Rows of parts of weights/ at a URI, with what the listing says of where their images are; by part.

    fingerprint: of weights/, so that a table which was overwritten is not taken for the one that is there.
    """
    return {part: _read_table(uri, listing_uri, artifacts.part_name(part)) for part in parts}


def _read_table(uri: str, listing_uri: str, name: str) -> pa.Table:
    with files.explained(files.join(uri, name)):
        table = files.read_table(files.join(uri, name))
    with files.explained(files.join(listing_uri, name)):
        places = files.read_table(files.join(listing_uri, name), ["container", "offset", "size"]).take(table["row"])
    for column in places.column_names:
        table = table.append_column(column, places[column])
    return table.combine_chunks()
