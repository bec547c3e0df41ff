"""The stages of generate in their order: pilot, samples, export, report; what workflows/generate.py calls."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pd_core import (
    acceptance,
    cluster,
    config,
    exporting,
    generators,
    ids,
    piloting,
    realset,
    sampling,
    sampling_report,
    search,
    storage,
    tracking,
)
from pd_core.candidates import EVERYTHING, Recipe
from pd_core.config import GenerateSettings
from pd_core.errors import UserError
from pd_core.generators.python import split
from pd_core.realset import RealSet
from pd_core.running import REPORT, Run, checked_output, failures, flatten

PILOT_PART_CHUNKS = 8
STAGES = ("pilot", "samples", "rejected", "export", "report")


def prepare(settings: GenerateSettings) -> tuple[GenerateSettings, RealSet]:
    """Check what can be checked without Ray; local paths become absolute.

    Raises:
        UserError: a setting that every run needs is missing, a path that must be there is not, the index is not finished, or
            the threshold lies outside its densities.
    """
    output = checked_output(settings.output, "generate")
    if not settings.index:
        raise UserError("--index: not set; name the --output of build_index.py")
    if settings.n is None:
        raise UserError("--n: not set; how many accepted images are wanted")
    generator = settings.generator
    generators.check_path(generator)
    assert generator.path is not None, "check_path refuses none"
    piloting.check_settings(settings.weighting, generator.labels)
    paths = {name: value for name in ("path", "code", "prompts") if (value := getattr(generator, name))}
    local = {name: storage.absolute(value) for name, value in paths.items() if _is_file(value)}
    if generator.kind == "python":
        source, factory = split(generator.path)
        if _is_file(source):
            local["path"] = f"{storage.absolute(source)}:{factory}"
    if "prompts" in paths and "prompts" not in local and storage.is_local(paths["prompts"]):
        raise UserError(f"--generator.prompts {paths['prompts']}: no such file; check the path")
    settings = settings.model_copy(
        update={
            "output": output,
            "index": storage.absolute(settings.index),
            "checkpoint": settings.checkpoint and storage.absolute(settings.checkpoint),
            "generator": generator.model_copy(update=local),
        }
    )
    real = _open_realset(settings)
    if settings.weighting.kind == "two_level" and not settings.weighting.per_label:
        piloting.weighting_of(settings.weighting, real.density_quantiles, np.empty(0), "the index")
    return settings, real


def _is_file(value: str) -> bool:
    return storage.is_local(value) and storage.exists(storage.absolute(value))


def generate(settings: GenerateSettings) -> None:
    """Rejection-sampled images with their densities, in `samples/` under `settings.output`."""
    settings, real = prepare(settings)
    cluster.say(config.to_yaml(settings))
    output, watch = str(settings.output), storage.Stopwatch()
    with (
        cluster.session(output) as now,
        tracking.start(settings.tracking, output, "generate", {"workflow": "generate"}) as tracker,
    ):
        tracker.params(dict(flatten(settings.model_dump(mode="json"))))
        run = Run(settings, output, now, tracker, "generate", STAGES)
        with contextlib.ExitStack() as resources:
            _generate(run, settings, real, resources)
        with failures("run", output):
            run.record(watch.seconds, ("report",))
        run.say_done(watch.seconds)
        if tracker.hint:
            cluster.say(f"tracking: {tracker.hint}")
        cluster.say(f"images: {storage.join(output, 'samples')}/*.parquet")
        cluster.say(f"report: {storage.join(output, 'report', REPORT)}")


def plan_generate(settings: GenerateSettings) -> None:
    """Run the pilot, which the run itself will take over, print what is to be expected, and stop."""
    settings, real = prepare(settings)
    cluster.say(config.to_yaml(settings))
    output = str(settings.output)
    with failures("samples", output):
        finished = storage.load_artifact(storage.join(output, "samples")) is not None
    if settings.overwrite and finished:
        raise UserError(
            f"--output {output}: holds finished samples, and --dry-run --overwrite would replace the pilot they were made with; "
            "choose another --output"
        )
    with cluster.session(output) as now, tracking.start(_off(settings), output, "generate", {}) as tracker:
        run = Run(settings, output, now, tracker, "generate", STAGES)
        with contextlib.ExitStack() as resources:
            planned = _plan(run, settings, real, resources)
        cluster.say(planned.text)


def _off(settings: GenerateSettings) -> config.TrackingSettings:
    return settings.tracking.model_copy(update={"enabled": False})


@dataclass(frozen=True)
class Planned:
    """What the pilot decided."""

    job: sampling.Job
    pool: sampling.Pool
    pilot: piloting.Pilot
    expected: piloting.Expectation
    open_index: Callable[[], search.SearchPool]
    text: str


def _generate(run: Run, settings: GenerateSettings, real: RealSet, resources: contextlib.ExitStack) -> None:
    planned = _plan(run, settings, real, resources)
    cluster.say(planned.text)
    job = planned.job
    budget = sampling.Budget(settings.max_candidates, settings.max_hours and settings.max_hours * 3600)
    if job.rejected is not None:
        with failures("rejected", job.rejected.uri):
            job.rejected.begin(settings.overwrite)

    def make() -> tuple[list[storage.Part], dict[str, Any]]:
        exporting.remove(run.output)  # of an older set of samples
        if job.rejected is None:
            storage.remove(storage.join(run.output, "rejected"))
        parts, totals = sampling.run(
            job, run.now, planned.pool, planned.open_index(), planned.expected.planning_rate, budget
        )
        if job.rejected is not None:
            job.rejected.commit(job.rejected.finished_parts().values(), {}, {})
        return parts, totals | {"settings": settings.model_dump(mode="json")}

    sampled = run.stage(job.samples, make)
    resources.close()  # the search actors' memory is wanted no more
    if settings.export != "none":
        exported = exporting.stage_of(run.output, job.samples, settings.export)
        run.stage(exported, lambda: exporting.run(exported, job.samples.uri, sampled, settings.export))
    reporting = sampling_report.stage_of(run.output, job.samples, settings)
    facts = sampling_report.Inputs(
        job, sampled, planned.pilot, planned.expected, planned.text, settings, dict(run.timings_s)
    )
    run.stage(reporting, lambda: sampling_report.run(reporting, facts))


def _plan(run: Run, settings: GenerateSettings, real: RealSet, resources: contextlib.ExitStack) -> Planned:
    """Everything up to the samples: open the generator, run the pilot, resolve the weighting."""
    assert settings.n is not None
    with failures("pilot", run.output):
        begun = None if settings.overwrite else storage.begun_identity(storage.join(run.output, "pilot"))
    gpus = cluster.gpus_to_ask(run.now, settings.actor_gpus, (begun or {}).get("device"))
    pool = sampling.Pool(settings.actors, settings.actor_cpus, gpus)
    with failures("generator", str(settings.generator.path)):
        facts = _describe(settings, run.now, pool)
    classes, names = _classes(settings, facts)
    by_label = _label_quantiles(settings, real, names)
    recipe = Recipe(
        generator=settings.generator,
        generator_identity=facts["identity"],
        realset=real,
        weightings={EVERYTHING: acceptance.uniform()},
        volume=piloting.volume_of(settings.weighting),
        score="both",
        seed=ids.stream(settings.seed, "pilot"),
        chunk=settings.chunk,
        threads=settings.actor_cpus,
        classes=classes,
        class_names=names,
        prompts=_prompts(settings, facts),
        device=cluster.device_of(run.now, gpus),
        copy_distance=real.copy_distance(settings.copies_quantile),
        drop_copies=False,
    )

    @functools.cache
    def open_index() -> search.SearchPool:
        searching, now = settings.search, cluster.refreshed(run.now)
        pool = search.open_pool(real.index, now, searching.actors, searching.actor_cpus, beside_generator=True)
        return resources.enter_context(pool)

    pilot = _pilot(run, settings, recipe, pool, open_index)
    weightings = piloting.weightings_of(settings.weighting, real, by_label, pilot, settings.score)
    expected = piloting.expect(settings, weightings, pilot)
    piloting.check_affordable(settings, real, by_label, pilot, expected)
    recipe = replace(
        recipe,
        weightings=weightings,
        score=settings.score,
        seed=settings.seed,
        drop_copies=settings.drop_copies,
    )
    job = _job(run.output, settings, recipe, expected, pilot.png_bytes)
    _, most, _, _ = cluster.actor_pool(run.now, pool.actors, pool.actor_cpus, pool.actor_gpus)
    fit = cluster.actors_that_fit(run.now, pool.actor_cpus, pool.actor_gpus)
    actors = max(1, min(most, fit))  # what the autoscaler may add is not there yet
    text = piloting.plan(settings, expected, pilot, actors, weightings, recipe.copy_distance)
    return Planned(job, pool, pilot, expected, open_index, text)


def _task(function: Any) -> Any:
    import ray

    return ray.remote(function).options(num_cpus=1, **cluster.TASK_OPTIONS)


def _open_realset(settings: GenerateSettings) -> RealSet:
    with failures("index", str(settings.index)):
        real = realset.open_realset(str(settings.index))
    if settings.checkpoint:
        real = replace(real, extractor=replace(real.extractor, checkpoint=settings.checkpoint))
    return real


def _describe(settings: GenerateSettings, now: cluster.Cluster, pool: sampling.Pool) -> dict[str, Any]:
    """`describe` where an actor of the generator would run: what fits one fits this."""
    import ray

    _, _, cpus, gpus = cluster.actor_pool(now, pool.actors, pool.actor_cpus, pool.actor_gpus)
    task: Any = ray.remote(describe).options(num_cpus=cpus, num_gpus=gpus, **cluster.TASK_OPTIONS)
    return cluster.get(task.remote(settings.generator))


def describe(settings: config.GeneratorSettings) -> dict[str, Any]:
    """Identity and abilities of a generator, which is loaded for it: runs in a Ray task."""
    generator = generators.open_generator(settings, cluster.assigned_device())
    return {
        "identity": generator.identity(),
        "num_classes": generator.num_classes,
        "takes_prompts": generator.takes_prompts,
    }


def _pilot(
    run: Run,
    settings: GenerateSettings,
    recipe: Recipe,
    pool: sampling.Pool,
    open_index: Callable[[], search.SearchPool],
) -> piloting.Pilot:
    chunks = -(-settings.pilot // settings.chunk)
    rows = chunks * settings.chunk
    stage = sampling.stage_of(storage.join(run.output, "pilot"), "pilot", recipe, {"n": rows})
    job = sampling.Job(recipe, stage, None, min(chunks, PILOT_PART_CHUNKS), rows)
    artifact = run.stage(stage, lambda: sampling.run(job, run.now, pool, open_index(), 1.0, sampling.Budget()))
    with failures("pilot", stage.uri):
        return cluster.get(_task(piloting.read).remote(stage, artifact))


def _job(
    output: str,
    settings: GenerateSettings,
    recipe: Recipe,
    expected: piloting.Expectation,
    png_bytes: float,
) -> sampling.Job:
    assert settings.n is not None
    per_part = expected.chunks_per_part(settings.n, settings.part_rows, settings.chunk, png_bytes)
    more = {"n": settings.n, "chunks_per_part": per_part, "keep_rejected": settings.keep_rejected}
    samples = sampling.stage_of(storage.join(output, "samples"), "samples", recipe, more)
    rejected = None
    if settings.keep_rejected:
        rejected = sampling.stage_of(storage.join(output, "rejected"), "rejected", recipe, more)
    return sampling.Job(recipe, samples, rejected, per_part, settings.n)


# ---- what is asked for -----------------------------------------------------------------------------------------------


def _classes(settings: GenerateSettings, facts: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Class numbers to draw from and their names."""
    text, many = settings.generator.labels, facts["num_classes"]
    if text == "none":
        if many:
            raise UserError(
                f"--generator.labels: the generator takes one of {many} class labels; set all, or a list such as 0,3"
            )
        return (), ()
    if not many:
        raise UserError(f"--generator.labels {text}: the generator takes no class labels; leave it out")
    try:
        classes = tuple(range(many)) if text == "all" else tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--generator.labels {text}: expected none, all, or class numbers such as 0,3,7") from None
    if wrong := [c for c in classes if not 0 <= c < many]:
        raise UserError(f"--generator.labels {text}: {wrong[0]} is outside 0 ... {many - 1}")
    names = settings.generator.label_names
    if names is not None and len(names) != many:
        raise UserError(f"--generator.label_names: {len(names)} names for {many} classes; give one for each")
    return classes, tuple(names[c] if names else str(c) for c in classes)


def _prompts(settings: GenerateSettings, facts: Mapping[str, Any]) -> tuple[str, ...]:
    path = settings.generator.prompts
    if path is None:
        if facts["takes_prompts"]:
            raise UserError("--generator.prompts: the generator takes text; name a file with a prompt on each line")
        return ()
    if not facts["takes_prompts"]:
        raise UserError(f"--generator.prompts {path}: the generator takes no text; leave it out")
    return generators.read_prompts(path)


def _label_quantiles(settings: GenerateSettings, real: RealSet, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Real densities of each label that is generated, where weightings are per label."""
    if not settings.weighting.per_label:
        return {}
    densities = storage.load_artifact(storage.join(real.uri, "densities"))
    assert densities is not None
    found = cluster.get(_task(piloting.label_quantiles).remote(real, [part.name for part in densities.parts]))
    if absent := [name for name in names if name not in found]:
        raise UserError(
            f"--weighting.per_label: the index holds fewer than {piloting.FEWEST_OF_LABEL} images of label {absent[0]!r} "
            f"(its labels: {', '.join(sorted(found)[:10]) or 'none'}); set --generator.label_names to the index's labels"
        )
    return {name: found[name] for name in dict.fromkeys(names)}
