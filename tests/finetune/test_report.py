"""The report of finetune: true to the stages it was gathered from, complete, and unharmed by hostile names."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pd_core.core import artifacts, files, schemas
from pd_core.core.settings import finetune, load
from pd_core.core.settings.finetune import FinetuneSettings
from pd_core.core.settings.generate import GenerateSettings, GeneratorSettings, WeightingSettings
from pd_core.engine import runs
from pd_core.evaluate.report import Number, interval
from pd_core.finetune import merge as finetune_merge
from pd_core.finetune import report
from pd_core.finetune.report import Evaluated, FinetunedData, Logged, Shot, Shown
from pd_core.generate.candidates import picture
from pd_core.images import resize
from pd_core.report import page as report_page
from tests.report.test_page import HOSTILE, LOADING_ATTRIBUTES, Page, pixels

METRICS = ("precision", "recall", "density", "coverage", "frechet_distance", "vendi_generated", "vendi_real")
STEPS = (0, 100, 200, 300)


def value_of(step: int, metric: str) -> float:
    """A value whose digits tell step and metric."""
    return 0.2 + 0.0613 * METRICS.index(metric) + 0.000917 * step


def number(step: int, metric: str) -> Number:
    value = value_of(step, metric)
    return Number(value, value - 0.0137, value + 0.0171)


def evaluated(step: int) -> Evaluated:
    return Evaluated(step, {metric: number(step, metric) for metric in METRICS}, 1797, 500)


def logged(name: str, many: int = 300) -> Logged:
    steps = np.arange(1, many + 1)
    return Logged(name, steps, np.exp(-steps / 90) + 0.05 * np.random.default_rng(0).standard_normal(many))


def shown(i: int, label: str | None = "cat", states=("before", "best", "merged")) -> Shown:
    shots = {s: Shot(0.5 + 0.0137 * i + 0.31 * j, resize.thumbnail(pixels(10 * i + j))) for j, s in enumerate(states)}
    return Shown(i, 900_000 + i, label, shots)


def combination(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "steps": STEPS,
        "coefficients": (-0.1213, 0.2347, 0.5151, 0.3715),
        "single_step": 200,
        "merged": {metric: number(1000, metric) for metric in METRICS},
        "single": {metric: number(1100, metric) for metric in METRICS},
        "difference": Number(-0.0917, -0.1411, -0.0423),
        "beats": True,
        "candidates": 64,
        "unmeasured": 3,
    }
    return values | changes


def example(**changes: Any) -> FinetunedData:
    values: dict[str, Any] = {
        "title": "Fine-tuned generator",
        "output": "runs/tuned",
        "index": "runs/cats",
        "created": "2025-01-02T03:04:05+00:00",
        "generator": "runs/generators/ddpm",
        "weighting": "w = 33 where ρ > p80, else 1",
        "effective_size": 412.4,
        "n_images": 1797,
        "asked": 500,
        "steps": 300,
        "stopped_early": True,
        "metric": "frechet_distance",
        "best": 200,
        "extractor": "efficientnet_lite0",
        "k_precision": 3,
        "k_coverage": 5,
        "evaluations": [evaluated(step) for step in STEPS],
        "history": [logged("loss"), logged("g_loss")],
        "shown": [shown(i) for i in range(3)],
        "merged": combination(),
        "command": "pd-core generate --index runs/cats",
        "facts": {"Generator": [("kind", "diffusers")]},
        "timings_s": {"training": 61.0, "merging": 20.0},
        "versions": {"pd-core": "0.1.0", "torch": "2.15.0"},
        "settings_yaml": "steps: 500\n",
    }
    return FinetunedData(**(values | changes))


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(report.drawn(example())[runs.REPORT])


# most tests look at text, and a figure takes a third of a second
@pytest.fixture
def no_figures(monkeypatch):
    blank = resize.thumbnail(pixels(0))
    for name in ("metric_png", "path_png", "history_png"):
        monkeypatch.setattr(report, name, lambda *_: blank)


def test_every_tag_is_closed_ids_resolve_and_nothing_is_loaded(page):
    assert page.open == []
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    anchors = {attributes["href"].removeprefix("#") for tag, attributes in page.tags if tag == "a"}
    assert len(ids) == len(set(ids)) and anchors and anchors <= set(ids)
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe", "object", "embed", "base", "form")]
    for tag, attributes in page.tags:
        for name in LOADING_ATTRIBUTES:
            assert attributes.get(name, "#").startswith(("#", "data:image/")), (tag, name)


def test_every_evaluation_is_in_the_table(page):
    data = example()
    for one in data.evaluations:
        row = " ".join(
            f"{report_page.number(n.value)} ({report_page.number(n.low)} … {report_page.number(n.high)})"
            for name, n in one.numbers.items()
            if name != "vendi_real"
        )
        assert f"{row} 500 1,797" in page.text, one.step
    assert page.text.count("500 1,797") == len(STEPS)


def test_images_of_every_seed_are_shown_in_every_state_with_their_density(page):
    drawn = set(page.images())
    for one in example().shown:
        for shot in one.shots.values():
            assert shot.thumbnail in drawn
            assert f"ρ {shot.density:#.4g}" in page.text
        assert any(f"seed {one.seed} · label cat" in a.get("title", "") for _, a in page.tags)


def test_numbers_of_the_page_equal_the_data(page):
    for text in (
        "best step 200 by Fréchet distance",
        "steps done 300 of 500, stopped early",
        "effective size 412 of 1,797 real images",
        "time of all stages 1 min 21 s",
        "w = 33 where ρ > p80, else 1",
        "64 linear combinations",
        "the images of 3 were not finite",
        "300 0.3715",
        "0 -0.1213",
        "pd-core generate --index runs/cats",
        "steps: 500",
        "in the space of efficientnet_lite0",
    ):
        assert text in page.text, text
    for metric in METRICS[:-1]:  # held-out numbers of both
        cells = [interval(number(step, metric)) for step in (1000, 1100)]
        assert " ".join(cells) in page.text, metric


def test_the_same_data_gives_the_same_bytes_and_figures_move_with_it(page):
    assert report.drawn(example())[runs.REPORT].decode() == page.html
    data, small = example(), example(best=100)
    draw = report.metric_png
    assert draw(data, "recall") != draw(small, "recall") != draw(small, "precision")
    assert report.path_png(data) != report.path_png(small)
    assert report.path_png(data) != report.path_png(data, narrow=True)
    assert set(report.drawn(data)) == {
        runs.REPORT,
        *(f"metric_{metric}.png" for metric in METRICS[:-1]),
        "precision_recall_path.png",
        "history_0.png",
        "history_1.png",
    }


def test_smoothing_keeps_the_mean_and_the_order():
    one = logged("loss", 40 * 7)
    step, value = report.smoothed(one)
    assert len(step) == report.SMOOTHING and (np.diff(step) > 0).all()
    assert value.mean() == pytest.approx(one.value.mean())  # windows are equally large here


def test_history_is_in_order_of_display_with_unknown_names_last():
    names = [one.name for one in report.history_shown([logged(n, 3) for n in ("zeta", "g_loss", "a", "loss")])]
    assert names == ["loss", "g_loss", "a", "zeta"]


# --- what is missing, and what is said of it ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "gone"),
    [
        ({"merged": None, "shown": [shown(0, states=("before", "best"))]}, "Combination of checkpoints"),
        ({"history": []}, "Training"),
        ({"shown": []}, "Images from the same seeds"),
        ({"timings_s": {}, "versions": {}, "settings_yaml": "", "facts": {}}, "All settings of this run"),
    ],
)
def test_what_is_missing_leaves_no_trace(changes, gone, no_figures):
    whole, less = Page(report.drawn(example())[runs.REPORT]), Page(report.drawn(example(**changes))[runs.REPORT])
    assert gone in whole.text and gone not in less.text
    ids = {attributes["id"] for _, attributes in less.tags if "id" in attributes}
    assert {a["href"].removeprefix("#") for tag, a in less.tags if tag == "a"} <= ids
    assert less.open == []


def test_a_run_without_a_better_step_says_so_and_shows_its_images_once(no_figures):
    data = example(best=0, merged=None, shown=[shown(0, states=("before", "last"))])
    text = Page(report.drawn(data)[runs.REPORT]).text
    assert "No evaluated step has a better Fréchet distance than the generator as it came" in text


def test_verdicts_follow_the_intervals():
    def run(before: Number, after: Number) -> str:
        both = [dataclasses.replace(evaluated(step), numbers={"recall": n}) for step, n in ((0, before), (100, after))]
        return report.verdict(example(metric="recall", best=100, evaluations=both, shown=[]))

    base = Number(0.5, 0.4, 0.6)
    assert run(base, Number(0.8, 0.7, 0.9)).endswith("The intervals part.")
    assert run(base, Number(0.65, 0.55, 0.75)).endswith("The intervals overlap: the two are not told apart.")
    assert run(base, Number(0.8, None, None)).endswith("whether they differ cannot be told.")


def test_the_merge_is_judged_in_one_sentence():
    line = report.merge_verdict(example(), combination())
    assert "beats the best single step (200) on held-out seeds" in line and line.endswith(
        "best/ holds the combination."
    )
    assert "difference -0.0917 (-0.1411 … -0.0423)" in line
    worse = combination(beats=False, difference=Number(-0.01, -0.04, 0.02))
    line = report.merge_verdict(example(), worse)
    assert "does not beat" in line and line.endswith("best/ holds step 200.")


@pytest.mark.parametrize(
    "changes",
    [
        {"best": 150},
        {"steps": 250},
        {"evaluations": [evaluated(100), evaluated(200)]},
        {"evaluations": [evaluated(0), evaluated(200), evaluated(200)]},
        {"shown": [shown(0, states=("before", "best"))]},
    ],
)
def test_data_that_does_not_add_up_is_refused(changes):
    with pytest.raises(AssertionError):
        example(**changes)


def hostile_data(text: str) -> FinetunedData:
    return example(
        title=text,
        output=text,
        index=text,
        generator=text,
        weighting=text,
        extractor=text,
        command=text,
        shown=[shown(0, label=text)],
        history=[logged(text, 5)],
        facts={text: [(text, text)]},
        timings_s={text: 1.0},
        versions={text: text},
        settings_yaml=text,
    )


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_names_are_text_and_nothing_else(text, no_figures):
    clean, dirty = (Page(report.drawn(hostile_data(t))[runs.REPORT]) for t in ("plain", text))
    assert dirty.open == []
    assert [(tag, sorted(a)) for tag, a in dirty.tags] == [(tag, sorted(a)) for tag, a in clean.tags]


@pytest.mark.parametrize("text", [HOSTILE[2], HOSTILE[7], HOSTILE[8], "$x"])
def test_figures_bear_hostile_names(text):
    assert report.history_png(logged(text, 5)).startswith(b"\x89PNG")


# --- gathered from stages that were really written ---------------------------------------------------------------------


def write_samples(stage: artifacts.Stage, name: str, state: int, many: int = 4) -> None:
    rows = {
        "number": np.arange(many),
        "seed": 7000 + np.arange(many),
        "label": ["cat", None, "dog", "<b>"][:many],
        "density_predicted": 0.5 + 0.1234 * state + 0.0137 * np.arange(many),
        "image": [picture(np.asarray(pixels(100 * state + i)), str(i)) for i in range(many)],
    }
    stage.write_table(name, pa.table(rows, schema=schemas.finetuned_samples()))


def write_training(output: Path, best: int = 200) -> artifacts.Artifact:
    stage = artifacts.Stage(str(output / "training"), "training", schemas.VERSIONS["training"], {"seed": 1})
    stage.begin(False)
    rows = []
    for i, step in enumerate(STEPS):
        write_samples(stage, f"samples-{step:08d}.parquet", i)
        for metric in METRICS:
            n = number(step, metric)
            row = {"step": step, "metric": metric, "value": n.value, "low": n.low, "high": n.high}
            rows.append(row | {"n_real": 1797, "n_generated": 500, "k": 3 if metric in METRICS[:2] else None})
    stage.write_table("evaluations.parquet", pa.Table.from_pylist(rows[::-1], schema=schemas.evaluations()))
    steps = [{"step": s, "name": n, "value": 1 / s} for s in range(300, 0, -1) for n in ("loss", "acceptance")]
    stage.write_table("history.parquet", pa.Table.from_pylist(steps, schema=schemas.history()))
    totals = {
        "best": best,
        "metric": "frechet_distance",
        "steps": 300,
        "stopped_early": False,
        "weights": {"rows": 1797, "effective_sample_size": 412.4, "share_above": 0.8919, "by_label": {"cat": 0.25}},
    }
    return stage.commit(stage.finished_parts().values(), totals, {"training": 61.0})


def write_merging(output: Path) -> artifacts.Artifact:
    stage = artifacts.Stage(str(output / "merging"), "merging", schemas.VERSIONS["merging"], {"seed": 1})
    stage.begin(False)
    write_samples(stage, finetune_merge.SAMPLES, 9)
    plain = lambda numbers: {name: dataclasses.asdict(n) for name, n in numbers.items()}  # noqa: E731
    one = combination(steps=list(STEPS), coefficients=list(combination()["coefficients"]), metric="frechet_distance")
    totals = one | {which: plain(one[which]) for which in ("merged", "single")}
    totals["difference"] = dataclasses.asdict(one["difference"])
    return stage.commit(stage.finished_parts().values(), totals, {"merging": 20.0})


def settings_of(output: Path, **changes: Any) -> FinetuneSettings:
    values: dict[str, Any] = {
        "index": "runs/cats",
        "output": str(output),
        "generator": GeneratorSettings(path="runs/generators/ddpm", steps=10, scheduler="DDIMScheduler"),
        "weighting": WeightingSettings(threshold="p80", weight=33.0),
    }
    return FinetuneSettings(**(values | changes))


def inputs_of(output: Path, merge: bool = True, best: int = 200, **changes: Any) -> report.Inputs:
    trained = write_training(output, best)
    merged = (str(output / "merging"), write_merging(output)) if merge else None
    settings = settings_of(output, **changes)
    result = settings.generator.model_copy(update={"path": str(output / "best")})
    return report.Inputs(
        str(output / "training"), trained, merged, settings, result, "efficientnet_lite0", {"training": 61.0}
    )


def test_what_is_gathered_is_what_was_written(tmp_path):
    data = report.gather(inputs_of(tmp_path))
    assert list(data.evaluations) == [evaluated(step) for step in STEPS]
    assert {one.name: one.value.tolist() for one in data.history} == {
        name: [1 / step for step in range(1, 301)] for name in ("loss", "acceptance")
    }
    assert data.merged is not None
    assert {name: data.merged[name] for name in combination()} == combination(
        steps=list(STEPS), coefficients=list(combination()["coefficients"])
    )
    assert [(s.number, s.seed, s.label) for s in data.shown] == [
        (i, 7000 + i, label) for i, label in enumerate(("cat", None, "dog", "<b>"))
    ]
    for i, one in enumerate(data.shown):
        for state, place in (("before", 0), ("best", STEPS.index(200)), ("merged", 9)):
            assert one.shots[state].thumbnail == resize.thumbnail(pixels(100 * place + i))
            assert one.shots[state].density == 0.5 + 0.1234 * place + 0.0137 * i
    assert (data.effective_size, data.n_images, data.best, data.asked) == (412.4, 1797, 200, 500)
    facts = dict(data.facts["Weights of the real images"])
    assert facts["share above"] == "0.8919" and facts["by label.cat"] == "0.25"
    assert data.settings_yaml and finetune.FinetuneSettings.model_fields.keys() >= {"weighting"}


def test_the_stage_writes_the_page_and_its_figures(tmp_path, ray_cluster):
    inputs = inputs_of(tmp_path)
    assert inputs.merging is not None
    stage = report.stage_of(str(tmp_path), inputs.trained, inputs.merging[1])
    artifact = stage.complete(lambda: report.run(stage, inputs), False)
    names = {part.name for part in artifact.parts}
    assert runs.REPORT in names and "metric_frechet_distance.png" in names and "precision_recall_path.png" in names
    page = Page((tmp_path / "report" / runs.REPORT).read_bytes())
    assert page.text.count("500 1,797") == len(STEPS)
    without = report.stage_of(str(tmp_path), inputs.trained, None)
    assert without.fingerprint != stage.fingerprint


@pytest.mark.parametrize(
    ("merge", "best", "states"), [(False, 200, ["before", "best"]), (True, 0, ["before", "last", "merged"])]
)
def test_states_that_do_not_exist_are_not_read(tmp_path, merge, best, states):
    data = report.gather(inputs_of(tmp_path, merge=merge, best=best))
    assert [list(one.shots) for one in data.shown] == [states] * 4


def test_images_of_other_seeds_are_a_defect(tmp_path):
    inputs = inputs_of(tmp_path)
    stage = artifacts.Stage(str(tmp_path / "training"), "training", schemas.VERSIONS["training"], {"seed": 1})
    table = files.read_table(str(tmp_path / "training" / "samples-00000200.parquet"))
    other = table.set_column(1, table.schema.field("seed"), pa.array(np.arange(4)))
    stage.write_table("samples-00000200.parquet", other)
    with pytest.raises(AssertionError):
        report.gather(inputs)


@pytest.mark.parametrize(
    "generator",
    [
        {"path": "runs/my generators/ddpm", "steps": 10, "scheduler": "DDIMScheduler", "safety_checker": False},
        {"kind": "torchscript", "path": "g.pt", "latent_shape": (3, 32, 32)},
        {"kind": "stylegan", "path": "g.pkl", "allow_pickle": True, "truncation": 0.7},
        {"kind": "python", "path": "a.py:make", "arguments": {"classes": 3, "name": "it's"}, "label_names": ["a", "b"]},
    ],
)
def test_the_command_of_the_page_opens_the_result(tmp_path, generator):
    inputs = inputs_of(tmp_path / "my runs", merge=False, generator=GeneratorSettings(**generator), checkpoint="w.pt")
    words = shlex.split(report.command(inputs))
    assert words[:2] == ["pd-core", "generate"]
    settings = load.load(GenerateSettings, words[2:], prog="generate.py")
    assert settings.generator == inputs.result
    assert (settings.index, settings.checkpoint, settings.weighting.kind) == ("runs/cats", "w.pt", "none")
    assert settings.output == f"{inputs.settings.output}-samples"


@pytest.mark.parametrize(
    ("weighting", "text"),
    [
        ({"threshold": "p80", "weight": 33}, "w = 33 where ρ > p80, else 1"),
        ({"threshold": "1.2", "weight": 0.5, "per_label": True}, "w = 0.5 where ρ > 1.2, else 1, by label"),
        ({"kind": "none"}, "each real image equally often"),
        ({"kind": "quantiles", "weights": [1, 2.5]}, "weights 1, 2.5 of equally large bins of ρ"),
        ({"kind": "match"}, "match"),
    ],
)
def test_weightings_read_as_they_were_asked_for(tmp_path, weighting, text):
    settings = settings_of(tmp_path, weighting=WeightingSettings(**weighting))
    assert report.weighting_text(settings) == text
