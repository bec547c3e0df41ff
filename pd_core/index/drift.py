"""Whether the index of a base still holds for an update: rows that changed, how far new ones lie off, and recall."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from pd_core.core import artifacts, files
from pd_core.core.settings.index import BuildIndexSettings
from pd_core.engine import tasks
from pd_core.index import build, search
from pd_core.index.base import Base, Update
from pd_core.index.features import load_features

SAMPLE_PARTS = 4  # of the base, that new rows are compared with


def reason_to_rebuild(update: Update, rows: int, settings: BuildIndexSettings) -> str | None:
    """Why the index of `rows` images has to be built anew, and every neighbor searched for; or None."""
    before, most = update.base.artifacts["index"], settings.update.max_growth
    if before.totals["kind"] == "flat":
        if build.resolve_kind(settings.index, settings.density.exact, rows) != "flat":
            return f"{rows:,} rows are enough for an index with cells, which the base has not"
        growth = update.moved / before.totals["rows"]
        return f"{growth:.0%} of the rows have changed, --update.max_growth is {most:g}" if growth > most else None
    growth = _changed(update) / build.rows_when_trained(before)
    if growth > most:
        return f"{growth:.0%} of the rows have changed since its quantizer was trained, --update.max_growth is {most:g}"
    if not update.added_rows:
        return None
    far = _measure(update.base.folder("index"), update.added_parts)
    allowed, trained = settings.update.max_cell_distance, _trained_distance(update.base)
    if trained > 0 and far > allowed * trained:
        return (
            f"the new rows' mean squared distance to their cells' centroids is {far / trained:.2f} times that of the "
            f"others, --update.max_cell_distance is {allowed:g}"
        )
    return None


def facts_of_quantizer(update: Update) -> dict[str, Any]:
    """What an index that keeps the base's quantizer remembers of it, for its totals."""
    return {"changed": _changed(update), "cell_distance": _trained_distance(update.base)}


def _changed(update: Update) -> int:
    """Rows that have come into the index or gone from it since its quantizer was trained."""
    return int(update.base.artifacts["index"].totals.get("changed", 0)) + update.moved


def _trained_distance(base: Base) -> float:
    """`_cell_distance` of a sample of the rows that the quantizer was trained on."""
    before = base.artifacts["index"]
    if before.totals.get("cell_distance") is not None:
        return float(before.totals["cell_distance"])
    parts = [part.name for part in base.artifacts["features"].parts if part.rows]
    chosen = parts[:: max(1, len(parts) // SAMPLE_PARTS)]
    uris = tuple(files.join(base.folder("features"), name) for name in chosen)
    return _measure_once(before.fingerprint, base.folder("index"), uris)


@functools.lru_cache(maxsize=1)  # asked for before the index is made, and again for what it remembers
def _measure_once(fingerprint: str, index_uri: str, uris: tuple[str, ...]) -> float:
    return _measure(index_uri, uris)


def _measure(index_uri: str, uris: Sequence[str]) -> float:
    distance: float = tasks.get(tasks.task(_cell_distance).remote(index_uri, uris))
    return distance


def _cell_distance(index_uri: str, uris: Sequence[str]) -> float:
    """Mean squared distance of the rows of some features parts to the centroid of their cell."""
    quantizer = search.read_quantizer(index_uri)
    total, rows = 0.0, 0
    for uri in uris:
        _, vectors = load_features(uri)
        distances, _ = quantizer.search(np.ascontiguousarray(vectors), 1)
        total, rows = total + float(distances.sum(dtype=np.float64)), rows + len(vectors)
    return total / max(1, rows)


def short_of_recall(indexed: artifacts.Artifact) -> str | None:
    """Why an index with the base's quantizer does not do, or None."""
    totals = indexed.totals
    if totals["nprobe"] and totals["recall"] < totals["target_recall"]:
        return (
            f"recall {totals['recall']:.4f} of the extended index is below --index.target_recall "
            f"{totals['target_recall']:g}"
        )
    return None
