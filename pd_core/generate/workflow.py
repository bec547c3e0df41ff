"""The stages of generate in their order: pilot, samples, export, report; what workflows/generate.py calls."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pd_core.build import fleet
from pd_core.core import artifacts, files
from pd_core.core.errors import UserError
from pd_core.core.settings import load
from pd_core.core.settings.generate import GenerateSettings, ResolvedGenerate
from pd_core.density import realset
from pd_core.density import weighting as density_weighting
from pd_core.density.realset import RealSet
from pd_core.engine import console, tasks
from pd_core.engine import resources as engine_resources
from pd_core.engine.runs import REPORT, Run, checked_output, execute, failures, required, started
from pd_core.generate import chunks, export, report, sampling, setup
from pd_core.generate import pilot as generate_pilot
from pd_core.generate.candidates import Recipe
from pd_core.index import search

STAGES = ("pilot", "samples", "rejected", "export", "report")
PIXEL_BYTES_OF_PNG = 8.0  # in memory, of float32 pixels, over those of the photograph's PNG
LEVER = (
    "--actors larger (an autoscaling cluster starts 64 at most without it), with more nodes; GPUs with --actor_gpus 1"
)


def prepare(settings: GenerateSettings) -> tuple[ResolvedGenerate, RealSet]:
    """Check what can be checked without Ray; local paths become absolute.

    Raises:
        UserError: a setting that every run needs is missing, a path that must be there is not, the index is not
            finished, or the threshold lies outside its densities.
    """
    checked = check(settings)
    real = realset.open_for(checked.index, checked.checkpoint, "--index")
    if settings.weighting.kind == "two_level" and not settings.weighting.per_label:
        density_weighting.resolve(settings.weighting, real.density_quantiles)
    return checked, real


def check(settings: GenerateSettings) -> ResolvedGenerate:
    """Check what needs neither Ray nor the index; local paths become absolute.

    Raises:
        UserError: a setting that every run needs is missing, or a path that must be there is not.
    """
    output = checked_output(settings.output, "generate")
    index = required(settings.index, "index", "name the --output of build_index.py")
    n = required(settings.n, "n", "how many accepted images are wanted")
    generator = setup.resolved(settings.generator)
    density_weighting.check(settings.weighting, generator.labels)
    return load.resolved(
        ResolvedGenerate,
        settings,
        output=output,
        index=files.absolute(index),
        n=n,
        checkpoint=settings.checkpoint and files.absolute(settings.checkpoint),
        generator=generator,
    )


def generate(settings: GenerateSettings) -> None:
    """Rejection-sampled images with their densities, in `samples/` under `settings.output`."""
    checked, real = prepare(settings)

    def body(run: Run) -> None:
        with contextlib.ExitStack() as resources:
            _generate(run, checked, real, resources)
        images, page = files.join(run.output, "samples", "*.parquet"), files.join(run.output, "report", REPORT)
        run.finish(("report",), {"images": images, "report": page})

    execute(checked, "generate", STAGES, body)


def plan_generate(settings: GenerateSettings) -> None:
    """Run the pilot, which the run itself will take over, print what is to be expected, and stop."""
    checked, real = prepare(settings)
    output = checked.output
    with failures("samples", output):
        finished = artifacts.load_artifact(files.join(output, "samples")) is not None
    if settings.overwrite and finished:
        raise UserError(
            f"--output {output}: holds finished samples, and --dry-run --overwrite would replace the pilot they were "
            "made with; choose another --output"
        )
    with started(checked, "generate", STAGES, tracked=False) as run, contextlib.ExitStack() as resources:
        console.say(_plan(run, checked, real, resources).text)


@dataclass(frozen=True)
class Planned:
    """What the pilot decided."""

    job: sampling.Job
    pool: chunks.Pool
    pilot: generate_pilot.Pilot
    expected: generate_pilot.Expectation
    open_index: Callable[[], search.SearchPool]
    text: str


def _generate(run: Run, settings: ResolvedGenerate, real: RealSet, resources: contextlib.ExitStack) -> None:
    planned = _plan(run, settings, real, resources)
    run.say(planned.text)
    job = planned.job
    budget = sampling.Budget(settings.max_candidates, settings.max_hours and settings.max_hours * 3600)
    if job.rejected is not None:
        with failures("rejected", job.rejected.uri):
            job.rejected.begin(settings.overwrite)

    def make() -> tuple[list[artifacts.Part], dict[str, Any]]:
        export.remove_other(run.output, job.samples)
        if job.rejected is None:
            artifacts.remove(files.join(run.output, "rejected"))
        parts, totals = sampling.run(
            job, run.now, planned.pool, planned.open_index(), planned.expected.planning_rate, budget
        )
        if job.rejected is not None:
            job.rejected.commit(job.rejected.finished_parts().values(), {}, {})
        return parts, totals | {"settings": settings.model_dump(mode="json"), "extractor": real.extractor.identity()}

    sampled = run.stage(job.samples, make)
    resources.close()  # the search actors' memory is wanted no more
    if settings.export != "none":
        exported = export.stage_of(run.output, job.samples, settings.export)
        run.stage(exported, lambda: export.run(exported, job.samples.uri, sampled, settings.export))
    reporting = report.stage_of(run.output, job.samples, settings)
    facts = report.Inputs(job, sampled, planned.pilot, planned.expected, planned.text, settings, dict(run.timings_s))
    run.stage(reporting, lambda: report.run(reporting, facts))


def _plan(run: Run, settings: ResolvedGenerate, real: RealSet, resources: contextlib.ExitStack) -> Planned:
    """Everything up to the samples: open the generator, run the pilot, resolve the weighting."""
    with failures("pilot", run.output):
        begun = None if settings.overwrite else artifacts.begun_identity(files.join(run.output, "pilot"))
    gpus = engine_resources.gpus_to_ask(run.now, settings.actor_gpus, (begun or {}).get("device"))
    pool = chunks.Pool(settings.actors, settings.actor_cpus, gpus)
    origin = setup.origin_of(
        settings.generator,
        setup.describe(settings.generator, run.now, pool),
        real,
        seed=settings.seed,
        chunk=settings.chunk,
        threads=settings.actor_cpus,
        device=engine_resources.device_of(run.now, gpus),
        copies_quantile=settings.copies_quantile,
        volume=generate_pilot.volume_of(settings.weighting),
    )
    by_label = _label_quantiles(settings, real, origin.class_names)

    @functools.cache
    def open_index() -> search.SearchPool:
        searching, now = settings.search, engine_resources.refreshed(run.now)
        opened = search.open_pool(real.index, now, searching.actors, searching.actor_cpus, True, "scoring")
        return resources.enter_context(opened)

    pilot = generate_pilot.make(run, origin, pool, open_index, settings.pilot)
    weightings = generate_pilot.weightings_of(settings.weighting, real, by_label, pilot, settings.score)
    expected = generate_pilot.expect(settings, weightings, pilot)
    generate_pilot.check_affordable(settings, real, by_label, pilot, expected)
    recipe = origin.accepting(weightings, settings.score, settings.drop_copies)
    job = _job(run.output, settings, recipe, expected, pilot.png_bytes)
    _, most, _, _ = engine_resources.actor_pool(run.now, pool.actors, pool.actor_cpus, pool.actor_gpus)
    fit = engine_resources.actors_that_fit(run.now, pool.actor_cpus, pool.actor_gpus)
    actors = max(1, min(most, fit))  # what the autoscaler may add is not there yet
    text = generate_pilot.plan(settings, expected, pilot, actors, weightings, recipe.copy_distance)
    text = "\n".join([text, *_limits(run, settings, job, expected, pilot, most)])
    return Planned(job, pool, pilot, expected, open_index, text)


def _limits(
    run: Run,
    settings: ResolvedGenerate,
    job: sampling.Job,
    expected: generate_pilot.Expectation,
    pilot: generate_pilot.Pilot,
    replicas: int,
) -> list[str]:
    """What limits a run that is large; nothing where the pilot's seconds are lost."""
    if math.isnan(pilot.actor_s):
        return []
    real, machines, chosen = job.recipe.realset, fleet.fleet_of(run.now), settings.search
    searchers, *_ = engine_resources.search_actors(
        run.now, chosen.actors, chosen.actor_cpus, real.index.shards, search.BESIDE_SHARE
    )
    # the index lies in memory beside the generators, in as many pieces as there are processes that search it
    held = 4.0 * real.rows * real.index.dim / min(machines.nodes, searchers)
    together = math.ceil(min(replicas, machines.cores) / machines.nodes)
    each = held / together + settings.chunk * PIXEL_BYTES_OF_PNG * pilot.png_bytes
    step = fleet.Step("samples", expected.candidates(settings.n) * pilot.actor_s, replicas, each, LEVER)
    return [line.replace("limit:", "limit: ") for line in fleet.limit_lines([step], machines)]


def _job(
    output: str,
    settings: ResolvedGenerate,
    recipe: Recipe,
    expected: generate_pilot.Expectation,
    png_bytes: float,
) -> sampling.Job:
    per_part = expected.chunks_per_part(settings.n, settings.part_rows, settings.chunk, png_bytes)
    more = {"n": settings.n, "chunks_per_part": per_part, "keep_rejected": settings.keep_rejected}
    samples = sampling.stage_of(files.join(output, "samples"), "samples", recipe, more)
    rejected = None
    if settings.keep_rejected:
        rejected = sampling.stage_of(files.join(output, "rejected"), "rejected", recipe, more)
        samples = replace(samples, beside=(rejected.uri,))
    return sampling.Job(recipe, samples, rejected, per_part, settings.n)


def _label_quantiles(settings: GenerateSettings, real: RealSet, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Real densities of each label that is generated, where weightings are per label."""
    if not settings.weighting.per_label:
        return {}
    found = tasks.get(tasks.task(density_weighting.label_quantiles).remote(real.uri))
    if absent := [name for name in names if name not in found]:
        raise UserError(
            f"--weighting.per_label: the index holds fewer than {density_weighting.FEWEST_OF_LABEL} images of label "
            f"{absent[0]!r} (its labels: {', '.join(sorted(found)[:10]) or 'none'}); set --generator.label_names to "
            "the index's labels"
        )
    return {name: found[name] for name in dict.fromkeys(names)}
