"""The report: complete, self-contained, true to its data, and unharmed by hostile names."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
from html.parser import HTMLParser
from importlib import resources
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from pd_core.build import report
from pd_core.build.report import ReportData
from pd_core.density import formula
from pd_core.engine.runs import REPORT
from pd_core.images import resize
from pd_core.images.decode import Reason
from pd_core.report import figures
from pd_core.report import page as report_page
from pd_core.report.page import Calibration, LabelRow, Picture

VOID = {"meta", "img", "source", "br", "link", "input", "hr"}
LOADING_ATTRIBUTES = ("src", "srcset", "href", "action", "data", "poster", "background", "xlink:href")


class Page(HTMLParser):
    """Tags with attributes, the text, and whether every opened tag is closed in order."""

    def __init__(self, html: bytes) -> None:
        super().__init__(convert_charrefs=True)
        self.html = html.decode("utf-8")
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.chunks: list[str] = []
        self.feed(self.html)
        self.close()
        self.text = " ".join(" ".join(self.chunks).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, {name: value or "" for name, value in attributes}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.chunks.append(data)

    def images(self) -> list[bytes]:
        uris = [a[name] for _, a in self.tags for name in ("src", "srcset") if name in a]
        return [base64.b64decode(uri.partition("base64,")[2]) for uri in uris]


def pixels(seed: int, size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def picture(i: int, *, key: str | None = None, label: str | None = "cat", distance: float | None = None) -> Picture:
    # values whose first four digits are all different, so that each can be looked for in the page
    return Picture(
        key or f"a/{i}.png",
        label,
        0.5 + i * 0.0137,
        0.01 + i * 0.7,
        20 - i * 0.1,
        resize.thumbnail(pixels(i)),
        distance,
    )


IVF = {
    "kind": "ivf_flat",
    "shards": 3,
    "cells": 179,
    "nprobe": 12,
    "target_recall": 0.99,
    "recall": 0.9931,
    "recall_lower": 0.9911,
    "mean_distance_relative_error": 0.00042,
    "calibration_queries": 1000,
}


def example(n: int = 2000, **changes) -> ReportData:
    distances = np.random.default_rng(0).gamma(9.0, 2.0, n)
    rho = formula.pseudo_density(distances, 1.0)
    quantiles = formula.density_quantiles(rho)
    log_rho = np.log(rho)[:400]
    data = ReportData(
        title="Pseudo density of cats",
        source="s3://bucket/cats",
        output="runs/cats",
        created="2025-01-02T03:04:05+00:00",
        n_images=n,
        n_quarantined=7,
        k=20,
        volume_dim=1.0,
        log_normalizer=formula.log_normalizer(distances, 1.0),
        floored_rows=0,
        density=rho,
        quantiles=quantiles,
        thresholds=[("p20", float(quantiles[200])), ("1.1869", 1.1869)],
        index=IVF,
        lowest=[picture(i) for i in range(4)],
        highest=[picture(100 - i) for i in range(4)],
        neighbors=[(picture(50), [picture(51, distance=3.217), picture(52, distance=4.681)])],
        labels=[LabelRow("cat", 1200, 1.1, 0.8, 1.05, 1.4), LabelRow("dog", 800, 0.85, 0.6, 0.83, 1.1)],
        calibration=Calibration(log_rho, log_rho * 0.9, 0.8765, 0.9432, 4321, {"low_decile_spearman": 0.6173}),
        quarantine={"truncated": 5, "empty": 2},
        quarantine_examples=[("a/bad.png", "truncated", "12 bytes missing")],
        skipped={".txt": 31},
        timings_s={"features": 61.0, "index": 2.5},
        versions={"pd_core": "0.1.0", "torch": "2.15.0"},
        settings_yaml="data:\n  source: s3://bucket/cats\n",
        feature={"model": "efficientnet_lite0", "fingerprint": "9f0c1e"},
    )
    return dataclasses.replace(data, **changes)


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(report.drawn(example())[REPORT])


# A page without figures: most tests look at text, and a figure takes a third of a second.
@pytest.fixture
def no_figures(monkeypatch):
    blank = resize.thumbnail(Image.new("RGB", (2, 2)))
    for name in ("histogram_png", "labels_png", "calibration_png"):
        monkeypatch.setattr(report, name, lambda *_: blank)


def test_every_tag_is_closed_and_ids_resolve(page):
    assert page.open == []
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    anchors = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert anchors
    assert {anchor.removeprefix("#") for anchor in anchors} <= set(ids)


def test_every_table_with_columns_scrolls_inside_its_card_on_every_page():
    texts = [file.read_text("utf-8") for file in resources.files("pd_core.report").joinpath("templates").iterdir()]
    before = [found for text in texts for found in re.findall(r"(.{0,25})<table(?! class=.facts)", text)]
    assert len(before) > 10
    assert [start for start in before if not re.search(r'<div class="scroll( tall)?">$', start)] == []
    style = next(text for text in texts if "<style>" in text)
    assert re.search(r"^\.scroll \{ overflow: auto; max-width: 100%;", style, re.MULTILINE)
    assert ".scroll :is(th, td) { overflow-wrap: break-word; }" in style  # a narrow column keeps its words whole


def test_the_page_loads_and_runs_nothing(page):
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe", "object", "embed", "base", "form")]
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in LOADING_ATTRIBUTES:
            assert attributes.get(name, "#").startswith(("#", "data:image/")), (tag, name)
    style = page.html.partition("<style>")[2].partition("</style>")[0]
    assert "color-scheme" in style
    assert "url(" not in style
    assert "@import" not in style


def test_every_value_of_every_picture_is_shown(page):
    data = example()
    anchor, near = data.neighbors[0]
    for p in [*data.lowest, *data.highest, anchor, *near]:
        assert f"ρ {p.density:#.4g}" in page.text
        assert f"p{report_page.percentile(p.percentile)}" in page.text
        assert p.key in page.text
        assert any(p.key in a.get("title", "") and f"{p.mean_knn_distance:#.4g}" in a["title"] for _, a in page.tags)
    assert all(f"{p.distance:#.4g} away" in page.text for p in near)
    thumbnails = {p.thumbnail for p in [*data.lowest, *data.highest, anchor, *near]}
    assert thumbnails <= set(page.images())


def test_numbers_of_the_page_equal_the_data(page):
    data = example()
    for text in (
        "images scored 2,000 of 2,007 listed",
        "quarantined 7 0.349%",  # 7 / 2007
        "k = 20",
        "recall@k 0.9931",
        "0.9911",
        "0.042%",  # relative error of the distances
        "R² 0.876",  # round half to even of 0.8765
        "0.9432",
        "0.6173",
        "4,321 images it was not trained on",
        "time of all stages 1 min 4 s",  # 63.5 s, half to even
        "truncated 5",
        "empty 2",
        "12 bytes missing",
        ".txt 31",
        "cat 1,200 1.100 0.8000 1.050 1.400",
        "dog 800 0.8500 0.6000 0.8300 1.100",
        "efficientnet_lite0",
        "source: s3://bucket/cats",
    ):
        assert text in page.text, text
    above = float(np.mean(data.density > 1.1869))
    assert f"1.1869 1.187 {100 * above:.3g}%" in page.text
    deciles = " ".join(f"{data.quantiles[i]:#.4g}" for i in range(100, 1000, 100))
    assert f"ρ {deciles}" in page.text


def test_figures_decode_are_not_blank_and_are_the_same_again(page):
    drawn = report.drawn(example())
    assert drawn.pop(REPORT)
    assert set(drawn) == {"density_histogram.png", "label_densities.png", "predictor_calibration.png"}
    for name, data in drawn.items():
        assert data in page.images(), name
        image = Image.open(io.BytesIO(data)).convert("RGB")
        assert image.width >= 900, name
        assert np.asarray(image).std() > 5, name


HOSTILE = [
    "\"><img src=x onerror=alert(1)>' onload='x",
    "line\nbreak\ttab\x00nul\x1b[31m \u202egnp.exe",
    "{{ d.title }}{% for %}",
    "</style></pre></title><script>",
    "undecodable \udcff byte",
    "猫/ünï.png $\\frac{$ %s %d",
    "x" * 5000,
]


def hostile_data(text: str) -> ReportData:
    entry = picture(1, key=text, label=text)
    return example(
        n=50,
        title=text,
        source=text,
        output=text,
        created=text,
        thresholds=[(text, 1.0)],
        lowest=[entry],
        highest=[entry],
        neighbors=[(entry, [dataclasses.replace(entry, distance=1.0)])],
        labels=[LabelRow(text, 3, 1.0, 0.9, 1.0, 1.1)],
        quarantine={text: 7},
        quarantine_examples=[(text, text, text)],
        skipped={text: 1},
        timings_s={text: 1.0},
        versions={"pd_core": text, text: text},
        settings_yaml=f"data: {text}\n",
        feature={text: text},
        index={"kind": text, "nprobe": 0},
        calibration=Calibration(np.zeros(3), np.zeros(3), None, None, 3, {text: 1.0}),
    )


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_names_are_text_and_nothing_else(text, no_figures):
    clean = Page(report.drawn(hostile_data("plain"))[REPORT])
    dirty = Page(report.drawn(hostile_data(text))[REPORT])
    assert dirty.open == []
    # the same elements with the same attributes as with harmless names
    assert [(tag, sorted(a)) for tag, a in dirty.tags] == [(tag, sorted(a)) for tag, a in clean.tags]
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202e]", dirty.html)
    assert report_page.visible(text) in [a.get("title", "").partition(" · label ")[0] for _, a in dirty.tags]
    assert dirty.text.count(" ".join(report_page.visible(text).split())) >= 5


@pytest.mark.parametrize("narrow", [False, True])
def test_figures_bear_hostile_labels(narrow):
    for data in map(hostile_data, (HOSTILE[1], HOSTILE[5])):
        # font warnings are errors in this suite (pyproject), so characters that the font lacks would fail here
        assert report.labels_png(data.labels, narrow).startswith(b"\x89PNG")
        assert report.histogram_png(data, narrow).startswith(b"\x89PNG")


EMPTY: dict[str, Any] = {
    "lowest": [],
    "highest": [],
    "neighbors": [],
    "labels": [],
    "thresholds": [],
    "calibration": None,
    "n_quarantined": 0,
    "quarantine": {},
    "quarantine_examples": [],
    "skipped": {},
    "timings_s": {},
    "versions": {},
    "settings_yaml": "",
    "feature": {},
    "index": {"kind": "flat", "nprobe": 0},
}


def test_a_run_with_nothing_optional():
    data = example(n=21, **EMPTY)
    page = Page(report.drawn(data)[REPORT])
    assert page.open == []
    for text in (
        "every image could be used",
        "No image was quarantined: all 21 listed images have a density.",
        "No predictor was fitted",
        "carry no labels",
        "exact search",
        "None were asked for",
    ):
        assert text in page.text, text
    assert "None None" not in page.text
    assert set(report.drawn(data)) == {REPORT, "density_histogram.png"}


@pytest.mark.parametrize(
    "values",
    [
        pytest.param(np.ones(50), id="all equal"),
        pytest.param(np.array([1.0]), id="one image"),
        pytest.param(np.r_[np.zeros(49), 50.0], id="underflow to zero"),
        pytest.param(np.r_[np.full(48, 1e-300), 1e-5, 50.0], id="300 decades"),
        pytest.param(np.r_[np.full(49, 1e-9), 50.0], id="one duplicate takes all"),
    ],
)
def test_degenerate_densities_are_drawn(values):
    quantiles = formula.density_quantiles(values)
    data = example(n=50, density=values, quantiles=quantiles, thresholds=[("p80", float(quantiles[800]))])
    shown = figures.density_axis(values, quantiles)
    assert shown.below == shown.above == 0 or not values.all()  # few images: all are shown, but zeros of a logarithm
    inside = np.count_nonzero((values >= shown.low) & (values <= shown.high))
    assert 0 < shown.low < shown.high
    assert shown.below + inside + shown.above == values.size
    assert report.histogram_png(data).startswith(b"\x89PNG")


def test_heavy_tails_get_a_logarithmic_axis_that_leaves_out_a_thousandth_at_each_end():
    log_rho = np.random.default_rng(0).normal(size=100_001)
    for sharpness, log in [(0.1, False), (3.0, True)]:
        rho = np.exp(sharpness * log_rho)
        shown = figures.density_axis(rho, formula.density_quantiles(rho))
        assert shown.log == log
        assert (shown.below, shown.above) == (100, 100)  # ranks 0..100 and 99,900..100,000, the ends are inside


def test_only_the_labels_of_lowest_and_highest_mean_are_shown(no_figures):
    rows = [LabelRow(f"class{i:03d}", 10 + i, 0.5 + i / 100, 0.4, 0.5, 0.6) for i in range(120)]
    page = Page(report.drawn(example(labels=rows[::-1]))[REPORT])
    shown = [i for i in range(120) if f"class{i:03d}" in page.text]
    assert shown == [*range(25), *range(95, 120)]
    assert "Of 120 labels, the 50 of lowest and highest mean are shown; 70 more" in page.text


def test_predictions_that_are_not_finite_are_counted_and_left_out():
    true = np.linspace(-1, 1, 101)
    predicted = np.where(np.arange(101) < 3, np.nan, true)
    calibration = Calibration(true, predicted, 0.9, 0.9, 101)
    page = Page(report.drawn(example(calibration=calibration))[REPORT])
    assert figures.calibration_png(calibration) in page.images()
    assert "3 lie outside the axes or have no finite prediction" in page.text


def test_every_quarantine_reason_says_what_to_do():
    assert set(report.QUARANTINE_ADVICE) == {reason.value for reason in Reason}


@pytest.mark.parametrize(
    "changes", [{"quarantine": {"empty": 6}}, {"quantiles": np.zeros(11)}, {"density": np.ones(0)}, {"n_images": 5}]
)
def test_data_that_do_not_add_up_are_refused(changes):
    with pytest.raises(AssertionError):
        example(**changes)


@pytest.mark.parametrize("name", ["out", 'it\'s [odd] "name" é'])
def test_the_code_in_the_page_reads_the_densities(tmp_path, name, no_figures):
    folder = tmp_path / name / "densities"
    folder.mkdir(parents=True)
    (folder / "artifact.json").write_text("{}")  # records lie beside the tables
    rho = np.arange(200) / 100
    for i in range(2):
        pd.DataFrame({"key": [f"{i}"] * 100, "density": rho[i::2]}).to_parquet(folder / f"part-{i}.parquet")
    page = Page(report.drawn(example(output=str(tmp_path / name), thresholds=[("p80", 1.195)]))[REPORT])
    (code,) = [chunk for chunk in page.chunks if "read_parquet" in chunk]
    names: dict[str, Any] = {}
    exec(code, names)
    assert len(names["densities"]) == 200
    assert len(names["common"]) == 80
    assert names["rarest"]["density"].max() == 0.99


# --- thumbnails and numbers -------------------------------------------------------------------------------------------


def test_small_pictures_are_enlarged_by_a_whole_factor_without_smoothing():
    image = pixels(0, (8, 5))
    enlarged = np.asarray(Image.open(io.BytesIO(resize.thumbnail(image, 96))))
    assert np.array_equal(enlarged, np.asarray(image).repeat(12, axis=0).repeat(12, axis=1))


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "I;16"])
def test_large_pictures_keep_their_ratio(mode):
    for size, expected in (((400, 300), (96, 72)), ((3000, 2), (96, 1)), ((97, 97), (96, 96))):
        data = resize.thumbnail(Image.new(mode, size), 96)
        assert Image.open(io.BytesIO(data)).size == expected
        assert data.startswith(b"\xff\xd8")


def test_a_page_of_full_grids_of_photographs_stays_below_5_mb(no_figures):
    # noise is the worst case of JPEG: photographs take a third
    noise = resize.thumbnail(pixels(0, (640, 480)))
    entry = dataclasses.replace(picture(0), thumbnail=noise)
    neighbors = [(entry, [entry] * 8)] * 6
    page = report.drawn(example(lowest=[entry] * 32, highest=[entry] * 32, neighbors=neighbors))[REPORT]
    assert len(page) < 5e6


def test_percentiles_tell_extremes_apart():
    texts = {0: "0.0", 100: "100.0", 50: "50.0", 0.5: "0.50", 0.0278: "0.028", 99.972: "99.972", 5e-7: "0.00000050"}
    assert {value: report_page.percentile(value) for value in texts} == texts


def test_durations():
    texts = {0.4: "0.40 s", 59.94: "59.9 s", 60: "1 min 0 s", 3599.7: "1 h 0 min", 8045: "2 h 14 min"}
    assert {value: report_page.seconds(value) for value in texts} == texts


def test_significant_digits_round_trip():
    for value in (1e-7, 0.01234, 0.617, 1, 1234.5, 5e9):
        assert float(report_page.significant(value)) == pytest.approx(value, rel=5e-4)
        assert not report_page.significant(value).endswith(".")


def test_shortened_names_keep_their_end():
    for text, chars in (("short", 10), ("a" * 30 + "/name.png", 20)):
        short = report_page.shorten(text, chars)
        assert len(short) <= chars
        assert short.endswith(text[-5:])
