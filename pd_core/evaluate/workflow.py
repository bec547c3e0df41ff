"""The stages of evaluate in their order: features of every set, metrics, report; what workflows/evaluate.py calls."""

from __future__ import annotations

import functools

from pd_core.core import artifacts, files
from pd_core.core.errors import UserError
from pd_core.core.settings import load
from pd_core.core.settings.evaluate import EvaluateSettings, ResolvedEvaluate
from pd_core.density import realset
from pd_core.density.realset import RealSet
from pd_core.engine import console
from pd_core.engine.runs import REPORT, Run, checked_output, execute, required, started
from pd_core.evaluate import measure, report, spaces
from pd_core.evaluate.report import metric_names
from pd_core.evaluate.spaces import Extraction, Features, ImageSet, Space

STAGES = ("metrics", "report")


def prepare(settings: EvaluateSettings) -> tuple[ResolvedEvaluate, RealSet, list[ImageSet]]:
    """Check what can be checked without Ray; local paths become absolute.

    Raises:
        UserError: no --real or --samples, one that is not there or not finished, or too few images for k.
    """
    of_real = required(settings.real, "real", "name the --output of build_index.py")
    what = "name the sets to measure: outputs of generate.py, folders of images, Parquet"
    samples = required(settings.samples, "samples", what)
    least = max(settings.metrics.k_precision, settings.metrics.k_coverage) + 1
    for name, rows in (("--n", settings.n), ("--n-real", settings.n_real)):
        if rows is not None and rows < least:
            raise UserError(
                f"{name} {rows}: too few images for k = {least - 1}; raise it to {least} or more, or lower k"
            )
    output = checked_output(settings.output or f"{of_real.rstrip('/')}-evaluation", "evaluate")
    real = realset.open_for(of_real, settings.checkpoint, "--real")
    sets = spaces.open_sets(samples, settings.data, Space(spaces.INDEX, real.extractor))
    return load.resolved(ResolvedEvaluate, settings, output=output, real=real.uri), real, sets


def evaluate(settings: EvaluateSettings) -> None:
    """Metrics of every set against the real one, in `metrics/` and `scores/` under `settings.output`."""
    checked, real, sets = prepare(settings)

    def body(run: Run) -> None:
        job = _evaluate(run, checked, real, sets)
        page = files.join(run.output, "report", REPORT)
        run.finish(("report",), {"report": page}, functools.partial(summary, job))

    execute(checked, "evaluate", STAGES, body, spaces.judged_roots(checked.judge, real.uri, sets, checked.source))


def plan_evaluate(settings: EvaluateSettings) -> None:
    """Print the resolved settings and what would be measured; write nothing."""
    checked, real, sets = prepare(settings)
    with started(checked, "evaluate", tracked=False):
        measured_in = spaces.open_spaces(real, settings.judge)
    judged = " and ".join(f"{space.extractor} ({space.name})" for space in measured_in)
    each = f"{settings.n} images" if settings.n else "as many images as the smallest has"
    names = ", ".join(chosen.name for chosen in sets)
    console.say(f"plan: {real.rows} real images against {each} of each of {names}, in {judged}")
    rows, dim = settings.n_real or real.rows, max(space.spec.feature_dim for space in measured_in)
    console.say(
        f"plan: features of the real images take {rows * dim * 4 / 1e9:.3g} GB of memory where they are measured"
    )


def _evaluate(run: Run, settings: EvaluateSettings, real: RealSet, sets: list[ImageSet]) -> measure.Job:
    measured_in = spaces.open_spaces(real, settings.judge)
    extraction = Extraction(settings.extraction, settings.data, settings.source)
    of_real = spaces.features_of_real(run, real, measured_in, extraction)
    k = settings.metrics.k_precision
    of_sets = [spaces.features_of_set(run, chosen, measured_in, extraction, k) for chosen in sets]
    comparisons = [
        measure.Comparison(chosen.name, space, of_real[space.name], found[space.name], chosen.selected_in(space, real))
        for space in measured_in
        for chosen, found in zip(sets, of_sets, strict=True)
    ]
    n = rows_of_each(settings.n, [min(found.values(), key=lambda f: f.rows) for found in of_sets], sets)
    job = measure.job_of(run.output, comparisons, settings.metrics, n, settings.n_real, settings.per_label)
    measured = run.stage(job.metrics, lambda: measure.run(job, run.now))
    report.make(run, report.Inputs(job, measured, sets, measured_in, real, settings, run.timings_s))
    return job


def rows_of_each(asked: int | None, found: list[Features], sets: list[ImageSet]) -> int:
    """Images of each set that are measured: as asked, or as many as the smallest set has.

    Raises:
        UserError: more are asked for than a set has.
    """
    smallest = min(range(len(found)), key=lambda i: found[i].rows)
    if asked is not None and asked > found[smallest].rows:
        raise UserError(
            f"--n {asked}: --samples {sets[smallest].name} has {found[smallest].rows} usable images; "
            "lower --n or add images"
        )
    return asked or found[smallest].rows


def summary(job: measure.Job) -> list[str]:
    """A line for each set and space, for the console."""
    artifact = artifacts.load_artifact(job.metrics.uri)
    assert artifact is not None, "the stage is committed"
    lines = []
    extractors = {comparison.space.name: comparison.space.extractor for comparison in job.comparisons}
    for space, by_set in artifact.totals.items():
        names = metric_names(extractors[space])
        for name, values in by_set.items():
            numbers = ", ".join(f"{names[m]} {v:.4g}" for m, v in values.items() if m != "vendi_real")
            lines.append(f"{space}: {name}: {numbers}")
    return lines
