"""What the report keeps of all samples: one pass over their light columns, whose memory does not grow with n."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pd_core.core import artifacts, files, seeds
from pd_core.density.realset import RealSet
from pd_core.generate.sampling import DENSITY_BINS, binned

SAMPLE_ROWS = 1_000_000  # accepted rows that the shown ones are chosen from
CALIBRATION_ROWS = 20_000  # accepted rows that the predictor is held against the index on
PAIRS_SHOWN = 12
LIGHT = ["sample_id", "density", "density_predicted", "density_index", "percentile", "acceptance_probability"]
LIGHT += ["label", "prompt", "nearest_real_id", "nearest_real_distance", "likely_copy"]


@dataclass(frozen=True)
class Count:
    """Accepted images of one label or prompt, and their mean ρ."""

    name: str
    rows: int
    mean_density: float


@dataclass
class Tally:
    """What one pass keeps: sums, and tables whose size does not grow with n.

    Attributes:
        bins: accepted in each density bin. index_bins: by their index-scored densities.
        rows: part, row, density of a sample of the accepted. nearest: those nearest to real images.
        scored: (index-scored, predicted) densities of a sample of the accepted.
        tallies: rows and summed density by name, for label and prompt.
    """

    bins: np.ndarray
    index_bins: np.ndarray
    rows: pa.Table
    nearest: pa.Table
    scored: list[np.ndarray]
    inverse_sum: float = 0.0
    inverse_square_sum: float = 0.0
    tallies: dict[str, dict[str, tuple[int, float]]] = field(default_factory=lambda: {"label": {}, "prompt": {}})

    @property
    def both(self) -> tuple[np.ndarray, np.ndarray]:
        """Index-scored and predicted densities, float64 [M] each."""
        true, predicted = np.concatenate(self.scored, axis=1)
        return true, predicted

    def counts(self, what: str) -> list[Count]:
        """Rows and mean density by label or prompt."""
        return [Count(name, rows, total / rows) for name, (rows, total) in self.tallies[what].items()]

    def tally(self, what: str, table: pa.Table) -> None:
        """Add a part's labels or prompts."""
        own = self.tallies[what]
        for group in table.group_by(what).aggregate([("density", "count"), ("density", "sum")]).to_pylist():
            if (name := group[what]) is not None:
                rows, total = own.get(name, (0, 0.0))
                own[name] = rows + group["density_count"], total + group["density_sum"]


def tallied(samples: str, sampled: artifacts.Artifact, real: RealSet, score: str) -> Tally:
    """One pass over the light columns of the samples stage at a URI, holding one part at a time."""
    zeros = np.zeros(DENSITY_BINS, np.int64)
    chosen: list[pa.Table] = []
    seen = Tally(zeros.copy(), zeros.copy(), pa.table({}), pa.table({}), [])
    for part in sampled.parts:
        if not part.rows:
            continue
        table = files.read_table(files.join(samples, part.name), LIGHT)
        place = {"part": pa.array([part.name] * table.num_rows), "row": pa.array(np.arange(table.num_rows))}
        table = pa.table({name: table[name] for name in table.column_names} | place)
        seen.bins += binned(table["percentile"].to_numpy())
        if score == "both":
            true, predicted = (table[name].to_numpy() for name in ("density_index", "density_predicted"))
            seen.index_bins += binned(real.percentile(true))
            seen.scored.append(np.stack([true, predicted])[:, _drawn(table, CALIBRATION_ROWS / sampled.rows)])
        inverse = 1.0 / table["acceptance_probability"].to_numpy()
        seen.inverse_sum += float(inverse.sum())
        seen.inverse_square_sum += float((inverse**2).sum())
        seen.nearest = _nearest(seen.nearest, table)
        keep = _drawn(table, SAMPLE_ROWS / sampled.rows)
        chosen.append(table.select(["part", "row", "sample_id", "density"]).filter(pa.array(keep)))
        seen.tally("label", table)
        seen.tally("prompt", table)
    seen.rows = pa.concat_tables(chosen)
    return seen


def _drawn(table: pa.Table, fraction: float) -> np.ndarray:
    return seeds.uniform(table["sample_id"].to_numpy(), seeds.stream(0, "report")) < fraction


def _nearest(best: pa.Table, table: pa.Table) -> pa.Table:
    """The rows nearest to a real image, nearest first; a flagged one is at most as far as any that is not."""
    columns = ["part", "row", "sample_id", "nearest_real_id", "nearest_real_distance", "likely_copy"]
    both = table.select(columns) if best.num_rows == 0 else pa.concat_tables([best, table.select(columns)])
    order = [("nearest_real_distance", "ascending"), ("sample_id", "ascending")]
    return both.take(pc.select_k_unstable(both, k=min(PAIRS_SHOWN, both.num_rows), sort_keys=order))
