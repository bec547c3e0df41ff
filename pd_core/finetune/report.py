"""The report of finetune: what its page shows of the training, and of the merge where there is one, gathered and drawn.

Metrics over the steps beside those of the generator as it came, what the loss did meanwhile, and images from the same
seeds before and after.
"""

from __future__ import annotations

import datetime
import functools
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    drawings: dict[str, figures.Drawing] = {
        f"metric_{name}": functools.partial(metric_png, data, name) for name in data["metrics"]
    }
    drawings["precision_recall_path"] = functools.partial(path_png, data)
    drawings |= {f"history_{i}": functools.partial(history_png, one) for i, one in enumerate(data["history"])}
    names = {"d": data, "history_names": HISTORY, "interval": interval, "states": STATES, "zip": zip}
    return runs.Drawn(figures.page_files("finetuned.html.j2", names, drawings))


# ---- what is shown ---------------------------------------------------------------------------------------------------


def gather(inputs: Inputs) -> dict[str, Any]:
    """All that the page shows, as its template names it."""
    settings, totals = inputs.settings, inputs.trained.totals
    weights, metric, names = totals["weights"], totals["metric"], metric_names(inputs.extractor)
    evaluations = _evaluations(inputs.training)
    before, after = evaluations[0], next(one for one in evaluations if one["step"] == totals["best"])
    merged = None if inputs.merging is None else _merged(inputs.merging[1].totals)
    return {
        "title": "Fine-tuned generator",
        "output": str(settings.output),
        "index": str(settings.index),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "generator": str(settings.generator.path),
        "weighting": weighting_text(settings),
        "effective_size": weights["effective_sample_size"],
        "n_images": weights["rows"],
        "asked": settings.steps,
        "steps": totals["steps"],
        "stopped_early": totals["stopped_early"],
        "metric": metric,
        "metric_names": names,
        # that of the real set alone stands still
        "metrics": [name for name in names if name in before["numbers"] and name != "vendi_real"],
        "best": totals["best"],
        "verdict": verdict(names[metric], before["numbers"][metric], after["numbers"][metric], totals["best"]),
        "merge_verdict": None if merged is None else merge_verdict(names[metric], metric, merged),
        "extractor": inputs.extractor,
        "k_precision": settings.evaluation.metrics.k_precision,
        "k_coverage": settings.evaluation.metrics.k_coverage,
        "evaluations": evaluations,
        "before": before,
        "after": after,
        "history": _history(inputs.training),
        "shown": _shown(inputs, evaluations[-1]["step"]),
        "merged": merged,
        "command": command(inputs),
        "facts": _facts(inputs),
        "timings_s": inputs.timings_s,
        "versions": inputs.trained.versions,
        "settings_yaml": to_yaml(settings),
    }


def weighting_text(settings: FinetuneSettings) -> str:
    """How often real images are drawn, in words."""
    weighting = settings.weighting
    if weighting.kind == "none":
        return "each real image equally often"
    by_label = ", by label" if weighting.per_label else ""
    if weighting.kind == "two_level":
        return f"w = {page.number(weighting.weight)} where ρ > {weighting.threshold}, else 1{by_label}"
    return f"weights {', '.join(map(page.number, weighting.weights or ()))} of equally large bins of ρ{by_label}"


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


def _evaluations(training: str) -> list[dict[str, Any]]:
    """Step, sizes and metrics by name of each evaluation, in ascending order of their steps; step 0 is the first."""
    found: dict[int, dict[str, Any]] = {}
    for row in files.read_table(files.join(training, checkpoints.EVALUATIONS)).sort_by("step").to_pylist():
        sizes = {name: row[name] for name in ("step", "n_real", "n_generated")}
        found.setdefault(row["step"], sizes | {"numbers": {}})["numbers"][row["metric"]] = _number(row)
    return list(found.values())


def _number(values: Mapping[str, Any]) -> Number:
    return Number(values["value"], values["low"], values["high"])


def _history(training: str) -> list[dict[str, Any]]:
    """What the steps logged, by name in order of display, unknown names last: arrays of step and value."""
    table = files.read_table(files.join(training, checkpoints.HISTORY)).sort_by("step")
    order = list(HISTORY)
    names = sorted(
        pc.unique(table["name"]).to_pylist(),
        key=lambda name: (order.index(name) if name in HISTORY else len(order), name),
    )
    own = {name: table.filter(pc.equal(table["name"], name)) for name in names}
    return [
        {"name": name, "step": rows["step"].to_numpy(), "value": rows["value"].to_numpy()} for name, rows in own.items()
    ]


def _merged(totals: Mapping[str, Any]) -> dict[str, Any]:
    numbers = {which: {name: _number(one) for name, one in totals[which].items()} for which in ("merged", "single")}
    return {**totals, **numbers, "difference": _number(totals["difference"])}


def _shown(inputs: Inputs, last: int) -> list[dict[str, Any]]:
    """Images of the same seeds, in every state: density and thumbnail. Where no step is better than 0, the last one
    shows what training did.
    """
    best, steps = inputs.trained.totals["best"], {"before": 0}
    if best or last:
        steps |= {"best": best} if best else {"last": last}
    uris = {state: files.join(inputs.training, checkpoints.samples_name(step)) for state, step in steps.items()}
    if inputs.merging is not None:
        uris["merged"] = files.join(inputs.merging[0], merge.SAMPLES)
    rows = [files.read_table(uri).sort_by("number").to_pylist() for uri in uris.values()]
    # strict: a state that lacks an image is a defect, and none is left out
    return [_one_seed(tuple(uris), of_seed) for of_seed in zip(*rows, strict=True)]


def _one_seed(states: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first = {name: rows[0][name] for name in ("number", "seed", "label")}
    assert all((row["number"], row["seed"]) == (first["number"], first["seed"]) for row in rows), first
    pictures = thumbnails.of_samples([row["image"] for row in rows], "samples")
    shots = zip((row["density_predicted"] for row in rows), pictures, strict=True)
    return first | {"shots": dict(zip(states, shots, strict=True))}


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


def verdict(name: str, before: Number, after: Number, best: int) -> str:
    """What fine-tuning did to the metric that the best step was chosen by, with what that is worth."""
    if best == 0:
        return f"No evaluated step has a better {name} than the generator as it came, {interval(before)}."
    line = f"{name}: {interval(before)} as it came, {interval(after)} at step {best:,}."
    if before.low is None or before.high is None or after.low is None or after.high is None:
        return f"{line} There are too few images for intervals: whether they differ cannot be told."
    apart = before.low > after.high or after.low > before.high
    return f"{line} {'The intervals part.' if apart else 'The intervals overlap: the two are not told apart.'}"


def merge_verdict(name: str, metric: str, merged: Mapping[str, Any]) -> str:
    """Whether the combination of checkpoints beats the best single one, with held-out intervals."""
    outcome, step = "beats" if merged["beats"] else "does not beat", f"{merged['single_step']:,}"
    combined, single, difference = merged["merged"][metric], merged["single"][metric], merged["difference"]
    return (
        f"The combination of checkpoints {outcome} the best single step ({step}) on held-out seeds: {name} "
        f"{interval(combined)} against {interval(single)}, difference {interval(difference)}. "
        f"best/ holds {'the combination' if merged['beats'] else f'step {step}'}."
    )


# --- figures ----------------------------------------------------------------------------------------------------------


def metric_png(data: Mapping[str, Any], metric: str, narrow: bool = False) -> bytes:
    """A metric over the steps with 95% intervals; the generator as it came as a band, the best step marked."""
    figure, axes = figures.new_figure(narrow, height_in=2.6 if narrow else 3.0, width_in=4.8)
    points = [(one["step"], one["numbers"][metric]) for one in data["evaluations"]]
    before, after = data["before"]["numbers"][metric], data["after"]["numbers"][metric]
    if before.low is not None and before.high is not None:
        axes.axhspan(before.low, before.high, color=figures.BAR, alpha=0.25, linewidth=0)
    axes.axhline(before.value, color=figures.BAR, linewidth=1.2)
    axes.plot([step for step, _ in points], [y.value for _, y in points], color=figures.INK, linewidth=1.4)
    for step, number in points:
        draw_point(axes, Number(step, None, None), number, None, figures.INK, "o")
    axes.axvline(data["best"], color=figures.MARK, linewidth=1.0, linestyle=":")
    draw_point(axes, Number(data["best"], None, None), after, None, figures.MARK, "o")
    axes.set_xlabel("step")
    axes.set_ylabel(data["metric_names"][metric])
    axes.margins(0.06)
    return figures.to_png(figure)


def path_png(data: Mapping[str, Any], narrow: bool = False) -> bytes:
    """Precision over recall, from the generator as it came along the steps."""
    figure, axes = figures.new_figure(narrow, height_in=3.6 if narrow else 4.6, width_in=6.4)
    points = [(one["step"], one["numbers"]["recall"], one["numbers"]["precision"]) for one in data["evaluations"]]
    recalls, precisions = [x.value for _, x, _ in points], [y.value for _, _, y in points]
    axes.plot(recalls, precisions, color=figures.INK, linewidth=1.2, alpha=0.6)
    styles = {data["best"]: (f"best, step {data['best']:,}", figures.MARK, "D"), 0: ("as it came", figures.BAR, "s")}
    for step, recall, precision in sorted(points, key=lambda point: point[0] in styles):  # those with a name on top
        draw_point(axes, recall, precision, *styles.get(step, (None, figures.INK, "o")))
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


def history_png(logged: Mapping[str, Any], narrow: bool = False) -> bytes:
    """What the steps logged (thin) and its mean over SMOOTHING windows of equally many rows (line)."""
    figure, axes = figures.new_figure(narrow, height_in=2.4 if narrow else 2.7, width_in=4.8)
    step, value = logged["step"], logged["value"]
    if len(step) > 2 * SMOOTHING:
        axes.plot(step, value, color=figures.BAR, linewidth=0.6, alpha=0.6)
        step, value = (np.array([w.mean() for w in np.array_split(whole, SMOOTHING)]) for whole in (step, value))
    axes.plot(step, value, color=figures.INK, linewidth=1.4, marker="o" if len(step) == 1 else None, markersize=4)
    axes.set_xlabel("step")
    axes.set_ylabel(page.drawable(page.visible(HISTORY.get(logged["name"], logged["name"]))), parse_math=False)
    return figures.to_png(figure)
