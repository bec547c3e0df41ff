"""The scheduled job: index what is new, generate by recipes, measure, release what passes its gates.

Under `output`: `lock/`, `index/VERSION/` (each an output of build_index), `candidates/VERSION/` (outputs of generate
and evaluate), `releases/DATE-HASH/`, `latest.json`. A VERSION ends with a hash of everything that decides its content:
a run that was broken off is found again by the next one, which goes on with it; a run that finds nothing new makes
nothing, except for what has been damaged since in the current index and the latest release. A source that changes while
a version is made gives another version: let the first, long build run on a source that rests.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from pd_core.build import plan, update
from pd_core.build import workflow as build_workflow
from pd_core.core import artifacts, errors, files, locks, schemas, trust
from pd_core.core.errors import RunError, UserError
from pd_core.core.settings import load
from pd_core.core.settings.curate import CurateSettings, RecipeSettings, ResolvedCurate
from pd_core.core.settings.evaluate import EvaluateSettings
from pd_core.core.settings.generate import GenerateSettings
from pd_core.core.settings.index import BuildIndexSettings
from pd_core.curate import releases
from pd_core.density import formula, realset
from pd_core.engine import console, finished, resources, session, tasks, telemetry, tracking
from pd_core.engine.runs import RUN, Run, checked_output, failures, started
from pd_core.evaluate import workflow as evaluate_workflow
from pd_core.generate import candidates, chunks, setup, workflow
from pd_core.images import listing, sources
from pd_core.index import extractor, features

LOCK, INDEX, CANDIDATES = "lock", "index", "candidates"
BEGUN = "begun.json"  # in a version of the index: what it is made from
_VERSION = re.compile(rf"\d{{8}}T\d{{6}}Z-[0-9a-f]{{{releases.HASH_LETTERS}}}")
FINISHED = "finished.json"  # by which the next run sees that nothing is new
CURRENT = "current.json"  # in INDEX: the version that was finished last
EVALUATION = "evaluation"
OUTCOMES = {errors.EXIT_DONE: "released", errors.EXIT_NOTHING_NEW: "nothing_new", errors.EXIT_HELD_BACK: "held_back"}
SECTIONS = ("data", "features", "index", "density", "estimator", "update")  # of the settings of build_index


def prepare(given: CurateSettings) -> ResolvedCurate:
    """Check what can be checked without Ray and without a lock; local paths become absolute.

    Raises:
        UserError: as the workflows of which the run consists; no recipes.
    """
    output = checked_output(given.output, "curate")
    if not given.recipes:
        raise UserError(
            "recipes: none; name at least one set, e.g. {name: typical, n: 1000, threshold: p80, weight: 33}"
        )
    # one store for all the runs that this one consists of, and it is not beside theirs
    uri = tracking.resolve_uri(given.tracking, output) if given.tracking.enabled else None
    settings = load.resolved(
        ResolvedCurate,
        given,
        output=output,
        generator=setup.resolved(given.generator),
        tracking=given.tracking.model_copy(update={"uri": uri, "enabled": uri is not None}),
    )
    checked, _ = build_workflow.prepare(_build_settings(settings, files.join(output, INDEX, "x"), None))
    settings = settings.model_copy(update={"features": checked.features})
    for recipe in settings.recipes:
        try:
            workflow.check(_generate_settings(settings, recipe, files.join(output, INDEX, "x"), output))
            if recipe.kind == "two_level":
                formula.parse_threshold(recipe.threshold)
        except UserError as error:
            text = str(error).replace("--weighting.", "")  # as a recipe has it
            raise UserError(f"recipes: {recipe.name}: {text}") from None
    return settings


def curate(given: CurateSettings) -> int:
    """One scheduled run; returns the exit code: released (0), nothing new, or held back by a gate."""
    settings = prepare(given)
    output = settings.output
    with files.explained(output):
        above = releases.lock_token(output)
    with locks.hold(files.join(output, LOCK), settings.lock.lease_s, above) as lease:
        with failures("curate", output):
            facts = finished.facts(settings, output)
            there = None if settings.overwrite else finished.read(files.join(output, FINISHED))
            if there is not None and there.holds(_with_pointers(facts, output), output):
                console.say(load.to_yaml(settings))
                releases.say_unknown_held(output)
                for line in there.lines:
                    console.say(line)
                return errors.EXIT_NOTHING_NEW
        return _curate(settings, lease, facts)


def _with_pointers(facts: str | None, output: str) -> str | None:
    """The facts of a run, with what it left as the current index and the latest release; None where any is unknown."""
    current = _current(files.join(output, INDEX))
    if facts is None or current is None or releases.latest(output) is None:
        return None
    places = (files.join(output, releases.LATEST), files.join(output, INDEX, CURRENT), files.join(current.uri, RUN))
    states = [finished.state(uri, output) for uri in places]
    return None if None in states else artifacts.fingerprint({"facts": facts, "pointers": states})


def _remember(settings: ResolvedCurate, facts: str | None) -> None:
    """Leave what the next run needs to see that nothing is new, after one that has released or found nothing new."""
    output = settings.output
    current, name, known = _current(files.join(output, INDEX)), releases.latest(output), _with_pointers(facts, output)
    if current is None or name is None or known is None:
        return
    record = files.read_record(files.join(current.uri, RUN))
    folders = [files.join(current.uri, folder) for folder in build_workflow.folders_of(record)]
    folders.append(files.join(output, releases.RELEASES, name))
    stages = {folder.removeprefix(f"{output}/"): artifacts.load_artifact(folder) for folder in folders}
    there = finished.Finished(
        known,
        {folder: artifact.fingerprint for folder, artifact in stages.items() if artifact is not None},
        (
            f"index: {settings.data.source} is as it was for {current.uri}",
            f"nothing new since {folders[-1]}",
        ),
    )
    files.write_bytes(files.join(output, FINISHED), json.dumps({"finished": asdict(there)}, indent=1).encode())


def _curate(settings: ResolvedCurate, lease: locks.Lease, facts: str | None) -> int:
    """One run with the lock held. facts: that it begins with."""
    output = settings.output
    with started(settings, "curate") as run, session.shared(run.now):
        for outcome in OUTCOMES.values():
            telemetry.RELEASES.add(0, outcome=outcome)
        with failures("curate", output):
            releases.settle(output)
            releases.say_unknown_held(output)
            index = _index(run, settings, lease)
            lease.check()
            code = _release(run, settings, index, lease)
        telemetry.RELEASES.add(1, outcome=OUTCOMES[code])
        run.tracker.metrics({"exit_code": code})
        try:
            with failures("curate", output):
                _clear(settings, lease)
                if code != errors.EXIT_HELD_BACK:
                    _remember(settings, facts)
        except (UserError, RunError) as error:  # what was released is released
            console.say(f"old versions were not all deleted, the next run does that: {error}")
    return code


# ---- index -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Version:
    """A version of the index: its directory, and the hash of what it was made from."""

    uri: str
    digest: str


@dataclass(frozen=True)
class _Now:
    """What a version is made from now: the state of the source, and the GPUs of each extractor."""

    state: sources.State
    gpus: float | None


def _gpus(run: Run, asked: float | None, before: str | None) -> float | None:
    """GPUs of each actor; where the settings leave it open as `before`, on cpu or cuda, whether a GPU is up or not."""
    gpus = resources.gpus_to_ask(run.now, asked, before)
    return 0.0 if gpus is None and before == "cpu" else gpus


def _build_settings(settings: ResolvedCurate, output: str, base: str | None) -> BuildIndexSettings:
    sections = {name: getattr(settings, name) for name in SECTIONS}
    return load.made(BuildIndexSettings, output=output, base=base, **sections, **_of_every_run(settings))


def _of_every_run(settings: ResolvedCurate) -> dict[str, Any]:
    """What a run with other versions of packages or another base has left is replaced, stage by stage."""
    return {"tracking": settings.tracking, "overwrite": True}


def _index(run: Run, settings: ResolvedCurate, lease: locks.Lease) -> Version:
    """The index of the source as it is now: one that is finished, an update of the current one, or one built anew."""
    root = files.join(run.output, INDEX)
    current = _current(root)
    version, now = _version_of_now(run, settings, current)
    if _is_of(version, now.state):
        console.say(f"index: {settings.data.source} is as it was for {version.uri}")
        _make_current(root, version, lease)
        return version
    begun = _claim(version.uri)
    base = None if begun is None else begun["base"]
    if base is not None and (damage := _damage(base, update.STAGES)):
        console.say(f"index: the base of {version.uri} cannot be had: {damage}; what follows from it is made anew")
        base = None
    if base is None and (begun is None or begun["base"]) and current is not None and current.uri != version.uri:
        if damage := _damage(current.uri, update.STAGES):
            console.say(f"index: {damage}; building anew")
        else:
            base = current.uri
    _mark(version.uri, {"base": base})
    console.say(f"index: {version.uri}, {'built anew' if base is None else f'an update of {base}'}")
    extracting = settings.features.model_copy(update={"actor_gpus": now.gpus})
    build = _build_settings(settings.model_copy(update={"features": extracting}), version.uri, base)
    try:
        build_workflow.build_index(build)
    except update.OtherSettings as error:
        console.say(f"index: {error}; building anew")
        _mark(version.uri, {"base": None})
        build_workflow.build_index(build.model_copy(update={"base": None}))
    _make_current(root, version, lease)
    return version


def _is_of(version: Version, state: sources.State) -> bool:
    """Whether a version is finished and whole, and its listing is of this state of the source.

    Where what nothing follows from is damaged, such as the report, and cannot be mended by itself any more, since the
    base is gone, it is left so.
    """
    if not files.exists(files.join(version.uri, RUN)):
        return False
    if damage := _damage(version.uri, build_workflow.STAGES):
        base = (files.read_record(files.join(version.uri, BEGUN)) or {}).get("base")
        needed = _damage(version.uri, update.STAGES) is not None
        mends = needed or base is None or _damage(base, update.STAGES) is None
        console.say(f"index: {damage}{'' if mends else f'; left so, since {base} is not there any more'}")
        if mends:
            return False
    if _committed(files.join(version.uri, "listing")).identity["state"] != state:
        console.say(f"index: {version.uri}: the source changed while it was made")
        return False
    return True


def _damage(uri: str, stages: Sequence[str]) -> str | None:
    """What is wrong with a finished version, or None; lists each folder of these stages, and of those beside them."""
    record = files.read_record(files.join(uri, RUN))
    if record is None:
        return f"{uri} is not there any more"
    for folder in (files.join(uri, stage) for stage in build_workflow.folders_of(record, stages)):
        artifact = artifacts.load_artifact(folder)
        if artifact is None or artifact.schema_version != schemas.VERSIONS[artifact.kind]:
            return f"{folder} is not finished any more, or of another pd_core"
        if damaged := artifacts.damaged_parts(folder, artifact.parts):
            return f"{folder}: {artifacts.told_damage(damaged)}"
    return None


def _claim(uri: str) -> dict[str, Any] | None:
    """What was noted in a version that was begun, or None; what is left of a half deleted one is deleted."""
    begun: dict[str, Any] | None = files.read_record(files.join(uri, BEGUN))
    if begun is None or begun.get("deleted"):
        files.remove_folder(uri)
        return None
    return begun


def _mark(uri: str, noted: Mapping[str, Any]) -> None:
    files.write_bytes(files.join(uri, BEGUN), json.dumps(noted).encode())


def _make_current(root: str, version: Version, lease: locks.Lease) -> None:
    lease.confirm()
    pointer = {"version": version.uri.rpartition("/")[2], "digest": version.digest}
    files.write_bytes(files.join(root, CURRENT), json.dumps(pointer).encode())


def _version_of_now(run: Run, settings: ResolvedCurate, current: Version | None) -> tuple[Version, _Now]:
    """By a hash of what decides the content of the index; the number of processes and the weights' place do not.

    Versions of packages are not in it: what is finished is not made again for a new one.
    """
    source = sources.open_source(settings.data)
    stating = tasks.task(sources.state).remote(source)
    spec: extractor.ExtractorSpec = tasks.get(extractor.describe_remotely(settings.features))
    before = None if current is None else artifacts.begun_identity(files.join(current.uri, "features"))
    gpus = _gpus(run, settings.features.actor_gpus, (before or {}).get("device"))
    featuring = settings.features
    state: sources.State = tasks.get(stating)
    decides = {
        "source": sources.identity(source),
        "state": state,
        "extractor": spec.identity(),
        "decode": features.decoding(settings.data),
        "device": resources.device_of(run.now, gpus),
        "batches": [featuring.batch_size, featuring.whole_part_rows, featuring.actor_cpus],
        "index": settings.index.model_dump(mode="json", exclude={"actors"}),
        "density": settings.density.model_dump(mode="json"),
        "estimator": settings.estimator.model_dump(mode="json"),
    }
    digest = releases.digest(decides)
    return Version(_named(files.join(run.output, INDEX), digest), digest), _Now(state, gpus)


def _current(root: str) -> Version | None:
    uri = files.join(root, CURRENT)
    pointer = files.read_json(uri)
    if pointer is None:
        return None
    if not isinstance(pointer, dict) or not {"version", "digest"} <= set(pointer):
        raise UserError(f"{uri}: names no version; restore it, or delete it and the index is built anew")
    return Version(files.join(root, trust.file_name(pointer["version"], uri)), str(pointer["digest"]))


def _named(root: str, digest: str) -> str:
    """The folder of a digest: the one that is there, or a new one whose name begins with the time."""
    there = [name for name in _versions(root) if name.endswith(f"-{digest}")]
    now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    return files.join(root, there[-1] if there else f"{now}-{digest}")


# ---- sets ------------------------------------------------------------------------------------------------------------


def _generate_settings(settings: ResolvedCurate, recipe: RecipeSettings, index: str, folder: str) -> GenerateSettings:
    generator = settings.generator
    if recipe.labels is not None:
        generator = generator.model_copy(update={"labels": recipe.labels})
    return load.made(
        GenerateSettings,
        output=files.join(folder, recipe.name),
        index=index,
        checkpoint=settings.features.checkpoint,
        source=settings.data.source,
        generator=generator,
        weighting=recipe.weighting,
        **recipe.model_dump(include={"n", "seed", "score", "drop_copies"}),
        **settings.generation.model_dump(),
        **_of_every_run(settings),
    )


def _evaluate_settings(settings: ResolvedCurate, index: str, samples: list[str], folder: str) -> EvaluateSettings:
    return load.made(
        EvaluateSettings,
        real=index,
        samples=samples,
        output=files.join(folder, EVALUATION),
        checkpoint=settings.features.checkpoint,
        source=settings.data.source,
        **settings.evaluation.model_dump(),
        **_of_every_run(settings),
    )


def _release(run: Run, settings: ResolvedCurate, index: Version, lease: locks.Lease) -> int:
    """The release of what there is now, made where it is not there, and the pointer moved to it if every gate holds."""
    settings = _as_before(run, settings)
    identity = {
        "sets": _inputs(run, settings, index),
        "evaluation": settings.evaluation.model_dump(mode="json", exclude={"extraction": {"actors", "actor_gpus"}}),
        "gates": [gate.model_dump(mode="json") for gate in settings.gates],
    }
    name = releases.name_of(run.output, identity)
    there = releases.open_release(run.output, name)
    released = name == releases.latest(run.output)
    if released and there is not None:
        console.say(f"nothing new since {there.uri}")
        return errors.EXIT_NOTHING_NEW
    last = releases.open_before_latest(run.output) if released else releases.open_latest(run.output)
    if there is None:
        _make_release(run, settings, index, identity, last, lease, mending=released)
        there = releases.open_release(run.output, name)
        assert there is not None, "it is committed"
    if released:
        console.say(f"mended, and nothing new since: {there.uri}")
        return errors.EXIT_NOTHING_NEW
    return _promote(run, settings, there, last, lease)


def _judge(
    settings: ResolvedCurate, numbers: releases.Numbers, last: releases.Release | None
) -> list[releases.Verdict]:
    return releases.judge(settings.gates, numbers, {} if last is None else last.record["numbers"])


def _make_release(
    run: Run,
    settings: ResolvedCurate,
    index: Version,
    identity: dict[str, Any],
    last: releases.Release | None,
    lease: locks.Lease,
    mending: bool,
) -> None:
    """Make what the recipes ask for, measure it, write the release. mending: it was made before and is not whole."""
    sets, measured = _sets(run, settings, index, identity, lease)
    numbers = releases.numbers_of(sets, measured)
    verdicts = _judge(settings, numbers, last)
    record = {
        "inputs": identity,
        "index": index.uri,
        "source": settings.data.source,
        "samples": {made.name: made.artifact.fingerprint for made in sets},
        "settings": settings.model_dump(mode="json"),
        "versions": artifacts.package_versions(),
        "numbers": numbers,
        "verdicts": [asdict(verdict) for verdict in verdicts],
        "gates_hold": all(verdict.holds for verdict in verdicts),
    }
    stage = releases.stage_of(run.output, identity)
    run.stage(stage, lambda: releases.run(stage, sets, measured, record, last, mending))


def _promote(
    run: Run,
    settings: ResolvedCurate,
    release: releases.Release,
    last: releases.Release | None,
    lease: locks.Lease,
) -> int:
    """Move the pointer to a release, unless a gate or a person is against it; returns the exit code."""
    numbers: releases.Numbers = release.record["numbers"]
    verdicts = _judge(settings, numbers, last)
    for recipe, values in numbers.items():
        run.tracker.metrics({f"{recipe}.{metric}": value for metric, value in values.items()})
    if failed := [verdict for verdict in verdicts if not verdict.holds]:
        for verdict in failed:
            console.say(f"gate: {verdict.describe()}")
        console.say(
            f"held back: {release.uri} was not made the latest release, {len(failed)} of {len(verdicts)} gates fail"
        )
        return errors.EXIT_HELD_BACK
    if releases.is_held_by_hand(run.output, release.name):
        console.say(f"held back: {release.uri}, which {releases.LATEST} names in `held`")
        return errors.EXIT_HELD_BACK
    lease.confirm()
    releases.point(run.output, release.name, lease.token, verdicts, last)
    console.say(f"released: {release.uri}")
    return errors.EXIT_DONE


def _as_before(run: Run, settings: ResolvedCurate) -> ResolvedCurate:
    """The settings with GPUs of a generator, see `_gpus`."""
    name = releases.latest(run.output)
    record = {} if name is None else releases.record_of(run.output, name) or {}
    before = next((made["device"] for made in record.get("inputs", {}).get("sets", {}).values()), None)
    gpus = _gpus(run, settings.generation.actor_gpus, before)
    return settings.model_copy(update={"generation": settings.generation.model_copy(update={"actor_gpus": gpus})})


def _inputs(run: Run, settings: ResolvedCurate, index: Version) -> dict[str, dict[str, Any]]:
    """Of each recipe, everything that decides its samples; JSON-able."""
    how, generator = settings.generation, settings.generator
    facts = setup.describe(generator, run.now, chunks.Pool(how.actors, how.actor_cpus, how.actor_gpus))
    prompts = setup.prompts_of(generator, facts)
    every = {
        "index": dict(realset.open_for(index.uri, settings.features.checkpoint, "--index").fingerprints),
        "generator": facts["identity"],
        "generator_settings": generator.model_dump(mode="json", exclude={"path", "code", "prompts", "allow_pickle"}),
        "prompts": candidates.prompts_hash(prompts),
        "generation": how.model_dump(mode="json", exclude={"actors", "actor_gpus", "max_candidates"}),
        "device": resources.device_of(run.now, how.actor_gpus),
    }
    return {recipe.name: every | {"recipe": recipe.model_dump(mode="json")} for recipe in settings.recipes}


def _sets(
    run: Run,
    settings: ResolvedCurate,
    index: Version,
    identity: dict[str, Any],
    lease: locks.Lease,
) -> tuple[list[releases.Set], pa.Table]:
    """The samples of every recipe, and the rows of their evaluation; each in a folder by what decides it."""
    sets, outputs = [], []
    for recipe in settings.recipes:
        folder = _candidates(run, identity["sets"][recipe.name])
        asked = _generate_settings(settings, recipe, index.uri, folder)
        workflow.generate(asked)
        lease.check()
        outputs.append(str(asked.output))
        uri = files.join(outputs[-1], "samples")
        sets.append(releases.Set(recipe.name, uri, _committed(uri)))
    folder = _candidates(run, {name: identity[name] for name in ("sets", "evaluation")})
    evaluate_workflow.evaluate(_evaluate_settings(settings, index.uri, outputs, folder))
    lease.check()
    metrics = files.join(folder, EVALUATION, "metrics")
    parts = _committed(metrics).parts
    return sets, pa.concat_tables([files.read_table(files.join(metrics, part.name)) for part in parts])


def _candidates(run: Run, decides: Mapping[str, Any]) -> str:
    """The folder of what follows from these values, begun."""
    folder = _named(files.join(run.output, CANDIDATES), releases.digest(decides))
    if _claim(folder) is None:
        _mark(folder, {})
    return folder


def _committed(uri: str) -> artifacts.Artifact:
    artifact = artifacts.load_artifact(uri)
    assert artifact is not None, "the workflow before has committed it"
    return artifact


def _clear(settings: ResolvedCurate, lease: locks.Lease) -> None:
    """Delete all but the newest versions of the index and of the candidates; releases hold what they need."""
    lease.confirm()
    output = settings.output
    current = _current(files.join(output, INDEX))
    sets = len(settings.recipes) + 1  # each in a folder of its own, and their evaluation
    for kind, keep in ((INDEX, settings.keep), (CANDIDATES, settings.keep * sets)):
        root = files.join(output, kind)
        for name in _versions(root)[:-keep]:
            uri = files.join(root, name)
            if current is None or uri != current.uri:
                _mark(uri, {"deleted": True})  # first: half deleted it must not be taken for whole
                files.delete_file(files.join(uri, RUN))
                files.remove_folder(uri)


def _versions(root: str) -> list[str]:
    """Names of the versions in a folder, oldest first."""
    return [name for name in files.folders(root) if _VERSION.fullmatch(name)]


# ---- plan ------------------------------------------------------------------------------------------------------------


def plan_curate(given: CurateSettings) -> None:
    """Print the resolved settings and what a run would do; write nothing."""
    settings = prepare(given)
    output = settings.output
    with (
        started(settings, "curate", tracked=False) as run,
        session.shared(run.now),
        failures("curate", output),
    ):
        current = _current(files.join(output, INDEX))
        version, now = _version_of_now(run, settings, current)
        last = releases.latest(output)
        if current is None:
            counted = listing.count(sources.open_source(settings.data))
            console.say(
                f"plan: index: built from {counted['rows']:,} images of {settings.data.source}; build_index.py "
                f"--dry-run with these {', '.join(SECTIONS)} tells its cost"
            )
        elif _is_of(version, now.state):
            console.say(f"plan: index: the source is as it was for {version.uri}")
        else:
            console.say(_plan_of_changed(run, settings, current))
        for recipe in settings.recipes:
            how = f", threshold {recipe.threshold}, weight {recipe.weight:g}" if recipe.kind == "two_level" else ""
            console.say(f"plan: set {recipe.name}: {recipe.n} images by {recipe.kind}{how}")
        for gate in settings.gates:
            bounds = gate.model_dump(include={"min", "max", "max_increase", "max_decrease"}, exclude_none=True)
            said = ", ".join(f"{name} {bound:g}" for name, bound in bounds.items())
            console.say(f"plan: gate: {gate.metric} of {gate.recipe or 'every set'}: {said}")
        gone = "" if last is None or releases.record_of(output, last) else ", which is not there any more, or not whole"
        console.say(f"plan: latest release: {last or 'none, so that changes from it are not judged'}{gone}")
        releases.say_unknown_held(output)


def _plan_of_changed(run: Run, settings: ResolvedCurate, current: Version) -> str:
    """The line of a source or settings that are not those of the current version."""
    if damage := _damage(current.uri, update.STAGES):
        return f"plan: index: built anew, since {damage}"
    build = _build_settings(settings, files.join(run.output, INDEX, "x"), current.uri)
    try:
        found = plan.foresee(build, sources.open_source(settings.data), run.now, update.open_base(current.uri))
    except update.OtherSettings as error:
        return f"plan: index: built anew: {error}"
    return f"plan: index: an update of {current.uri}: {found}"
