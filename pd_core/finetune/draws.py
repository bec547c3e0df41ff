"""Which image is draw p of a run: a function of the weights, the seed and p alone, found without walking the draws
before it.

The draws are epochs of E each, E the number of images. In epoch e the parts of the weights table are permuted and their
weights laid end to end, W in all; draw j is the image whose stretch holds (j + u) W / E, with one u ~ U[0, 1) for the
epoch: systematic resampling (Kitagawa 1996, "Monte Carlo filter and smoother for non-Gaussian nonlinear state space
models", appendix). Image i is then drawn E ω_i / W times on average, exactly, and in each epoch that number rounded
down or up. The parts are cut into windows of about WINDOW_ROWS images, whose draws are shuffled among themselves: what
is read at a time is a window's.

Which draws belong to a part follows from the sums of the parts, which draws to an image from the weights of its part.
Both levels ask the same question of the same floating-point number: how many draws lie below a cumulative weight
(`_below`). A part's last cumulative weight is the next one's first, to the bit, so every draw has one image.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pd_core.core import seeds

WINDOW_ROWS = 16_384
EPOCHS_KEPT = 2  # of those that were looked at last; a run goes on from one to the next
WINDOWS_KEPT = 4

WeightsOf = Callable[[int], np.ndarray]


def permutation(n: int, seed: int) -> np.ndarray:
    """A permutation of 0 ... n - 1, int64 [n]: the order of n hashes, the same with every version of numpy."""
    return np.argsort(seeds.integers(np.arange(n), seed), kind="stable")


@dataclass(frozen=True)
class Window:
    """Consecutive draws of a run, all of the images of a few parts.

    Attributes:
        first: position of its first draw in the run. draws: how many it has, at least 1.
        parts: their numbers, in the order of the epoch.
        borders: int64 [parts + 1], draws of the window, before they are shuffled, that lie before each part.
        before: float64 [parts], weight of the epoch's images before each part.
        order: int64 [draws], the draw before shuffling that each place has.
        epoch: what `_below` needs of it.
    """

    first: int
    draws: int
    parts: tuple[int, ...]
    borders: np.ndarray
    before: np.ndarray
    order: np.ndarray
    epoch: _Epoch

    @property
    def stop(self) -> int:
        """Position after its last draw."""
        return self.first + self.draws

    def locate(self, positions: np.ndarray, weights_of: WeightsOf) -> tuple[np.ndarray, np.ndarray]:
        """Part and row within the part's weights of draws at these positions, all in the window; int64 [n] both.

        weights_of: ω of a part's rows, float64, in their order; asked only for parts that have a draw here.
        """
        unshuffled = self.order[positions - self.first]
        places = np.searchsorted(self.borders, unshuffled, side="right") - 1
        part, row = np.array(self.parts, dtype=np.int64)[places], np.empty(len(positions), dtype=np.int64)
        start = self.first - self.epoch.number * self.epoch.size  # draws of the epoch before the window
        for place in np.unique(places):
            here = places == place
            cumulative = self.before[place] + np.cumsum(weights_of(self.parts[place]))
            ends = self.epoch.below(cumulative)  # draws of the epoch before the end of each row
            assert ends[-1] - start == self.borders[place + 1], (
                "these are not the weights that the parts' sums were made of"
            )
            row[here] = np.searchsorted(ends, start + unshuffled[here], side="right")
        return part, row


@dataclass(frozen=True)
class _Epoch:
    """One epoch: its parts in their order, and where its draws and windows begin.

    Attributes:
        number: e. size: E. offset: u. weight: W.
        parts: int64 [P], permuted. before: float64 [P], weight before each.
        draws: int64 [P + 1], draws before each part, and all of them.
        windows: int64 [windows + 1], place in `parts` where each begins, and P.
    """

    number: int
    size: int
    offset: float
    weight: float
    parts: np.ndarray
    before: np.ndarray
    draws: np.ndarray
    windows: np.ndarray

    def below(self, cumulative: np.ndarray) -> np.ndarray:
        """Draws of the epoch that lie below cumulative weights, ascending float64 [n]: int64 [n], ascending."""
        return _below(cumulative, self.weight, self.size, self.offset)


def _below(cumulative: np.ndarray, weight: float, size: int, offset: float) -> np.ndarray:
    """How many of the points (j + u) W / E, j = 0 ... E - 1, are below each cumulative weight, int64.

    Ascending in its argument also as computed: division, product, difference and ceiling are, each with its rounding.
    """
    found = np.ceil(cumulative / weight * size - offset)
    return np.where(cumulative >= weight, size, np.clip(found, 0, size)).astype(np.int64)


class Draws:
    """All draws of a run.

    Args:
        part_weights: sum of the weights of each part, by its number, not all 0: the last of their cumulative sum, to
            the bit.
        rows: images of each part, those of weight 0 too; E is their sum.
        seed: of the run.
    """

    def __init__(self, part_weights: Sequence[float], rows: Sequence[int], seed: int) -> None:
        self.part_weights, self.rows = np.asarray(part_weights, dtype=np.float64), np.asarray(rows, dtype=np.int64)
        assert self.part_weights.shape == self.rows.shape, (self.part_weights.shape, self.rows.shape)
        assert np.isfinite(self.part_weights.sum()) and (self.part_weights >= 0).all() and self.part_weights.any()
        self.seed, self.size = seed, int(self.rows.sum())
        self._epoch = functools.lru_cache(maxsize=EPOCHS_KEPT)(self._make_epoch)
        self._window = functools.lru_cache(maxsize=WINDOWS_KEPT)(self._make_window)

    def _make_epoch(self, number: int) -> _Epoch:
        parts = permutation(len(self.rows), seeds.stream(self.seed, f"finetune/parts/{number}"))
        ends = np.cumsum(self.part_weights[parts])
        offset = float(seeds.uniform(np.array([number]), seeds.stream(self.seed, "finetune/offset"))[0])
        draws = np.concatenate([[0], _below(ends, ends[-1], self.size, offset)])
        rows_before = np.cumsum(self.rows[parts]) - self.rows[parts]
        _, windows = np.unique(rows_before // WINDOW_ROWS, return_index=True)
        return _Epoch(
            number=number,
            size=self.size,
            offset=offset,
            weight=float(ends[-1]),
            parts=parts,
            before=np.concatenate([[0.0], ends[:-1]]),
            draws=draws,
            windows=np.append(windows, len(parts)),
        )

    def _make_window(self, epoch_number: int, number: int) -> Window:
        epoch = self._epoch(epoch_number)
        start, stop = epoch.windows[number : number + 2]
        borders = epoch.draws[start : stop + 1] - epoch.draws[start]
        many = int(borders[-1])
        return Window(
            first=epoch_number * self.size + int(epoch.draws[start]),
            draws=many,
            parts=tuple(epoch.parts[start:stop].tolist()),
            borders=borders,
            before=epoch.before[start:stop],
            order=permutation(many, seeds.stream(self.seed, f"finetune/shuffle/{epoch_number}/{number}")),
            epoch=epoch,
        )

    def window_of(self, position: int) -> Window:
        """The window that has the draw at a position. Time and memory: of the parts' sums and of the window's draws.

        A window has at most WINDOW_ROWS images and one part more, and on average as many draws; where its images weigh
        more than others, as many times that.
        """
        epoch_number, draw = divmod(position, self.size)
        epoch = self._epoch(epoch_number)
        ends = epoch.draws[epoch.windows[1:]]
        return self._window(epoch_number, int(np.searchsorted(ends, draw, side="right")))

    def windows(self, positions: np.ndarray) -> Iterator[tuple[Window, np.ndarray]]:
        """The windows of draws at ascending positions, int64 [n], each with the positions that it has."""
        while len(positions):
            window = self.window_of(int(positions[0]))
            inside = positions[: np.searchsorted(positions, window.stop)]
            yield window, inside
            positions = positions[len(inside) :]

    def mirrored(self, positions: np.ndarray) -> np.ndarray:
        """Which draws show their image mirrored, half of them, bool [n]."""
        return seeds.uniform(positions, seeds.stream(self.seed, "finetune/mirror")) < 0.5
