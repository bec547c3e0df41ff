"""What the density predictor is made of: its layers and what they give, known without torch."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from pd_core.core.errors import UserError

PREDICT_ROWS = 65_536  # rows that a predictor takes at once


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

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of the input and of every layer."""
        return (self.feature_dim, *self.hidden, 1)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor of the predictor's state, by name; nothing is made."""
        d = (self.feature_dim,)
        shapes: dict[str, tuple[int, ...]] = {"feature_mean": d, "feature_std": d, "target_mean": (), "target_std": ()}
        for number, (n_in, n_out) in enumerate(pairwise(self.widths)):  # each with a ReLU after it
            shapes |= {f"layers.{2 * number}.weight": (n_out, n_in), f"layers.{2 * number}.bias": (n_out,)}
        return shapes
