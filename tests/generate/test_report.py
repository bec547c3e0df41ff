"""The report of generate: true to the samples it was gathered from, complete, and unharmed by hostile labels and
prompts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pd_core.core import artifacts, files, schemas
from pd_core.core.settings.data import DataSettings
from pd_core.core.settings.generate import GenerateSettings, GeneratorSettings, WeightingSettings
from pd_core.density import formula, realset
from pd_core.density import weighting as density_weighting
from pd_core.density.weighting import EVERYTHING
from pd_core.engine import runs
from pd_core.generate import figures, pilot, report, sampling, tally
from pd_core.generate.candidates import Recipe
from pd_core.generate.pilot import Expectation
from pd_core.generate.report import Pair, Sample, SamplesData, Weight
from pd_core.generate.tally import Count
from pd_core.images import resize, sources
from pd_core.report import figures as report_figures
from pd_core.report import page as report_page
from pd_core.report.page import Calibration
from tests.report.test_page import HOSTILE, LOADING_ATTRIBUTES, Page, pixels

# --- the page, from constructed data ----------------------------------------------------------------------------------


def sample(i: int, *, label: str | None = "cat", prompt: str | None = None, probability: float | None = 0.25) -> Sample:
    # values whose first four digits are all different, so that each can be looked for in the page
    thumbnail = resize.thumbnail(pixels(i))
    return Sample(7000 + i, 900_000 + i, 0.5 + i * 0.0137, 0.01 + i * 0.7, probability, label, prompt, thumbnail)


def example(**changes: Any) -> SamplesData:
    rng = np.random.default_rng(0)
    real = formula.pseudo_density(rng.gamma(9.0, 2.0, 5000), 1.0)
    generated, accepted = (rng.multinomial(m, p) for m, p in ((2000, weights(-1)), (600, weights(1))))
    log_rho = rng.normal(size=300)
    original = resize.thumbnail(pixels(99))
    values: dict[str, Any] = {
        "title": "Generated images",
        "output": "runs/typical",
        "index": "runs/cats",
        "created": "2025-01-02T03:04:05+00:00",
        "n": 600,
        "candidates": 1950,
        "score": "both",
        "weighting": WeightingSettings(threshold="p80", weight=10).model_dump(),
        "weights": [Weight(None, None, 1.2345, 1.0, 0.1), Weight(None, 1.2345, None, 10.0, 1.0)],
        "expected": Expectation(0.3111, 0.2822, 0.3433, 0.2345),
        "pilot_rows": 256,
        "pilot_copies": 3,
        "inverse_sum": 1961.4,
        "inverse_square_sum": 15_900.0,
        "quantiles": formula.density_quantiles(real),
        "generated": generated,
        "accepted": accepted,
        "accepted_by_index": accepted[::-1],
        "span": (0.4, 2.2),
        "bands": [("p0–p5", [sample(1), sample(2)]), ("median", [sample(40)])],
        "unfiltered": [sample(i, probability=None) for i in (3, 60)],
        "pilot_calibration": Calibration(log_rho, log_rho * 0.9, 0.8765, 0.9432, 256, {"low_decile_spearman": 0.6173}),
        "accepted_calibration": Calibration(log_rho, log_rho * 0.8, 0.7531, 0.8642, 600),
        "parts": [(700, 200), (700, 250), (550, 150)],
        "copies": 5,
        "copy_distance": 1.357,
        "copies_quantile": 0.01,
        "pairs": [
            Pair(sample(71), 0.4681, True, "a/71.png", "cat", original),
            Pair(sample(72), 0.9123, True, "a/72.png", None, None, "has changed since it was indexed"),
        ],
        "labels": [Count("cat", 400, 1.1357), Count("dog", 200, 0.8246)],
        "choices": {"label": 2, "prompt": 0},
        "plan": "acceptance: 0.3111\ncandidates: about 1,929",
        "facts": {"Generator": [("kind", "diffusers")]},
        "timings_s": {"pilot": 12.0, "samples": 61.0},
        "versions": {"pd-core": "0.1.0", "torch": "2.15.0"},
        "settings_yaml": "n: 600\n",
    }
    return SamplesData(**(values | changes))


def weights(slope: float) -> np.ndarray:
    """Probabilities of 50 bins that rise or fall."""
    p = np.exp(slope * np.linspace(-1, 1, sampling.DENSITY_BINS))
    return p / p.sum()


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(report.drawn(example())[runs.REPORT])


@pytest.fixture
def no_figures(monkeypatch):
    blank = resize.thumbnail(Image.new("RGB", (2, 2)))
    for module, name in (
        (figures, "histogram_png"),
        (figures, "acceptance_png"),
        (report_figures, "calibration_png"),
    ):
        monkeypatch.setattr(module, name, lambda *_: blank)


def test_every_tag_is_closed_ids_resolve_and_nothing_is_loaded(page):
    assert page.open == []
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    anchors = {attributes["href"].removeprefix("#") for tag, attributes in page.tags if tag == "a"}
    assert len(ids) == len(set(ids))
    assert anchors and anchors <= set(ids)
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe", "object", "embed", "base", "form")]
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in LOADING_ATTRIBUTES:
            assert attributes.get(name, "#").startswith(("#", "data:image/")), (tag, name)


def test_numbers_of_the_page_equal_the_data(page):
    for text in (
        "accepted images 600",
        "candidates 1,950",
        "acceptance rate 30.8% as the pilot said: 27.6% … 34.9%",  # 600 / 1950; 0.3111 - √(0.0289² + 1.96² 0.2143/1950)
        "the pilot of 256 candidates said 31.1% (95%: 28.2% … 34.3%, shaded)",
        "a run of 1,950 candidates measures 27.6% … 34.9%",
        "likely copies 5 0.833% of the images",  # 5 / 600
        "predictor against index 0.943 Spearman on 256 generated images",
        "time of all stages 1 min 13 s",
        "ω = w = 10 above the threshold τ = 1.234 ( p80 )",  # round half to even of 1.2345
        "the rest with a = 1/w = 0.1",
        "P = Pr(ρ > τ) = 0.2345 in the pilot, the acceptance rate is P + (1 − P)/w = 31.1%",
        "– 1.234 1 0.1 1.234 – 10 1",  # the table of weights
        "Σ 1/a = 1,961 stands for the 1,950 candidates",
        "the 600 images are worth 242 unselected ones",  # 1961.4² / 15,900 = 241.96
        "all 2,000 candidates that were made",
        "within 1.357 of a real image's: 1% of the real images",
        "5 of the 600 images are flagged",
        "In the pilot it was 3 of 256 candidates",
        "R² of log ρ 0.8765",
        "0.6173",
        "R² of log ρ 0.7531",
        "0.8642",
        "cat 400 66.7% 1.136",  # round half to even of 1.1357
        "dog 200 33.3% 0.8246",
        "candidates: about 1,929",
        "n: 600",
    ):
        assert text in page.text, text


def test_every_picture_is_shown_with_its_numbers(page):
    data = example()
    shown = [s for _, band in data.bands for s in band] + [*data.unfiltered, *(p.sample for p in data.pairs)]
    for s in shown:
        assert f"ρ {s.density:#.4g} p{report_page.percentile(s.percentile)}" in page.text
        assert any(f"candidate {s.number} · seed {s.seed} · label cat" == a.get("title") for _, a in page.tags)
    assert {s.thumbnail for s in shown} | {data.pairs[0].original} <= set(page.images())
    assert "0.4681 away" in page.text and "0.9123 away" in page.text
    assert "has changed since it was indexed" in page.text
    assert page.text.count("a 0.25") == 5  # the accepted ones; nothing was decided in the pilot


def cells(page: Page, first: str) -> list[list[str]]:
    """Rows of the table whose header begins with `first`, as texts."""
    (table,) = [t for t in re.findall(r"<table>.*?</table>", page.html, re.S) if f"<th>{first}</th>" in t]
    strip = lambda cell: re.sub(r"<[^>]*>", "", cell).strip()  # noqa: E731
    return [[strip(c) for c in re.findall(r"<td[^>]*>(.*?)</td>", row, re.S)] for row in table.split("<tr>")[2:]]


def test_shares_in_tenths_are_those_of_the_bins_and_add_up_to_one(page):
    data, rows = example(), cells(page, "real percentiles")
    assert len(rows) == 10
    assert data.accepted_by_index is not None
    for column, counts in ((4, data.generated), (5, data.accepted), (6, data.accepted_by_index)):
        shares = [float(row[column].removesuffix("%")) / 100 for row in rows]
        assert shares == pytest.approx([counts[5 * i : 5 * i + 5].sum() / counts.sum() for i in range(10)], abs=5.1e-5)
        assert sum(shares) == pytest.approx(1, abs=10 * 0.00005)  # ten of them, rounded to 0.01%
    for i, row in enumerate(rows):
        assert row[0] == f"p{10 * i}–p{10 * i + 10}"
        edges = data.quantiles[[100 * i, 100 * i + 100]]
        assert [float(row[1]), float(row[2])] == pytest.approx(edges, rel=5e-4)
        factor = float(row[5][:-1]) / float(row[4][:-1])
        assert float(row[7].removeprefix("×")) == pytest.approx(factor, rel=0.02)


def test_figures_decode_and_are_not_blank(page):
    drawn = report.drawn(example())
    assert drawn.pop(runs.REPORT)
    names = ("sample_densities", "acceptance", "predictor_on_generated", "predictor_on_accepted")
    assert set(drawn) == {f"{name}.png" for name in names}
    assert set(drawn.values()) <= set(page.images())
    for name, png in drawn.items():
        image = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
        assert image.shape[1] >= 900 and image.std() > 5, name


def steps(data: SamplesData) -> figures.Steps:
    return figures.steps(data.quantiles, data.generated, data.accepted, data.span)


def histogram(data: SamplesData) -> bytes:
    return figures.histogram_png(steps(data), report.thresholds(data))


def test_the_three_lines_tell_apart_in_grey():
    """Drawn over the same bins they differ: each of the three moves the picture."""
    data = example()
    pictures = {histogram(data)}
    for name in ("generated", "accepted"):
        moved = dataclasses.replace(data, **{name: getattr(data, name)[::-1], "accepted_by_index": None})
        pictures.add(histogram(moved))
    assert len(pictures) == 3


QUANTILES = {
    "narrow": formula.density_quantiles(np.random.default_rng(0).normal(1, 0.1, 9999).clip(0.1)),
    "heavy": formula.density_quantiles(np.exp(np.random.default_rng(0).normal(0, 3, 9999))),
    "ties": formula.density_quantiles(np.r_[np.full(600, 0.5), np.linspace(0.5, 2, 400)]),
    "equal": np.ones(1001),
    "underflow": formula.density_quantiles(np.r_[np.zeros(900), np.full(100, 10.0)]),
}


@pytest.mark.parametrize("quantiles", QUANTILES.values(), ids=QUANTILES)
@pytest.mark.parametrize("span", [(1.0, 1.0), (0.05, 40.0), (0.0, 1e9)])
def test_drawn_areas_are_one_and_the_bins_keep_their_shares(quantiles, span):
    data = example(quantiles=quantiles, span=span)
    shown = steps(data)
    at = np.log(shown.edges) if shown.log else shown.edges
    assert (np.diff(at) > 0).all() and np.isfinite(at).all()
    for heights, counts in ((shown.real, None), (shown.generated, data.generated), (shown.accepted, data.accepted)):
        assert np.sum(heights * np.diff(at)) == pytest.approx(1)
        if counts is not None:  # up to each drawn edge there lie as many as in the bins below it
            edges = np.r_[-np.inf, quantiles[20::20]]  # the first bin holds all that is lower
            drawn = np.cumsum(heights * np.diff(at))
            for edge, share in zip(shown.edges[1:-1], drawn, strict=False):
                below = int(np.flatnonzero(edges == edge)[0])
                assert share == pytest.approx(counts[:below].sum() / counts.sum())
    assert figures.histogram_png(shown, report.thresholds(data)).startswith(b"\x89PNG")


def test_the_line_of_the_real_set_is_its_density():
    """Against the histogram of the real densities themselves, over the drawn edges; bins hold 2% each but at the
    ends.
    """
    real = np.random.default_rng(3).gamma(8, 1 / 8, 100_000)
    shown = steps(example(quantiles=formula.density_quantiles(real), span=(0.5, 1.5)))
    counts, _ = np.histogram(real, shown.edges)
    # beyond the axis: a thousandth at each end, which the outermost bins hold
    np.testing.assert_allclose(shown.real * np.diff(shown.edges), counts / real.size, atol=1.1e-3)


def test_stretches_keep_every_candidate():
    rng = np.random.default_rng(0)
    parts = [(int(c), int(c) // 3) for c in rng.integers(10, 99, 1234)]
    candidates, accepted = figures.stretches(parts)
    assert len(candidates) <= figures.MAX_STEPS_DRAWN
    assert (candidates.sum(), accepted.sum()) == tuple(np.sum(parts, axis=0))


def test_a_rate_outside_of_what_the_pilot_said_is_marked(no_figures):
    page = Page(report.drawn(example(expected=Expectation(0.5, 0.4, 0.6, None)))[runs.REPORT])
    assert "acceptance rate 30.8% outside of what the pilot said: 39.8% … 60.2%" in page.text
    assert "Pr(ρ > τ) =" not in page.text
    assert any(a.get("class") == "card warn" for _, a in page.tags)
    # 0.3077 of 1,950 candidates, whose own error is 2.05% at 95%: 32% ... 34% in the pilot is no contradiction
    near = example(expected=Expectation(0.33, 0.32, 0.34, None))
    assert near.acceptance_rate < 0.32 and near.as_expected
    assert not example(expected=Expectation(0.34, 0.33, 0.35, None)).as_expected


@pytest.mark.parametrize(
    ("settings", "steps", "texts"),
    [
        ({"kind": "none"}, [Weight(None, None, None, 1.0, 1.0)], ["every candidate is accepted"]),
        (
            {"weight": 0.05},
            [Weight(None, None, 1.5, 1.0, 1.0), Weight(None, 1.5, None, 0.05, 0.05)],
            ["accepted with a = w = 0.05, the rest always", "varied", "P·w + (1 − P)"],
        ),
        (
            {"weight": 4, "per_label": True},
            [Weight("cat", None, 1.5, 1.0, 0.25), Weight("cat", 1.5, None, 4.0, 1.0)],
            ["τ = p80 of the candidate's own label", "cat – 1.500 1 0.25 cat 1.500 – 4 1"],
        ),
        (
            {"kind": "match"},
            [Weight(None, None, 1.5, 0.3, 0.1), Weight(None, 1.5, None, 3.0, 1.0)],
            ["over 20 bins", "at most 20", "– 1.500 0.3 0.1"],
        ),
        (
            {"kind": "quantiles", "weights": [1, 2]},
            [Weight(None, None, 1.5, 1.0, 0.5), Weight(None, 1.5, None, 2.0, 1.0)],
            ["a weight for each of 2 bins"],
        ),
        (
            {"kind": "polarity", "polarity": -0.5, "rank": 6, "bins": 2},
            [Weight(None, None, -7.5, 1.5, 1.0), Weight(None, -7.5, None, 0.5, 0.333)],
            ["over the 6 largest singular values", "exp(-0.5·v)", "Polarity Sampling", "v above", "– -7.500 1.5 1"],
        ),
        (
            {"kind": "magnet"},
            [Weight(None, None, None, 1.0, 1.0)],
            ["exp(1·v)", "MaGNET: uniform on the manifold", "where it was not used to decide"],
        ),
    ],
    ids=["none", "varied", "per label", "match", "quantiles", "polarity", "magnet"],
)
def test_every_kind_of_weighting_is_explained(settings, steps, texts, no_figures):
    data = example(weighting=WeightingSettings(**settings).model_dump(), weights=steps)
    page = Page(report.drawn(data)[runs.REPORT])
    assert page.open == []
    for text in texts:
        assert text in page.text, text


@pytest.mark.parametrize("labels", [[None], ["cat", "dog"], ["cat", "Cat"]])
@pytest.mark.parametrize("given", [{"kind": "match", "bins": 3}, {"kind": "quantiles", "weights": [1, 2, 4]}])
def test_the_page_says_where_tied_real_images_left_fewer_bins(given, labels, no_figures):
    per_label = labels != [None]
    made = [Weight(label, None, None, 1.0, 1.0) for label in labels for _ in range(3)]
    for steps, fewer in ((made, False), (made[1:], True)):
        settings = WeightingSettings(**given, per_label=per_label).model_dump()
        text = Page(report.drawn(example(weighting=settings, weights=steps))[runs.REPORT]).text
        assert ("real images have one and the same density the bins that they fill are one" in text) == fewer


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_labels_prompts_and_keys_are_text_and_nothing_else(text, no_figures):
    dirty, clean = (Page(report.drawn(hostile(t))[runs.REPORT]) for t in (text, "plain"))
    assert dirty.open == []
    # the same elements with the same attributes as with harmless names
    assert [(tag, sorted(a)) for tag, a in dirty.tags] == [(tag, sorted(a)) for tag, a in clean.tags]
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202e]", dirty.html)
    titles = [a.get("title", "") for _, a in dirty.tags]
    seen = report_page.visible(text)
    assert f"candidate 7001 · seed 900001 · label {seen} · prompt {seen}" in titles  # the attribute, whole
    assert seen in titles  # of the original
    assert dirty.text.count(" ".join(seen.split())) >= 4


def hostile(text: str) -> SamplesData:
    entry = sample(1, label=text, prompt=text)
    return example(
        title=text,
        output=text,
        index=text,
        created=text,
        bands=[(text, [entry])],
        unfiltered=[entry],
        pairs=[Pair(entry, 1.0, True, text, text, None, text)],
        originals_note=text,
        labels=[Count(text, 600, 1.0)],
        prompts=[Count(text, 600, 1.0)],
        choices={"label": 1, "prompt": 1},
        weighting=WeightingSettings(weight=10, per_label=True).model_dump(),
        weights=[Weight(text, None, 1.0, 1.0, 0.1)],
        plan=text,
        facts={text: [(text, text)]},
        timings_s={text: 1.0},
        versions={"pd-core": text, text: text},
        settings_yaml=f"n: {text}\n",
    )


def test_a_run_with_nothing_optional(no_figures):
    data = example(
        score="predictor",
        accepted_by_index=None,
        accepted_calibration=None,
        pilot_calibration=Calibration(np.zeros(3), np.zeros(3), None, None, 3),
        pairs=[],
        labels=[],
        copies=0,
        timings_s={},
        versions={},
        settings_yaml="",
        plan="",
        facts={},
    )
    page = Page(report.drawn(data)[runs.REPORT])
    assert page.open == []
    assert "accepted, by the index" not in page.text and "Labels and prompts" not in page.text
    assert "predictor against index n/a" in page.text
    assert "None" not in page.text.replace("partitioning=None", "")
    assert set(report.drawn(data)) == {
        runs.REPORT,
        "sample_densities.png",
        "acceptance.png",
        "predictor_on_generated.png",
    }


def test_only_the_labels_of_most_and_fewest_images_are_shown(no_figures):
    counts = [Count(f"class{i:03d}", 1 + i, 1.0) for i in range(120)]
    n = sum(c.rows for c in counts)
    bins = np.full(50, n // 50)
    bins[0] += n - bins.sum()
    data = example(
        n=n, candidates=n, parts=[(n, n)], accepted=bins, generated=bins, accepted_by_index=None, labels=counts,
        choices={"label": 123, "prompt": 0},
    )  # fmt: skip
    page = Page(report.drawn(data)[runs.REPORT])
    shown = [i for i in range(120) if f"class{i:03d}" in page.text]
    assert shown == [*range(25), *range(95, 120)]
    assert "3 of them have no accepted image" in page.text and "70 more lie between them" in page.text


@pytest.mark.parametrize(
    "changes",
    [
        {"n": 599},
        {"parts": [(1950, 599)]},
        {"candidates": 2001, "parts": [(2001, 600)]},
        {"labels": [Count("cat", 599, 1.0)]},
        {"quantiles": np.zeros(11)},
    ],
)
def test_data_that_do_not_add_up_are_refused(changes):
    with pytest.raises(AssertionError):
        example(**changes)


# --- gathering, from committed stages ---------------------------------------------------------------------------------

REAL, PILOT, PARTS, PART_CANDIDATES = 200, 40, 4, 100
WORDS = ("a red square", "two circles")


def colour(i: int) -> tuple[int, int, int]:
    """Of the image of a row, so that a picture tells whose it is."""
    return (i % 256, i // 256, 77)


def png(rgb: tuple[int, int, int]) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (8, 8), rgb).save(sink, "PNG")
    return sink.getvalue()


def colour_of(thumbnail: bytes | None) -> tuple[int, ...]:
    assert thumbnail is not None
    pixel = Image.open(io.BytesIO(thumbnail)).convert("RGB").getpixel((0, 0))
    assert isinstance(pixel, tuple)
    return pixel


class World:
    """A finished build_index output of one-coloured images, and a finished pilot and samples stage beside it."""

    def __init__(self, root: Path, **settings: Any) -> None:
        rng = np.random.default_rng(5)
        self.images, self.index, self.output = root / "images", root / "index", root / "w=10" / "out"
        self.images.mkdir()
        for i in range(REAL):
            (self.images / f"{i:04d}.png").write_bytes(png(colour(10_000 + i)))
        self.real_ids = self.build_index()
        real = np.exp(rng.normal(0, 0.3, REAL))
        self.quantiles = formula.density_quantiles(real / real.mean())
        given = {"index": str(self.index), "output": str(self.output), "n": 10, "images": 11, "score": "both"}
        weighting = WeightingSettings(threshold="p60", weight=10)
        generator = GeneratorSettings(kind="python", path="module:make")
        self.settings = GenerateSettings.model_construct(
            **{name: field.default for name, field in GenerateSettings.model_fields.items()}
            | {"weighting": weighting, "generator": generator}
            | given
            | settings
        )
        self.recipe = self.make_recipe(generator)
        self.pilot_table = self.table(rng, np.arange(PILOT), decide=False)
        self.write_pilot()
        self.samples = self.write_samples(rng)

    def build_index(self) -> np.ndarray:
        """Listing, features (hashes only) and run.json, as build_index leaves them."""
        source = sources.open_source(DataSettings(source=str(self.images)))
        (table,) = sources.list_images(source)
        listing = artifacts.Stage(f"{self.index}/listing", "listing", 1, {"source": sources.identity(source)})
        features = artifacts.Stage(f"{self.index}/features", "features", 1, {})
        parts = []
        for number, start in enumerate(range(0, REAL, 70)):
            rows = table.slice(start, 70)
            parts.append(listing.write_table(artifacts.part_name(number), rows))
            hashes = [hashlib.sha256((self.images / key).read_bytes()).hexdigest() for key in rows["key"].to_pylist()]
            facts = pa.table({"sample_id": rows["sample_id"], "content_hash": hashes})
            features.write_table(artifacts.part_name(number), facts)
        listing.commit(parts, {}, {})
        # a relative path, as users type it: it says nothing on another machine or in another directory
        data = DataSettings(source="images").model_dump(mode="json")
        (self.index / runs.RUN).write_text(json.dumps({"settings": {"data": data}}))
        return table["sample_id"].to_numpy()

    def make_recipe(self, generator: GeneratorSettings) -> Recipe:
        real: Any = SimpleNamespace(
            uri=str(self.index),
            rows=REAL,
            extractor=SimpleNamespace(model="tiny"),
            k=5,
            volume_dim=1.0,
            density_quantiles=self.quantiles,
        )
        real.percentile = lambda values: realset.RealSet.percentile(real, values)
        tau = formula.parse_threshold("p60").density(self.quantiles)
        return Recipe(
            generator=generator,
            generator_identity={"toy": 1},
            realset=real,
            weightings={EVERYTHING: density_weighting.two_level(tau, 10)},
            score=self.settings.score,
            seed=3,
            chunk=50,
            threads=1,
            classes=(0, 1, 2),
            class_names=("zero", "one", "two"),
            prompts=WORDS,
            device="cpu",
            copy_distance=0.2,
            drop_copies=self.settings.drop_copies,
        )

    def table(self, rng: np.random.Generator, numbers: np.ndarray, decide: bool) -> pa.Table:
        """Rows of `schemas.samples`; a candidate's image has the colour of its number."""
        m = len(numbers)
        by_index = np.exp(rng.normal(-0.1, 0.4, m))
        predicted = by_index * np.exp(rng.normal(0, 0.1, m))
        deciding = by_index if self.settings.score == "index" and decide else predicted
        chances = (
            density_weighting.acceptance_probability(deciding, self.recipe.weightings[""]) if decide else np.ones(m)
        )
        distance = rng.uniform(0.05, 3, m).astype(np.float32)
        columns = {
            "sample_id": numbers,
            "seed": numbers + 5_000_000,
            "density": deciding,
            "density_predicted": None if self.settings.score == "index" and decide else predicted,
            "density_index": None if self.settings.score == "predictor" and decide else by_index,
            "percentile": self.recipe.realset.percentile(deciding),
            "log_volume": None,
            "acceptance_probability": chances,
            "label": rng.choice(self.recipe.class_names, m),
            "prompt": rng.choice(WORDS, m),
            "nearest_real_id": rng.choice(self.real_ids, m),
            "nearest_real_distance": distance,
            "likely_copy": distance <= self.recipe.copy_distance,
            "image_hash": ["00"] * m,
            "image": [{"bytes": png(colour(int(i))), "path": f"{i}.png"} for i in numbers],
        }
        schema = schemas.samples()
        arrays = [pa.nulls(m, f.type) if columns[f.name] is None else pa.array(columns[f.name], f.type) for f in schema]
        return pa.table(arrays, schema=schema)

    def write_pilot(self) -> None:
        stage = artifacts.Stage(f"{self.output}/pilot", "pilot", 1, {})
        parts = [stage.write_table(artifacts.part_name(i), self.pilot_table.slice(20 * i, 20)) for i in range(2)]
        self.pilot = pilot.read(stage, stage.commit(parts, {}, {}))

    def write_samples(self, rng: np.random.Generator) -> pa.Table:
        """Parts as the sampler leaves them: accepted rows only, the last part cut to its last row; part 1 is empty."""
        self.stage = artifacts.Stage(f"{self.output}/samples", "samples", 1, {})
        kept, parts, bins = [], [], np.zeros(sampling.DENSITY_BINS, int)
        for number in range(PARTS):
            start = number * PART_CANDIDATES
            everyone = self.table(rng, np.arange(start, start + PART_CANDIDATES), decide=True)
            bins += np.bincount(
                (everyone["percentile"].to_numpy() / 2).astype(int).clip(0, 49), minlength=sampling.DENSITY_BINS
            )
            accepted = rng.random(PART_CANDIDATES) < everyone["acceptance_probability"].to_numpy()
            if self.settings.drop_copies:
                accepted &= ~everyone["likely_copy"].to_numpy(zero_copy_only=False)
            table = everyone.filter(pa.array(accepted & (number != 1)))
            table = table.slice(0, 25) if number == PARTS - 1 else table
            copies = int(np.sum(table["likely_copy"].to_numpy()))
            counts = {"candidates": PART_CANDIDATES, "copies": copies}
            parts.append(self.stage.write_table(artifacts.part_name(number), table, counts))
            kept.append(table)
        samples = pa.concat_tables(kept)
        totals = {
            "rows": samples.num_rows,
            "candidates": samples["sample_id"][-1].as_py() + 1,
            "copies": sum(part.counts["copies"] for part in parts),
            "density_bins": bins.tolist(),
            "actor_s_per_candidate": 0.01,
        }
        self.sampled = self.stage.commit(parts, totals, {"samples": 61.0})
        return samples

    @property
    def inputs(self) -> report.Inputs:
        n = self.samples.num_rows
        job = sampling.Job(self.recipe, self.stage, None, 2, n)
        expected = pilot.Expectation(0.3, 0.2, 0.4, 0.25)
        return report.Inputs(job, self.sampled, self.pilot, expected, "the plan", self.settings, {"pilot": 1.0})

    def column(self, name: str) -> np.ndarray:
        return self.samples[name].to_numpy(zero_copy_only=False)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def gathered(world):
    return report.gather(world.inputs)


def test_counts_are_those_of_the_rows(world, gathered):
    rho, a, n = world.column("density"), world.column("acceptance_probability"), world.samples.num_rows
    edges = np.r_[-np.inf, world.quantiles[20:1000:20], np.inf]  # densities against quantiles, not percentiles
    np.testing.assert_array_equal(gathered.accepted, np.histogram(rho, edges)[0])
    np.testing.assert_array_equal(gathered.accepted_by_index, np.histogram(world.column("density_index"), edges)[0])
    assert gathered.generated.sum() == PARTS * PART_CANDIDATES
    assert (gathered.n, sum(rows for _, rows in gathered.parts)) == (n, n)
    assert [candidates for candidates, _ in gathered.parts[:-1]] == [PART_CANDIDATES] * (PARTS - 1)
    assert sum(candidates for candidates, _ in gathered.parts) == world.column("sample_id")[-1] + 1
    assert gathered.inverse_sum == pytest.approx(np.sum(1 / a))
    assert gathered.effective_sample_size == pytest.approx(np.sum(1 / a) ** 2 / np.sum(a**-2.0))
    assert gathered.copies == np.sum(world.column("likely_copy"))


@pytest.mark.parametrize("what", ["label", "prompt"])
def test_labels_and_prompts_are_counted_over_all_parts(world, gathered, what):
    names, rho = world.column(what), world.column("density")
    counts = {c.name: c for c in getattr(gathered, f"{what}s")}
    assert set(counts) == set(names)
    for name, count in counts.items():
        assert count.rows == np.sum(names == name)
        assert count.mean_density == pytest.approx(rho[names == name].mean())


def test_each_row_of_images_lies_in_its_range_of_the_accepted(world, gathered):
    rho, numbers = world.column("density"), world.column("sample_id")
    a = world.column("acceptance_probability")
    bands = dict(gathered.bands)
    assert list(bands) == list(report.BANDS)
    assert [len(band) for band in bands.values()] == [3, 2, 2, 2, 2]  # 11 images
    shown = [s for band in bands.values() for s in band]
    assert len({s.number for s in shown}) == 11
    for name, (low, high) in report.BANDS.items():
        # ranks are rounded to whole rows: one row of slack
        ranks = [np.sum(rho < s.density) for s in bands[name]]
        assert all(low / 100 * len(rho) - 2 <= rank <= high / 100 * len(rho) + 1 for rank in ranks), name
        assert ranks == sorted(ranks)
    for s in shown:
        (row,) = np.flatnonzero(numbers == s.number)
        assert (s.density, s.probability, s.seed) == (rho[row], a[row], s.number + 5_000_000)
        assert colour_of(s.thumbnail) == colour(s.number)


def test_unfiltered_images_come_from_all_over_the_pilot(world, gathered):
    numbers = sorted(s.number for s in gathered.unfiltered)
    assert len(numbers) == 11 and numbers[0] == 0 and numbers[-1] == PILOT - 1
    assert np.diff(numbers).max() <= PILOT / 10 + 1
    rho = [s.density for s in gathered.unfiltered]
    assert rho == sorted(rho)
    for s in gathered.unfiltered:
        assert s.density == world.pilot_table["density"][s.number].as_py()
        assert s.probability is None
        assert colour_of(s.thumbnail) == colour(s.number)


def test_calibrations_are_those_of_the_rows(world, gathered):
    from scipy import stats

    true, predicted = world.column("density_index"), world.column("density_predicted")
    assert gathered.accepted_calibration.n_holdout == world.samples.num_rows
    assert gathered.accepted_calibration.spearman == pytest.approx(stats.spearmanr(true, predicted).statistic)
    np.testing.assert_allclose(np.sort(gathered.accepted_calibration.log_density), np.sort(np.log(true)))
    by_index, guessed = (world.pilot_table[name].to_numpy() for name in ("density_index", "density_predicted"))
    assert gathered.pilot_calibration.spearman == pytest.approx(stats.spearmanr(by_index, guessed).statistic)
    residual = np.sum((np.log(by_index) - np.log(guessed)) ** 2)
    r2 = 1 - residual / np.sum((np.log(by_index) - np.log(by_index).mean()) ** 2)
    assert gathered.pilot_calibration.r2 == pytest.approx(r2)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("zeros", [0, 2, 50])
def test_densities_that_underflow_are_left_out_of_the_figures_and_said_to_be(zeros, no_figures):
    rng = np.random.default_rng(3)
    true, predicted = rng.lognormal(size=(2, 50))
    true[: zeros // 2], predicted[zeros // 2 : zeros] = 0.0, 0.0
    if zeros == 50:
        true[:] = 0.0
    made = report._calibration(pilot.agreement(true, predicted))
    assert made.n_holdout == 50 - zeros and made.log_density.size == 50
    assert (made.r2 is None) == (made.spearman is None) == (zeros == 50)
    text = Page(report.drawn(example(pilot_calibration=made))[runs.REPORT]).text
    assert (f"left out, since ρ underflows to 0 {zeros}" in text) == (zeros > 0)


def test_copies_stand_beside_their_originals(world, gathered):
    """The nearest flagged ones, each with the picture of its own nearest real image, read from where it was indexed."""
    distance, flagged = world.column("nearest_real_distance"), world.column("likely_copy")
    many = min(tally.PAIRS_SHOWN, int(flagged.sum()))
    assert many > 2 and gathered.originals_note == ""
    order = np.argsort(distance, kind="stable")[:many]
    assert [p.sample.number for p in gathered.pairs] == world.column("sample_id")[order].tolist()
    keys = {int(sources.sample_id(f"{i:04d}.png")): i for i in range(REAL)}
    for p, row in zip(gathered.pairs, order, strict=True):
        i = keys[int(world.column("nearest_real_id")[row])]
        assert (p.distance, p.likely_copy, p.key) == (pytest.approx(distance[row]), True, f"{i:04d}.png")
        assert colour_of(p.original) == colour(10_000 + i)
        assert colour_of(p.sample.thumbnail) == colour(p.sample.number)


def test_the_page_of_what_was_gathered(world, gathered):
    page = Page(report.drawn(gathered)[runs.REPORT])
    assert page.open == []
    assert f"accepted images {world.samples.num_rows}" in page.text
    assert "the plan" in page.text and "tiny" in page.text


def test_images_are_read_of_the_shown_parts_only_and_never_with_the_rest(world, monkeypatch):
    asked: list[tuple[str, list[str]]] = []
    read = files.read_table

    def noted(uri: str, columns: Any = None, without: Any = ()) -> pa.Table:
        asked.append((uri, columns))
        return read(uri, columns, without)

    monkeypatch.setattr(files, "read_table", noted)
    report.gather(world.inputs)
    samples = [(uri, columns) for uri, columns in asked if "/samples/" in uri]
    assert [columns for uri, columns in samples if "image" not in columns] == [tally.LIGHT] * (PARTS - 1)
    assert len([1 for _, columns in samples if "image" in columns]) <= 2 * (PARTS - 1)  # for the rows and for the pairs


# --- what can be gone, or otherwise -----------------------------------------------------------------------------------


@pytest.fixture
def fresh(tmp_path):
    return World(tmp_path)


def test_an_original_that_is_gone_changed_or_broken_is_replaced_by_a_word(fresh, no_figures):
    before = report.gather(fresh.inputs).pairs
    keys = list(dict.fromkeys(p.key for p in before))
    (fresh.images / keys[0]).unlink()
    (fresh.images / keys[1]).write_bytes(png((1, 2, 3)))
    data = report.gather(fresh.inputs)
    for p in data.pairs:
        if p.key in keys[:2]:
            assert p.original is None
            assert ("can no longer be read", "has changed since it was indexed")[keys.index(p.key)] in p.missing
        else:
            assert p.original is not None and not p.missing
    assert data.originals_note == ""
    page = Page(report.drawn(data)[runs.REPORT])
    assert "can no longer be read" in page.text and "has changed since it was indexed" in page.text


def lose_source(world: World) -> None:
    for file in world.images.iterdir():
        file.unlink()
    world.images.rmdir()


def lose_record(world: World) -> None:
    (world.index / runs.RUN).unlink()


def age_record(world: World) -> None:
    (world.index / runs.RUN).write_text(json.dumps({"settings": {"data": {"sauce": "images"}}}))


@pytest.mark.parametrize("lose", [lose_source, lose_record, age_record])
def test_a_source_that_cannot_be_read_leaves_the_report_standing(fresh, lose, no_figures):
    lose(fresh)
    data = report.gather(fresh.inputs)
    assert data.originals_note
    assert data.pairs and all(p.original is None and p.missing for p in data.pairs)
    assert any(p.key is not None for p in data.pairs)
    assert "The originals could not be read:" in Page(report.drawn(data)[runs.REPORT]).text


def test_a_listing_that_is_gone_names_no_originals(fresh):
    (fresh.index / "listing" / files.ARTIFACT).unlink()
    data = report.gather(fresh.inputs)
    assert {p.missing for p in data.pairs} == {"the index no longer names it"}


@pytest.mark.parametrize("score", ["predictor", "index"])
def test_other_scores(tmp_path, score, no_figures):
    world = World(tmp_path, score=score, drop_copies=True, images=3)
    data = report.gather(world.inputs)
    assert data.accepted_by_index is None and data.accepted_calibration is None
    assert not any(p.likely_copy for p in data.pairs) and len(data.pairs) == report.NEAREST_SHOWN
    column = "density_index" if score == "index" else "density_predicted"
    for s in data.unfiltered:
        assert s.density == world.pilot_table[column][s.number].as_py()
    page = Page(report.drawn(data)[runs.REPORT])
    assert "None is flagged; the nearest 4 of all images" in page.text
    assert "Likely copies were left out" in page.text
    assert [len(band) for _, band in data.bands] == [1] * 5


def test_one_accepted_image_makes_a_report(tmp_path, no_figures):
    world = World(tmp_path)
    first = world.samples.slice(0, 1)
    part = world.stage.write_table(artifacts.part_name(0), first, {"candidates": 100, "copies": 0})
    totals = world.sampled.totals | {"rows": 1, "candidates": first["sample_id"][0].as_py() + 1, "copies": 0}
    world.samples, world.sampled = first, world.stage.commit([part], totals, {})
    data = report.gather(world.inputs)
    assert [len(band) for _, band in data.bands] == [1]
    assert Page(report.drawn(data)[runs.REPORT]).open == []


# --- how to load the data ---------------------------------------------------------------------------------------------


def snippet(page: Page, word: str) -> str:
    (code,) = [chunk for chunk in page.chunks if word in chunk]
    return code


def test_the_pandas_code_in_the_page_reads_the_samples_and_undoes_the_weighting(world, gathered, no_figures):
    names: dict[str, Any] = {}
    exec(snippet(Page(report.drawn(gathered)[runs.REPORT]), "import pandas"), names)
    rho, a = world.column("density"), world.column("acceptance_probability")
    assert list(names["samples"].columns) == schemas.samples().names  # nothing made of `w=10` in the path
    assert names["samples"]["sample_id"].tolist() == world.column("sample_id").tolist()
    assert names["image"].convert("RGB").getpixel((0, 0)) == colour(int(world.column("sample_id")[0]))
    assert names["mean_density"] == pytest.approx(np.average(rho, weights=1 / a))


def test_the_ray_code_in_the_page_reads_the_samples(world, gathered, no_figures, ray_cluster):
    names: dict[str, Any] = {}
    exec(snippet(Page(report.drawn(gathered)[runs.REPORT]), "import ray"), names)
    assert names["samples"].count() == world.samples.num_rows
    assert set(names["samples"].columns()) == set(schemas.samples().names)
    assert names["pictures"][0].startswith(b"\x89PNG")


def test_the_datasets_code_in_the_page_reads_the_samples(world, gathered, no_figures, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    names: dict[str, Any] = {}
    exec(snippet(Page(report.drawn(gathered)[runs.REPORT]), "load_dataset"), names)
    assert names["samples"]["sample_id"] == world.column("sample_id").tolist()
    assert names["image"].getpixel((0, 0)) == colour(int(world.column("sample_id")[0]))
