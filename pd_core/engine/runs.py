"""One run of a workflow: its stages one after the other, each committed, tracked, and failing in one clear line."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from pd_core.core import artifacts as core_artifacts
from pd_core.core import files as core_files
from pd_core.core import schemas
from pd_core.core.errors import RunError, UserError, one_line
from pd_core.core.settings.base import ResolvedSettings, flatten
from pd_core.core.settings.load import to_yaml
from pd_core.engine import console, finished, resources, session, tasks, tracking

Made = tuple[Iterable[core_artifacts.Part], Mapping[str, Any]]
Make = Callable[[], Made]
Value = TypeVar("Value")

RUN = "run.json"
FIRST_STAGES = {
    "build_index": "listing",
    "generate": "pilot",
    "evaluate": "metrics",
    "perturb": "perturbed",
    "tradeoff": "pool-pilot",
    "finetune": "weights",
}  # by which the output of a workflow is known
REPORT = "index.html"
ALREADY = ", every stage was finished already"


@dataclass
class Run:
    """One run of a workflow: what every stage needs, and the commit records so far.

    Attributes:
        settings: of the workflow, checked.
        output: where its stages lie.
        now: the cluster.
        tracker: of the whole run.
        workflow: its name.
        stages: those that follow from others, by their folders in `output`, in their order; stages that are not named
            here follow from none.
        facts: that it began with, see `finished.facts`.
        artifacts, made: commit records of its finished stages, and which of these were not finished before.
        beside: folders of what was made together with them.
        lines: what it says of its result.
        watch: of the whole run.
    """

    settings: ResolvedSettings
    output: str
    now: resources.Cluster
    tracker: tracking.Tracker
    workflow: str
    stages: Sequence[str]
    facts: str | None = None
    artifacts: dict[str, core_artifacts.Artifact] = field(default_factory=dict)
    made: list[str] = field(default_factory=list)
    beside: set[str] = field(default_factory=set)
    lines: list[str] = field(default_factory=list)
    watch: core_artifacts.Stopwatch = field(default_factory=core_artifacts.Stopwatch)

    def stage(self, stage: core_artifacts.Stage, make: Make, replace: bool = False) -> core_artifacts.Artifact:
        """Complete a stage inside a tracked run of its own; replace: one of other settings may go, as a report may."""
        with self.tracker.stage(self.name_of(stage.uri)) as nested, failures(stage.kind, stage.uri):
            before = stage.recorded()
            artifact = stage.complete(lambda: self._make(stage, make, before), self.settings.overwrite or replace)
            self.done(stage.uri, artifact, nested, stage.beside)
        return artifact

    def _make(self, stage: core_artifacts.Stage, make: Make, before: core_artifacts.Artifact | None) -> Made:
        """Make the stage. What was made of an older state of it is finished no more.

        before: its record, of a stage that was finished and damaged since; where what is made anew is the same to the
            byte, later stages stay finished.
        """
        name = self.name_of(stage.uri)
        self.made.append(name)
        core_files.delete_file(core_files.join(self.output, RUN))
        if before is None:
            self._unfinish_after(name)
            return make()
        console.say(f"{name}: {core_artifacts.told_damage(stage.damage(before))}; making it anew")
        parts, totals = make()
        parts = tuple(parts)
        if not before.holds(parts):
            console.say(f"{name}: what was made anew is not the same to the byte, so later stages are made again too")
            self._unfinish_after(name)
        return parts, totals

    def _unfinish_after(self, name: str) -> None:
        for later in self.stages[self.stages.index(name) + 1 if name in self.stages else 0 :]:
            core_files.delete_file(core_files.join(self.output, later, core_files.ARTIFACT))

    def report(self, identity: Mapping[str, Any], make: Callable[[], Drawn], replace: bool = False) -> None:
        """Complete the report stage; `identity` and `make` as for `report_stage` and `draw`."""
        stage = report_stage(self.output, identity)
        self.stage(stage, lambda: draw(stage, make), replace)

    def gpus_to_ask(self, asked: float | None, stage: str) -> float | None:
        """GPUs of each actor of the stage at this URI; where they are left open, by the device that it was begun on."""
        with failures(self.name_of(stage), stage):
            begun = None if self.settings.overwrite else core_artifacts.begun_identity(stage)
        return resources.gpus_to_ask(self.now, asked, (begun or {}).get("device"))

    def name_of(self, uri: str) -> str:
        """Folder of a stage in the output."""
        return uri.removeprefix(self.output).strip("/")

    def done(
        self, uri: str, artifact: core_artifacts.Artifact, nested: tracking.Tracker, beside: Iterable[str] = ()
    ) -> None:
        """Remember and track a finished stage. beside: directories of what was made together with it."""
        self.artifacts[self.name_of(uri)] = artifact
        self.beside.update(map(self.name_of, beside))
        numbers = {n: v for n, v in flatten(artifact.totals) if isinstance(v, int | float) and not isinstance(v, bool)}
        nested.metrics(numbers | {f"{name}_s": value for name, value in artifact.timings_s.items()})
        nested.dataset(artifact.kind, uri, artifact.fingerprint, "output", {"rows": artifact.rows})

    def say(self, *lines: str) -> None:
        """Say what came of the run, which the same command says again once all is finished."""
        self.lines += lines
        for line in lines:
            console.say(line)

    def finish(
        self,
        kept: Sequence[str],
        made: Mapping[str, str],
        summary: Callable[[], Iterable[str]] = tuple,
        refusal: UserError | None = None,
    ) -> None:
        """Record the run and say how it ended.

        Args:
            kept: stages whose files are logged.
            made: what there is now, and where it lies, a line each.
            summary: lines of its numbers.
            refusal: why the run ends in an error although all is made; without one the same command is answered by its
                record.
        """
        with failures("run", self.output):
            lines = [*summary()]
            result = [f"{name}: {uri}" for name, uri in made.items()]
            self._record(kept, None if refusal else [*self.lines, *lines, *result])
        again = "" if self.made else ALREADY
        hint = [f"tracking: {self.tracker.hint}"] if self.tracker.hint else []
        for line in (*lines, f"done in {self.watch.seconds:.0f} s{again}: {self.output}", *hint, *result):
            console.say(line)
        if refusal:
            raise refusal

    @property
    def timings_s(self) -> dict[str, float]:
        """Seconds that each stage took when it was made."""
        return {name: sum(artifact.timings_s.values()) for name, artifact in self.artifacts.items()}

    def _record(self, kept: Sequence[str], lines: Sequence[str] | None) -> None:
        """Log the run, with the files of the stages in `kept`, then write run.json, by which it is known to be done."""
        elapsed_s = self.watch.seconds
        self.tracker.metrics({"elapsed_s": elapsed_s})
        for stage in kept:
            for part in self.artifacts[stage].parts:
                uri = core_files.join(self.output, stage, part.name)
                self.tracker.artifact_bytes(f"{stage}/{part.name}", core_files.read_bytes(uri))
        values: dict[str, Any] = {
            "workflow": self.workflow,
            "settings": self.settings.model_dump(mode="json"),
            "stages": {name: artifact.fingerprint for name, artifact in self.artifacts.items()},
            "timings_s": self.timings_s,
            "elapsed_s": round(elapsed_s, 3),
            "versions": core_artifacts.package_versions(),
        }
        told = self.tracker.active or not self.settings.tracking.enabled
        if self.facts is not None and lines is not None and told:
            values["finished"] = asdict(finished.Finished(self.facts, self._fingerprints(), tuple(lines)))
        core_files.write_bytes(core_files.join(self.output, RUN), json.dumps(values, indent=1).encode())

    def _fingerprints(self) -> dict[str, str]:
        """Of every stage that the output consists of, by its folder."""
        beside = {name: core_artifacts.load_artifact(core_files.join(self.output, name)) for name in self.beside}
        return {name: found.fingerprint for name, found in (beside | self.artifacts).items() if found is not None}


def execute(
    settings: ResolvedSettings,
    workflow: str,
    stages: Sequence[str],
    body: Callable[[Run], None],
    inputs: Sequence[str] = (),
) -> None:
    """Run a workflow, or say that the same command has finished it, and start nothing.

    Args:
        settings: checked.
        workflow: its name.
        stages: see Run.
        body: makes the stages and ends with `Run.finish`.
        inputs: URIs of what it reads and no setting names.
    """
    output, watch = settings.output, core_artifacts.Stopwatch()
    core_files.refuse_links(output)
    with failures("run", output):
        facts = finished.facts(settings, output, inputs)
        before = None if settings.overwrite else finished.read(core_files.join(output, RUN))
        if before is not None and before.holds(facts, output):
            console.say(to_yaml(settings))
            console.say(f"done in {watch.seconds:.0f} s{ALREADY}: {output}")
            for line in before.lines:
                console.say(line)
            return
    with started(settings, workflow, stages) as run:
        run.facts = facts
        body(run)


@contextmanager
def started(
    settings: ResolvedSettings, workflow: str, stages: Sequence[str] = (), tracked: bool = True
) -> Iterator[Run]:
    """A run inside a session of a cluster and a tracked run; its settings are logged, and said unless it is part of
    another.

    stages: see Run. tracked: False for a plan, which MLflow hears nothing of.
    """
    watch, output = core_artifacts.Stopwatch(), settings.output
    core_files.refuse_links(output)
    if not session.is_shared():
        console.say(to_yaml(settings))
    how = settings.tracking if tracked else settings.tracking.model_copy(update={"enabled": False})
    tags = {"workflow": workflow}
    connecting = tracking.connect(how, output, tags)  # while Ray starts
    with (
        session.session(output, workflow) as now,
        tracking.start(how, output, workflow, tags, connecting) as tracker,
    ):
        tracker.params(dict(flatten(settings.model_dump(mode="json"))))
        yield Run(settings, output, now, tracker, workflow, stages, watch=watch)


def required(value: Value | None, setting: str, what: str) -> Value:
    """The value of a setting that a workflow needs. Raises UserError: it is not set; `what` says what to name."""
    if not value:
        raise UserError(f"--{setting}: not set; {what}")
    return value


def checked_output(output: str | None, workflow: str) -> str:
    """The --output of a workflow, absolute.

    Raises:
        UserError: none, one that stores take for a pattern, one that a Ray job would lose, or one that holds a run of
            another workflow, whose report and run.json would be replaced.
    """
    output = required(output, "output", "name the directory or s3:// prefix for the artifacts")
    if set(output) & set("*?[]"):
        raise UserError(f"--output {output}: must hold none of * ? [ ], which stores take for patterns; rename it")
    if session.in_job_copy() and core_files.is_local(output) and not os.path.isabs(output):
        raise UserError(
            f"--output {output}: would lie in this job's temporary copy of the working directory, which Ray "
            "deletes; give an absolute path or an s3:// prefix"
        )
    output = core_files.absolute(output)
    with core_files.explained(output):
        if workflow != "curate" and core_files.exists(core_files.join(output, "index", "current.json")):
            raise UserError(f"--output {output}: holds the releases of curate.py; choose another")
        for other, stage in FIRST_STAGES.items():
            if other != workflow and core_artifacts.begun_identity(core_files.join(output, stage)) is not None:
                raise UserError(f"--output {output}: holds a run of {other}.py; choose another")
    return output


def report_stage(output: str, identity: Mapping[str, Any]) -> core_artifacts.Stage:
    """The report stage of any workflow; identity: what its page shows follows from."""
    return core_artifacts.Stage(core_files.join(output, "report"), "report", schemas.VERSIONS["report"], dict(identity))


@dataclass(frozen=True)
class Drawn:
    """A report: contents of its files by their names, REPORT among them; rows of those that are tables; more totals."""

    files: Mapping[str, bytes]
    rows: Mapping[str, int] = field(default_factory=dict)
    totals: Mapping[str, Any] = field(default_factory=dict)


def draw(stage: core_artifacts.Stage, make: Callable[[], Drawn]) -> Made:
    """Make a report in a Ray task, since images are read; returns the parts and totals to commit. make: picklable."""
    console.say("report: drawing")
    totals = tasks.get(tasks.task(_draw).remote(stage, make))
    return list(stage.finished_parts().values()), totals


def _draw(stage: core_artifacts.Stage, make: Callable[[], Drawn]) -> dict[str, Any]:
    drawn = make()
    for name, content in drawn.files.items():
        stage.write_part(name, content, drawn.rows.get(name, 0))
    return {"bytes": len(drawn.files[REPORT]), **drawn.totals}


@contextmanager
def failures(stage: str, uri: str) -> Iterator[None]:
    """Turn what storage and cluster raise inside a stage into one line with the next step."""
    with core_files.explained(uri):
        try:
            yield
        except Exception as error:
            ray = sys.modules.get("ray")
            if ray is None or not isinstance(error, ray.exceptions.RayError):
                raise
            tasks.raise_cause(error)
            cause = getattr(error, "cause", None)
            if core_files.is_failure(cause):
                raise core_files.explain(cause, uri) from error
            if isinstance(error, ray.exceptions.RayTaskError):
                raise  # a defect of this program keeps its traceback
            line = one_line(error)
            raise RunError(
                f"{stage}: {type(error).__name__}: {line}; what is done is kept, run the same command again"
            ) from error
