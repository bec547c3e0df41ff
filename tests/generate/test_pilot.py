"""What a pilot says of a run, held to simulated runs: label shares, intervals, advice, parts, the plan's text."""

import math
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from pd_core.core.errors import UserError
from pd_core.core.settings import load
from pd_core.core.settings.generate import GenerateSettings, GeneratorSettings, WeightingSettings
from pd_core.core.settings.load import to_yaml
from pd_core.density import weighting as density_weighting
from pd_core.density.weighting import EVERYTHING
from pd_core.generate import chunks as generate_chunks
from pd_core.generate import pilot as generate_pilot
from pd_core.generate.candidates import Candidates, decide

QUANTILES = stats.expon.ppf(np.clip(np.linspace(0, 1, 1001), 0, 1 - 1e-5))  # of a real set with ρ ~ Exp(1)
REAL: Any = SimpleNamespace(density_quantiles=QUANTILES)


def pilot_of(densities, label=None, copies=None, actor_s=0.01):
    m = len(densities)
    return generate_pilot.Pilot(
        label=label,
        predicted=densities,
        by_index=densities * np.exp(np.random.default_rng(0).normal(0, 0.1, m)),
        copies=np.zeros(m, bool) if copies is None else copies,
        actor_s=actor_s,
        png_bytes=1500.0,
    )


def settings_of(n=1000, most=None, weighting=None, **more):
    weighting = WeightingSettings(**(weighting or {"threshold": "p80", "weight": 100}))
    return GenerateSettings(n=n, max_candidates=most, weighting=weighting, **more)


def forecast(settings, pilot, by_label=None):
    weightings = generate_pilot.weightings_of(settings.weighting, REAL, by_label or {}, pilot, settings.score)
    return weightings, generate_pilot.expect(settings, weightings, pilot)


def probabilities(weightings, label, densities):
    numbers = np.arange(len(label))
    drawn = Candidates(numbers, numbers, numbers / len(label), label, None)
    recipe: Any = SimpleNamespace(weightings=weightings, class_names=NAMES)
    return decide(recipe, drawn, densities, densities).probability


def rate_of(shares, weighting):
    """The expected share of accepted samples: Σ share_j a_j."""
    return np.dot(shares, weighting.weights) / max(weighting.weights)


# ---- labels ----------------------------------------------------------------------------------------------------------

NAMES = ("a", "b", "c")
SHARES = np.array([0.5, 0.3, 0.2])
BY_LABEL = {"a": QUANTILES, "b": 3 * QUANTILES, "c": QUANTILES**0.5}


def labelled(rng, m):
    """Labels, and densities that lie quite apart from the real ones in a and c and just as them in b."""
    label = rng.choice(3, m, p=SHARES)
    scale = np.array([2.0, 3.0, 0.4])[label]
    return label, scale * rng.exponential(size=m)


def test_match_per_label_keeps_the_label_shares_and_gives_each_label_its_real_densities():
    """χ² of the accepted against the generator's label shares, and in each label against equally filled bins."""
    rng = np.random.default_rng(1)
    settings = settings_of(weighting={"kind": "match", "bins": 10, "per_label": True})
    label, densities = labelled(rng, 1_000_000)  # so many that what the pilot errs by does not show below
    weightings, _ = forecast(settings, pilot_of(densities, np.array(NAMES)[label]), BY_LABEL)
    label, densities = labelled(rng, 60_000)
    kept = rng.random(label.size) < probabilities(weightings, label, densities)
    counts = np.bincount(label[kept], minlength=3)
    assert counts.sum() > 2000
    assert stats.chisquare(counts, SHARES * counts.sum()).pvalue > 1e-3
    for place, name in enumerate(NAMES):
        own = np.bincount(np.searchsorted(weightings[name].edges, densities[kept & (label == place)]), minlength=10)
        assert stats.chisquare(own).pvalue > 1e-3
    # the label whose densities fit is matched by accepting it all alike; a supremum of its own would accept nearly all
    assert counts[1] / np.sum(label == 1) < 0.5


@pytest.mark.parametrize(
    "given",
    [{"weight": 10}, {"weight": 0.1}, {"kind": "quantiles", "weights": [1, 2, 5]}],
    ids=["typical", "varied", "q"],
)
def test_weights_that_all_labels_share_are_accepted_as_if_alone(given):
    rng = np.random.default_rng(2)
    label, densities = labelled(rng, 5000)
    settings = settings_of(weighting={"per_label": True, **given})
    weightings, _ = forecast(settings, pilot_of(densities, np.array(NAMES)[label]), BY_LABEL)
    found = probabilities(weightings, label, densities)
    for place, name in enumerate(NAMES):
        own = label == place
        np.testing.assert_array_equal(
            found[own], density_weighting.acceptance_probability(densities[own], weightings[name])
        )


def test_the_rate_of_a_pilot_with_labels_is_that_of_the_run():
    rng = np.random.default_rng(3)
    settings = settings_of(weighting={"kind": "match", "bins": 10, "per_label": True})
    label, densities = labelled(rng, 2000)
    weightings, expected = forecast(settings, pilot_of(densities, np.array(NAMES)[label]), BY_LABEL)
    label, densities = labelled(rng, 200_000)
    assert expected.low <= probabilities(weightings, label, densities).mean() <= expected.high


def test_the_rate_of_match_is_told_for_new_candidates_though_the_pilot_made_the_weights():
    """Where the generator has the real densities each of 100 pilots would tell too low a rate from its own weights."""
    rng = np.random.default_rng(4)
    settings = settings_of(weighting={"kind": "match"})
    hits = 0
    for _ in range(100):
        weightings, expected = forecast(settings, pilot_of(rng.exponential(size=256)))
        weighting = weightings[EVERYTHING]
        rate = rate_of(np.full(20, 1 / 20), weighting)
        hits += expected.low <= rate <= expected.high
    assert hits >= 88  # of 95 expected


def test_dropped_copies_lower_the_rate_and_leave_no_certain_minimum():
    densities = np.full(256, 0.1)  # all below τ
    _, kept = forecast(settings_of(), pilot_of(densities))
    assert (kept.rate, kept.low) == pytest.approx((0.01, 0.01))
    copies = np.arange(256) < 64
    _, dropped = forecast(settings_of(drop_copies=True), pilot_of(densities, copies=copies))
    assert dropped.rate == pytest.approx(0.75 * 0.01)
    assert dropped.low < dropped.rate and dropped.planning_rate >= dropped.rate / 10 > 0


# ---- the budget ------------------------------------------------------------------------------------------------------


def refusal(settings, pilot, by_label=None):
    """The advised settings, or the expectation where nothing is refused."""
    _, expected = forecast(settings, pilot, by_label)
    try:
        generate_pilot.check_affordable(settings, REAL, by_label or {}, pilot, expected)
    except UserError as error:
        return str(error)
    return expected


def test_what_the_point_estimate_does_not_fit_is_refused():
    """4,826 expected from at most 4,000 is refused although 4,000 lies within the interval."""
    above = np.arange(256) < 51  # P = 0.199
    settings = settings_of(1000, 4000)
    pilot = pilot_of(np.where(above, 2.0, 0.5))
    _, expected = forecast(settings, pilot)
    assert 4700 < expected.candidates(1000) < 4900 and 1000 / expected.high < 4000
    error = refusal(settings, pilot)
    assert "--max-candidates 4000: 1000 accepted images need about" in error and "--weighting.weight" in error
    assert "\n" not in error


def test_what_only_the_low_end_does_not_fit_is_a_warning_in_the_plan():
    pilot = pilot_of(np.where(np.arange(256) < 51, 2.0, 0.5))
    for most, warned in [(5200, True), (8000, False), (None, False)]:
        settings = settings_of(1000, most)
        weightings, expected = forecast(settings, pilot)
        assert refusal(settings, pilot) == expected
        text = generate_pilot.plan(settings, expected, pilot, 1, weightings, 0.1)
        assert ("may not be enough" in text) == warned, text


@pytest.mark.parametrize(
    ("most", "weighting"),
    [
        (4000, {"weight": 100}),
        (1150, {"threshold": "p20", "weight": 0.01}),
        (3000, {"kind": "quantiles", "weights": [1, 1, 1, 1, 50]}),
    ],
    ids=["typical", "varied", "quantiles"],
)
def test_the_advised_weights_work(most, weighting):
    """200 pilots of 256, a run of each with what was advised and as many candidates as whole parts allow: 97.5%
    succeed.

    Fewer than 94% of 200 would happen with probability 0.4%, were it 97.5%; with weights for which only the point
    estimate fits about half of them fail.
    """
    rng = np.random.default_rng(5)
    refused = worked = 0
    settings = settings_of(1000, most, weighting)
    name = "weights" if "weights" in weighting else "weight"
    for _ in range(200):
        pilot = pilot_of(rng.exponential(size=256))
        error = refusal(settings, pilot)
        if not isinstance(error, str):
            continue
        refused += 1
        (text,) = re.findall(rf"--weighting.{name} (\S+), with which", error)
        value = [float(w) for w in text.strip("[]").split(",")] if name == "weights" else float(text)
        advised = settings.model_copy(update={"weighting": WeightingSettings(**{**weighting, name: value})})
        weightings, expected = forecast(advised, pilot)
        part = expected.chunks_per_part(1000, advised.part_rows, advised.chunk, pilot.png_bytes) * advised.chunk
        densities = rng.exponential(size=most // part * part)
        accepted = rng.random(densities.size) < density_weighting.acceptance_probability(
            densities, weightings[EVERYTHING]
        )
        worked += int(accepted.sum() >= 1000)
    assert refused > 100
    assert worked / refused >= 0.94


@pytest.mark.parametrize(
    ("weighting", "name"),
    [
        ({"weight": 100}, "weight"),
        ({"kind": "match"}, "max_weight"),
        ({"kind": "quantiles", "weights": [1, 50]}, "weights"),
        ({"kind": "polarity", "polarity": -3}, "polarity"),
    ],
)
@pytest.mark.parametrize("labels", [False, True])
def test_every_kind_gets_an_advice_that_is_accepted_and_no_milder_than_needed(weighting, name, labels):
    rng = np.random.default_rng(6)
    label, densities = labelled(rng, 512)
    pilot = pilot_of(densities, np.array(NAMES)[label])
    if name == "polarity":
        pilot, labels = replace(pilot, log_volume=rng.normal(size=512)), False
    by_label = BY_LABEL if labels else None
    given = {**weighting, "per_label": labels}
    _, expected = forecast(settings_of(1000, None, given), pilot, by_label)
    most = int(0.8 * expected.candidates(1000))
    error = refusal(settings_of(1000, most, given), pilot, by_label)
    (text,) = re.findall(rf"--weighting.{name} (\S+), with which", error)
    value = [float(w) for w in text.strip("[]").split(",")] if name == "weights" else float(text)
    settings = settings_of(1000, most, {**given, name: value})
    typed = load.load(
        GenerateSettings, [f"--weighting.kind={settings.weighting.kind}", f"--weighting.{name}={text}"], "test"
    )
    assert getattr(typed.weighting, name) == value
    _, fitting = forecast(settings, pilot, by_label)
    assert refusal(settings, pilot, by_label) == fitting
    assert 0.75 * most < fitting.candidates_surely(1000) <= most


def test_more_images_than_candidates_get_no_weights_as_advice():
    error = refusal(settings_of(1000, 900), pilot_of(np.full(256, 0.5)))
    assert "or lower --n" in error and "use --weighting" not in error


def test_the_candidates_that_surely_suffice():
    """Of 4,000 pilots and runs with that many candidates 97.5% give n; without the run's own draws it would be
    fewer.
    """
    rng = np.random.default_rng(7)
    for rate, m, n in [(0.3, 256, 1000), (0.3, 20_000, 100), (0.02, 4096, 50)]:
        found = rng.binomial(m, rate, 4000)
        enough = []
        for c, many in zip(*np.unique(found, return_counts=True), strict=True):
            low, high = density_weighting.rate_interval(np.repeat([0.0, 1.0], [m - c, c]), 0.0, 1.0)
            candidates = generate_pilot.Expectation(c / m, low, high, None).candidates_surely(n)
            enough += (rng.binomial(math.ceil(candidates), rate, many) >= n).tolist()
        assert 0.96 < np.mean(enough) < 0.995, (rate, m, n)


@pytest.mark.parametrize(("rate", "low", "n"), [(0.3, 0.25, 100), (0.02, 0.01, 50), (0.9, 0.9, 10), (1.0, 1.0, 7)])
def test_the_candidates_that_surely_suffice_are_where_the_low_end_of_what_a_run_measures_is_n(rate, low, n):
    candidates = generate_pilot.Expectation(rate, low, 1.0, None).candidates_surely(n)
    assert density_weighting.measured_interval(rate, low, 1.0, candidates)[0] * candidates == pytest.approx(n)


# ---- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [1e-6, 0.001, 0.05, 1.0])
@pytest.mark.parametrize("n", [1, 1000, 10_000_000])
@pytest.mark.parametrize("chunk", [1, 64, 10_000])
@pytest.mark.parametrize("png_bytes", [1e3, 5e6])
def test_a_part_is_bounded_by_rows_bytes_and_work(rate, n, chunk, png_bytes):
    expected = generate_pilot.Expectation(rate, rate / 2, 2 * rate, None)
    chunks = expected.chunks_per_part(n, 1000, chunk, png_bytes)
    assert 1 <= chunks <= generate_chunks.MAX_CHUNKS
    if chunks > 1:
        candidates = chunks * chunk
        assert candidates <= max(generate_pilot.PART_CANDIDATES, n / rate / generate_pilot.MOST_PARTS)
        rows = candidates * rate  # up to the rounding to whole chunks
        assert rows <= 1000 + chunk * rate and rows * png_bytes <= generate_pilot.PART_BYTES + chunk * rate * png_bytes


def test_a_rare_acceptance_makes_no_part_of_a_million():
    assert generate_pilot.Expectation(0.001, 0.0005, 0.002, None).chunks_per_part(20_000, 1000, 64, 1e3) * 64 == 19_968
    assert generate_pilot.Expectation(0.001, 0.0005, 0.002, None).chunks_per_part(1000, 1000, 64, 1e3) * 64 == 4096


def test_the_machines_speed_does_not_decide_the_parts():
    text = [forecast(settings_of(), pilot_of(np.linspace(0.1, 3, 256), actor_s=s))[1] for s in (1e-4, 100.0, math.nan)]
    assert text[0] == text[1] == text[2]


# ---- the plan --------------------------------------------------------------------------------------------------------


def lines_of(pilot, actors=1, copy_distance=0.25, **more):
    settings = settings_of(100, **more)
    weightings, expected = forecast(settings, pilot)
    text = generate_pilot.plan(settings, expected, pilot, actors, weightings, copy_distance)
    return {line.partition(":")[0]: line.partition(":")[2].strip() for line in text.splitlines()}, expected


def warnings_of(pilot):
    settings = settings_of(100)
    weightings, expected = forecast(settings, pilot)
    text = generate_pilot.plan(settings, expected, pilot, 1, weightings, 0.1)
    return [line for line in text.splitlines() if line.startswith("warning:")]


def test_the_time_is_told_for_one_process_and_for_those_that_run_now():
    pilot = pilot_of(np.where(np.arange(256) < 128, 2.0, 0.5), actor_s=0.5)
    lines, expected = lines_of(pilot, actors=4)
    one = expected.candidates(100) * 0.5
    assert lines["time"].startswith(
        f"about {one:,.0f} s on one generator process, {one / 4:,.0f} s on the 4 that fit now"
    )
    assert "fit now" not in lines_of(pilot, actors=1)[0]["time"]
    assert "not known" in lines_of(pilot_of(pilot.predicted, actor_s=math.nan))[0]["time"]


def test_copies_are_told_with_their_share_and_distance():
    densities = np.linspace(0.1, 3, 200)
    lines, _ = lines_of(pilot_of(densities, copies=np.arange(200) < 3))
    assert "3 of 200 pilot candidates (0.015)" in lines["copies"] and "within 0.25 of one" in lines["copies"]
    assert "the copy distance is 0" in lines_of(pilot_of(densities), copy_distance=0.0)[0]["copies"]


def far_off(many, m=256):
    """Candidates of which the index gives the first `many` a density of 0, and on the rest the predictor is
    worthless.
    """
    rng = np.random.default_rng(8)
    by_index = np.where(np.arange(m) < many, 0.0, rng.lognormal(0, 0.3, m))
    return generate_pilot.Pilot(None, rng.lognormal(0, 1.0, m), by_index, np.zeros(m, bool), 0.01, 1500.0)


@pytest.mark.filterwarnings("error")
def test_densities_that_underflow_take_no_warning_away():
    """log 0 would make R² a NaN, which is not below 0; the figures are those of the rows that have both logarithms."""
    pilot = far_off(30)
    found = pilot.calibration()
    assert found.left_out == 30 and found.figures is not None and found.figures.n == 226
    assert found.figures.spearman == pytest.approx(stats.spearmanr(pilot.by_index[30:], pilot.predicted[30:]).statistic)
    text = "\n".join(warnings_of(pilot))
    assert "worse than a constant (R² -" in text
    assert "30 of 256 pilot candidates are left out of what is said of the predictor" in text


@pytest.mark.filterwarnings("error")
def test_where_all_densities_underflow_nothing_is_said_of_the_predictor_but_that():
    pilot = far_off(256)
    assert pilot.calibration().figures is None
    lines, _ = lines_of(pilot)
    assert lines["predictor"].startswith("Spearman undefined")
    (text,) = warnings_of(pilot)
    assert "256 of 256 pilot candidates are left out" in text and "--density.volume_dim" in text


def test_where_no_density_underflows_nothing_is_left_out():
    assert far_off(0).calibration().left_out == 0
    assert not any("left out" in line for line in warnings_of(far_off(0)))


# ---- log-volumes -----------------------------------------------------------------------------------------------------


def pilot_of_volumes(rng, m, degenerate=0):
    """v ~ N(-3, 1), and densities that have nothing to do with it."""
    return replace(pilot_of(rng.exponential(size=m)), log_volume=rng.normal(-3, 1, m), degenerate=degenerate)


@pytest.mark.parametrize(("kind", "exponent"), [("polarity", -1.5), ("magnet", 1.0)])
def test_log_volumes_decide_and_densities_do_not(kind, exponent):
    given = {"kind": kind} | ({"polarity": exponent} if kind == "polarity" else {})
    rng = np.random.default_rng(9)
    pilot = pilot_of_volumes(rng, 4000)
    weightings, expected = forecast(settings_of(weighting=given), pilot)
    assert weightings == {EVERYTHING: density_weighting.tilted(pilot.log_volume, exponent, 20)}
    shuffled = replace(pilot, predicted=pilot.predicted[::-1], by_index=pilot.by_index[::-1])
    assert forecast(settings_of(weighting=given), shuffled) == (weightings, expected)


def test_the_rate_of_volumes_is_told_for_new_candidates_though_the_pilot_made_the_steps():
    """The rate of a weighting is Σ ω_j p_j / max ω with p_j those of N(-3, 1): within the interval in most of 200
    pilots.
    """
    rng = np.random.default_rng(10)
    hits = 0
    for _ in range(200):
        weightings, expected = forecast(
            settings_of(weighting={"kind": "polarity", "polarity": -1}), pilot_of_volumes(rng, 256)
        )
        weighting = weightings[EVERYTHING]
        shares = np.diff(stats.norm.cdf([-np.inf, *weighting.edges, np.inf], loc=-3))
        hits += expected.low <= rate_of(shares, weighting) <= expected.high
    assert hits >= 180  # of 190 expected


def test_the_plan_tells_the_cap_and_the_effective_sample_size():
    """By hand: of v = 0 and log 3, half of the pilot each, exp(v) has (1 + 3)² / (1 + 9) / 2 = 80% of the sample's
    size.
    """
    pilot = replace(pilot_of(np.ones(200)), log_volume=np.repeat([0.0, math.log(3)], 100), degenerate=7)
    settings = settings_of(weighting={"kind": "magnet"})
    weightings, expected = forecast(settings, pilot)
    text = generate_pilot.plan(settings, expected, pilot, 1, weightings, 0.1)
    assert "exp(1 v) in 2 steps, log-volumes v of the pilot in 0 ... 1.099" in text
    assert "all v above 0 have the weight 1.5 (1 is the generator's mean)" in text
    assert "effective sample size of the pilot 160.0 of 200, without steps and cap 160.0" in text
    assert "0.5, 1.5 (log-volumes cut at 0)" in text
    assert "7 of 200 pilot candidates have singular values that are zero" in text and "--weighting.rank" in text
    assert expected.rate == pytest.approx((1 + 1 / 3) / 2)


def test_polarity_wants_its_number_and_no_decision_by_the_index():
    with pytest.raises(UserError, match=r"--weighting.polarity: not set"):
        density_weighting.check(WeightingSettings(kind="polarity"), "none")
    density_weighting.check(WeightingSettings(kind="magnet"), "none")
    for kind in ("--weighting.kind=magnet", "--weighting.kind=polarity"):
        with pytest.raises(UserError, match=r"score index.* has no meaning for weighting.kind") as raised:
            load.load(GenerateSettings, [kind, "--score=index"], "test")
        assert "\n" not in str(raised.value)


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("match", "weight", 5),
        ("match", "threshold", "p10"),
        ("match", "weights", [1.0]),
        ("two_level", "weights", [1.0, 2.0]),
        ("two_level", "bins", 10),
        ("two_level", "max_weight", 5),
        ("quantiles", "weight", 5),
        ("quantiles", "bins", 5),
        ("none", "weight", 5),
        ("none", "per_label", True),
        ("two_level", "polarity", -1),
        ("match", "rank", 4),
        ("quantiles", "output_size", 32),
        ("magnet", "polarity", 2),
        ("magnet", "weight", 2),
        ("polarity", "threshold", "p10"),
        ("polarity", "per_label", True),
    ],
)
def test_a_setting_that_the_kind_does_not_use_is_refused(kind, name, value, tmp_path, monkeypatch):
    """Wherever it comes from, in one line."""
    text = str(value).replace(" ", "")
    expected = f"weighting.{name} has no meaning for weighting.kind '{kind}'"
    file = tmp_path / "settings.yaml"
    file.write_text(f"weighting: {{kind: {kind}, {name}: {text.lower()}}}\n")
    option = f"--weighting.{name}" if value is True else f"--weighting.{name}={text}"
    for argv in ([f"--weighting.kind={kind}", option], [f"--config={file}"]):
        with pytest.raises(UserError, match=expected) as raised:
            load.load(GenerateSettings, argv, "test")
        assert "\n" not in str(raised.value)
    monkeypatch.setenv(f"PD_CORE_WEIGHTING__{name.upper()}", text)
    with pytest.raises(UserError, match=expected):
        load.load(GenerateSettings, [f"--weighting.kind={kind}"], "test")


@pytest.mark.parametrize(
    "given",
    [
        {"kind": "two_level", "threshold": "p20", "weight": 3.0, "per_label": True},
        {"kind": "quantiles", "weights": [1.0, 2.0]},
        {"kind": "match", "bins": 5, "max_weight": 4.0},
        {"kind": "polarity", "polarity": -0.5, "rank": 4, "output_size": 32, "bins": 64},
        {"kind": "magnet", "rank": 4},
        {"kind": "none"},
    ],
)
def test_settings_that_fit_are_taken_and_their_print_is_read_again(given, tmp_path):
    settings = settings_of(weighting=given, generator=GeneratorSettings(path="x"))
    (tmp_path / "printed.yaml").write_text(to_yaml(settings))
    again = load.load(GenerateSettings, [f"--config={tmp_path / 'printed.yaml'}"], "test")
    assert again.weighting == settings.weighting == WeightingSettings(**given)
