"""Balanced half-samples: a metric's spread over halves of the rows tells its standard error, from one pass over pairs.

Rows fall into GROUPS groups by a hash of their id. A replicate is the metric of half of the groups of the real side and
half of those of the generated side. The spread of such delete-half estimates about their mean estimates the variance of
the metric on all rows, for statistics too that are not smooth (Shao & Wu, Annals of Statistics 17, 1989).

Which halves: not drawn but balanced (McCarthy, Review of the ISI 37, 1969). Row i of a 16 x 16 Hadamard matrix splits
the groups in two; each of the 15 splits is used with both of its halves on the real side times both on the generated
side, 60 replicates. For a statistic that is linear in the rows the spread over them is exactly the variance from the 16
group means, sides independent; as many random halves add their own noise of 1/sqrt(2 R), 9% of the standard error.

The same id is in the same group in every set, so that replicates of two sets that share rows, or a side, share that
half.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pd_core.core import seeds

GROUPS = 16
SPLITS = GROUPS - 1
REPLICATES = 4 * SPLITS
FULL = REPLICATES  # the bit after those of the replicates: all rows
Z_975 = 1.959963984540054  # normal quantile
T_975 = 2.131449545559323  # Student's t of SPLITS degrees of freedom
ROWS_FOR_INTERVALS = 64  # 4 rows per group; coverage by simulation: tests/evaluate/test_metrics.py

_PLUS = np.array([[(i & j).bit_count() % 2 == 0 for j in range(GROUPS)] for i in range(1, GROUPS)])
_SIGNS = [(split, real, generated) for split in range(SPLITS) for real in (True, False) for generated in (True, False)]
REAL_HALVES = np.array([_PLUS[split] == real for split, real, _ in _SIGNS])  # bool [REPLICATES, GROUPS]
GENERATED_HALVES = np.array([_PLUS[split] == generated for split, _, generated in _SIGNS])


@dataclass(frozen=True)
class Estimate:
    """A metric and its 95% confidence interval; None where there are too few rows to tell one."""

    value: float
    low: float | None
    high: float | None


def groups_of(row_ids: np.ndarray) -> np.ndarray:
    """Group of each row, uint8 [N] for ids int64 [N]: a function of the id alone."""
    return (seeds.uniform(row_ids, seeds.stream(0, "metrics/groups")) * GROUPS).astype(np.uint8)


def enough_rows(rows: int, k: int) -> bool:
    """Whether halves of a set of so many rows still have a k-th neighbor that means the same."""
    return rows >= max(ROWS_FOR_INTERVALS, 8 * k)


def presence(halves: np.ndarray) -> np.ndarray:
    """Bit r of uint64 [GROUPS]: the group is in replicate r of bool [REPLICATES, GROUPS]; bit FULL: always."""
    bits = np.full(GROUPS, 1 << FULL, np.uint64)
    for r, half in enumerate(halves):
        bits[half] |= np.uint64(1 << r)
    return bits


def count_bits(words: np.ndarray) -> np.ndarray:
    """How many of uint64 [n] have each bit set: int64 [FULL + 1]."""
    counts = np.zeros(64, np.int64)
    for start in range(0, len(words), 1 << 15):
        octets = np.ascontiguousarray(words[start : start + (1 << 15)], "<u8").view(np.uint8).reshape(-1, 8)
        counts += np.unpackbits(octets, axis=1, bitorder="little").sum(0, dtype=np.int64)
    return counts[: FULL + 1]


def standard_error(replicates: np.ndarray) -> float:
    """Of the metric on all rows, from float64 [REPLICATES]: their root mean squared distance from their mean."""
    return float(np.std(replicates))


def estimate(value: float, replicates: np.ndarray, lowest: float = -math.inf, highest: float = math.inf) -> Estimate:
    """value ± t·standard error within the range of the metric; no interval where there are no replicates."""
    if len(replicates) == 0:
        return Estimate(value, None, None)
    reach = T_975 * standard_error(replicates)
    return Estimate(value, max(lowest, value - reach), min(highest, value + reach))


def share_estimate(value: float, replicates: np.ndarray, rows: int) -> Estimate:
    """The same for a share of `rows` rows, at least as wide as Wilson's score interval (JASA 22, 1927) of that many.

    Where all or none of them are counted no replicate differs, and their spread alone would leave no doubt.
    """
    spread = estimate(value, replicates, 0.0, 1.0)
    if spread.low is None or spread.high is None:
        return spread
    z2 = Z_975**2
    middle = (value + z2 / (2 * rows)) / (1 + z2 / rows)
    reach = Z_975 * math.sqrt(value * (1 - value) / rows + z2 / (4 * rows * rows)) / (1 + z2 / rows)
    return Estimate(value, max(0.0, min(spread.low, middle - reach)), min(1.0, max(spread.high, middle + reach)))
