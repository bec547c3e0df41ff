"""density/fit.py: what it learns, what it must not see, and that nothing depends on how rows are cut into parts."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tracemalloc
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from pd_core.core.errors import UserError
from pd_core.core.settings.index import EstimatorSettings
from pd_core.core.settings.load import PRESETS
from pd_core.density import fit, network
from pd_core.density import predictor as density_predictor
from pd_core.density.architecture import Architecture

DIM = 8


def _settings(**changes: Any) -> EstimatorSettings:
    small: dict[str, Any] = {"hidden": (32, 16), "batch_size": 64, "epochs": 3, "patience": 0}
    return EstimatorSettings(**(small | changes))


def _rows(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, features of unequal scale, and a smooth log density of them."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, DIM))
    log_density = np.sin(x[:, 0]) + 0.5 * x[:, 1] * x[:, 2] - 0.3
    features = (x * np.geomspace(0.1, 10, DIM) + 3.0).astype(np.float32)
    return rng.permutation(n * 7)[:n].astype(np.int64), features, log_density


def _parts(rows: tuple[np.ndarray, ...], n_parts: int, loads: Counter[int] | None = None) -> list[fit.LoadPart]:
    cuts = np.array_split(np.arange(len(rows[0])), n_parts)

    def load(part: int) -> Any:
        if loads is not None:
            loads[part] += 1
        return tuple(column[cuts[part]] for column in rows)

    return [lambda part=part: load(part) for part in range(n_parts)]  # type: ignore[misc]


def _fit(rows: tuple[np.ndarray, ...], n_parts: int = 3, **changes: Any) -> density_predictor.FitResult:
    window_rows = changes.pop("window_rows", fit.WINDOW_ROWS)
    return fit.fit(_parts(rows, n_parts), _settings(**changes), feature_dim=DIM, window_rows=window_rows)


def _weights(result: density_predictor.FitResult) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in result.predictor.state_dict().items()}


def _is_heldout(rows: tuple[np.ndarray, ...], fraction: float = 0.2) -> np.ndarray:
    """Which rows "hash" holds out, in plain Python integers: SplitMix64 as published (Steele, Lea & Flood 2014)."""
    mask = 2**64 - 1

    def position(x: int) -> float:
        z = (x + 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return ((z ^ (z >> 31)) >> 11) / 2**53

    return np.array([position(int(i) & mask) < fraction for i in rows[0]])


# --- what it learns ---------------------------------------------------------------------------------------------------


def test_a_unit_that_is_all_but_dead_does_not_spoil_held_out_rows():
    sample_id, features, log_density = _rows(4000)
    features[:, 6] = 3.0  # a dead unit ...
    features[::50, 6] += 1e-3  # ... that hardly moves in the rows it was fitted on
    wide = features.copy()
    heldout = _is_heldout((sample_id,))
    wide[heldout & (np.arange(len(wide)) % 7 == 0), 6] = 3.1  # and wakes up elsewhere
    plain = _fit((sample_id, features, log_density), epochs=20).metrics.heldout
    woken = _fit((sample_id, wide, log_density), epochs=20).metrics.heldout
    assert plain.r2_log_density is not None and woken.r2_log_density is not None
    assert plain.r2_log_density > 0.5 and woken.r2_log_density > plain.r2_log_density - 0.1


@pytest.mark.parametrize("target", ["log_density", "density"])
def test_it_recovers_a_smooth_function(target: str) -> None:
    result = _fit(_rows(6000), hidden=(64, 64), epochs=40, patience=10, target=target)
    heldout = result.metrics.heldout
    r2 = heldout.r2_log_density if target == "log_density" else heldout.r2_density
    assert r2 is not None and r2 > 0.9
    assert heldout.spearman is not None and heldout.spearman > 0.95
    # The same on rows that the fit never saw in any form, computed without the module's metrics.
    _, features, log_density = _rows(2000, seed=99)
    prediction = result.predictor.predict(features)
    assert stats.spearmanr(prediction.log_density, log_density).statistic > 0.95
    true, predicted = (
        (log_density, prediction.log_density) if target == "log_density" else (np.exp(log_density), prediction.density)
    )
    assert 1 - np.sum((true - predicted) ** 2) / np.sum((true - true.mean()) ** 2) > 0.9
    assert result.heldout_log_density.shape == result.heldout_predicted_log_density.shape == (result.metrics.n_heldout,)


def test_paper_settings_give_the_network_of_the_paper() -> None:
    rng = np.random.default_rng(0)
    features = rng.standard_normal((200, 768)).astype(np.float32)
    rows = np.arange(200), features, features[:, 0].astype(np.float64)
    settings = EstimatorSettings(**{**PRESETS["paper"]["estimator"], "epochs": 1})
    predictor = fit.fit(_parts(rows, 2), settings, feature_dim=768).predictor
    linear = [layer for layer in predictor.layers if isinstance(layer, torch.nn.Linear)]
    assert [linear[0].in_features, *(layer.out_features for layer in linear)] == [768, 512, 256, 128, 1]
    assert [type(layer).__name__ for layer in predictor.layers] == ["Linear", "ReLU"] * 3 + ["Linear"]
    # Plain features to plain density: the layers alone are the predictor.
    x = torch.from_numpy(features[:5])
    torch.testing.assert_close(predictor.score(x), predictor.layers(x).squeeze(1), rtol=0, atol=0)


def test_initial_weights_are_distributed_as_torch_initialises_a_linear_layer() -> None:
    ours = density_predictor.new_predictor(Architecture(400, (300,), "density"), seed=1).layers[0]
    torchs = torch.nn.Linear(400, 300)
    for name in ("weight", "bias"):
        a, b = (getattr(layer, name).detach().flatten().numpy() for layer in (ours, torchs))
        assert stats.ks_2samp(a, b).pvalue > 1e-3


# --- the split --------------------------------------------------------------------------------------------------------


def test_heldout_rows_do_not_influence_the_weights() -> None:
    rows = _rows(1500)
    heldout = _is_heldout(rows)
    sample_id, features, log_density = rows
    other_features, other_density = features.copy(), log_density.copy()
    other_features[heldout] += 50.0
    other_density[heldout] -= 20.0
    plain, changed = _fit(rows), _fit((sample_id, other_features, other_density))
    assert _weights(plain) == _weights(changed)  # statistics included
    assert plain.metrics.heldout != changed.metrics.heldout
    assert plain.metrics.n_heldout == heldout.sum()

    other_density = log_density.copy()
    other_density[~heldout] -= 20.0
    assert _weights(plain) != _weights(_fit((sample_id, features, other_density)))


@pytest.mark.parametrize("split", ["hash", "random"])
@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_split_has_the_asked_size_and_hangs_on_ids_or_the_seed_alone(split: str, fraction: float) -> None:
    ids = np.arange(20_000, dtype=np.int64) - 10_000
    settings = [_settings(split=split, holdout_fraction=fraction, seed=seed) for seed in (1, 1, 2)]
    first, again, other = (fit._split_position(ids, 3, one) < fraction for one in settings)
    # binomial: five standard deviations
    assert abs(first.sum() - 20_000 * fraction) < 5 * math.sqrt(20_000 * fraction * (1 - fraction))
    assert (first == again).all() and (first == other).all() == (split == "hash")
    if split == "hash":
        edges = np.array([0, 1, -1, 2**63 - 1, 12345], dtype=np.int64)
        assert (fit.held_out(edges, settings[0]) == _is_heldout((edges,), fraction)).all()


def test_heldout_draw_is_bounded_and_uniform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "HELDOUT_ROWS", 100)
    rng = np.random.default_rng(0)
    position = rng.random(5000)
    draw = fit._HeldoutDraw(1)
    for block in np.array_split(np.arange(5000), 37):
        draw.add(fit._Rows(block[:, None].astype(np.float32), position[block]), position[block])
        assert sum(map(len, draw._position)) <= 150
    drawn = draw.rows()
    order = np.argsort(position)[:100]
    np.testing.assert_array_equal(drawn.features[:, 0], order)
    np.testing.assert_array_equal(drawn.log_density, position[order])
    assert draw.count == 5000


# --- streaming --------------------------------------------------------------------------------------------------------


def test_parts_that_fit_are_loaded_once_and_others_once_per_epoch() -> None:
    rows = _rows(1000)
    for window_rows, expected in ((1000, 1), (250, 1 + 3)):  # 3 epochs after the pass for statistics
        loads: Counter[int] = Counter()
        fit.fit(_parts(rows, 10, loads), _settings(), feature_dim=DIM, window_rows=window_rows)
        assert loads == dict.fromkeys(range(10), expected)


@pytest.mark.parametrize("window_rows", [1, 300, 10_000])
def test_every_training_row_is_used_once_per_epoch(window_rows: int) -> None:
    """Conservation: with steps too small to move a float32, the reported training loss is that of the training rows."""
    rows = _rows(1200)
    rows[2][:] = np.exp(3 * rows[2])  # a few rows carry most of the loss: one used twice or never shows
    result = _fit(rows, n_parts=7, window_rows=window_rows, learning_rate=1e-30, epochs=2)
    train = ~_is_heldout(rows)
    predictor = result.predictor
    error = predictor.predict(rows[1][train]).log_density - rows[2][train]
    expected = np.mean(error**2) / float(predictor.target_std) ** 2
    # float32 predictions: relative error of each term below 1e-5, all of one sign at worst.
    assert [loss.train_loss for loss in result.metrics.losses] == pytest.approx([expected] * 2, rel=1e-5)


def test_windows_hold_whole_parts_within_the_limit_in_a_new_order_each_epoch() -> None:
    rows = np.arange(2000), np.arange(2000, dtype=np.float32)[:, None].repeat(DIM, 1), np.zeros(2000)
    data = fit._scan(_parts(rows, 20), _settings(), DIM, window_rows=300)
    epochs = [[w.features[:, 0] for w in data.windows(np.random.default_rng([0, epoch]))] for epoch in (1, 2)]
    train = np.flatnonzero(~_is_heldout(rows))
    for windows in epochs:
        assert len(windows) > 1 and max(map(len, windows)) <= 300
        np.testing.assert_array_equal(np.sort(np.concatenate(windows)), train)
    assert not np.array_equal(np.concatenate(epochs[0]), np.concatenate(epochs[1]))


def test_statistics_are_those_of_the_training_rows_in_one_piece() -> None:
    rows = _rows(3000)
    rows[1][:, 5] = 7.25  # constant: deviation 1, or it would divide by zero
    predictor = _fit(rows, n_parts=11, window_rows=100, epochs=1).predictor
    train = ~_is_heldout(rows)
    features = rows[1][train].astype(np.float64)
    std = features.std(axis=0)
    std[5] = 1.0
    np.testing.assert_allclose(predictor.feature_mean.numpy(), features.mean(axis=0), rtol=1e-6)  # stored as float32
    np.testing.assert_allclose(predictor.feature_std.numpy(), std, rtol=1e-6)
    assert float(predictor.target_mean) == pytest.approx(rows[2][train].mean(), rel=1e-6)
    assert float(predictor.target_std) == pytest.approx(rows[2][train].std(), rel=1e-6)


# --- the course of a fit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window_rows", [200, 10_000])
def test_same_settings_same_bytes(window_rows: int) -> None:
    rows, threads = _rows(1000), torch.get_num_threads()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first = _fit(rows, window_rows=window_rows)
        torch.manual_seed(2)  # the global generator must not matter
        assert _weights(first) == _weights(_fit(rows, window_rows=window_rows))
    assert _weights(first) != _weights(_fit(rows, window_rows=window_rows, seed=1))
    assert torch.get_num_threads() == threads


def test_threads_are_restored_after_an_error() -> None:
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="not finite in epoch 1"):
        _fit(_rows(500), learning_rate=1e30, threads=before + 1)
    assert torch.get_num_threads() == before


def test_early_stopping_keeps_the_best_weights() -> None:
    sample_id, features, _ = _rows(400)
    noise = np.random.default_rng(5).standard_normal(400)  # nothing to learn: the held-out loss rises as it overfits
    result = _fit((sample_id, features, noise), 2, hidden=(128,), epochs=200, patience=4, learning_rate=3e-3)
    losses = [loss.heldout_loss for loss in result.metrics.losses]
    assert [loss.epoch for loss in result.metrics.losses] == list(range(1, len(losses) + 1))
    assert result.metrics.best_epoch == int(np.argmin(losses)) + 1
    assert len(losses) == result.metrics.best_epoch + 4 < 200
    # The weights that came back have the loss of the best epoch, not of the last.
    heldout = _is_heldout((sample_id,))
    error = result.predictor.predict(features[heldout]).log_density - noise[heldout]
    mse = np.mean(error**2) / float(result.predictor.target_std) ** 2
    assert mse == pytest.approx(min(losses), rel=1e-5)
    assert mse < losses[-1] * (1 - 1e-3)


def test_without_patience_the_last_weights_are_kept() -> None:
    assert _fit(_rows(500), epochs=5, patience=0).metrics.best_epoch == 5


@pytest.mark.parametrize(("n", "changes"), [(0, {}), (8, {}), (60, {"holdout_fraction": 0.01})])
def test_too_few_rows_are_refused(n: int, changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="needs at least"):
        _fit(_rows(n), n_parts=1, **changes)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda features, density: (features[:, 1:], density),
        lambda features, density: (features, density[1:]),
        lambda features, density: (np.where(features == features[3, 3], np.nan, features), density),
        lambda features, density: (features, np.where(density == density[3], -np.inf, density)),
    ],
    ids=["dim", "length", "feature", "density"],
)
def test_malformed_parts_are_refused(spoil: Any) -> None:
    sample_id, features, log_density = _rows(100)
    with pytest.raises(ValueError, match="part 0"):
        fit.fit([lambda: (sample_id, *spoil(features, log_density))], _settings(), feature_dim=DIM)


# --- using it ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["log_density", "density"])
def test_gradient_agrees_with_finite_differences(target: str) -> None:
    rows = _rows(800)
    # Between its kinks a ReLU network is linear: central differences over 2e-7 in float64 err by rounding only, 1e-9.
    predictor = _fit(rows, target=target, epochs=5).predictor.to(dtype=torch.float64)
    x = torch.from_numpy(rows[1][:6]).double().requires_grad_(True)
    assert torch.autograd.gradcheck(predictor, (x,), eps=1e-7, atol=1e-6)
    (gradient,) = torch.autograd.grad(predictor(x).sum(), x)
    assert (gradient != 0).any(dim=1).all()
    assert not any(parameter.requires_grad for parameter in predictor.layers.parameters())


@pytest.mark.parametrize("target", ["log_density", "density"])
def test_predict_agrees_with_forward(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "PREDICT_ROWS", 100)
    rows = _rows(750)
    predictor = _fit(rows, target=target).predictor
    features = rows[1]
    features.flags.writeable = False  # as Arrow hands them out
    prediction = predictor.predict(features)
    expected = predictor.forward(torch.tensor(features)).numpy()
    np.testing.assert_allclose(prediction.log_density, expected, rtol=1e-4, atol=1e-5)  # float32 in other batches
    np.testing.assert_allclose(prediction.density, np.exp(prediction.log_density), rtol=1e-12)
    np.testing.assert_array_equal(predictor.predict(torch.tensor(features)).density, prediction.density)
    assert predictor.predict(features[:0]).density.shape == (0,)


def test_a_network_that_predicts_a_negative_density_gives_finite_logs() -> None:
    predictor = _fit(_rows(300), target="density").predictor
    predictor.target_mean.fill_(-1e6)
    x = torch.from_numpy(_rows(5)[1]).requires_grad_(True)
    prediction = predictor.predict(x.detach())
    assert np.isfinite(prediction.log_density).all() and (prediction.density > 0).all()
    (slope,) = torch.autograd.grad(predictor.score(x).sum(), x)
    assert (slope != 0).any()  # where forward is flat, score still tells up from down


def test_features_of_another_extractor_are_refused() -> None:
    predictor = density_predictor.new_predictor(Architecture(DIM, (4,), "density"))
    with pytest.raises(ValueError, match=r"features must be \[N, 8\]"):
        predictor.predict(np.zeros((2, 9), np.float32))


# --- calibration ------------------------------------------------------------------------------------------------------


def test_calibration_by_hand() -> None:
    rng = np.random.default_rng(0)
    true = rng.standard_normal(1000)
    predicted = true + 0.3 * rng.standard_normal(1000)
    result = fit.calibration(true, predicted)
    assert result.r2_log_density == pytest.approx(
        1 - np.sum((true - predicted) ** 2) / np.sum((true - true.mean()) ** 2)
    )
    assert result.spearman == pytest.approx(stats.spearmanr(true, predicted).statistic)
    low, high = true <= np.sort(true)[99], true >= np.sort(true)[900]
    assert low.sum() == high.sum() == 100
    assert result.low_decile_mean_abs_log_error == pytest.approx(np.abs(true - predicted)[low].mean())
    assert result.high_decile_mean_abs_log_error == pytest.approx(np.abs(true - predicted)[high].mean())
    assert result.low_decile_spearman == pytest.approx(stats.spearmanr(true[low], predicted[low]).statistic)
    assert result.high_decile_spearman == pytest.approx(stats.spearmanr(true[high], predicted[high]).statistic)


def test_calibration_of_a_perfect_and_of_a_constant_predictor() -> None:
    true = np.linspace(-1, 1, 50)
    perfect = fit.calibration(true, true.copy())
    assert perfect.r2_log_density == perfect.r2_density == 1.0
    assert perfect.spearman == pytest.approx(1.0)
    constant = fit.calibration(true, np.zeros(50))
    assert constant.spearman is None and constant.r2_log_density == pytest.approx(0.0)
    assert fit.calibration(np.zeros(5), true[:5]).r2_log_density is None
    assert fit.calibration(true, true + 900.0).r2_density is None  # beyond float64: undefined, not inf


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["log_density", "density"])
def test_saved_and_loaded_to_the_bit(target: str, tmp_path: Path) -> None:
    rows = _rows(500)
    result = _fit(rows, target=target)
    files = density_predictor.to_bytes(result.predictor, result.metrics)
    assert files == density_predictor.to_bytes(result.predictor, result.metrics)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    for predictor in (density_predictor.from_bytes(files), density_predictor.load(str(tmp_path))):
        assert predictor.architecture == result.predictor.architecture
        before, after = (p.predict(rows[1]).log_density for p in (result.predictor, predictor))
        np.testing.assert_array_equal(before, after)
    description = json.loads(files["predictor.json"])
    assert description["layer_widths"] == [DIM, 32, 16, 1]
    assert description["metrics"]["heldout"]["spearman"] == result.metrics.heldout.spearman
    assert description["tensors"]["feature_mean"] == [DIM]


FEW = Architecture(DIM, (4, 3), "density")


def saved(architecture: Architecture = FEW) -> dict[str, bytes]:
    metrics = density_predictor.FitMetrics(fit.calibration(np.arange(4.0), np.arange(4.0)), 10, 4, 1, ())
    return density_predictor.to_bytes(density_predictor.new_predictor(architecture), metrics)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"predictor.safetensors": saved()["predictor.safetensors"][:-7]}, "do not fit together"),
        (
            {"predictor.json": saved()["predictor.json"].replace(b'"format_version": 1', b'"format_version": 2')},
            "version 2",
        ),
        *(({"predictor.json": text}, "predictor.json: ") for text in (b"", b"[]", b"[" * 200_000, b"\xff", b"{}")),
    ],
    ids=["cut weights", "version", "empty", "list", "nested", "no text", "no field"],
)
def test_damaged_files_are_one_line(changed: dict[str, bytes], expected: str) -> None:
    with pytest.raises(UserError, match=rf"^density predictor: [^\n]*{expected}[^\n]*$"):
        density_predictor.from_bytes(saved() | changed)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(UserError, match=r"predictor\.safetensors is missing"):
        density_predictor.from_bytes({"predictor.json": saved()["predictor.json"]})


@pytest.mark.parametrize("section", ["", "architecture", "tensors"])
def test_whatever_a_description_says_nothing_is_made_of_it(section: str) -> None:
    """Every entry in turn is gone, doubled under another name, or something else; a width of 10^9 would take 72 GB."""
    files = saved()
    others: list[Any] = [
        None,
        True,
        -1,
        0,
        10**9,
        2**70,
        0.5,
        float("nan"),
        "rank",
        [],
        [10**9],
        [-1],
        [None],
        {},
        {"a": 1},
    ]
    honest = json.loads(files["predictor.json"])
    keys = list(honest[section] if section else honest)
    tracemalloc.start()
    for key in [*keys, "another"]:
        for other in [*others, "gone"]:
            description = json.loads(files["predictor.json"])
            inside = description[section] if section else description
            if other == "gone":
                inside.pop(key, None)
            else:
                inside[key] = other
            if description == honest or (key == "metrics" and isinstance(other, dict)):
                continue
            changed = files | {"predictor.json": json.dumps(description).encode()}
            with pytest.raises(UserError, match=r"^density predictor: [^\n]*$"):
                density_predictor.from_bytes(changed)
    assert tracemalloc.get_traced_memory()[1] < 1 << 24
    tracemalloc.stop()


def test_widths_that_agree_with_each_other_are_held_to_the_tensors_before_anything_is_made() -> None:
    wide = Architecture(DIM, (10**9, 10**9), "density")
    description = json.loads(saved()["predictor.json"])
    widths = [DIM, *wide.hidden, 1]
    description["architecture"]["hidden"], description["layer_widths"] = list(wide.hidden), widths
    for number, (n_in, n_out) in enumerate(pairwise(widths)):
        description["tensors"] |= {f"layers.{2 * number}.weight": [n_out, n_in], f"layers.{2 * number}.bias": [n_out]}
    with pytest.raises(UserError, match=r"of other layers than predictor\.json says"):
        density_predictor.from_bytes(saved() | {"predictor.json": json.dumps(description).encode()})


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("layers.0.weight", lambda tensor: tensor * float("nan"), "finite numbers"),
        ("target_mean", lambda tensor: tensor + float("inf"), "finite numbers"),
        ("layers.2.bias", lambda tensor: tensor.double(), "of float32"),
        ("feature_std", lambda tensor: tensor * 0, "not above 0"),
        ("target_std", lambda tensor: -tensor, "not above 0"),
        ("feature_mean", lambda tensor: tensor[:-1], "of other layers"),
    ],
)
def test_weights_that_no_fit_leaves_are_refused(name: str, change: Any, expected: str) -> None:
    from safetensors.torch import load, save

    tensors = load(saved()["predictor.safetensors"])
    tensors[name] = change(tensors[name]).contiguous()
    with pytest.raises(UserError, match=expected):
        density_predictor.from_bytes(saved() | {"predictor.safetensors": save(tensors)})


def test_it_loads_and_predicts_without_ray(tmp_path: Path) -> None:
    files = saved()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    script = (
        "import sys; sys.modules['ray'] = sys.modules['faiss'] = None\n"
        "from pd_core.density import predictor\nassert 'torch' not in sys.modules, 'torch must be imported late'\n"
        f"import numpy as np\np = predictor.load({str(tmp_path)!r}).predict(np.ones((2, {DIM}), np.float32))\n"
        "print(repr(float(p.log_density[0])))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = density_predictor.from_bytes(files).predict(np.ones((2, DIM), np.float32))
    assert float(done.stdout) == expected.log_density[0]
