"""The stages of tradeoff in their order: pilot, one pool, its features, the curve, report."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pd_core.core import artifacts, files
from pd_core.core.errors import UserError
from pd_core.core.settings import load
from pd_core.core.settings.data import DataSettings
from pd_core.core.settings.evaluate import ResolvedTradeoff, TradeoffSettings
from pd_core.core.settings.generate import TRUNCATION_SETTINGS, GeneratorSettings
from pd_core.density import realset, weighting
from pd_core.density.realset import RealSet
from pd_core.density.weighting import Weighting
from pd_core.engine import console, tracking
from pd_core.engine import resources as engine_resources
from pd_core.engine.runs import REPORT, Run, checked_output, execute, required, started
from pd_core.evaluate import spaces
from pd_core.evaluate.spaces import Extraction, Features, ImageSet
from pd_core.evaluate.tradeoff import curve, report
from pd_core.evaluate.tradeoff import points as tradeoff_points
from pd_core.evaluate.tradeoff.points import Setting
from pd_core.generate import chunks as generate_chunks
from pd_core.generate import pilot as generate_pilot
from pd_core.generate import sampling, setup
from pd_core.generate.candidates import Origin, Recipe
from pd_core.generate.volume import INSTEAD, Volume
from pd_core.index import search

PILOT = "pool-pilot"  # its folder: by `pilot` an output of generate.py is known
STAGES = ("curve", "report")
OWN_WORDS = {  # for those in which volumes are refused, which are generate's
    "--weighting.rank": "--rank",
    "--weighting.output_size": "--output_size",
    INSTEAD: "give --polarities '[]' to leave Polarity Sampling out",
}
# what a number of a setting hangs on beside its images
REFERENCE = ("extractor", "n_real", "k_precision", "k_coverage")
POOL_TIMES = 20  # --n: largest pool, unless it is said
PART_CHUNKS = 16  # of the pool


def prepare(settings: TradeoffSettings) -> tuple[ResolvedTradeoff, RealSet, list[Setting]]:
    """Check what can be checked without Ray; local paths become absolute.

    Raises:
        UserError: a setting that every run needs is missing, or a path, threshold or target is wrong.
    """
    output = checked_output(settings.output, "tradeoff")
    index = required(settings.index, "index", "name the --output of build_index.py")
    generator = setup.resolved(settings.generator)
    if settings.target is not None:
        tradeoff_points.parse_target(settings.target)
    real = realset.open_for(index, settings.checkpoint, "--index")
    found = tradeoff_points.sweep(
        settings.thresholds, settings.weights, polarities_of(settings), truncations_of(settings)
    )
    for setting in found:
        if setting.method == "density":
            curve.weighting_of(setting, real, None, settings.bins)
    least = max(settings.metrics.k_precision, settings.metrics.k_coverage) + 1
    for name, rows in (("--n", settings.n), ("--n-real", min(settings.n_real or real.rows, real.rows))):
        if rows < least:
            raise UserError(
                f"{name} {rows}: too few images for k = {least - 1}; raise it to {least} or more, or lower k"
            )
    if settings.max_candidates is not None and settings.max_candidates < settings.n:
        raise UserError(f"--max-candidates {settings.max_candidates}: fewer than --n {settings.n}; raise it")
    checked = load.resolved(ResolvedTradeoff, settings, output=output, index=real.uri, generator=generator)
    return checked, real, found


def polarities_of(settings: TradeoffSettings) -> list[float]:
    """As set; else -1 and 1 where a volume costs a few passes through a small network, and none for diffusion."""
    if settings.polarities is not None:
        return settings.polarities
    return [-1.0, 1.0] if settings.generator.kind in ("stylegan", "torchscript") else []


def truncations_of(settings: TradeoffSettings) -> list[float]:
    """As set, where the generator has truncation; else two.

    Raises:
        UserError: the generator has none.
    """
    able = settings.generator.kind in TRUNCATION_SETTINGS
    if settings.truncations and not able:
        raise UserError(
            f"--truncations: --generator.kind {settings.generator.kind} has no truncation; leave it out "
            f"(kinds that have: {', '.join(TRUNCATION_SETTINGS)})"
        )
    if settings.truncations is not None:
        own = getattr(settings.generator, TRUNCATION_SETTINGS[settings.generator.kind]) if able else None
        return [psi for psi in settings.truncations if psi != own]
    return [0.5, 0.7] if able else []


def compare(settings: TradeoffSettings) -> None:
    """Every setting's metrics from one pool of candidates: `curve/`, figures and a table under `checked.output`."""
    checked, real, found = prepare(settings)

    def body(run: Run) -> None:
        with _own_words(), contextlib.ExitStack() as resources:
            planned = _plan(run, checked, real, found, resources)
            run.say(planned.text)
            pool = _candidates(run, "pool", planned.recipe, planned, planned.candidates)
            truncated = {
                s.truncation: _truncated(run, checked, real, planned, s.truncation)
                for s in found
                if s.truncation is not None
            }
        job, measured = _measure(run, checked, real, found, planned.weightings, pool, truncated)
        rows = curve.read_curve(job.stage.uri, measured.parts)
        images: dict[float | None, str] = {psi: stage.uri for psi, stage in truncated.items()}
        images[None] = pool.uri
        n_real = min(checked.n_real or real.rows, real.rows)
        report.make(run, report.Inputs(job, measured, images, planned.candidates, n_real, run.timings_s))
        if (
            run.made
        ):  # anything at all: a run that was killed after the curve makes its report, and tells MLflow of both
            _track(run.tracker, rows)
        table, page = (files.join(run.output, "report", name) for name in (report.TABLE, REPORT))
        chosen, refusal = ({}, None) if checked.target is None else choice(checked.target, rows)
        run.finish(("report",), {"table": table, "report": page, **chosen}, functools.partial(summary, rows), refusal)

    execute(checked, "tradeoff", STAGES, body, spaces.judged_roots(checked.judge, real.uri, (), checked.source))


def plan_tradeoff(settings: TradeoffSettings) -> None:
    """Run the pilot, which the run itself will take over, print what is to be expected, and stop."""
    checked, real, found = prepare(settings)
    with (
        started(checked, "tradeoff", STAGES, tracked=False) as run,
        _own_words(),
        contextlib.ExitStack() as resources,
    ):
        console.say(_plan(run, checked, real, found, resources).text)


@contextlib.contextmanager
def _own_words() -> Iterator[None]:
    """A refusal of the generator's volumes names the options of this workflow."""
    try:
        yield
    except UserError as error:
        text = str(error)
        for theirs, ours in OWN_WORDS.items():
            text = text.replace(theirs, ours)
        raise UserError(text) from None


# ---- the pool --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planned:
    """What the pilot decided: the pool's recipe, ω of each setting, the pool's candidates, and who makes them."""

    recipe: Recipe
    weightings: Mapping[str, Weighting]
    pool: generate_chunks.Pool
    candidates: int
    open_index: Callable[[], search.SearchPool]
    text: str


def _plan(
    run: Run, settings: TradeoffSettings, real: RealSet, found: list[Setting], resources: contextlib.ExitStack
) -> Planned:
    gpus = run.gpus_to_ask(settings.actor_gpus, files.join(run.output, PILOT))
    pool = generate_chunks.Pool(settings.actors, settings.actor_cpus, gpus)
    origin = _origin(run, settings, real, pool, settings.generator)
    if any(setting.method == "polarity" for setting in found):
        origin = replace(origin, volume=Volume(settings.rank, settings.output_size))

    @functools.cache
    def open_index() -> search.SearchPool:
        searching, now = settings.search, engine_resources.refreshed(run.now)
        opened = search.open_pool(real.index, now, searching.actors, searching.actor_cpus, True, "scoring")
        return resources.enter_context(opened)

    pilot = generate_pilot.make(run, origin, pool, open_index, settings.pilot, PILOT)
    weightings = {
        s.name: curve.weighting_of(s, real, pilot.log_volume, settings.bins) for s in found if s.method != "truncation"
    }
    deciding = {
        s.name: (pilot.statistic(s.statistic, settings.score), weightings[s.name])
        for s in found
        if s.name in weightings
    }
    most = settings.max_candidates or POOL_TIMES * settings.n
    wanted = tradeoff_points.pool_needed(deciding.values(), settings.n, most)
    chunks = max(-(-settings.n // settings.chunk), min(-(-wanted // settings.chunk), most // settings.chunk))
    rates = {name: float(weighting.acceptance_probability(*asked).mean()) for name, asked in deciding.items()}
    short = [name for name, rate in rates.items() if rate * chunks * settings.chunk < settings.n]
    lines = [f"pool: {chunks * settings.chunk} candidates for {len(found)} settings of {settings.n} images each"]
    if math.isfinite(pilot.actor_s):
        lines[0] += f", about {chunks * settings.chunk * pilot.actor_s:.0f} s of one generator process"
    if short:
        lines.append(f"pool: too small for {', '.join(short)}, which are left out; raise --max-candidates (now {most})")
    return Planned(origin.everyone(), weightings, pool, chunks * settings.chunk, open_index, "\n".join(lines))


def _origin(
    run: Run, settings: TradeoffSettings, real: RealSet, pool: generate_chunks.Pool, generator: GeneratorSettings
) -> Origin:
    facts = setup.describe(generator, run.now, pool)
    if polarities_of(settings) and not facts["latents"]:
        raise UserError(
            f"--generator.path {generator.path}: offers no latents, which Polarity Sampling needs "
            "(docs/generators.md); give --polarities '[]' to leave it out"
        )
    return setup.origin_of(
        generator,
        facts,
        real,
        seed=settings.seed,
        chunk=settings.chunk,
        threads=settings.actor_cpus,
        device=engine_resources.device_of(run.now, pool.actor_gpus),
        copies_quantile=0.0,
    )


def _truncated(run: Run, settings: TradeoffSettings, real: RealSet, planned: Planned, psi: float) -> artifacts.Stage:
    """n images of a truncation ψ, which are other images, and so not of the pool."""
    name = TRUNCATION_SETTINGS[settings.generator.kind]
    generator = settings.generator.model_copy(update={name: psi})
    recipe = _origin(run, settings, real, planned.pool, generator).everyone()
    rows = -(-settings.n // settings.chunk) * settings.chunk
    return _candidates(run, f"truncated-{psi:g}", recipe, planned, rows)


def _candidates(run: Run, folder: str, recipe: Recipe, planned: Planned, rows: int) -> artifacts.Stage:
    chunks = rows // recipe.chunk
    stage = sampling.stage_of(files.join(run.output, folder), "pool", recipe, {"n": rows})
    parts = -(-chunks // PART_CHUNKS)
    # parts of like size: little is made beyond the last
    job = sampling.Job(recipe, stage, None, -(-chunks // parts), rows)
    run.stage(stage, lambda: sampling.run(job, run.now, planned.pool, planned.open_index(), 1.0, sampling.Budget()))
    return stage


# ---- the curve -------------------------------------------------------------------------------------------------------


def _measure(
    run: Run,
    settings: TradeoffSettings,
    real: RealSet,
    found: list[Setting],
    weightings: Mapping[str, Weighting],
    pool: artifacts.Stage,
    truncated: Mapping[float, artifacts.Stage],
) -> tuple[curve.Job, artifacts.Artifact]:
    measured_in = spaces.open_spaces(real, settings.judge)
    extraction = Extraction(settings.extraction, DataSettings(source=None), settings.source)
    of_real = spaces.features_of_real(run, real, measured_in, extraction)

    def features_of(name: str, stage: artifacts.Stage) -> dict[str, Features]:
        chosen = ImageSet(name, stage.uri, spaces.table_source(stage.uri, curve.SCORED), None)
        return spaces.features_of_set(run, chosen, measured_in, extraction)

    of_pool = features_of("pool", pool)
    of_truncated = {
        (space, psi): featured
        for psi, stage in truncated.items()
        for space, featured in features_of(f"truncated-{psi:g}", stage).items()
    }
    job = curve.Job(
        output=run.output,
        settings=settings,
        swept=tuple(found),
        spaces=tuple(measured_in),
        real=of_real,
        pool=of_pool,
        truncated=of_truncated,
        weightings=weightings,
        densities=real.fingerprints["densities"],
    )
    return job, run.stage(job.stage, lambda: curve.run(job, run.now))


def _track(tracker: tracking.Tracker, rows: list[dict[str, Any]]) -> None:
    """A nested run for each setting and space, so that MLflow's own charts can draw the trade-off."""
    for row in rows:
        with tracker.stage(f"{row['space']}: {row['setting']}") as nested:
            named = ("curve", "method", "threshold", "weight", "polarity", "truncation", "n", *REFERENCE)
            nested.params({name: row[name] for name in named if row[name] is not None})
            numbers = {name: value for name, value in row.items() if isinstance(value, float) and name not in named}
            nested.metrics(numbers)


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """The frontier of each space, for the console."""
    lines = []
    for space in dict.fromkeys(row["space"] for row in rows):
        best = sorted((r for r in rows if r["space"] == space and r["frontier"]), key=lambda r: r["recall"])
        points = "; ".join(f"{r['setting']}: precision {r['precision']:.3f}, recall {r['recall']:.3f}" for r in best)
        lines.append(f"frontier ({space}): {points}")
    return lines


def choice(target: str, rows: list[dict[str, Any]]) -> tuple[dict[str, str], UserError | None]:
    """Under `target` which setting reaches it, in the judge's space where there is one; or the error that none does."""
    wanted = tradeoff_points.parse_target(target)
    space = rows[-1]["space"]
    own = [row for row in rows if row["space"] == space]
    if report.best(wanted, own) is not None:
        return {"target": " ".join(report.choice(wanted, own))}, None
    lines = "; ".join(report.frontier_lines(wanted, own))
    refusal = f"--target {target}: out of reach in the {space} space; the frontier: {lines}; lower the target"
    return {}, UserError(refusal)
