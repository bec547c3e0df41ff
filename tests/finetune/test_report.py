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
from pd_core.core.settings import load
from pd_core.core.settings.finetune import FinetuneSettings
from pd_core.core.settings.generate import GenerateSettings, GeneratorSettings, WeightingSettings
from pd_core.engine import runs
from pd_core.evaluate.report import Number, interval
from pd_core.finetune import merge as finetune_merge
from pd_core.finetune import report
from pd_core.generate.candidates import picture
from pd_core.images import resize
from pd_core.report import page as report_page
from tests.report.test_page import HOSTILE, LOADING_ATTRIBUTES, Page, pixels

METRICS = ("precision", "recall", "density", "coverage", "frechet_distance", "vendi_generated", "vendi_real")
STEPS = (0, 100, 200, 300)
COEFFICIENTS = [-0.1213, 0.2347, 0.5151, 0.3715]
DIFFERENCE = Number(-0.0917, -0.1411, -0.0423)


def number(step: int, metric: str) -> Number:
    """A value whose digits tell step and metric."""
    value = 0.2 + 0.0613 * METRICS.index(metric) + 0.000917 * step
    return Number(value, value - 0.0137, value + 0.0171)


def write_samples(stage: artifacts.Stage, name: str, state: int, labels: list[str | None]) -> None:
    many = len(labels)
    rows = {
        "number": np.arange(many),
        "seed": 7000 + np.arange(many),
        "label": labels,
        "density_predicted": 0.5 + 0.1234 * state + 0.0137 * np.arange(many),
        "image": [picture(np.asarray(pixels(100 * state + i)), str(i)) for i in range(many)],
    }
    stage.write_table(name, pa.table(rows, schema=schemas.finetuned_samples()))


def stage_of(output: Path, kind: str) -> artifacts.Stage:
    return artifacts.Stage(str(output / kind), kind, schemas.VERSIONS[kind], {"seed": 1})


def inputs_of(
    output: Path, merge: bool = True, best: int = 200, text: str = "cat", settings: dict[str, Any] | None = None
) -> report.Inputs:
    """Stages that were really written; text: whatever a stranger may have named."""
    name = text.encode(errors="replace").decode()  # a table holds no name that is no text
    stage, labels, rows = stage_of(output, "training"), [name, None, "dog", "<b>"], []
    stage.begin(False)
    for i, step in enumerate(STEPS):
        write_samples(stage, f"samples-{step:08d}.parquet", i, labels)
        for metric in METRICS:
            row = {"step": step, "metric": metric} | dataclasses.asdict(number(step, metric))
            rows.append(row | {"n_real": 1797, "n_generated": 500, "k": 3 if metric in METRICS[:2] else None})
    stage.write_table("evaluations.parquet", pa.Table.from_pylist(rows[::-1], schema=schemas.evaluations()))
    logged = ("zeta", "acceptance", name, "loss")
    steps = [{"step": s, "name": n, "value": 1 / s} for s in range(300, 0, -1) for n in logged]
    stage.write_table("history.parquet", pa.Table.from_pylist(steps, schema=schemas.history()))
    totals = {
        "best": best,
        "metric": "frechet_distance",
        "steps": 300,
        "stopped_early": True,
        "weights": {"rows": 1797, "effective_sample_size": 412.4, "share_above": 0.8919, "by_label": {name: 0.25}},
    }
    trained = stage.commit(stage.finished_parts().values(), totals, {"training": 61.0})
    values: dict[str, Any] = {
        "index": "runs/cats",
        "output": str(output),
        "generator": GeneratorSettings(path=f"runs/{text}/ddpm", steps=10, scheduler="DDIMScheduler"),
        "weighting": WeightingSettings(threshold="p80", weight=33.0),
    }
    made = FinetuneSettings(**(values | (settings or {})))
    result = made.generator.model_copy(update={"path": str(output / "best")})
    merged = (str(output / "merging"), write_merging(output, labels)) if merge else None
    timings_s = {"training": 61.0, text: 20.0}
    return report.Inputs(str(output / "training"), trained, merged, made, result, "efficientnet_lite0", timings_s)


def write_merging(output: Path, labels: list[str | None]) -> artifacts.Artifact:
    stage = stage_of(output, "merging")
    stage.begin(False)
    write_samples(stage, finetune_merge.SAMPLES, 9, labels)
    both = {"merged": 1000, "single": 1100}
    totals = {which: {m: dataclasses.asdict(number(step, m)) for m in METRICS} for which, step in both.items()}
    more = {"steps": list(STEPS), "coefficients": COEFFICIENTS, "single_step": 200, "beats": True}
    more |= {"candidates": 64, "unmeasured": 3, "difference": dataclasses.asdict(DIFFERENCE)}
    return stage.commit(stage.finished_parts().values(), totals | more, {"merging": 20.0})


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> report.Inputs:
    return inputs_of(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def drawn(inputs: report.Inputs) -> dict[str, bytes]:
    return dict(report._draw(inputs).files)


@pytest.fixture(scope="module")
def page(drawn: dict[str, bytes]) -> Page:
    return Page(drawn[runs.REPORT])


@pytest.fixture
def no_figures(monkeypatch):  # a figure takes a third of a second
    blank = resize.thumbnail(pixels(0))
    for name in ("metric_png", "path_png", "history_png"):
        monkeypatch.setattr(report, name, lambda *_: blank)


# ---- gathered --------------------------------------------------------------------------------------------------------


def test_what_is_gathered_is_what_was_written(inputs):
    data = report.gather(inputs)
    assert data["evaluations"] == [
        {"step": s, "n_real": 1797, "n_generated": 500, "numbers": {m: number(s, m) for m in METRICS[::-1]}}
        for s in STEPS
    ]
    assert [one["name"] for one in data["history"]] == ["loss", "acceptance", "cat", "zeta"]  # names not known last
    assert all(one["value"].tolist() == [1 / step for step in range(1, 301)] for one in data["history"])
    assert data["merged"]["difference"] == DIFFERENCE and data["merged"]["single"]["recall"] == number(1100, "recall")
    for i, (one, label) in enumerate(zip(data["shown"], ("cat", None, "dog", "<b>"), strict=True)):
        assert (one["number"], one["seed"], one["label"]) == (i, 7000 + i, label)
        assert one["shots"] == {
            state: (0.5 + 0.1234 * place + 0.0137 * i, resize.thumbnail(pixels(100 * place + i)))
            for state, place in (("before", 0), ("best", STEPS.index(200)), ("merged", 9))
        }
    facts = dict(data["facts"]["Weights of the real images"])
    assert facts["share above"] == "0.8919" and facts["by label.cat"] == "0.25"


@pytest.mark.parametrize(
    ("merge", "best", "states"), [(False, 200, ["before", "best"]), (True, 0, ["before", "last", "merged"])]
)
def test_states_that_do_not_exist_are_not_read(tmp_path, merge, best, states, no_figures):
    made = inputs_of(tmp_path, merge=merge, best=best)
    assert [list(one["shots"]) for one in report.gather(made)["shown"]] == [states] * 4
    text = Page(report._draw(made).files[runs.REPORT]).text
    assert ("Combination of checkpoints" in text) == merge
    assert ("No evaluated step has a better Fréchet distance than the generator as it came" in text) == (best == 0)


def test_images_of_other_seeds_are_a_defect(tmp_path):
    made = inputs_of(tmp_path)
    table = files.read_table(str(tmp_path / "training" / "samples-00000200.parquet"))
    other = table.set_column(1, table.schema.field("seed"), pa.array(np.arange(4)))
    stage_of(tmp_path, "training").write_table("samples-00000200.parquet", other)
    with pytest.raises(AssertionError):
        report.gather(made)


@pytest.mark.parametrize(
    "generator",
    [
        {"path": "runs/my generators/ddpm", "steps": 10, "scheduler": "DDIMScheduler", "safety_checker": False},
        {"kind": "torchscript", "path": "g.pt", "latent_shape": (3, 32, 32)},
        {"kind": "stylegan", "path": "g.pkl", "allow_pickle": True, "truncation": 0.7},
        {"kind": "python", "path": "a.py:make", "arguments": {"classes": 3, "name": "it's"}, "label_names": ["a", "b"]},
    ],
)
def test_the_command_of_the_page_opens_the_result(inputs, generator):
    settings = inputs.settings.model_copy(update={"output": "my runs", "checkpoint": "w.pt"})
    result = GeneratorSettings(**generator)
    words = shlex.split(report.command(dataclasses.replace(inputs, settings=settings, result=result)))
    assert words[:2] == ["pd-core", "generate"]
    found = load.load(GenerateSettings, words[2:], prog="generate.py")
    assert found.generator == result and found.output == "my runs-samples"
    assert (found.index, found.checkpoint, found.weighting.kind) == ("runs/cats", "w.pt", "none")


@pytest.mark.parametrize(
    ("weighting", "text"),
    [
        ({"threshold": "1.2", "weight": 0.5, "per_label": True}, "w = 0.5 where ρ > 1.2, else 1, by label"),
        ({"kind": "none"}, "each real image equally often"),
        ({"kind": "quantiles", "weights": [1, 2.5]}, "weights 1, 2.5 of equally large bins of ρ"),
    ],
)
def test_weightings_read_as_they_were_asked_for(weighting, text):
    assert report.weighting_text(FinetuneSettings(weighting=WeightingSettings(**weighting))) == text


def test_verdicts_follow_the_intervals(inputs):
    base = Number(0.5, 0.4, 0.6)
    for after, end in (
        (Number(0.8, 0.7, 0.9), "The intervals part."),
        (Number(0.65, 0.55, 0.75), "The intervals overlap: the two are not told apart."),
        (Number(0.8, None, None), "whether they differ cannot be told."),
    ):
        assert report.verdict("recall", base, after, 100).endswith(end)
    merged = report.gather(inputs)["merged"]
    line = report.merge_verdict("recall", "recall", merged)
    assert "beats the best single step (200) on held-out seeds" in line and "-0.0917 (-0.1411 … -0.0423)" in line
    assert line.endswith("best/ holds the combination.")
    line = report.merge_verdict("recall", "recall", merged | {"beats": False})
    assert "does not beat" in line and line.endswith("best/ holds step 200.")


# ---- drawn -----------------------------------------------------------------------------------------------------------


def test_every_tag_is_closed_ids_resolve_and_nothing_is_loaded(page):
    assert page.open == []
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    anchors = {attributes["href"].removeprefix("#") for tag, attributes in page.tags if tag == "a"}
    assert len(ids) == len(set(ids)) and anchors and anchors <= set(ids)
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe", "object", "embed", "base", "form")]
    for tag, attributes in page.tags:
        for name in LOADING_ATTRIBUTES:
            assert attributes.get(name, "#").startswith(("#", "data:image/")), (tag, name)


def test_numbers_and_images_of_the_page_equal_the_data(page, inputs):
    data = report.gather(inputs)
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
        data["verdict"],
        data["merge_verdict"],
    ):
        assert text in page.text, text
    for one in data["evaluations"]:
        row = " ".join(interval(one["numbers"][name]) for name in METRICS[:-1])
        assert f"{row} 500 1,797" in page.text, one["step"]
    for metric in METRICS[:-1]:  # held-out numbers of both
        assert " ".join(interval(number(step, metric)) for step in (1000, 1100)) in page.text, metric
    pictures = set(page.images())
    for one in data["shown"]:
        assert any(f"seed {one['seed']}" in attributes.get("title", "") for _, attributes in page.tags)
        for density, thumbnail in one["shots"].values():
            assert thumbnail in pictures and f"ρ {density:#.4g}" in page.text
    assert report_page.number(0.8919) in page.text


def test_figures_move_with_the_data(drawn, inputs):
    assert set(drawn) == {
        runs.REPORT,
        *(f"metric_{metric}.png" for metric in METRICS[:-1]),
        "precision_recall_path.png",
        *(f"history_{i}.png" for i in range(4)),
    }
    data = report.gather(inputs)
    small = data | {"best": 100, "after": data["evaluations"][1]}
    assert report.metric_png(data, "recall") != report.metric_png(small, "recall")
    assert report.path_png(data) != report.path_png(small)


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_names_are_text_and_nothing_else(text, tmp_path, no_figures):
    pages: list[Page] = []
    for name in ("plain", text):
        made = inputs_of(tmp_path / str(len(pages)), text=name)
        trained = dataclasses.replace(made.trained, versions={name: name})
        made = dataclasses.replace(
            made, trained=trained, extractor=name, settings=made.settings.model_copy(update={"index": name})
        )
        pages.append(Page(report._draw(made).files[runs.REPORT]))
    clean, dirty = pages
    assert dirty.open == []
    assert [(tag, sorted(a)) for tag, a in dirty.tags] == [(tag, sorted(a)) for tag, a in clean.tags]


@pytest.mark.parametrize("text", [HOSTILE[1], HOSTILE[5], "$x"])
def test_figures_bear_hostile_names(text):
    assert report.history_png({"name": text, "step": np.arange(1, 5), "value": np.ones(4)}).startswith(b"\x89PNG")


def test_the_stage_writes_the_page_and_its_figures(inputs, tmp_path, ray_cluster):
    stage = report.stage_of(str(tmp_path), inputs.trained, inputs.merging[1])
    artifact = stage.complete(lambda: report.run(stage, inputs), False)
    assert {runs.REPORT, "metric_frechet_distance.png"} <= {part.name for part in artifact.parts}
    assert report.stage_of(str(tmp_path), inputs.trained, None).fingerprint != stage.fingerprint
