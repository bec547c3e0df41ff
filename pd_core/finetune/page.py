"""The report of finetune: one self-contained HTML page, and its figures. Pure functions from plain data to bytes.

Metrics over the steps beside those of the generator as it came, what the loss did meanwhile, and images from the same seeds
before and after. Style, escaping and figures' looks are those of `report`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pd_core.evaluate.report import Number, draw_point, interval, metric_names, plane_axes
from pd_core.report import figures as report_figures
from pd_core.report import page
from pd_core.report.figures import Drawing

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
class Merged:
    """The combination of checkpoints, judged on seeds that its search has not seen.

    Attributes:
        steps, coefficients: of the checkpoints. single_step: the best of them.
        merged, single: metrics of the combination and of that one. difference: theirs in the metric of the run.
        beats: the interval of the difference leaves out 0, on the better side.
        candidates: combinations tried. unmeasured: of them, whose images were not finite.
    """

    steps: Sequence[int]
    coefficients: Sequence[float]
    single_step: int
    merged: Mapping[str, Number]
    single: Mapping[str, Number]
    difference: Number
    beats: bool
    candidates: int
    unmeasured: int


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
        history: of the steps. shown: some images. merged: None without a merge.
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
    merged: Merged | None
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


# --- figures -----------------------------------------------------------------------------------------------------------


def metric_png(data: FinetunedData, metric: str, narrow: bool = False) -> bytes:
    """A metric over the steps with 95% intervals; the generator as it came as a band, the best step marked."""
    figure, axes = report_figures.new_figure(narrow, height_in=2.6 if narrow else 3.0, width_in=4.8)
    numbers = [evaluated.numbers[metric] for evaluated in data.evaluations]
    steps = [evaluated.step for evaluated in data.evaluations]
    before, after = data.before.numbers[metric], data.after.numbers[metric]
    if before.low is not None and before.high is not None:
        axes.axhspan(before.low, before.high, color=report_figures.BAR, alpha=0.25, linewidth=0)
    axes.axhline(before.value, color=report_figures.BAR, linewidth=1.2)
    axes.plot(steps, [number.value for number in numbers], color=report_figures.INK, linewidth=1.4)
    for step, number in zip(steps, numbers, strict=True):
        draw_point(axes, Number(step, None, None), number, None, report_figures.INK, "o")
    axes.axvline(data.best, color=report_figures.MARK, linewidth=1.0, linestyle=":")
    draw_point(axes, Number(data.best, None, None), after, None, report_figures.MARK, "o")
    axes.set_xlabel("step")
    axes.set_ylabel(metric_names(data.extractor)[metric])
    axes.margins(0.06)
    return report_figures.to_png(figure)


def path_png(data: FinetunedData, narrow: bool = False) -> bytes:
    """Precision over recall, from the generator as it came along the steps."""
    figure, axes = report_figures.new_figure(narrow, height_in=3.6 if narrow else 4.6, width_in=6.4)
    points = [(e.step, e.numbers["recall"], e.numbers["precision"]) for e in data.evaluations]
    axes.plot(
        [x.value for _, x, _ in points],
        [y.value for _, _, y in points],
        color=report_figures.INK,
        linewidth=1.2,
        alpha=0.6,
    )
    for step, recall, precision in points:
        if step not in (0, data.best):
            draw_point(axes, recall, precision, None, report_figures.INK, "o")
    start, end = data.before.numbers, data.after.numbers
    draw_point(axes, start["recall"], start["precision"], "as it came", report_figures.BAR, "s")
    if data.best > 0:
        draw_point(axes, end["recall"], end["precision"], f"best, step {data.best:,}", report_figures.MARK, "D")
    for step, recall, precision in points[1:]:
        axes.annotate(
            f"{step:,}",
            (recall.value, precision.value),
            xytext=(5, 4),
            textcoords="offset points",
            fontsize=7.5,
            color=report_figures.MUTED,
        )
    plane_axes(axes)
    axes.legend(frameon=False, fontsize=9, loc="best")
    return report_figures.to_png(figure)


def history_png(logged: Logged, narrow: bool = False) -> bytes:
    """What the steps logged (thin) and its mean over windows (line)."""
    figure, axes = report_figures.new_figure(narrow, height_in=2.4 if narrow else 2.7, width_in=4.8)
    if len(logged.step) > 2 * SMOOTHING:
        axes.plot(logged.step, logged.value, color=report_figures.BAR, linewidth=0.6, alpha=0.6)
        step, value = smoothed(logged)
    else:
        step, value = logged.step, logged.value
    axes.plot(
        step, value, color=report_figures.INK, linewidth=1.4, marker="o" if len(step) == 1 else None, markersize=4
    )
    axes.set_xlabel("step")
    axes.set_ylabel(page.drawable(page.visible(history_name(logged.name))), parse_math=False)
    return report_figures.to_png(figure)


def smoothed(logged: Logged) -> tuple[np.ndarray, np.ndarray]:
    """Means of step and value over SMOOTHING windows of equally many rows, float64 [SMOOTHING] each."""
    windows = np.array_split(np.arange(len(logged.step)), SMOOTHING)
    means = [(logged.step[window].mean(), logged.value[window].mean()) for window in windows]
    step, value = np.array(means).T
    return step, value


def history_name(name: str) -> str:
    """How it reads."""
    return HISTORY.get(name, name)


def figures(data: FinetunedData) -> dict[str, bytes]:
    """The page's figures as PNG by file name, for MLflow."""
    return {f"{name}.png": drawing(False) for name, drawing in _drawings(data).items()}


def shown_metrics(data: FinetunedData) -> list[str]:
    """Metrics that were measured, in order of display; that of the real set alone stands still."""
    return [name for name in metric_names(data.extractor) if name in data.before.numbers and name != "vendi_real"]


def history_shown(history: Sequence[Logged]) -> list[Logged]:
    """In order of display, others after them by name."""
    order = list(HISTORY)
    return sorted(history, key=lambda one: (order.index(one.name) if one.name in order else len(order), one.name))


def _drawings(data: FinetunedData) -> dict[str, Drawing]:
    def metric(name: str) -> Drawing:
        return lambda narrow: metric_png(data, name, narrow)

    def logged(one: Logged) -> Drawing:
        return lambda narrow: history_png(one, narrow)

    drawings = {f"metric_{name}": metric(name) for name in shown_metrics(data)}
    drawings["precision_recall_path"] = lambda narrow: path_png(data, narrow)
    return drawings | {f"history_{i}": logged(one) for i, one in enumerate(history_shown(data.history))}


# --- the page ----------------------------------------------------------------------------------------------------------


def render(data: FinetunedData) -> bytes:
    """The page as UTF-8 HTML. The same data gives the same bytes."""
    context: dict[str, Any] = {
        "d": data,
        "figures": report_figures.draw(_drawings(data)),
        "metric_names": metric_names(data.extractor),
        "metrics": shown_metrics(data),
        "history": history_shown(data.history),
        "history_name": history_name,
        "interval": interval,
        "states": STATES,
        "verdict": verdict(data),
        "merge_verdict": None if data.merged is None else merge_verdict(data, data.merged),
        "total_s": sum(data.timings_s.values()),
        "zip": zip,
    }
    return page.page("finetuned.html.j2", context)


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


def merge_verdict(data: FinetunedData, merged: Merged) -> str:
    """Whether the combination of checkpoints beats the best single one, with held-out intervals."""
    name = metric_names(data.extractor)[data.metric]
    outcome = "beats" if merged.beats else "does not beat"
    numbers = merged.merged[data.metric], merged.single[data.metric]
    kept = "best/ holds the combination" if merged.beats else f"best/ holds step {merged.single_step:,}"
    return (
        f"The combination of checkpoints {outcome} the best single step ({merged.single_step:,}) on held-out seeds: {name} "
        f"{interval(numbers[0])} against {interval(numbers[1])}, difference {interval(merged.difference)}. {kept}."
    )
