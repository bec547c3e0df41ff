"""The report stage of finetune: gather what its page shows from the training, and from the merge where there is one."""

from __future__ import annotations

import datetime
import functools
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc

from pd_core.core import artifacts, files
from pd_core.core.settings.finetune import FinetuneSettings
from pd_core.core.settings.generate import GeneratorSettings
from pd_core.core.settings.load import to_yaml
from pd_core.engine import runs
from pd_core.evaluate.report import Number
from pd_core.finetune import checkpoints, merge
from pd_core.finetune import page as finetune_page
from pd_core.finetune.page import Evaluated, FinetunedData, Logged, Merged, Shot, Shown
from pd_core.images import child
from pd_core.report import page


@dataclass(frozen=True)
class Inputs:
    """What the stage reads; picklable.

    Attributes:
        training: uri of the stage. trained: its commit record.
        merging: uri and commit record of that stage, or None.
        settings: of the run.
        result: settings of a generator that open what the run saved.
        extractor: of the index. timings_s: so far.
    """

    training: str
    trained: artifacts.Artifact
    merging: tuple[str, artifacts.Artifact] | None
    settings: FinetuneSettings
    result: GeneratorSettings
    extractor: str
    timings_s: Mapping[str, float]


def stage_of(output: str, trained: artifacts.Artifact, merged: artifacts.Artifact | None) -> artifacts.Stage:
    """The report stage under `output`."""
    identity = {"training": trained.fingerprint, "merging": merged and merged.fingerprint}
    return runs.report_stage(output, identity)


def run(stage: artifacts.Stage, inputs: Inputs) -> runs.Made:
    """Make the page and its figures; returns the parts and totals to commit."""
    return runs.draw(stage, functools.partial(_draw, inputs))


def _draw(inputs: Inputs) -> runs.Drawn:
    data = gather(inputs)
    return runs.Drawn({**finetune_page.figures(data), runs.REPORT: finetune_page.render(data)})


def gather(inputs: Inputs) -> FinetunedData:
    """All that the page shows."""
    settings, totals = inputs.settings, inputs.trained.totals
    weights = totals["weights"]
    return FinetunedData(
        title="Fine-tuned generator",
        output=str(settings.output),
        index=str(settings.index),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        generator=str(settings.generator.path),
        weighting=weighting_text(settings),
        effective_size=weights["effective_sample_size"],
        n_images=weights["rows"],
        asked=settings.steps,
        steps=totals["steps"],
        stopped_early=totals["stopped_early"],
        metric=totals["metric"],
        best=totals["best"],
        extractor=inputs.extractor,
        k_precision=settings.evaluation.metrics.k_precision,
        k_coverage=settings.evaluation.metrics.k_coverage,
        evaluations=_evaluations(inputs.training),
        history=_history(inputs.training),
        shown=_shown(inputs),
        merged=None if inputs.merging is None else _merged(inputs.merging[1].totals),
        command=command(inputs),
        facts=_facts(inputs),
        timings_s=inputs.timings_s,
        versions=inputs.trained.versions,
        settings_yaml=to_yaml(settings),
    )


def weighting_text(settings: FinetuneSettings) -> str:
    """How often real images are drawn, in words."""
    weighting = settings.weighting
    if weighting.kind == "none":
        return "each real image equally often"
    by_label = ", by label" if weighting.per_label else ""
    if weighting.kind == "two_level":
        return f"w = {page.number(weighting.weight)} where ρ > {weighting.threshold}, else 1{by_label}"
    if weighting.kind == "quantiles":
        return f"weights {', '.join(map(page.number, weighting.weights or ()))} of equally large bins of ρ{by_label}"
    return f"{weighting.kind}{by_label}"


def command(inputs: Inputs) -> str:
    """The command that generates with the result."""
    given = inputs.result.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    options: dict[str, Any] = {"index": inputs.settings.index}
    if inputs.settings.checkpoint:
        options["checkpoint"] = inputs.settings.checkpoint
    options |= {f"generator.{name}": value for name, value in ({"kind": inputs.result.kind} | given).items()}
    options |= {"n": 1000, "weighting.kind": "none", "output": f"{str(inputs.settings.output).rstrip('/')}-samples"}
    words = [word for name, value in options.items() for word in _option(name, value)]
    return f"pd-core generate {shlex.join(words)}"


def _option(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", value if isinstance(value, str) else json.dumps(value)]


# ---- tables ----------------------------------------------------------------------------------------------------------


def _evaluations(training: str) -> list[Evaluated]:
    rows = files.read_table(files.join(training, checkpoints.EVALUATIONS)).to_pylist()
    by_step: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_step.setdefault(row["step"], []).append(row)
    return [
        Evaluated(step, {row["metric"]: _number(row) for row in own}, own[0]["n_real"], own[0]["n_generated"])
        for step, own in sorted(by_step.items())
    ]


def _number(values: Mapping[str, Any]) -> Number:
    return Number(values["value"], values["low"], values["high"])


def _history(training: str) -> list[Logged]:
    table = files.read_table(files.join(training, checkpoints.HISTORY))
    found = []
    for name in pc.unique(table["name"]).to_pylist():
        own = table.filter(pc.equal(table["name"], name)).sort_by("step")
        found.append(Logged(name, own["step"].to_numpy(), own["value"].to_numpy()))
    return found


def _merged(totals: Mapping[str, Any]) -> Merged:
    numbers = [{name: _number(values) for name, values in totals[which].items()} for which in ("merged", "single")]
    return Merged(
        steps=totals["steps"],
        coefficients=totals["coefficients"],
        single_step=totals["single_step"],
        merged=numbers[0],
        single=numbers[1],
        difference=_number(totals["difference"]),
        beats=totals["beats"],
        candidates=totals["candidates"],
        unmeasured=totals["unmeasured"],
    )


# ---- images ----------------------------------------------------------------------------------------------------------


def _shown(inputs: Inputs) -> list[Shown]:
    """Images of the same seeds, in every state."""
    best, last = inputs.trained.totals["best"], _evaluations(inputs.training)[-1].step
    places = {"before": _samples(inputs.training, 0)}
    if best > 0:
        places["best"] = _samples(inputs.training, best)
    elif last > 0:
        places["last"] = _samples(inputs.training, last)
    if inputs.merging is not None:
        places["merged"] = files.join(inputs.merging[0], merge.SAMPLES)
    states = {state: files.read_table(uri).sort_by("number").to_pylist() for state, uri in places.items()}
    return [
        _one_seed(dict(zip(states, rows, strict=True))) for rows in zip(*states.values(), strict=True)
    ]  # strict: a state that lacks an image is a defect, and none is left out


def _samples(training: str, step: int) -> str:
    return files.join(training, checkpoints.samples_name(step))


def _one_seed(rows: Mapping[str, Mapping[str, Any]]) -> Shown:
    first = rows["before"]
    assert {(row["number"], row["seed"]) for row in rows.values()} == {(first["number"], first["seed"])}, rows.keys()
    pictures = child.sample_thumbnails([row["image"] for row in rows.values()], "samples")
    shots = {
        state: Shot(row["density_predicted"], picture)
        for (state, row), picture in zip(rows.items(), pictures, strict=True)
    }
    return Shown(first["number"], first["seed"], first["label"], shots)


# ---- facts -----------------------------------------------------------------------------------------------------------


def _facts(inputs: Inputs) -> dict[str, list[tuple[str, str]]]:
    settings = inputs.settings
    given = settings.generator.model_dump(mode="json", exclude_defaults=True)
    return {
        "Generator": [(name, _text(value)) for name, value in ({"kind": settings.generator.kind} | given).items()],
        "Weights of the real images": [
            ("asked for", weighting_text(settings)),
            *((name.replace("_", " "), _text(value)) for name, value in runs.flatten(inputs.trained.totals["weights"])),
        ],
    }


def _text(value: Any) -> str:
    if isinstance(value, float):
        return page.number(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return page.shorten(value if isinstance(value, str) else artifacts.canonical(value), 120)
