"""The estimator stage: the density predictor is fitted to committed features and densities, and calibrated."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pd_core.core import seeds
from pd_core.core.errors import RunError, UserError
from pd_core.density.architecture import PREDICT_ROWS, Architecture
from pd_core.density.formula import density_of
from pd_core.density.predictor import Calibration, EpochLoss, FitMetrics, FitResult, new_predictor

if TYPE_CHECKING:
    import torch

    from pd_core.core.settings.index import EstimatorSettings
    from pd_core.density.network import DensityPredictor

WINDOW_ROWS = 131_072  # rows in memory at once while fitting: 0.4 GB of float32 features at D = 768
HELDOUT_ROWS = 65_536  # held-out rows kept in memory; R2 and Spearman are then good to about 1/sqrt(65536) = 0.004
CALIBRATION_ROWS = 5_000  # held-out rows returned for the calibration plot
INPUT_SCALE_FLOOR = 0.01
MIN_TRAIN_ROWS = 10
MIN_HELDOUT_ROWS = 4
FEWEST_ROWS = MIN_TRAIN_ROWS + MIN_HELDOUT_ROWS
LoadPart = Callable[[], tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float64]]]
"""Loads one part: sample_id int64 [n], feature float32 [n, D], log_density float64 [n]; the same rows at every call."""


def calibration(log_density: NDArray[np.float64], predicted_log_density: NDArray[np.float64]) -> Calibration:
    """How well predictions hold, over all rows and in the tails: R2 = 1 - SSE/SST, Spearman rank correlation, and the
    latter with the mean |error| of log rho among the tenth of the rows of lowest and of highest true density.

    Both arguments float64 [N], N >= 1, index-scored (true) and predicted.
    """
    if log_density.shape != predicted_log_density.shape or log_density.ndim != 1 or log_density.size == 0:
        raise ValueError(f"need two vectors of equal size >= 1, got {log_density.shape}, {predicted_log_density.shape}")
    n = log_density.size
    order = np.argsort(log_density, kind="stable")
    tail = math.ceil(n / 10)
    low, high = order[:tail], order[-tail:]
    error = np.abs(predicted_log_density - log_density)
    return Calibration(
        n=n,
        r2_log_density=_r2(log_density, predicted_log_density),
        r2_density=_r2(density_of(log_density), density_of(predicted_log_density)),
        spearman=_spearman(log_density, predicted_log_density),
        low_decile_spearman=_spearman(log_density[low], predicted_log_density[low]),
        low_decile_mean_abs_log_error=float(error[low].mean()),
        high_decile_spearman=_spearman(log_density[high], predicted_log_density[high]),
        high_decile_mean_abs_log_error=float(error[high].mean()),
    )


def _r2(true: NDArray[np.float64], predicted: NDArray[np.float64]) -> float | None:
    with np.errstate(over="ignore", invalid="ignore"):  # densities near the largest float64: undefined, like constants
        total = float(np.sum((true - true.mean()) ** 2))
        r2 = 1.0 - float(np.sum((true - predicted) ** 2)) / total if total > 0 else math.nan
    return r2 if math.isfinite(r2) else None


def _spearman(true: NDArray[np.float64], predicted: NDArray[np.float64]) -> float | None:
    from scipy import stats

    if true.size < 2 or np.ptp(true) == 0 or np.ptp(predicted) == 0:
        return None
    return float(stats.spearmanr(true, predicted).statistic)


def fit(
    parts: Sequence[LoadPart],
    settings: EstimatorSettings,
    *,
    feature_dim: int,
    window_rows: int = WINDOW_ROWS,
) -> FitResult:
    """Fits the density predictor to rows that are loaded part by part.

    Memory: `window_rows` training rows, at most HELDOUT_ROWS held-out rows and one part. If all training rows fit in
        one window, parts are loaded once, else once to take statistics and once per epoch; the order of parts, and of
        rows within a window, is drawn from (seed, epoch). Held-out losses and metrics are those of the held-out rows in
        memory, a fixed uniform draw if there are more. With patience the weights of the best held-out loss are kept,
        without it the last ones. The result depends on parts, settings (threads included) and window_rows alone, to the
        bit.

    parts: see LoadPart. Raises UserError for too few rows, ValueError for a malformed part, RunError (a RuntimeError)
        with the epoch if a loss is not finite.
    """
    import torch

    predictor = new_predictor(Architecture(feature_dim, tuple(settings.hidden), settings.target), settings.seed)
    data = _scan(parts, settings, feature_dim, window_rows)
    if settings.standardize:
        predictor.feature_mean.copy_(torch.from_numpy(data.statistics.mean[:-1]))
        predictor.feature_std.copy_(torch.from_numpy(_input_scale(data.statistics.std()[:-1])))
        predictor.target_mean.fill_(data.statistics.mean[-1])
        predictor.target_std.fill_(data.statistics.std()[-1])
    with _threads(settings.threads):
        losses, best_epoch = _train(predictor, data, settings)
        predicted = predictor.predict(data.heldout.features).log_density
    true = data.heldout.log_density
    metrics = FitMetrics(calibration(true, predicted), data.statistics.count, data.n_heldout, best_epoch, tuple(losses))
    return FitResult(predictor, metrics, true[:CALIBRATION_ROWS], predicted[:CALIBRATION_ROWS])


def _input_scale(std: NDArray[np.float64]) -> NDArray[np.float64]:
    """Divisors of the inputs: their standard deviations, held above a hundredth of the root mean square of all.

    Backbones have units that are all but dead: divided by their own deviation, a held-out row that wakes one lies
    thousands of deviations out and its prediction with it (docs/log.md has the figures).
    """
    return np.maximum(std, INPUT_SCALE_FLOOR * np.sqrt(np.mean(std**2)))


def _train(predictor: DensityPredictor, data: _Data, settings: EstimatorSettings) -> tuple[list[EpochLoss], int]:
    """Runs the epochs, leaves the weights to keep in the predictor, returns the losses and the epoch that was kept."""
    import torch

    predictor.layers.requires_grad_(True)
    optimizer = torch.optim.Adam(predictor.layers.parameters(), lr=settings.learning_rate, fused=True)
    losses: list[EpochLoss] = []
    best, best_epoch = math.inf, 0
    best_state: dict[str, torch.Tensor] = {}
    for epoch in range(1, settings.epochs + 1):
        rng = np.random.default_rng([settings.seed, epoch])
        train_loss = _train_epoch(predictor, optimizer, data, settings.batch_size, rng)
        loss = EpochLoss(epoch, train_loss, _heldout_loss(predictor, data.heldout))
        if not (math.isfinite(loss.train_loss) and math.isfinite(loss.heldout_loss)):
            raise RunError(
                f"estimator: the loss is not finite in epoch {epoch} (training {loss.train_loss}, held-out "
                f"{loss.heldout_loss}); lower estimator.learning_rate or use estimator.target log_density"
            )
        losses.append(loss)
        if not settings.patience:
            best_epoch = epoch  # the last: held-out rows have no say in the weights
        elif loss.heldout_loss < best:
            best, best_epoch = loss.heldout_loss, epoch
            best_state = {name: tensor.clone() for name, tensor in predictor.state_dict().items()}
        elif epoch - best_epoch >= settings.patience:
            break
    predictor.layers.requires_grad_(False)
    if best_state:
        predictor.load_state_dict(best_state)
    return losses, best_epoch


def _train_epoch(
    predictor: DensityPredictor,
    optimizer: torch.optim.Optimizer,
    data: _Data,
    batch_size: int,
    rng: np.random.Generator,
) -> float:
    """One pass over every training row; returns the mean loss per row."""
    import torch

    total = torch.zeros((), dtype=torch.float64)
    for window in data.windows(rng):
        features, target = _tensors(predictor, window)
        for rows in torch.from_numpy(rng.permutation(len(target))).split(batch_size):
            loss = torch.nn.functional.mse_loss(predictor.standardized_score(features[rows]), target[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(rows)
    return float(total) / data.statistics.count


def _heldout_loss(predictor: DensityPredictor, heldout: _Rows) -> float:
    import torch

    features, target = _tensors(predictor, heldout)
    total = 0.0
    with torch.inference_mode():
        for x, y in zip(features.split(PREDICT_ROWS), target.split(PREDICT_ROWS), strict=True):
            total += float((predictor.standardized_score(x) - y).double().square().sum())
    return total / len(target)


def _tensors(predictor: DensityPredictor, rows: _Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 features [n, D] and standardised target [n]."""
    import torch

    target = _target(rows.log_density, predictor.architecture.target)
    target = (target - float(predictor.target_mean)) / float(predictor.target_std)
    return torch.from_numpy(rows.features), torch.from_numpy(target.astype(np.float32))


def _target(log_density: NDArray[np.float64], target: str) -> NDArray[np.float64]:
    return log_density if target == "log_density" else density_of(log_density)


@contextmanager
def _threads(threads: int) -> Iterator[None]:
    """Runs torch on `threads` threads: sums, and with them the weights, depend on their number."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- streamed data ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Rows:
    features: NDArray[np.float32]  # [n, D]
    log_density: NDArray[np.float64]  # [n]

    def take(self, rows: NDArray[Any]) -> _Rows:
        return _Rows(self.features[rows], self.log_density[rows])


@dataclass
class _Moments:
    """Mean and variance of columns, merged part by part in float64 (Chan, Golub & LeVeque 1983, eq. 2.1)."""

    count: int
    mean: NDArray[np.float64]
    squares: NDArray[np.float64]

    def add(self, rows: NDArray[np.float64]) -> None:
        n = len(rows)
        if n == 0:
            return
        mean = rows.mean(axis=0)
        delta, total = mean - self.mean, self.count + n
        self.squares += ((rows - mean) ** 2).sum(axis=0) + delta**2 * (self.count * n / total)
        self.mean += delta * (n / total)
        self.count = total

    def std(self) -> NDArray[np.float64]:
        """Standard deviation, 1 for a column that is constant to float32 precision: it would only amplify rounding."""
        std = np.sqrt(self.squares / self.count)
        return np.where(std > 1e-6 * np.hypot(self.mean, std), std, 1.0)


@dataclass(frozen=True)
class _Data:
    """What the first pass over the parts leaves: where the training rows are, their statistics, the held-out rows."""

    load_train: Callable[[int], _Rows]
    train_rows: list[int]  # per part
    statistics: _Moments  # of the D features and, last, the target
    kept: _Rows | None  # every training row, where they fit in one window
    heldout: _Rows
    n_heldout: int
    window_rows: int

    def windows(self, rng: np.random.Generator) -> Iterator[_Rows]:
        """Every training row once, in windows of whole parts that are drawn in random order."""
        if self.kept is not None:
            yield self.kept
            return
        group: list[int] = []
        rows = 0
        for part in rng.permutation(len(self.train_rows)).tolist():
            if group and rows + self.train_rows[part] > self.window_rows:
                yield self._load_window(group, rows)
                group, rows = [], 0
            group.append(part)
            rows += self.train_rows[part]
        yield self._load_window(group, rows)

    def _load_window(self, group: list[int], rows: int) -> _Rows:
        return _concatenate((self.load_train(part) for part in group), rows, self.heldout.features.shape[1])


def _scan(parts: Sequence[LoadPart], settings: EstimatorSettings, feature_dim: int, window_rows: int) -> _Data:
    """The first pass: splits every part, takes statistics of the training rows, gathers the held-out rows."""

    def load_split(part: int) -> tuple[_Rows, _Rows, NDArray[np.float64]]:
        sample_id, rows = _load(parts[part], part, feature_dim)
        position = _split_position(sample_id, part, settings)
        is_heldout = position < settings.holdout_fraction
        return rows.take(~is_heldout), rows.take(is_heldout), position[is_heldout]

    statistics = _Moments(0, np.zeros(feature_dim + 1), np.zeros(feature_dim + 1))
    draw = _HeldoutDraw(feature_dim)
    kept: list[_Rows] | None = []
    train_rows: list[int] = []
    for part in range(len(parts)):
        train, heldout, position = load_split(part)
        target = _target(train.log_density, settings.target)
        statistics.add(np.column_stack([train.features.astype(np.float64), target]))
        draw.add(heldout, position)
        train_rows.append(len(target))
        if kept is not None:
            kept.append(train)
        if statistics.count > window_rows:
            kept = None
    if statistics.count < MIN_TRAIN_ROWS or draw.count < MIN_HELDOUT_ROWS:
        raise UserError(
            f"the density predictor needs at least {MIN_TRAIN_ROWS} training and {MIN_HELDOUT_ROWS} held-out rows, got "
            f"{statistics.count} and {draw.count}; give more images or another estimator.holdout_fraction"
        )
    window = None if kept is None else _concatenate(iter(kept), statistics.count, feature_dim)
    return _Data(lambda part: load_split(part)[0], train_rows, statistics, window, draw.rows(), draw.count, window_rows)


class _HeldoutDraw:
    """A uniform draw of at most HELDOUT_ROWS held-out rows, whatever their order: those of the lowest position."""

    def __init__(self, feature_dim: int) -> None:
        self.count = 0
        self._rows = [_Rows(np.empty((0, feature_dim), np.float32), np.empty(0))]
        self._position = [np.empty(0)]
        self._limit = math.inf  # once the draw is full, rows above can no longer get in

    def add(self, rows: _Rows, position: NDArray[np.float64]) -> None:
        self.count += len(position)
        fresh = position < self._limit
        self._rows.append(rows.take(fresh))
        self._position.append(position[fresh])
        # Sorting out at 1.5 times the size, not at every part, keeps the copying small next to the reading.
        if sum(map(len, self._position)) > HELDOUT_ROWS * 3 // 2:
            self._sort_out()

    def rows(self) -> _Rows:
        """The drawn rows, by ascending position: any first n of them are a uniform draw too."""
        self._sort_out()
        return self._rows[0]

    def _sort_out(self) -> None:
        position = np.concatenate(self._position)
        order = np.argsort(position, kind="stable")[:HELDOUT_ROWS]
        features = np.concatenate([rows.features for rows in self._rows])
        log_density = np.concatenate([rows.log_density for rows in self._rows])
        self._rows, self._position = [_Rows(features, log_density).take(order)], [position[order]]
        if len(order) == HELDOUT_ROWS:
            self._limit = float(position[order[-1]])


def _load(load: LoadPart, part: int, feature_dim: int) -> tuple[NDArray[np.int64], _Rows]:
    sample_id, features, log_density = load()
    n = len(sample_id)
    if sample_id.shape != (n,) or features.shape != (n, feature_dim) or log_density.shape != (n,):
        raise ValueError(
            f"part {part}: expected [n], [n, {feature_dim}] and [n], "
            f"got {sample_id.shape}, {features.shape} and {log_density.shape}"
        )
    rows = _Rows(np.asarray(features, np.float32), np.asarray(log_density, np.float64))
    if not (np.isfinite(rows.features).all() and np.isfinite(rows.log_density).all()):
        raise ValueError(f"part {part}: a feature or a log density is not finite")
    return sample_id, rows


def held_out(sample_id: NDArray[np.int64], settings: EstimatorSettings) -> NDArray[np.bool_]:
    """Which rows no fit has trained on, bool [n]; of the split by hash, which is the same in every run."""
    assert settings.split == "hash", "a random split is not known afterwards"
    return _split_position(sample_id, 0, settings) < settings.holdout_fraction


def _split_position(sample_id: NDArray[np.int64], part: int, settings: EstimatorSettings) -> NDArray[np.float64]:
    """Uniform [0, 1) for each row; a row is held out where it is below holdout_fraction.

    "hash" depends on the row's id alone: a row stays on its side in every run, also as the data grows. "random" is
    drawn from (seed, part).
    """
    if settings.split == "hash":
        return seeds.uniform(sample_id)
    return np.random.default_rng([settings.seed, 0, part]).random(len(sample_id))


def _concatenate(loaded: Iterator[_Rows], rows: int, feature_dim: int) -> _Rows:
    """Fills one window part after part, so that beside it only one part is in memory."""
    window = _Rows(np.empty((rows, feature_dim), np.float32), np.empty(rows))
    end = 0
    for part in loaded:
        start, end = end, end + len(part.log_density)
        window.features[start:end], window.log_density[start:end] = part.features, part.log_density
    assert end == rows, f"a part gave other rows than before: {end} rows, {rows} expected"
    return window
