"""The density predictor f: F(x) -> pseudo density: fit on streamed parts, calibrate, save, load.

A fully connected network trained by MSE on (F(x_i), rho_i) (arXiv 2407.08659). It exists because it is differentiable
(perturbation needs its gradient) and costs nothing next to the generator. The paper's settings are 768-512-256-128-1,
ReLU, Adam 1e-3, batch 64, 100 epochs, random 80/20 split, plain features to plain rho. Ours standardise the features and
predict a standardised log rho, so that the tails do not dominate, stop early, and split by a hash of the row id.

The predictor is blind where it saw no features: fitted on real images alone it says nothing about images off their
manifold. `fit` takes any rows with a density, so generated images scored by the index can be parts too, and
`calibration` measures it on whatever rows it will be used on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pd_core.core import seeds, trust
from pd_core.core.errors import RunError, UserError, one_line
from pd_core.density import density_of

if TYPE_CHECKING:
    import torch

    from pd_core.core.settings.index import EstimatorSettings

FORMAT_VERSION = 1
WEIGHTS_FILE = "predictor.safetensors"
DESCRIPTION_FILE = "predictor.json"

WINDOW_ROWS = 131_072  # rows in memory at once while fitting: 0.4 GB of float32 features at D = 768
HELDOUT_ROWS = 65_536  # held-out rows kept in memory; R2 and Spearman are then good to about 1/sqrt(65536) = 0.004
CALIBRATION_ROWS = 5_000  # held-out rows returned for the calibration plot
INPUT_SCALE_FLOOR = 0.01
MIN_TRAIN_ROWS = 10
MIN_HELDOUT_ROWS = 4
_PREDICT_ROWS = 65_536
# A network that predicts rho itself can go below zero. Its logarithm is taken from here up; real densities are around 1
# and the resolution of such a network is some 1e-2, so nothing it can tell apart lies below.
_SMALLEST_PREDICTED_DENSITY = 1e-6

LoadPart = Callable[[], tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float64]]]
"""Loads one part: sample_id int64 [n], feature float32 [n, D], log_density float64 [n]; the same rows at every call."""


# --- the predictor -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Architecture:
    """Layers feature_dim - hidden... - 1 with ReLU between them; `target` is what the last layer stands for."""

    feature_dim: int
    hidden: tuple[int, ...]
    target: str

    def __post_init__(self) -> None:
        if self.feature_dim < 1 or any(width < 1 for width in self.hidden):
            raise UserError(f"layer widths must be >= 1, are {self.feature_dim} and hidden {list(self.hidden)}")
        if self.target not in ("log_density", "density"):
            raise UserError(f"estimator target is {self.target!r}; it must be 'log_density' or 'density'")


@dataclass(frozen=True)
class Prediction:
    """Predicted pseudo densities of N rows: float64 [N] each, finite, density = exp(log_density)."""

    density: NDArray[np.float64]
    log_density: NDArray[np.float64]


@dataclass(eq=False)
class DensityPredictor:
    """f: F(x) -> pseudo density. Call it on a tensor for the differentiable log density, `predict` for numbers.

    The standardisation of features and target is part of the model: feature_mean and feature_std are [D], target_mean
    and target_std are scalars, (0, 1) where nothing is standardised. Weights are frozen outside `fit`.
    """

    architecture: Architecture
    layers: torch.nn.Sequential
    feature_mean: torch.Tensor
    feature_std: torch.Tensor
    target_mean: torch.Tensor
    target_std: torch.Tensor

    def standardized_score(self, features: torch.Tensor) -> torch.Tensor:
        """The network's output [N] for features [N, D], in units of the standardised target."""
        if features.ndim != 2 or features.shape[1] != self.architecture.feature_dim:
            raise ValueError(f"features must be [N, {self.architecture.feature_dim}], are {list(features.shape)}")
        features = features.to(self.feature_mean.dtype)
        out: torch.Tensor = self.layers((features - self.feature_mean) / self.feature_std)
        return out.squeeze(1)

    def score(self, features: torch.Tensor) -> torch.Tensor:
        """The target itself, [N] for features [N, D]: log rho or rho, whichever the network was trained on.

        Where `forward` is held at the smallest density its gradient is zero; this one is not held and keeps its slope,
        and it rises and falls with the density: the one to climb with a predictor of the plain density.
        """
        return self.standardized_score(features) * self.target_std + self.target_mean

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Log pseudo density [N] of features [N, D] (any float type, the predictor's device); differentiable."""
        return self._log_density(self.score(features))

    __call__ = forward

    def predict(self, features: NDArray[Any] | torch.Tensor) -> Prediction:
        """Predicted densities of features [N, D], array or tensor, without a gradient; runs on the predictor's device."""
        import torch

        rows = len(features)
        log_density = np.empty(rows, dtype=np.float64)
        with torch.inference_mode():
            for start in range(0, rows, _PREDICT_ROWS):
                block = features[start : start + _PREDICT_ROWS]
                # torch.tensor copies, so read-only arrays (Arrow's) are fine.
                tensor = block if isinstance(block, torch.Tensor) else torch.tensor(block)
                score = self.score(tensor.to(self.feature_mean.device)).double()
                log_density[start : start + len(block)] = self._log_density(score).cpu().numpy()
        return Prediction(density_of(log_density), log_density)

    def rescaled(self, shift: float) -> DensityPredictor:
        """This predictor, changed in place, of log densities that are greater by `shift`: of the same d̄ under another c."""
        if self.architecture.target == "log_density":
            self.target_mean += shift
        else:
            self.target_mean *= math.exp(shift)
            self.target_std *= math.exp(shift)
        return self

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> DensityPredictor:
        """Moves the predictor in place, as torch.nn.Module.to does, and returns it."""
        self.layers.to(device=device, dtype=dtype)
        for name in ("feature_mean", "feature_std", "target_mean", "target_std"):
            setattr(self, name, getattr(self, name).to(device=device, dtype=dtype))
        return self

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Weights and statistics by name; the tensors are the predictor's own, not copies."""
        state = {f"layers.{name}": tensor for name, tensor in self.layers.state_dict().items()}
        for name in ("feature_mean", "feature_std", "target_mean", "target_std"):
            state[name] = getattr(self, name)
        return state

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Copies weights and statistics from `state`. Raises ValueError if names or shapes are not this predictor's."""
        import torch

        own = self.state_dict()
        found, expected = ({name: tuple(t.shape) for name, t in tensors.items()} for tensors in (state, own))
        wrong = {name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)}
        if wrong:
            listed = ", ".join(f"{n} is {found.get(n)}, not {expected.get(n)}" for n in sorted(wrong))
            raise ValueError(f"the predictor's tensors have other names or shapes: {listed}")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])

    def _log_density(self, score: torch.Tensor) -> torch.Tensor:
        return score if self.architecture.target == "log_density" else score.clamp(_SMALLEST_PREDICTED_DENSITY).log()


def new_predictor(architecture: Architecture, seed: int = 0) -> DensityPredictor:
    """A predictor with torch's usual initial weights, drawn from `seed` (the global generator is left alone)."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    widths = [architecture.feature_dim, *architecture.hidden, 1]
    layers: list[torch.nn.Module] = []
    for n_in, n_out in pairwise(widths):
        linear = torch.nn.utils.skip_init(torch.nn.Linear, n_in, n_out)
        for parameter in (linear.weight, linear.bias):  # what torch.nn.Linear.reset_parameters does
            torch.nn.init.uniform_(parameter, -1 / math.sqrt(n_in), 1 / math.sqrt(n_in), generator=generator)
        layers += [linear, torch.nn.ReLU()]
    network = torch.nn.Sequential(*layers[:-1]).requires_grad_(False)
    mean, std = torch.zeros(architecture.feature_dim), torch.ones(architecture.feature_dim)
    return DensityPredictor(architecture, network, mean, std, torch.zeros(()), torch.ones(()))


# --- calibration -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Calibration:
    """Predicted against true log densities of n rows. None where a figure is undefined (constant values, < 2 rows)."""

    n: int
    r2_log_density: float | None
    r2_density: float | None
    spearman: float | None
    low_decile_spearman: float | None
    low_decile_mean_abs_log_error: float
    high_decile_spearman: float | None
    high_decile_mean_abs_log_error: float


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


# --- fitting -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EpochLoss:
    """Losses of one epoch (from 1): mean squared error in units of the standardised target.

    train_loss is the mean over all training rows while the weights move, heldout_loss is taken at the epoch's end.
    """

    epoch: int
    train_loss: float
    heldout_loss: float


@dataclass(frozen=True)
class FitMetrics:
    """Held-out calibration and the course of the fit. best_epoch is the one whose weights were kept."""

    heldout: Calibration
    n_train: int
    n_heldout: int
    best_epoch: int
    losses: tuple[EpochLoss, ...]


@dataclass(frozen=True)
class FitResult:
    """The predictor (on the CPU), its metrics, and up to CALIBRATION_ROWS held-out rows: float64 [M] each."""

    predictor: DensityPredictor
    metrics: FitMetrics
    heldout_log_density: NDArray[np.float64]
    heldout_predicted_log_density: NDArray[np.float64]


def fit(
    parts: Sequence[LoadPart],
    settings: EstimatorSettings,
    *,
    feature_dim: int,
    on_epoch: Callable[[EpochLoss], None] | None = None,
    window_rows: int = WINDOW_ROWS,
    device: str | None = None,
) -> FitResult:
    """Fits the density predictor to rows that are loaded part by part.

    Memory: `window_rows` training rows, at most HELDOUT_ROWS held-out rows and one part. If all training rows fit in one
    window, parts are loaded once, else once to take statistics and once per epoch; the order of parts, and of rows
    within a window, is drawn from (seed, epoch). Held-out losses and metrics are those of the held-out rows in memory,
    a fixed uniform draw if there are more. With patience the weights of the best held-out loss are kept, without it the
    last ones. On the CPU the result depends on parts, settings (threads included) and window_rows alone, to the bit.

    parts: see LoadPart. settings: the validated class or any object with its attributes. device: a torch device; None
    takes the GPU that this process was given, else the CPU. Raises UserError for bad layers or too few rows, ValueError for a malformed part, RunError (a RuntimeError) with
    the epoch if a loss is not finite.
    """
    import torch

    predictor = new_predictor(Architecture(feature_dim, tuple(settings.hidden), settings.target), settings.seed)
    data = _scan(parts, settings, feature_dim, window_rows)
    if settings.standardize:
        predictor.feature_mean.copy_(torch.from_numpy(data.statistics.mean[:-1]))
        predictor.feature_std.copy_(torch.from_numpy(_input_scale(data.statistics.std()[:-1])))
        predictor.target_mean.fill_(data.statistics.mean[-1])
        predictor.target_std.fill_(data.statistics.std()[-1])
    predictor.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with _threads(settings.threads):
        losses, best_epoch = _train(predictor, data, settings, on_epoch)
        predicted = predictor.predict(data.heldout.features).log_density
    true = data.heldout.log_density
    metrics = FitMetrics(calibration(true, predicted), data.statistics.count, data.n_heldout, best_epoch, tuple(losses))
    return FitResult(predictor.to("cpu"), metrics, true[:CALIBRATION_ROWS], predicted[:CALIBRATION_ROWS])


def _input_scale(std: NDArray[np.float64]) -> NDArray[np.float64]:
    """Divisors of the inputs: their standard deviations, held above a hundredth of the root mean square of all.

    Backbones have units that are all but dead: divided by their own deviation, a held-out row that wakes one lies
    thousands of deviations out and its prediction with it (docs/log.md has the figures).
    """
    return np.maximum(std, INPUT_SCALE_FLOOR * np.sqrt(np.mean(std**2)))


def _train(
    predictor: DensityPredictor,
    data: _Data,
    settings: EstimatorSettings,
    on_epoch: Callable[[EpochLoss], None] | None,
) -> tuple[list[EpochLoss], int]:
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
        if on_epoch is not None:
            on_epoch(loss)
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

    device = predictor.feature_mean.device
    total = torch.zeros((), dtype=torch.float64, device=device)
    for window in data.windows(rng):
        features, target = (tensor.to(device) for tensor in _tensors(predictor, window))
        for rows in torch.from_numpy(rng.permutation(len(target))).to(device).split(batch_size):
            loss = torch.nn.functional.mse_loss(predictor.standardized_score(features[rows]), target[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(rows)
    return float(total) / data.statistics.count


def _heldout_loss(predictor: DensityPredictor, heldout: _Rows) -> float:
    import torch

    device = predictor.feature_mean.device
    features, target = _tensors(predictor, heldout)
    total = 0.0
    with torch.inference_mode():
        for x, y in zip(features.split(_PREDICT_ROWS), target.split(_PREDICT_ROWS), strict=True):
            total += float((predictor.standardized_score(x.to(device)) - y.to(device)).double().square().sum())
    return total / len(target)


def _tensors(predictor: DensityPredictor, rows: _Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 features [n, D] and standardised target [n], on the CPU."""
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


# --- streamed data -----------------------------------------------------------------------------------------------------


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

    "hash" depends on the row's id alone: a row stays on its side in every run, also as the data grows. "random" is drawn
    from (seed, part).
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


# --- files -------------------------------------------------------------------------------------------------------------


def to_bytes(predictor: DensityPredictor, metrics: FitMetrics) -> dict[str, bytes]:
    """The predictor's two files by name: safetensors with weights and statistics, JSON that describes them."""
    architecture = predictor.architecture
    description = {
        "format_version": FORMAT_VERSION,
        "architecture": asdict(architecture),
        "layer_widths": [architecture.feature_dim, *architecture.hidden, 1],
        "tensors": {name: list(tensor.shape) for name, tensor in predictor.state_dict().items()},
        "metrics": asdict(metrics),
    }
    text = json.dumps(description, indent=2, sort_keys=True, allow_nan=False)
    return {WEIGHTS_FILE: weights_bytes(predictor), DESCRIPTION_FILE: text.encode() + b"\n"}


def weights_bytes(predictor: DensityPredictor) -> bytes:
    """The safetensors file of weights and statistics."""
    from safetensors.torch import save

    return bytes(save({name: tensor.detach().cpu().contiguous() for name, tensor in predictor.state_dict().items()}))


@dataclass(frozen=True)
class _Description:
    """What predictor.json says; the numbers of the fit are for people."""

    format_version: int
    architecture: Architecture
    layer_widths: tuple[int, ...]
    tensors: dict[str, tuple[int, ...]]
    metrics: dict[str, Any]

    def __post_init__(self) -> None:
        own = self.architecture
        if self.layer_widths != (own.feature_dim, *own.hidden, 1) or self.tensors != _shapes(own):
            raise ValueError("the widths of its layers contradict each other")


def _shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of `DensityPredictor.state_dict`, by name; nothing is made."""
    widths = [architecture.feature_dim, *architecture.hidden, 1]
    shapes: dict[str, tuple[int, ...]] = {}
    for number, (n_in, n_out) in enumerate(pairwise(widths)):  # each with a ReLU after it
        shapes |= {f"layers.{2 * number}.weight": (n_out, n_in), f"layers.{2 * number}.bias": (n_out,)}
    d = (architecture.feature_dim,)
    return shapes | {"feature_mean": d, "feature_std": d, "target_mean": (), "target_std": ()}


def from_bytes(files: Mapping[str, bytes]) -> DensityPredictor:
    """The predictor, on the CPU, from the files of `to_bytes`. Raises UserError if they are missing or do not fit.

    Nothing is made before the widths are known to be those of the tensors, which are in the file.
    """
    import safetensors

    for name in (WEIGHTS_FILE, DESCRIPTION_FILE):
        if name not in files:
            raise UserError(f"density predictor: {name} is missing; run the estimator stage again")
    architecture = _described(files[DESCRIPTION_FILE])
    try:
        tensors = _checked_tensors(files[WEIGHTS_FILE], architecture)
    except (ValueError, TypeError, safetensors.SafetensorError) as error:
        raise UserError(
            f"density predictor: the files do not fit together ({one_line(error)}); make them again"
        ) from error
    predictor = new_predictor(architecture)
    predictor.load_state_dict(tensors)
    return predictor


def _described(text: bytes) -> Architecture:
    where = f"density predictor: {DESCRIPTION_FILE}"
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is no JSON ({one_line(error)}); run the estimator stage again") from None
    version = values.get("format_version") if isinstance(values, dict) else None
    if isinstance(version, int) and version != FORMAT_VERSION:
        raise UserError(f"density predictor: format version {version}, this release reads {FORMAT_VERSION}")
    return trust.checked(_Description, values, where).architecture


def _checked_tensors(data: bytes, architecture: Architecture) -> dict[str, torch.Tensor]:
    """Raises ValueError: they are not those of the architecture, or hold what no fit has left."""
    import torch
    from safetensors.torch import load as load_tensors

    tensors = load_tensors(data)
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != _shapes(architecture):
        raise ValueError(f"the tensors are of other layers than {DESCRIPTION_FILE} says")
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 or not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} holds something else than finite numbers of float32")
        if name.endswith("_std") and not bool((tensor > 0).all()):
            raise ValueError(f"{name} is not above 0")
    return tensors


def load(path: str | Path) -> DensityPredictor:
    """The predictor from its two files in a local directory. Needs neither Ray nor a network."""
    directory = Path(path)
    files = {name: directory / name for name in (WEIGHTS_FILE, DESCRIPTION_FILE)}
    return from_bytes({name: file.read_bytes() for name, file in files.items() if file.is_file()})
