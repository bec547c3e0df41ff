"""The plan of a run, for --dry-run: what it reads, writes, holds in memory and takes, by a listing and a short probe.

A few plain formulas, of computing and of reading the images; benchmarks/costs.py models also what else store and
network add on large clusters.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

from pd_core.build import probe as build_probe
from pd_core.build import update as build_update
from pd_core.build.fleet import PROCESS_BYTES, Fleet, Step, bytes_text, fleet_of, limit_lines, time_text
from pd_core.core.errors import UserError
from pd_core.core.settings.index import BuildIndexSettings
from pd_core.density import fit
from pd_core.engine import resources, tasks
from pd_core.images import decode, listing, sources
from pd_core.index.base import Base
from pd_core.index.build import GROUP_ROWS, resolve
from pd_core.index.extractor import ExtractorSpec, describe_remotely

DRIVER_BYTES, PART_BYTES = 200e6, 4 * 605.0  # of the driver, and what it knows of a part in four tables

# Seconds of a core and FLOP that nobody probes, after docs/unit_costs.json. Comparing, training and fitting consist of
# matrix products, whose rate is probed; memory makes them slower by what these numbers exceed 2, 20 and 6 by.
PAIR_FLOP, KMEANS_FLOP, FIT_FLOP = 3.0, 29.0, 8.0  # a dimension and pair, the same in all iterations, a weight and row
START_UP_S, REPORT_S = 30.0, 2.1  # of Ray, models and search processes; of a small report
LIST_S, TABLE_S = 1.05e-5, 2.6e-9  # of an image that is listed, of a byte of features
ROW_S, RANK_S, MERGE_S, REPORT_ROW_S = 6e-6, 1.6e-7, 1.9e-6, 4e-7  # of a row; MERGE_S of every search process too
RANK_BYTES = 62.0  # of a row
SCANNED, SCANNED_ROWS, SCANNED_GROWTH = 0.0286, 88_192, -0.185  # share of rows scanned where an index has cells

EXTRACT_LEVER = "more nodes; GPUs with --features.actor_gpus 1; --features.precision bf16"
CELLS_LEVER = "--index.cells smaller, --index.train_rows_per_cell 39; --index.actor_cpus (its threads)"
SEARCH_LEVER = (
    "more nodes; --index.shards larger (a search process each); --index.kind ivf_sq8 (a quarter of the bytes)"
)


@dataclass(frozen=True)
class Build:
    """A run, its index resolved. gpus: the model runs on GPUs, which are not probed. new: images of an update."""

    settings: BuildIndexSettings
    rows: int
    spec: ExtractorSpec
    unit: build_probe.Probe
    fleet: Fleet
    gpus: bool
    new: int | None = None

    @property
    def features_bytes(self) -> float:
        """Of the features table."""
        return self.rows * (4.0 * self.spec.feature_dim + 60)

    @property
    def index_bytes(self) -> float:
        """Of all shards together."""
        index, dim = self.settings.index, self.spec.feature_dim
        return self.rows * (8.0 + {"ivf_sq8": dim, "ivf_pq": index.pq_bytes}.get(index.kind, 4 * dim))

    @property
    def scanned(self) -> float:
        """Share of the rows that a query is compared with; calibration decides it, so of cells what other data had."""
        return min(1.0, SCANNED * (self.rows / SCANNED_ROWS) ** SCANNED_GROWTH) if self.settings.index.cells else 1.0

    @property
    def total_s(self) -> float:
        """Seconds of all steps, and of the start."""
        return START_UP_S + sum(step.seconds(self.fleet) for step in self.steps())

    def pairs_s(self, pairs: float) -> float:
        """Of one core, to compare so many queries and rows."""
        return pairs * self.spec.feature_dim * PAIR_FLOP / self.unit.flops

    def steps(self) -> list[Step]:
        """In their order. An update takes quantizer and predictor over."""
        rows, dim, unit, chosen = float(self.rows), self.spec.feature_dim, self.unit, self.settings
        index, fresh = chosen.index, rows if self.new is None else float(self.new)
        shards, cells, table_s = index.shards or 1, index.cells or 0, self.features_bytes * TABLE_S
        model_s = 0.0 if self.gpus else unit.extract_s * chosen.features.actor_cpus
        pixels = 3 * self.spec.preprocess.height * self.spec.preprocess.width
        extractor_bytes = unit.model_bytes + 12.0 * chosen.features.batch_size * pixels
        image_s = unit.read_s + unit.decode_s + model_s
        trained = min(rows, float(cells) * index.train_rows_per_cell)
        train_s = trained * cells * dim * KMEANS_FLOP / unit.flops
        compared = rows * (cells + index.calibration_queries * (1 + self.scanned))
        group_bytes = 12.0 * dim * (min(rows, GROUP_ROWS) + cells)
        actors, threads, *_ = resources.search_actors(self.fleet.cluster, index.actors, index.actor_cpus, shards)
        pairs = fresh * rows + (rows - fresh) * fresh  # new rows with all, old ones with the new ones
        search_s = self.pairs_s(pairs * self.scanned + rows * cells) + fresh * actors * MERGE_S + rows * ROW_S
        block = PROCESS_BYTES + min(rows, chosen.density.block_rows) * (8.0 * dim + 36.0 * chosen.density.k)
        search_bytes = self.index_bytes * (1 / actors + 2 / shards) + 20.0 * dim * threads * chosen.density.block_rows
        weights = sum(a * b for a, b in itertools.pairwise((dim, *chosen.estimator.hidden, 1)))
        fit_s = chosen.estimator.epochs * rows * (weights * FIT_FLOP / unit.flops + 4 * dim * TABLE_S)
        fit_bytes = 8.0 * dim * min(rows, fit.WINDOW_ROWS + fit.HELDOUT_ROWS)
        of_cells = [
            Step("quantizer", train_s, 1, 8.0 * trained * dim, CELLS_LEVER, index.actor_cpus),
            Step("cells", 4 * table_s + self.pairs_s(compared), math.inf, group_bytes, CELLS_LEVER),
        ]
        filled = 1.0 if cells else fresh / rows
        found = [
            Step("listing", rows * LIST_S, 1, 96.0 * rows, "a source of Parquet files or tars"),
            Step("features", fresh * image_s, math.inf, extractor_bytes, EXTRACT_LEVER),
            *(of_cells if cells else []),
            Step("shards", 2 * filled * table_s, shards, 16.0 * rows * dim / shards, "--index.shards larger"),
            Step("neighbors", search_s, actors, search_bytes + block, SEARCH_LEVER, threads),
            Step("densities", rows * ROW_S, math.inf, 0.0, "more nodes"),
            Step("ranks", rows * RANK_S, 1, RANK_BYTES * rows, "nodes with more memory"),
            Step("estimator", fit_s, 1, fit_bytes, "--estimator.epochs and --estimator.patience smaller"),
            Step("report", REPORT_S + rows * REPORT_ROW_S, 1, PROCESS_BYTES, "--features.part_rows larger"),
        ]
        return [step for step in found if self.new is None or step.name not in ("quantizer", "estimator")]


def plan(
    settings: BuildIndexSettings,
    source: sources.Source,
    now: resources.Cluster,
    limits: decode.DecodeLimits,
    base: Base | None = None,
) -> str:
    """The plan as text.

    base: of an update, of which a line is told beside those of a whole build, which it may become.

    Raises:
        UserError: as the run itself would, as far as that can be known before it.
    """
    found = None if base is None else foresee(settings, source, now, base)
    counted = listing.count(source) if found is None else found.counted
    rows = counted["rows"]
    if rows == 0:
        raise UserError(f"{source.root}: no images there; check --data.source")
    spec, unit = tasks.get(build_probe.probe(source, counted["sample"], settings, limits))
    if settings.density.k >= rows:
        raise UserError(
            f"--density.k {settings.density.k}: needs more than k images, found {rows}; lower k or add images"
        )
    now = resources.refreshed(now)  # the probe may have brought a node
    parts = -(-rows // settings.features.whole_part_rows)
    index = resolve(settings.index, settings.density.exact, rows, spec.feature_dim, parts)
    asked = settings.features.actor_gpus
    gpus = now.gpus > 0 if asked is None else asked > 0  # those that are asked for may be still to come
    build = Build(settings.model_copy(update={"index": index}), rows, spec, unit, fleet_of(now), gpus)
    lines = [*_sizes(build, counted["bytes"], parts), *_times(build, now.cpus >= 1)]
    lines += limit_lines(build.steps(), build.fleet)
    if base is not None and found is not None:
        lost = found.gone + found.changed
        searches = f", and the searches for whoever had one of the {lost:,} for a neighbor" if lost else ""
        lines += [
            f"update:    of {base.uri}: {found}",
            f"           {_spent(replace(build, new=max(1, found.to_extract)))}{searches}; the lines above are of a "
            "whole build, whose neighbors or fit come on top where quantizer or predictor do not hold any more",
        ]
    return "\n".join(lines)


def foresee(
    settings: BuildIndexSettings, source: sources.Source, now: resources.Cluster, base: Base
) -> build_update.Foreseen:
    """What an update would find; before that, whether it can be one: the walk through a source may take an hour."""
    spec: ExtractorSpec = tasks.get(describe_remotely(settings.features))
    gpus = resources.gpus_to_ask(now, settings.features.actor_gpus, base.artifacts["features"].identity["device"])
    build_update.check_same(base, settings, source, spec, resources.device_of(now, gpus))
    return build_update.foresee(source, base)


def _sizes(build: Build, size: int, parts: int) -> list[str]:
    unit, spec, chosen, index = build.unit, build.spec, build.settings, build.settings.index
    bad = f"; {unit.bad} of {unit.tried} probed are bad" if unit.bad else ""
    if unit.bad > (allowed := chosen.data.max_bad_fraction) * unit.tried:
        bad += f": the run would stop, --data.max_bad_fraction is {allowed:g}"
    fits = 1 if build.rows <= fit.WINDOW_ROWS else 1 + chosen.estimator.epochs
    passes = (5 if index.cells else 1) + 1 + fits  # of index, search and fit
    written = build.features_bytes + build.index_bytes + build.rows * (32.0 * chosen.density.k + 70)
    each = ", ".join(f"{step.name} {bytes_text(PROCESS_BYTES + step.memory_bytes)}" for step in build.steps())
    return [
        f"images:    {build.rows:,} listed, {bytes_text(size)}{bad}",
        f"features:  {spec.model}, {spec.feature_dim} dimensions, {spec.precision}, {parts:,} parts of "
        f"{chosen.features.whole_part_rows:,} images",
        f"index:     {index.kind}, {index.shards} shards, "
        f"{f'{index.cells:,} cells' if index.cells else 'exact search'}",
        f"reads:     images once, {bytes_text(size)}; features up to {passes} times, "
        f"{bytes_text(build.features_bytes)} each",
        f"writes:    about {bytes_text(written)} to {chosen.output}",
        f"memory:    of a process, about: {each}, driver {bytes_text(DRIVER_BYTES + parts * PART_BYTES)}",
    ]


def _times(build: Build, up: bool) -> list[str]:
    """Seconds, by what unit costs, and for which nodes. up: there is a node; where none is, one is assumed."""
    unit, fleet = build.unit, build.fleet
    model = "" if build.gpus else f" and {unit.extract_s * 1e3:.1f} ms model"
    where = f"{fleet.cores:g} cores" if fleet.cluster.local else str(fleet)
    lines = [
        f"time:      {_spent(build)}; at {unit.read_s * 1e3:.1f} ms reading from the source, "
        f"{unit.decode_s * 1e3:.1f} ms decoding{model} per image and core, {unit.flops / 1e9:.0f} GFLOP/s a core, "
        f"{where}",
        f"           the predictor's fit takes at most {build.settings.estimator.epochs} epochs, fewer where its loss "
        "stops falling",
    ]
    if build.gpus:
        lines.append("           the model runs on GPUs, which are not probed: features are the time of decoding alone")
    if build.settings.index.cells:
        exact = build.pairs_s(float(build.rows) * build.rows) / fleet.cores
        lines.append(
            f"           neighbors: as if {build.scanned:.1%} of the rows reached the recall, which calibration "
            f"decides; at most {time_text(exact)} (exact search)"
        )
    if fleet.cluster.elastic:
        here = f"the {fleet} that the cluster has now"
        if not up:
            memory = bytes_text(fleet.memory_bytes)
            here = f"one node of {fleet.cores:g} CPUs and {memory}, an assumption, since none is up"
        hours = sum(step.core_s for step in build.steps()) / 3600
        lines.append(
            f"fleet:     times are for {here}; the autoscaler adds nodes up to its maximum; the CPUs compute "
            f"{hours:,.1f} core-hours in all"
        )
    return lines


def _spent(build: Build) -> str:
    steps = ", ".join(f"{step.name} {time_text(step.seconds(build.fleet))}" for step in build.steps())
    return f"about {time_text(build.total_s)}: start {time_text(START_UP_S)}, {steps}"
