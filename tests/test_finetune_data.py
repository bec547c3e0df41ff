"""Weighted data of fine-tuning: the draws against closed forms and brute force, the stage and the stream on a tiny index."""

import dataclasses
import io
import math
import shutil
import tarfile
from collections import Counter
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.stats
from PIL import Image

from pd_core import acceptance, cluster, density, ids, images, realset, running, sources, storage, tracking
from pd_core.config import DataSettings, FinetuneSettings, WeightingSettings
from pd_core.errors import RunError, UserError
from pd_core.finetuning import Share, draws, stream, weights
from pd_core.finetuning.draws import Draws
from tests import tiny

SIZE = (12, 16)


# ---- draws -----------------------------------------------------------------------------------------------------------


def cut(values, rows):
    """Weights of each part, for parts of so many rows."""
    return [np.asarray(part, dtype=np.float64) for part in np.split(np.asarray(values), np.cumsum(rows)[:-1])]


def draws_of(parts, seed=0):
    return Draws([float(np.cumsum(part)[-1]) if len(part) else 0.0 for part in parts], [len(p) for p in parts], seed)


def located(found, parts, positions):
    """Number of the image, counted over all parts, of each draw."""
    firsts = np.cumsum([0] + [len(part) for part in parts])
    images = []
    for window, inside in found.windows(positions):
        part, row = window.locate(inside, lambda number: parts[number])
        images.append(firsts[part] + row)
    return np.concatenate(images)


def weight_sets():
    rng = np.random.default_rng(0)
    return {
        "two levels": np.where(rng.random(200) < 0.2, 33.0, 1.0),
        "two levels that no float holds": np.where(rng.random(200) < 0.2, 0.1, 0.3),
        "any": rng.lognormal(0, 2, 200),
        "zeros and ties": rng.choice([0.0, 0.0, 1 / 3, 2 / 3], 200),
        "one dominates": np.append(np.full(199, 1e-3), 1e6),
        "tiny and huge": 10.0 ** rng.uniform(-300, 300, 200),
        "all but vanish": np.append(1e300, np.full(199, 1e-300)),
        "only the first": np.append(1.0, np.zeros(199)),
        "equal": np.full(200, 0.1),
    }


@pytest.fixture
def small_windows(monkeypatch):
    monkeypatch.setattr(draws, "WINDOW_ROWS", 40)


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("name", weight_sets())
@pytest.mark.parametrize("rows", [[200], [1] * 200, [0, 70, 0, 1, 9, 64, 56, 0]])
def test_draws_are_those_of_systematic_resampling_computed_flat_and_exactly(name, rows):
    """Brute force in rational numbers: the points (j + u) W / E on the line of all weights in the epoch's order of parts."""
    parts, seed = cut(weight_sets()[name], rows), 3
    found, size = draws_of(parts, seed), 200
    flat = np.concatenate(parts)
    total = sum(map(Fraction, flat.tolist()))
    for epoch in range(3):
        counts = np.bincount(located(found, parts, np.arange(epoch * size, (epoch + 1) * size)), minlength=size)
        assert counts.sum() == size
        assert not counts[flat == 0].any()
        # within the rounding of sums of 200 float64 terms, counts are the expected number rounded down or up
        expected = [size * Fraction(w) / total for w in flat.tolist()]
        slack = Fraction(200 * size, 2**52)
        assert all(math.floor(e - slack) <= c <= math.ceil(e + slack) for e, c in zip(expected, counts.tolist(), strict=True))

        offset = Fraction(float(ids.uniform(np.array([epoch]), ids.stream(seed, "finetune/offset"))[0]))
        firsts = np.cumsum([0] + [len(p) for p in parts])
        order = draws.permutation(len(parts), ids.stream(seed, f"finetune/parts/{epoch}"))
        line = [i for part in order for i in range(firsts[part], firsts[part + 1])]
        brute, end, j = np.zeros(size, int), Fraction(0), 0
        near = False
        for i in line:
            end += Fraction(flat[i].item())
            while j < size and (j + offset) * total / size < end:
                brute[i] += 1
                j += 1
            border = end * size / total - offset
            near |= bool(flat[i]) and abs(border - round(border)) < slack
        if not near:  # no point lies so near to a border that rounding may put it on the other side
            np.testing.assert_array_equal(counts, brute)


def test_pooled_counts_over_epochs_follow_the_weights():
    rng = np.random.default_rng(1)
    values = rng.choice([0.25, 1.0, 7.0], 300) * rng.random(300)
    parts = cut(values, [100, 3, 97, 100])
    found, epochs = draws_of(parts), 400
    counts = sum(
        np.bincount(located(found, parts, np.arange(e * 300, (e + 1) * 300)), minlength=300) for e in range(epochs)
    )
    assert counts.sum() == 300 * epochs
    expected = 300 * epochs * values / values.sum()
    # an epoch's count is its expected number rounded down or up, so its variance is f (1 - f), f what is cut off
    fraction = (expected / epochs) % 1
    z = (counts - expected) / np.sqrt(epochs * fraction * (1 - fraction))
    chi_square = float(z @ z)  # the counts of an epoch sum to E: 299 free, and they are not independent: only a bound above
    assert chi_square < scipy.stats.chi2.isf(1e-3, 300) * 2
    # one draw taken from each epoch, at a place of its own: independent draws from the weights
    positions = np.arange(4000) * 300 + ids.integers(np.arange(4000), 9) % 300
    single = np.array([located(found, parts, np.array([p]))[0] for p in positions])
    ranks = np.argsort(np.argsort(values, kind="stable"), kind="stable") // 30
    observed, chances = np.bincount(ranks[single], minlength=10), np.bincount(ranks, values / values.sum())
    assert scipy.stats.chisquare(observed, 4000 * chances).pvalue > 1e-3


@pytest.mark.usefixtures("small_windows")
def test_a_run_taken_up_at_any_position_goes_on_with_the_same_draws():
    parts = cut(weight_sets()["any"], [30] * 6 + [20])
    whole = located(draws_of(parts), parts, np.arange(700))
    for first in (0, 1, 39, 199, 200, 201, 555):
        np.testing.assert_array_equal(located(draws_of(parts), parts, np.arange(first, 700)), whole[first:])
    for position in range(0, 700, 7):
        assert located(draws_of(parts), parts, np.array([position])) == whole[position]
    assert not np.array_equal(whole[:200], located(draws_of(parts, seed=1), parts, np.arange(200)))


@pytest.mark.usefixtures("small_windows")
def test_windows_cover_the_run_without_gap_and_hold_few_images():
    parts = cut(weight_sets()["two levels"], [7] * 28 + [4])
    found, first, epochs = draws_of(parts), 0, 0
    seen = Counter()
    while first < 600:
        window = found.window_of(first)
        assert window.first == first and window.draws > 0
        assert window is found.window_of(window.stop - 1)
        assert sum(len(parts[p]) for p in window.parts) < 40 + 7
        assert sorted(window.order.tolist()) == list(range(window.draws))
        seen.update(window.parts)
        first = window.stop
        if first % 200 == 0:
            epochs += 1
            assert set(seen.values()) == {epochs}, "each part once an epoch"
    assert epochs == 3


def test_draws_of_a_window_are_shuffled():
    parts = cut(np.ones(1000), [1000])
    order = located(draws_of(parts), parts, np.arange(1000))
    assert sorted(order) == list(range(1000))
    assert abs(scipy.stats.spearmanr(order, np.arange(1000)).statistic) < 0.15  # 4.7 standard deviations
    assert not np.array_equal(order, located(draws_of(parts), parts, np.arange(1000, 2000)))


def test_half_of_the_draws_are_mirrored_whatever_is_asked_with_them():
    found = Draws([1.0], [10], 5)
    mirrored = found.mirrored(np.arange(10_000))
    assert abs(mirrored.mean() - 0.5) < 4 * 0.5 / 100
    np.testing.assert_array_equal(found.mirrored(np.arange(70, 90)), mirrored[70:90])


def test_weights_that_are_not_those_of_the_sums_are_noticed():
    parts = cut(np.arange(1.0, 41.0), [20, 20])
    found = draws_of(parts)
    with pytest.raises(AssertionError, match="not the weights"):
        located(found, [part[::-1][:10] for part in parts], np.arange(40))
