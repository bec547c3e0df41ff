"""The scheduled job: index what is new, generate by recipes, measure, release what passes its gates; what workflows/curate.py calls.

Under `output`: `lock/`, `index/VERSION/` (each an output of build_index), `candidates/VERSION/` (outputs of generate and
evaluate), `releases/DATE-HASH/`, `latest.json`. A VERSION ends with a hash of everything that decides its content: a run that was
broken off is found again by the next one, which goes on with it; a run that finds nothing new makes nothing.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pyarrow as pa

from pd_core import (
    chunking,
    cluster,
    config,
    errors,
    evaluation,
    generation,
    leases,
    opening,
    pipeline,
    releasing,
    sources,
    storage,
    telemetry,
    tracking,
    updating,
)
from pd_core.config import CurateSettings, RecipeSettings
from pd_core.errors import UserError
from pd_core.running import Run, failures, flatten

LOCK, INDEX, CANDIDATES = "lock", "index", "candidates"
CURRENT = "current.json"  # in INDEX: the version that was finished last
EVALUATION = "evaluation"
OUTCOMES = {errors.EXIT_DONE: "released", errors.EXIT_NOTHING_NEW: "nothing_new", errors.EXIT_HELD_BACK: "held_back"}
SECTIONS = ("data", "features", "index", "density", "estimator", "update")  # of the settings of build_index


def prepare(settings: CurateSettings) -> CurateSettings:
    """Check what can be checked without Ray and without a lock; local paths become absolute.

    Raises:
        UserError: as the workflows of which the run consists; no recipes.
    """
    if not settings.output:
        raise UserError("--output: not set; name the directory or s3:// prefix for the releases")
    if not settings.recipes:
        raise UserError(
            "recipes: none; name at least one set, e.g. {name: typical, n: 1000, threshold: p80, weight: 33}"
        )
    if cluster.in_job_copy() and storage.is_local(settings.output) and not settings.output.startswith("/"):
        raise UserError(
            f"--output {settings.output}: would go with the job's temporary copy; give an absolute path or s3://"
        )
    output = storage.absolute(settings.output)
    settings = settings.model_copy(update={"output": output, "generator": opening.resolved(settings.generator)})
    checked, _ = pipeline.prepare(_build_settings(settings, storage.join(output, INDEX, "x"), None))
    settings = settings.model_copy(update={"features": checked.features})
    for recipe in settings.recipes:
        generation.check(_generate_settings(settings, recipe, storage.join(output, INDEX, "x"), output))
    return settings


def curate(settings: CurateSettings) -> int:
    """One scheduled run; returns the exit code: released (0), nothing new, or held back by a gate."""
    settings = prepare(settings)
    cluster.say(config.to_yaml(settings))
    output = str(settings.output)
    with leases.hold(storage.join(output, LOCK), settings.lock.lease_s) as lease, _session(settings) as (run, tracker):
        for outcome in OUTCOMES.values():
            telemetry.RELEASES.add(0, outcome=outcome)
        with failures("curate", output):
            index = _index(run, settings, lease)
            lease.check()
            code = _release(run, settings, index, lease)
            _clear(output, settings.keep)
        telemetry.RELEASES.add(1, outcome=OUTCOMES[code])
        tracker.metrics({"exit_code": code})
    return code


@contextmanager
def _session(settings: CurateSettings) -> Iterator[tuple[Run, tracking.Tracker]]:
    """One cluster for the run and all that it consists of, and a tracked run of its own."""
    output = str(settings.output)
    with (
        cluster.session(output, "curate") as now,
        cluster.shared(now),
        tracking.start(settings.tracking, output, "curate", {"workflow": "curate"}) as tracker,
    ):
        tracker.params(dict(flatten(settings.model_dump(mode="json"))))
        yield Run(settings, output, now, tracker, "curate", ()), tracker


# ---- index -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Version:
    """A version of the index: its directory, and the hash of what it was made from."""

    uri: str
    digest: str


def _build_settings(settings: CurateSettings, output: str, base: str | None) -> config.BuildIndexSettings:
    values = {name: getattr(settings, name) for name in SECTIONS}
    return config.made(config.BuildIndexSettings, **values, output=output, base=base, tracking=settings.tracking)


def _index(run: Run, settings: CurateSettings, lease: leases.Lease) -> Version:
    """The index of the source as it is now: the current version, or an update of it, or one that is built anew."""
    root = storage.join(run.output, INDEX)
    current = _current(root)
    version = _version_of_now(root, settings)
    if current is not None and current.digest == version.digest and _finished(current.uri):
        cluster.say(f"index: nothing new in {settings.data.source}; {current.uri} it is")
        return current
    base = current.uri if current is not None and _finished(current.uri) else None
    if current is not None and base is None:
        cluster.say(f"index: {current.uri} is not there any more; building anew")
    try:
        pipeline.build_index(_build_settings(settings, version.uri, base))
    except updating.OtherSettings as error:
        cluster.say(f"index: {error}; building anew")
        pipeline.build_index(_build_settings(settings, version.uri, None).model_copy(update={"overwrite": True}))
    lease.check()
    pointer = {"version": version.uri.rpartition("/")[2], "digest": version.digest}
    storage.write_bytes(storage.join(root, CURRENT), json.dumps(pointer).encode())
    return version


def _version_of_now(root: str, settings: CurateSettings) -> Version:
    source = sources.open_source(settings.data)
    decides = {
        "settings": {name: getattr(settings, name).model_dump(mode="json") for name in SECTIONS},
        "source": sources.identity(source),
        "state": cluster.get(cluster.task(sources.state).remote(source)),
    }
    digest = storage.fingerprint(decides)[: releasing.HASH_LETTERS]
    return Version(_named(root, digest), digest)


def _current(root: str) -> Version | None:
    try:
        pointer = json.loads(storage.read_bytes(storage.join(root, CURRENT)))
    except FileNotFoundError:
        return None
    return Version(storage.join(root, pointer["version"]), pointer["digest"])


def _finished(uri: str) -> bool:
    return storage.exists(storage.join(uri, "run.json"))


def _named(root: str, digest: str) -> str:
    """The folder of a digest: the one that is there, or a new one whose name begins with the time."""
    there = [name for name in storage.folders(root) if name.endswith(f"-{digest}")]
    now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    return storage.join(root, there[-1] if there else f"{now}-{digest}")


# ---- sets ------------------------------------------------------------------------------------------------------------


def _generate_settings(
    settings: CurateSettings, recipe: RecipeSettings, index: str, folder: str
) -> config.GenerateSettings:
    generator, how = settings.generator, settings.generation
    if recipe.labels is not None:
        generator = generator.model_copy(update={"labels": recipe.labels})
    return config.made(
        config.GenerateSettings,
        output=storage.join(folder, recipe.name),
        index=index,
        checkpoint=settings.features.checkpoint,
        generator=generator,
        weighting=recipe.weighting,
        n=recipe.n,
        seed=recipe.seed,
        score=recipe.score,
        drop_copies=recipe.drop_copies,
        tracking=settings.tracking,
        **how.model_dump(),
    )


def _evaluate_settings(settings: CurateSettings, index: str, folder: str) -> config.EvaluateSettings:
    how = settings.evaluation
    return config.made(
        config.EvaluateSettings,
        real=index,
        samples=[storage.join(folder, recipe.name) for recipe in settings.recipes],
        output=storage.join(folder, EVALUATION),
        checkpoint=settings.features.checkpoint,
        n=how.n,
        n_real=how.n_real,
        judge=how.judge,
        metrics=how.metrics,
        extraction=how.extraction,
        tracking=settings.tracking,
    )


def _release(run: Run, settings: CurateSettings, index: Version, lease: leases.Lease) -> int:
    """Make what the recipes ask for, measure it, write the release, and move the pointer if every gate holds."""
    last = releasing.open_latest(run.output)
    how = settings.generation
    gpus = cluster.gpus_to_ask(run.now, how.actor_gpus, None)
    facts = opening.describe(settings.generator, run.now, chunking.Pool(how.actors, how.actor_cpus, gpus))
    inputs = {
        "index": {name: a.fingerprint for name, a in updating.open_base(index.uri).artifacts.items()},
        "generator": facts["identity"],
        "generator_settings": settings.generator.model_dump(mode="json"),
        "generation": how.model_dump(mode="json", exclude={"actors", "max_candidates"}),
        "recipes": [recipe.model_dump(mode="json") for recipe in settings.recipes],
        "evaluation": settings.evaluation.model_dump(mode="json"),
    }
    identity = inputs | {"gates": [gate.model_dump(mode="json") for gate in settings.gates]}
    stage = releasing.stage_of(run.output, identity)
    there = releasing.open_release(run.output, stage.uri.rpartition("/")[2])
    if there is not None and last is not None and there.name == last.name:
        cluster.say(f"nothing new since {last.uri}")
        return errors.EXIT_NOTHING_NEW
    if there is None:
        folder = _named(storage.join(run.output, CANDIDATES), storage.fingerprint(inputs)[: releasing.HASH_LETTERS])
        sets, measured = _sets(settings, index, folder, lease)
        numbers = releasing.numbers_of(sets, measured)
    else:
        numbers = there.record["numbers"]
    verdicts = releasing.judge(settings.gates, numbers, {} if last is None else last.record["numbers"])
    if there is None:
        record = {
            "inputs": identity,
            "index": index.uri,
            "source": settings.data.source,
            "samples": {made.name: made.artifact.fingerprint for made in sets},
            "settings": settings.model_dump(mode="json"),
            "versions": storage.package_versions(),
            "numbers": numbers,
            "verdicts": releasing.as_json(verdicts),
            "gates_hold": all(verdict.holds for verdict in verdicts),
        }
        run.stage(stage, lambda: releasing.run(stage, sets, measured, record, last))
    return _point(run, stage, verdicts, numbers, lease)


def _sets(
    settings: CurateSettings, index: Version, folder: str, lease: leases.Lease
) -> tuple[list[releasing.Set], pa.Table]:
    """The samples of every recipe, and the rows of their evaluation."""
    sets = []
    for recipe in settings.recipes:
        asked = _generate_settings(settings, recipe, index.uri, folder)
        generation.generate(asked)
        lease.check()
        uri = storage.join(str(asked.output), "samples")
        artifact = storage.load_artifact(uri)
        assert artifact is not None, "generate has committed it"
        sets.append(releasing.Set(recipe.name, uri, artifact))
    evaluation.evaluate(_evaluate_settings(settings, index.uri, folder))
    lease.check()
    metrics = storage.join(folder, EVALUATION, "metrics")
    artifact = storage.load_artifact(metrics)
    assert artifact is not None, "evaluate has committed it"
    return sets, pa.concat_tables([storage.read_table(storage.join(metrics, part.name)) for part in artifact.parts])


def _point(
    run: Run, stage: storage.Stage, verdicts: list[releasing.Verdict], numbers: releasing.Numbers, lease: leases.Lease
) -> int:
    for recipe, values in numbers.items():
        run.tracker.metrics({f"{recipe}.{name}": value for name, value in values.items()})
    lease.check()
    if failed := [verdict for verdict in verdicts if not verdict.holds]:
        for verdict in failed:
            cluster.say(f"gate: {verdict.describe()}")
        cluster.say(
            f"held back: {stage.uri} was not made the latest release, {len(failed)} of {len(verdicts)} gates fail"
        )
        return errors.EXIT_HELD_BACK
    releasing.point(run.output, stage.uri.rpartition("/")[2], lease.token)
    cluster.say(f"released: {stage.uri}")
    return errors.EXIT_DONE


def _clear(output: str, keep: int) -> None:
    """Delete all but the newest versions of the index and of the candidates; releases hold what they need themselves."""
    current = _current(storage.join(output, INDEX))
    for kind in (INDEX, CANDIDATES):
        root = storage.join(output, kind)
        for name in storage.folders(root)[:-keep]:
            uri = storage.join(root, name)
            if current is None or uri != current.uri:
                storage.delete_file(storage.join(uri, "run.json"))  # first: half deleted it must not be taken for whole
                storage.remove_folder(uri)


# ---- plan ------------------------------------------------------------------------------------------------------------


def plan_curate(settings: CurateSettings) -> None:
    """Print the resolved settings and what a run would do; write nothing."""
    settings = prepare(settings)
    cluster.say(config.to_yaml(settings))
    output = str(settings.output)
    with cluster.session(output, "curate"), failures("curate", output):
        root = storage.join(output, INDEX)
        current, version = _current(root), _version_of_now(root, settings)
        last = releasing.open_latest(output)
        if current is None:
            cluster.say(
                f"plan: index: built from {settings.data.source}; build_index.py --dry-run with the same settings tells its cost"
            )
        elif current.digest == version.digest:
            cluster.say(f"plan: index: nothing new, {current.uri} it is")
        else:
            cluster.say(
                f"plan: index: the source or the settings have changed; an update of {current.uri}, or all anew where it does not fit"
            )
        for recipe in settings.recipes:
            cluster.say(f"plan: {recipe.name}: {recipe.n} images, {recipe.kind}")
        cluster.say(f"plan: {len(settings.gates)} gates; latest release: {'none' if last is None else last.name}")
