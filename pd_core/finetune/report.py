"""The report of finetune: what its page shows of the training, and of the merge where there is one, gathered and drawn.

Metrics over the steps beside those of the generator as it came, what the loss did meanwhile, and images from the same seeds
before and after.
"""

from __future__ import annotations

import datetime
import functools
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow.compute as pc

from pd_core.core import artifacts, files
from pd_core.core.settings.base import flatten
from pd_core.core.settings.finetune import FinetuneSettings
from pd_core.core.settings.generate import GeneratorSettings
from pd_core.core.settings.load import to_yaml
from pd_core.engine import runs
from pd_core.evaluate.report import Number, draw_point, interval, metric_names, plane_axes
from pd_core.finetune import checkpoints, merge
from pd_core.images import thumbnails
from pd_core.report import figures, page

STATES = {
    "before": "as it came",
    "best": "best step",
    "last": "last step",
    "merged": "combination",
}  # of an image, from left to right
SMOOTHING = 40  # windows that a history is cut into, over which its line is a mean
HISTORY = {  # in order of display: name, and how it reads
    "loss": "loss",
    "g_loss": "loss of the generator",
    "d_loss": "loss of the discriminator",
    "real_logit": "logit of real images, mean",
    "fake_logit": "logit of generated images, mean",
    "r1": "R1 penalty",
    "acceptance": "accepted share of the generated images",
    "gradient_norm": "norm of the gradient",
    "learning_rate": "learning rate",
}


@dataclass(frozen=True)
class Evaluated:
    """One evaluation: its step, metrics by name, real and generated images measured."""

    step: int
    numbers: Mapping[str, Number]
    n_real: int
    n_generated: int


@dataclass(frozen=True)
class Logged:
    """What the steps logged under a name: int64 and float64 [S], in ascending order of the steps."""

    name: str
    step: np.ndarray
    value: np.ndarray


@dataclass(frozen=True)
class Shot:
    """One image: its predicted density ρ and its thumbnail."""

    density: float
    thumbnail: bytes


@dataclass(frozen=True)
class Shown:
    """The images of a seed by their state: `before`, `best`, and `merged` where there is a combination."""

    number: int
    seed: int
    label: str | None
    shots: Mapping[str, Shot]


@dataclass(frozen=True)
class FinetunedData:
    """All that the page shows.

    Attributes:
        created: ISO 8601 time, given by the caller, so that `render` is a function of its argument alone.
        generator: as the user named it. weighting: of the real images, in words. effective_size: images that the weighted real ones are worth.
        n_images: real images that were trained on.
        asked, steps: optimiser steps, those done. stopped_early: no better step came for a while.
        metric: by which the best step was chosen. best: that step; 0 where no step was better than the generator as it came.
        extractor: of the space that was measured in. k_precision, k_coverage: neighbors of the metrics.
        evaluations: in ascending order of their steps, that of step 0 first.
        history: of the steps. shown: some images.
        merged: totals of the merge, whose metrics are Numbers, on seeds that its search has not seen; None without one.
        command: that generates with the result.
    """

    title: str
    output: str
    index: str
    created: str
    generator: str
    weighting: str
    effective_size: float
    n_images: int
    asked: int
    steps: int
    stopped_early: bool
    metric: str
    best: int
    extractor: str
    k_precision: int
    k_coverage: int
    evaluations: Sequence[Evaluated]
    history: Sequence[Logged]
    shown: Sequence[Shown]
    merged: Mapping[str, Any] | None
    command: str
    facts: Mapping[str, Sequence[tuple[str, str]]] = field(default_factory=dict)
    timings_s: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    settings_yaml: str = ""

    def __post_init__(self) -> None:
        """Conservation: the steps are those of the run, and what is compared is there."""
        steps = [evaluated.step for evaluated in self.evaluations]
        assert steps == sorted(set(steps)) and steps[0] == 0 and steps[-1] <= self.steps <= self.asked, steps
        assert self.best in steps, (self.best, steps)
        assert all(set(evaluated.numbers) == set(self.evaluations[0].numbers) for evaluated in self.evaluations)
        assert all(list(shown.shots) == self.states for shown in self.shown)

    @property
    def before(self) -> Evaluated:
        """The generator as it came."""
        return self.evaluations[0]

    @property
    def after(self) -> Evaluated:
        """The best step."""
        return next(evaluated for evaluated in self.evaluations if evaluated.step == self.best)

    @property
    def states(self) -> list[str]:
        """Of the images of a seed, from left to right; where no step is better than 0, the last one shows what training did."""
        last = self.best == 0 and self.evaluations[-1].step > 0
        there = {"before": True, "best": self.best > 0, "last": last, "merged": self.merged is not None}
        return [state for state in STATES if there[state]]


def parted(one: Number, other: Number) -> bool | None:
    """Whether two intervals have no point in common; None where there is none."""
    if one.low is None or one.high is None or other.low is None or other.high is None:
        return None
    return one.low > other.high or other.low > one.high


# --- what it is gathered from ----------------------------------------------------------------------------------------


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
    return runs.Drawn(drawn(gather(inputs)))


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


def _merged(totals: Mapping[str, Any]) -> dict[str, Any]:
    numbers = {which: {name: _number(one) for name, one in totals[which].items()} for which in ("merged", "single")}
    return {**totals, **numbers, "difference": _number(totals["difference"])}


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
    pictures = thumbnails.of_samples([row["image"] for row in rows.values()], "samples")
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
            *((name.replace("_", " "), _text(value)) for name, value in flatten(inputs.trained.totals["weights"])),
        ],
    }


def _text(value: Any) -> str:
    if isinstance(value, float):
        return page.number(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return page.shorten(value if isinstance(value, str) else artifacts.canonical(value), 120)


# --- figures -----------------------------------------------------------------------------------------------------------


def metric_png(data: FinetunedData, metric: str, narrow: bool = False) -> bytes:
    """A metric over the steps with 95% intervals; the generator as it came as a band, the best step marked."""
    figure, axes = figures.new_figure(narrow, height_in=2.6 if narrow else 3.0, width_in=4.8)
    numbers = [evaluated.numbers[metric] for evaluated in data.evaluations]
    steps = [evaluated.step for evaluated in data.evaluations]
    before, after = data.before.numbers[metric], data.after.numbers[metric]
    if before.low is not None and before.high is not None:
        axes.axhspan(before.low, before.high, color=figures.BAR, alpha=0.25, linewidth=0)
    axes.axhline(before.value, color=figures.BAR, linewidth=1.2)
    axes.plot(steps, [number.value for number in numbers], color=figures.INK, linewidth=1.4)
    for step, number in zip(steps, numbers, strict=True):
        draw_point(axes, Number(step, None, None), number, None, figures.INK, "o")
    axes.axvline(data.best, color=figures.MARK, linewidth=1.0, linestyle=":")
    draw_point(axes, Number(data.best, None, None), after, None, figures.MARK, "o")
    axes.set_xlabel("step")
    axes.set_ylabel(metric_names(data.extractor)[metric])
    axes.margins(0.06)
    return figures.to_png(figure)


def path_png(data: FinetunedData, narrow: bool = False) -> bytes:
    """Precision over recall, from the generator as it came along the steps."""
    figure, axes = figures.new_figure(narrow, height_in=3.6 if narrow else 4.6, width_in=6.4)
    points = [(e.step, e.numbers["recall"], e.numbers["precision"]) for e in data.evaluations]
    axes.plot(
        [x.value for _, x, _ in points],
        [y.value for _, _, y in points],
        color=figures.INK,
        linewidth=1.2,
        alpha=0.6,
    )
    for step, recall, precision in points:
        if step not in (0, data.best):
            draw_point(axes, recall, precision, None, figures.INK, "o")
    start, end = data.before.numbers, data.after.numbers
    draw_point(axes, start["recall"], start["precision"], "as it came", figures.BAR, "s")
    if data.best > 0:
        draw_point(axes, end["recall"], end["precision"], f"best, step {data.best:,}", figures.MARK, "D")
    for step, recall, precision in points[1:]:
        axes.annotate(
            f"{step:,}",
            (recall.value, precision.value),
            xytext=(5, 4),
            textcoords="offset points",
            fontsize=7.5,
            color=figures.MUTED,
        )
    plane_axes(axes)
    axes.legend(frameon=False, fontsize=9, loc="best")
    return figures.to_png(figure)


def history_png(logged: Logged, narrow: bool = False) -> bytes:
    """What the steps logged (thin) and its mean over windows (line)."""
    figure, axes = figures.new_figure(narrow, height_in=2.4 if narrow else 2.7, width_in=4.8)
    if len(logged.step) > 2 * SMOOTHING:
        axes.plot(logged.step, logged.value, color=figures.BAR, linewidth=0.6, alpha=0.6)
        step, value = smoothed(logged)
    else:
        step, value = logged.step, logged.value
    axes.plot(step, value, color=figures.INK, linewidth=1.4, marker="o" if len(step) == 1 else None, markersize=4)
    axes.set_xlabel("step")
    axes.set_ylabel(page.drawable(page.visible(HISTORY.get(logged.name, logged.name))), parse_math=False)
    return figures.to_png(figure)


def smoothed(logged: Logged) -> tuple[np.ndarray, np.ndarray]:
    """Means of step and value over SMOOTHING windows of equally many rows, float64 [SMOOTHING] each."""
    windows = np.array_split(np.arange(len(logged.step)), SMOOTHING)
    means = [(logged.step[window].mean(), logged.value[window].mean()) for window in windows]
    step, value = np.array(means).T
    return step, value


def shown_metrics(data: FinetunedData) -> list[str]:
    """Metrics that were measured, in order of display; that of the real set alone stands still."""
    return [name for name in metric_names(data.extractor) if name in data.before.numbers and name != "vendi_real"]


def history_shown(history: Sequence[Logged]) -> list[Logged]:
    """In order of display, others after them by name."""
    order = list(HISTORY)
    return sorted(history, key=lambda one: (order.index(one.name) if one.name in order else len(order), one.name))


def _drawings(data: FinetunedData) -> dict[str, figures.Drawing]:
    drawings: dict[str, figures.Drawing] = {
        f"metric_{name}": functools.partial(metric_png, data, name) for name in shown_metrics(data)
    }
    drawings["precision_recall_path"] = functools.partial(path_png, data)
    return drawings | {
        f"history_{i}": functools.partial(history_png, one) for i, one in enumerate(history_shown(data.history))
    }


# --- the page ----------------------------------------------------------------------------------------------------------


def drawn(data: FinetunedData) -> dict[str, bytes]:
    """Files of the report by name. The same data gives the same bytes."""
    context: dict[str, Any] = {
        "d": data,
        "metric_names": metric_names(data.extractor),
        "metrics": shown_metrics(data),
        "history": history_shown(data.history),
        "history_names": HISTORY,
        "interval": interval,
        "states": STATES,
        "verdict": verdict(data),
        "merge_verdict": None if data.merged is None else merge_verdict(data, data.merged),
        "zip": zip,
    }
    return figures.page_files("finetuned.html.j2", context, _drawings(data))


def verdict(data: FinetunedData) -> str:
    """What fine-tuning did to the metric that the best step was chosen by, with what that is worth."""
    name = metric_names(data.extractor)[data.metric]
    before, after = data.before.numbers[data.metric], data.after.numbers[data.metric]
    if data.best == 0:
        return f"No evaluated step has a better {name} than the generator as it came, {interval(before)}."
    line = f"{name}: {interval(before)} as it came, {interval(after)} at step {data.best:,}."
    apart = parted(before, after)
    if apart is None:
        return f"{line} There are too few images for intervals: whether they differ cannot be told."
    return f"{line} {'The intervals part.' if apart else 'The intervals overlap: the two are not told apart.'}"


def merge_verdict(data: FinetunedData, merged: Mapping[str, Any]) -> str:
    """Whether the combination of checkpoints beats the best single one, with held-out intervals."""
    name = metric_names(data.extractor)[data.metric]
    outcome = "beats" if merged["beats"] else "does not beat"
    combined, single, difference = merged["merged"][data.metric], merged["single"][data.metric], merged["difference"]
    step = f"{merged['single_step']:,}"
    return (
        f"The combination of checkpoints {outcome} the best single step ({step}) on held-out seeds: {name} "
        f"{interval(combined)} against {interval(single)}, difference {interval(difference)}. "
        f"best/ holds {'the combination' if merged['beats'] else f'step {step}'}."
    )
