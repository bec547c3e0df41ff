"""The trade-off's pure part: settings, draws from a pool, frontier, choice."""

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.spatial import KDTree

from pd_core.core import schemas
from pd_core.core.errors import UserError
from pd_core.density import formula
from pd_core.density import weighting as density_weighting
from pd_core.evaluate import metrics
from pd_core.evaluate.tradeoff import points as tradeoff_points
from pd_core.evaluate.tradeoff import report
from pd_core.evaluate.tradeoff.points import Setting, Target


def test_what_changes_nothing_comes_once_as_the_generator():
    found = tradeoff_points.sweep(["p20", "p80", "p20"], [100, 1, 0.01], [0, 1, -1], [0.5])
    assert [s.name for s in found] == [
        "generator",
        "p20, w = 0.01",
        "p20, w = 100",
        "p80, w = 0.01",
        "p80, w = 100",
        "polarity -1",
        "MaGNET",
        "ψ = 0.5",
    ]
    assert [s.curve for s in found[:2]] == ["generator", "density, τ = p20"]


@pytest.mark.parametrize("weight", [0.1, 100.0])
def test_rows_accepted_from_a_pool_follow_the_target_distribution(weight):
    """docs/method.md, section 12: accepted samples follow q(x) ∝ ω(ρ(x)) p_G(x); ρ uniform on ten values; χ²."""
    rng = np.random.default_rng(0)
    density, u = rng.integers(1, 11, 200_000).astype(float), rng.random(200_000)
    rows = tradeoff_points.accepted(density, u, density_weighting.two_level(7.5, weight))
    counts = np.bincount(density[rows].astype(int), minlength=11)[1:]
    q = np.where(np.arange(1, 11) > 7.5, weight, 1.0)
    assert stats.chisquare(counts, counts.sum() * q / q.sum()).pvalue > 1e-3


def test_fidelity_is_traded_for_diversity_with_intervals_apart():
    """docs/method.md, section 12: precision(w = 100) > precision(1) > precision(0.01), recall the reverse, for a
    generator that has the real distribution (a Gaussian in 8 dimensions) and can so afford it; and what it costs:
    coverage falls with w = 0.01. With w = 100 it does not: the accepted images lie where most real ones do.
    """
    rng = np.random.default_rng(0)
    real, pool = (rng.normal(size=(rows, 8)).astype(np.float32) for rows in (1500, 14_000))
    tree = KDTree(real)
    to_real = tree.query(real, 21)[0][:, 1:].mean(axis=1)
    normalizer = formula.log_normalizer(to_real, 1.0)
    of_real, of_pool = (
        formula.density_of(formula.log_pseudo_density(d, 1.0, normalizer))
        for d in (to_real, tree.query(pool, 20)[0].mean(axis=1))
    )
    reference, u, found = metrics.prepare(real, np.arange(1500)), rng.random(14_000), {}
    for quantile, weight in ((0.8, 100), (0.5, 1), (0.2, 0.01)):
        weighting = density_weighting.two_level(float(np.quantile(of_real, quantile)), weight)
        rows = tradeoff_points.accepted(of_pool, u, weighting)[:600]
        assert len(rows) == 600
        found[weight] = metrics.evaluate(reference, pool[rows], rows + 10_000).estimates
    for metric, *falling in (("precision", 100, 1, 0.01), ("recall", 0.01, 1, 100), ("coverage", 1, 0.01)):
        for more, less in itertools.pairwise(falling):
            low, high = found[more][metric].low, found[less][metric].high
            assert low is not None and high is not None and low > high, (metric, more, less)


@pytest.mark.parametrize(("above", "weight"), [(0.1, 100), (0.8, 0.01), (0.5, 1.0001)])
def test_pool_is_enough_in_97_of_100_runs_though_a_pilot_told_the_rates(above, weight):
    """Pilot and pool drawn anew 2,000 times: the pilot's error at 256 candidates is much larger than the pool's own."""
    n, pilot, most = 2000, 256, 10**9
    weighting = density_weighting.two_level(1.0, weight)
    rng = np.random.default_rng(0)
    rate = above + (1 - above) / weight if weight > 1 else above * weight + 1 - above
    sizes = []
    for _ in range(2000):
        densities = np.where(rng.random(pilot) < above, 2.0, 0.5)
        sizes.append(
            tradeoff_points.pool_needed([(densities, weighting), ([1.0], density_weighting.two_level(1.0, 1))], n, most)
        )
    enough = rng.binomial(sizes, rate) >= n
    assert enough.mean() >= 0.955  # 0.975 by the normal approximation
    assert np.median(sizes) <= n / rate * 1.7
    assert tradeoff_points.pool_needed([([0.5, 2.0], weighting)], n, 2001) == 2001


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=20))
def test_frontier_is_what_no_point_dominates(points):
    a, b = (np.array(c, dtype=float) for c in zip(*points, strict=True))
    expected = [not any((x >= p and y >= q and (x > p or y > q)) for x, y in points) for p, q in points]
    assert tradeoff_points.frontier(a, b).tolist() == expected
    # one that was not measured is on no frontier and dominates none
    assert tradeoff_points.frontier(np.append(a, np.nan), np.append(b, np.nan)).tolist() == [*expected, False]


def test_target_takes_the_best_counterpart_among_those_that_reach_it():
    measured: list[dict[str, Any]] = [
        {"precision": 0.9, "recall": 0.3},
        {"precision": 0.7, "recall": 0.6},
        {"precision": None, "recall": None},
        {"precision": 0.75, "recall": 0.65},
        {"precision": 0.5, "recall": 0.8},
    ]
    assert report.best(Target("recall", 0.6), measured) == measured[3]
    assert report.best(Target("precision", 0.6), measured) == measured[3]
    assert report.best(Target("recall", 0.81), measured) is None


@pytest.mark.parametrize("text", ["recall", "recall=", "recall=x", "fid=3", "recall=nan", "recall=0", "recall=-1"])
def test_target_that_cannot_be_read_is_refused(text):
    with pytest.raises(UserError, match=r"--target .*expected|no number"):
        tradeoff_points.parse_target(text)
    assert tradeoff_points.parse_target("recall=0.6") == Target("recall", 0.6)


# --- the page ---------------------------------------------------------------------------------------------------------


def row(setting: Setting, precision: float | None, recall: float | None, **more: Any) -> dict[str, Any]:
    numbers = dict.fromkeys(schemas.CURVE_METRICS, 0.5) | {"precision": precision, "recall": recall}
    ends = {
        f"{name}{end}": None if value is None else value + step
        for name, value in numbers.items()
        for end, step in (("_low", -0.02), ("_high", 0.02))
    }
    of = {"setting": setting.name, "curve": setting.curve, **dataclasses.asdict(setting)}
    counts = {"candidates": 400, "acceptance_rate": 0.1, "effective_sample_size": 90.0, "exact_effective_size": None}
    return {"space": "index", **of, **numbers, **ends, **counts, "frontier": False, **more}


def page_of(rows: list[dict[str, Any]]) -> str:
    plane = {"name": "index", "extractor": "of a test", "is_judge": False, "rows": rows}
    texts = {"title": "t", "index": "i", "output": "o", "created": "now", "score": "index", "settings_yaml": ""}
    counts = {"n": 40, "n_real": 55, "pool": 800, "k_precision": 3, "k_coverage": 5}
    data = {**texts, **counts, "planes": [plane], "picked": [], "images": [], "timings_s": {}, "versions": {}}
    return report.files(data)["index.html"].decode()


@pytest.mark.parametrize("exact", [None, 12.0])
def test_the_page_says_what_the_steps_of_polarity_cost_where_there_are_any(exact):
    page = page_of([row(Setting("polarity", polarity=-1.0), 0.5, 0.5, exact_effective_size=exact)])
    assert ("90 (12)" in page) == ("in brackets" in page) == (exact is not None)
    assert "All settings but truncations" in page


def test_a_setting_that_was_not_measured_has_dashes_and_no_point():
    missing = row(Setting("density", threshold="p90", weight=50.0), None, None)
    page = page_of([row(Setting("generator"), 0.5, 0.5), missing])
    cells = page.partition("p90, w = 50</th>")[2].partition("</tr>")[0]
    assert cells.count("–") == len(schemas.CURVE_METRICS)
    page_of([missing])  # nothing was measured at all: an empty figure


def crowded(step: float) -> list[dict[str, Any]]:
    """Twenty settings along a falling line, `step` from each to the next, and as many right below them."""
    found = [row(Setting("generator"), 0.5, 0.5)]
    for i in range(20):
        place = (0.7 - step * i, 0.4 + step * i)
        found.append(row(Setting("density", threshold="p20", weight=1.5 + i), *place, frontier=True))
        found.append(row(Setting("density", threshold="p80", weight=1.5 + i), place[0] - step, place[1]))
    return found


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("step", [0.015, 0.0])
def test_names_in_the_figure_meet_neither_each_other_nor_a_point_nor_the_legend(step, narrow):
    figure = report.plane_figure(crowded(step), narrow)
    figure.draw_without_rendering()
    axes, legend = figure.axes[0], figure.legends[0].get_window_extent()
    boxes = [name.get_window_extent() for name in axes.texts]
    assert boxes and all(name.get_text().startswith("w = ") for name in axes.texts)
    if step and not narrow:
        assert len(boxes) == 20  # settings on the frontier alone
    assert not any(a.overlaps(b) for a, b in itertools.combinations([*boxes, legend], 2))
    points = axes.transData.transform([(r["recall"], r["precision"]) for r in crowded(step)])
    assert not any(box.contains(*point) for box in boxes for point in points)
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height for box in boxes)
