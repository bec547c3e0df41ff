"""Build the sharded index on Ray: train, spread the rows over shards by cell, measure recall, commit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pd_core.core import artifacts, files, schemas, seeds
from pd_core.core.errors import RunError, UserError
from pd_core.core.settings.index import DensitySettings, IndexSettings
from pd_core.engine import console, resources, tasks
from pd_core.index import knn, recall, search
from pd_core.index import shards as index_shards
from pd_core.index.base import Update
from pd_core.index.features import load_features

FLAT_ROWS = 20_000  # below, exact search costs seconds and a quantizer is not worth training
FEWEST_SHARDS_AT_ONCE = 4  # whose rows are in the object store together; beyond its memory Ray spills to disk
MOST_SHARDS_AT_ONCE = 64
MOST_PIECES = 100_000
STORE_SHARE = 0.5  # of the object store that those rows may take
GROUP_ROWS = 65_536  # rows that one task of this stage reads
MOST_SMALL_SHARDS = 8  # that updates may leave beside those of the usual size; each is read and searched by itself


def resolve_kind(settings: IndexSettings, exact: bool, rows: int) -> str:
    """The kind of index to build; `auto` for few rows, and exact densities, need no cells."""
    if settings.kind == "auto":
        return "flat" if exact or rows <= FLAT_ROWS else "ivf_flat"
    return settings.kind


def keeps_shards(update: Update) -> bool:
    """Whether the shards of the base's flat index may be kept beside those of the new rows.

    They may not where there are many small ones, after many updates, or one that might be left without rows.
    """
    before = update.base.artifacts["index"]
    dim = before.totals["dim"]
    usual = index_shards.default_shards(before.rows + update.added_rows, dim)
    few = len(before.parts) + _shards_of_added(update, dim) <= MOST_SMALL_SHARDS + 2 * usual
    return few and len(update.removed) < min(part.rows for part in before.parts)


def _shards_of_added(update: Update, dim: int) -> int:
    rows = update.added_rows
    return min(index_shards.default_shards(rows, dim), len(update.added_parts)) if rows else 0


def rows_when_trained(before: artifacts.Artifact) -> int:
    """Rows of the index that the quantizer of an index was trained for."""
    return int(before.identity.get("rows_when_trained", before.totals["rows"]))


def resolve(
    settings: IndexSettings, exact: bool, rows: int, dim: int, parts: int, update: Update | None = None
) -> IndexSettings:
    """The settings with kind, shards and cells as the index of so many features [rows, dim] has them.

    Raises:
        UserError: the kind does not fit the features.
    """
    before = {} if update is None else update.base.artifacts["index"].totals
    kind = before.get("kind") or resolve_kind(settings, exact, rows)
    if kind == "ivf_pq" and dim % settings.pq_bytes:
        raise UserError(
            f"--index.pq_bytes {settings.pq_bytes}: must divide the feature dimension {dim}; "
            f"try {index_shards.nearest_divisor(dim, settings.pq_bytes)}"
        )
    most_cells = max(1, rows // index_shards.ROWS_PER_CELL)
    cells = 0 if kind == "flat" else min(settings.cells or index_shards.default_cells(rows), most_cells)
    cells = before.get("cells", cells)
    shards = min(settings.shards or index_shards.default_shards(rows, dim), max(1, cells or parts))
    if update is not None and kind == "flat":
        shards = len(update.base.artifacts["index"].parts) + _shards_of_added(update, dim)
    return settings.model_copy(update={"kind": kind, "shards": shards, "cells": cells or None})


def stage_of(
    output: str,
    features: artifacts.Artifact,
    settings: IndexSettings,
    density: DensitySettings,
    update: Update | None = None,
) -> tuple[artifacts.Stage, IndexSettings]:
    """The index stage under `output`, and the settings with kind, shards and cells resolved.

    update: whose base's index is taken over, see `run`.

    Raises:
        UserError: k is not below the number of images, or the kind does not fit the features.
    """
    rows, dim = features.rows, features.totals["dim"]
    if density.k >= rows:
        raise UserError(
            f"--density.k {density.k}: needs more than k images, found {rows} good ones; lower k or add images"
        )
    parts = sum(part.rows > 0 for part in features.parts)
    resolved = resolve(settings, density.exact, rows, dim, parts, update)
    identity: dict[str, Any] = {
        "features": features.fingerprint,
        "kind": resolved.kind,
        "shards": resolved.shards,
        "faiss": index_shards.faiss_version(),
    }
    if resolved.kind != "flat":
        identity |= {
            "cells": resolved.cells,
            "target_recall": settings.target_recall,
            "max_scan_fraction": settings.max_scan_fraction,
            "train_rows_per_cell": settings.train_rows_per_cell,
            "calibration_queries": settings.calibration_queries,
            "auto": settings.kind == "auto",
            "k": density.k,
            "seed": settings.seed,
            "threads": settings.actor_cpus,  # k-means sums per thread
        }
    if resolved.kind == "ivf_pq":
        identity["pq_bytes"] = settings.pq_bytes
    if update is not None and resolved.kind != "flat":
        identity["rows_when_trained"] = rows_when_trained(update.base.artifacts["index"])
    stage = artifacts.Stage(files.join(output, "index"), "index", schemas.VERSIONS["index"], identity)
    return stage if update is None else update.base.continued(stage), resolved


def run(
    stage: artifacts.Stage,
    features_uri: str,
    features: artifacts.Artifact,
    settings: IndexSettings,
    density: DensitySettings,
    update: Update | None = None,
) -> tuple[list[artifacts.Part], dict[str, Any]]:
    """Build what is missing of the index; returns the parts and totals to commit.

    Args:
        stage: from `stage_of`, begun.
        features_uri: directory of the features.
        features: their commit record.
        settings: from `stage_of`, resolved.
        density: k.
        update: whose base's index is taken over: of a flat one the shards, less the rows that are gone; of one with
            cells the quantizer and the number of probed cells. Then `recall` may fall short of the target, for the
            caller to judge.

    Raises:
        UserError: the target recall is out of reach.
    """
    rows, dim = features.rows, features.totals["dim"]
    facts: dict[str, Any] = {"kind": settings.kind, "rows": rows, "dim": dim, "shards": settings.shards, "nprobe": 0}
    if settings.kind == "flat":
        uris = [files.join(features_uri, part.name) for part in features.parts if part.rows]
        _fill_flat(stage, uris if update is None else update.added_parts, settings, update)
        return _all_parts(stage, rows), facts
    groups = list(_groups(features_uri, features))
    assert settings.cells is not None and settings.shards is not None
    if update is not None and search.QUANTIZER not in stage.finished_parts():
        before = update.base.artifacts["index"]
        stage.adopt(update.base.folder("index"), next(p for p in before.parts if p.name == search.QUANTIZER))
    template = _train(stage, groups, settings, rows)
    owners = _fill_cells(stage, groups, template, settings, rows * dim * 4 // settings.shards)
    info = search.IndexInfo(
        stage.uri,
        stage.fingerprint,
        str(settings.kind),
        rows,
        dim,
        settings.shards,
        settings.cells,
        tuple(owners.tolist()),
    )
    nprobe = None if update is None else update.base.artifacts["index"].totals["nprobe"]
    facts |= {"cells": settings.cells, **_calibrate(stage, info, groups, settings, density.k, nprobe)}
    return _all_parts(stage, rows), facts


def _all_parts(stage: artifacts.Stage, rows: int) -> list[artifacts.Part]:
    parts = list(stage.finished_parts().values())
    if (found := sum(part.rows for part in parts)) != rows:
        raise RunError(f"{stage.uri}: the shards hold {found} of {rows} rows; run the same command again")
    return parts


def _groups(uri: str, features: artifacts.Artifact) -> Iterator[list[str]]:
    """Feature parts, as URIs, in runs of about GROUP_ROWS rows."""
    group: list[str] = []
    rows = 0
    for part in features.parts:
        if part.rows == 0:
            continue
        group.append(files.join(uri, part.name))
        rows += part.rows
        if rows >= GROUP_ROWS:
            yield group
            group, rows = [], 0
    if group:
        yield group


def load_group(group: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """sample_id int64 [n] and features float32 [n, D] of some parts."""
    loaded = [load_features(uri) for uri in group]
    return (
        np.concatenate([table["sample_id"].to_numpy() for table, _ in loaded]),
        np.concatenate([features for _, features in loaded]),
    )


# ---- fill ------------------------------------------------------------------------------------------------------------


def _fill_flat(stage: artifacts.Stage, uris: Sequence[str], settings: IndexSettings, update: Update | None) -> None:
    """Shards of a flat index are runs of whole parts. In an update they follow the base's, less what is gone."""
    import ray

    assert settings.shards is not None
    kept = () if update is None else update.base.artifacts["index"].parts
    names = [*(part.name for part in kept), *map(search.shard_name, range(len(kept), settings.shards))]
    removed = None if update is None else ray.put(update.removed)
    take, build = tasks.task(_take_shard), tasks.task(_build_flat)
    shards = max(1, settings.shards - len(kept))  # never more than parts, so that none is empty
    runs = np.array_split(np.array(uris, object), shards)

    def submit(missing: Sequence[str]) -> Any:
        shard = names.index(missing[0])
        if update is not None and shard < len(kept):
            return take.remote(stage, update.base.folder("index"), kept[shard], removed)
        return build.remote(stage, names[shard], runs[shard - len(kept)].tolist())

    tasks.make_missing(stage, [[name] for name in names], submit, unit="shards")


def _build_flat(stage: artifacts.Stage, name: str, group: Sequence[str]) -> None:
    sample_id, features = load_group(group)
    _write_shard(stage, name, index_shards.train_template("flat", features.shape[1]), features, sample_id)


def _write_shard(
    stage: artifacts.Stage,
    name: str,
    template: bytes,
    features: np.ndarray,
    sample_id: np.ndarray,
    cells: np.ndarray | None = None,
) -> None:
    stage.write_part(name, index_shards.build_shard(template, features, sample_id, cells), len(sample_id))


def _take_shard(stage: artifacts.Stage, uri: str, part: artifacts.Part, removed: np.ndarray) -> None:
    if len(removed):
        rows = index_shards.open_rows([files.read_bytes(files.join(uri, part.name))])
        stays = np.flatnonzero(~np.isin(rows.ids, removed))
        if len(stays) < len(rows.ids):
            features = np.ascontiguousarray(rows.at(stays))
            template = index_shards.train_template("flat", rows.dim)
            _write_shard(stage, part.name, template, features, rows.ids[stays])
            return
    stage.adopt(uri, part)


def _train(stage: artifacts.Stage, groups: Sequence[Sequence[str]], settings: IndexSettings, rows: int) -> Any:
    """Reference to the trained, empty index that every shard starts from; committed as QUANTIZER."""
    import ray

    if search.QUANTIZER in stage.finished_parts():
        return ray.put(files.read_bytes(files.join(stage.uri, search.QUANTIZER)))
    assert settings.cells is not None
    wanted = settings.cells * settings.train_rows_per_cell
    sample = tasks.task(_sample)
    picked = [sample.remote(group, settings.seed, min(1.0, wanted / rows)) for group in groups]
    console.say(f"index: training {settings.cells} cells on about {min(wanted, rows)} of {rows} rows")
    gpu = index_shards.HAS_GPUS and ray.cluster_resources().get("GPU", 0.0) >= 1
    cpus = 1 if gpu else resources.feasible_cpus(settings.actor_cpus)
    train = tasks.task(_train_template, cpus, int(gpu))
    return train.remote(stage, settings, *picked)


def _sample(group: Sequence[str], seed: int, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    sample_id, features = load_group(group)
    chosen = seeds.uniform(sample_id, seed) < fraction
    return sample_id[chosen], features[chosen]


def _train_template(stage: artifacts.Stage, settings: IndexSettings, *picked: tuple[np.ndarray, np.ndarray]) -> bytes:
    sample = np.concatenate([features for _, features in picked])
    assert settings.cells is not None and settings.kind != "auto"
    on_gpu = resources.assigned_device() == "cuda"
    centroids = index_shards.train_quantizer(sample, settings.cells, settings.seed, settings.actor_cpus, gpu=on_gpu)
    template = index_shards.train_template(
        settings.kind,
        sample.shape[1],
        centroids,
        sample,
        pq_bytes=settings.pq_bytes,
        seed=settings.seed,
        threads=settings.actor_cpus,
    )
    stage.write_part(search.QUANTIZER, template, 0)
    return template


def _fill_cells(
    stage: artifacts.Stage, groups: Sequence[Sequence[str]], template: Any, settings: IndexSettings, shard_bytes: int
) -> np.ndarray:
    """Count rows per cell, deal the cells to shards, send every row to its shard; returns the shard of each cell."""
    import ray

    done = stage.finished_parts()
    names = [search.CELLS, *(search.shard_name(s) for s in range(settings.shards or 0))]
    if all(name in done for name in names):
        return np.array(search.read_cells(stage.uri).shard_of_cell, dtype=np.int32)
    assert settings.shards is not None and settings.cells is not None
    assign = tasks.task(_assign, num_returns=2)
    with console.progress("index: cells", len(groups), "groups") as bar:
        cells: list[Any] = [None] * len(groups)
        counts = np.zeros(settings.cells, dtype=np.int64)
        refs = {g: assign.remote(template, group) for g, group in enumerate(groups)}
        for g, (numbers, count) in refs.items():
            cells[g] = numbers
            counts += tasks.get(count)
            bar.update(1)
    owners = tasks.get(tasks.task(_deal_cells).remote(template, counts, settings.shards))
    table = {"shard_of_cell": owners.tolist(), "rows_of_cell": counts.tolist()}
    if search.CELLS not in done:
        stage.write_part(search.CELLS, artifacts.canonical(table).encode(), 0)
    wanted = [s for s in range(settings.shards) if search.shard_name(s) not in done]
    build, shared = tasks.task(_build_shard), ray.put(owners)
    # each round reads all features once, so few rounds are best
    together = fit_shards(ray.cluster_resources().get("object_store_memory", 0.0), shard_bytes, len(groups))
    with console.progress("index", settings.shards, "shards", settings.shards - len(wanted)) as bar:
        for first in range(0, len(wanted), together):
            some = wanted[first : first + together]
            deal = tasks.task(_deal, num_returns=len(some))
            dealt = [deal.remote(group, numbers, shared, some) for group, numbers in zip(groups, cells, strict=True)]
            pieces = zip(*([[d] for d in dealt] if len(some) == 1 else dealt), strict=True)
            submit = lambda shard: build.remote(stage, shard[0], template, *shard[1])  # noqa: E731
            for _ in tasks.bounded(submit, zip(some, pieces, strict=True), tasks.in_flight):
                bar.update(1)
    return owners


def fit_shards(store_bytes: float, shard_bytes: int, groups: int) -> int:
    """Shards whose rows are in an object store of so many bytes together, each in a piece of every group.

    The driver holds a reference for each piece, and Ray keeps small pieces themselves there.
    """
    fit = min(int(STORE_SHARE * store_bytes / max(shard_bytes, 1)), MOST_SHARDS_AT_ONCE, MOST_PIECES // groups)
    return max(FEWEST_SHARDS_AT_ONCE, fit)


def _centroids(template: bytes) -> np.ndarray:
    return index_shards.centroids_of(index_shards.deserialize(template))


def _deal_cells(template: bytes, counts: np.ndarray, shards: int) -> np.ndarray:
    return index_shards.assign_cells(_centroids(template), counts, shards)


def _assign(template: bytes, group: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    quantizer = index_shards.quantizer_of(_centroids(template))
    _, features = load_group(group)
    cells = index_shards.cell_of(quantizer, features)
    return cells, np.bincount(cells, minlength=quantizer.ntotal)


def _deal(group: Sequence[str], cells: np.ndarray, owners: np.ndarray, wanted: Sequence[int]) -> Any:
    sample_id, features = load_group(group)
    owner = owners[cells]
    pieces = [(sample_id[owner == s], features[owner == s], cells[owner == s]) for s in wanted]
    return pieces if len(wanted) > 1 else pieces[0]


def _build_shard(stage: artifacts.Stage, shard: int, template: bytes, *pieces: tuple[np.ndarray, ...]) -> None:
    sample_id, features, cells = (np.concatenate(columns) for columns in zip(*pieces, strict=True))
    _write_shard(stage, search.shard_name(shard), template, features, sample_id, cells)


# ---- calibrate -------------------------------------------------------------------------------------------------------


def _calibrate(
    stage: artifacts.Stage,
    info: search.IndexInfo,
    groups: Sequence[Sequence[str]],
    settings: IndexSettings,
    k: int,
    nprobe: int | None,
) -> dict[str, Any]:
    """Choose nprobe for the target recall by exact search on a sample, or take the given one; measure what it gives."""
    import ray

    if nprobe == 0:  # every search is exact
        return {"nprobe": 0}

    sample = tasks.task(_sample)
    fraction = min(1.0, settings.calibration_queries / info.rows)
    picked = tasks.get([sample.remote(group, settings.seed + 1, fraction) for group in groups])
    query_ids = np.concatenate([i for i, _ in picked])
    queries = ray.put(np.concatenate([f for _, f in picked]))
    exact = _exact(stage, queries, query_ids, groups, k)
    return tasks.get(tasks.task(_choose).remote(stage, info, settings, k, queries, query_ids, exact, nprobe))


def _choose(
    stage: artifacts.Stage,
    info: search.IndexInfo,
    settings: IndexSettings,
    k: int,
    queries: np.ndarray,
    query_ids: np.ndarray,
    exact: tuple[np.ndarray, np.ndarray, np.ndarray],
    given: int | None,
) -> dict[str, Any]:
    """A task, since the distance of every query to every cell is more than a driver should hold."""
    exact_distances, exact_ids, neighbor_cells = exact
    quantizer = search.read_quantizer(stage.uri)
    cells = quantizer.ntotal
    ranked = index_shards.coarse_probes(quantizer, queries, cells)
    counts = np.array(search.read_cells(stage.uri).rows_of_cell)
    curve = recall.recall_curve(recall.neighbor_ranks(neighbor_cells, ranked), cells)
    nprobe = given or recall.choose_nprobe(curve, settings.target_recall) or cells
    scanned = recall.scan_fraction(ranked[:, :nprobe], counts)
    facts: dict[str, Any] = {
        "nprobe": nprobe,
        "scan_fraction": scanned,
        "target_recall": settings.target_recall,
        "calibration_queries": len(queries),
    }
    if given is None and stage.identity["auto"] and recall.relative_cost(scanned, info.rows, cells) >= 1:
        return facts | {"nprobe": 0, "nprobe_at_target": nprobe}
    if given is None and scanned > settings.max_scan_fraction:
        raise UserError(
            f"index: recall {settings.target_recall} needs {nprobe} of {cells} cells per query ({scanned:.0%} of the "
            "rows); use --index.kind auto or flat, or lower --index.target_recall"
        )
    distances, found = _approximate(info, queries, query_ids, ranked[:, :nprobe], k)
    measured = recall.recall_and_error(exact_ids, exact_distances, found, distances)
    if given is None and measured.recall < settings.target_recall:
        raise UserError(
            f"index: {info.kind} reaches recall {measured.recall:.4f} at nprobe {nprobe}, below --index.target_recall "
            f"{settings.target_recall}, since its codes lose precision; use ivf_flat or lower the target"
        )
    return facts | {
        "recall": measured.recall,
        "recall_lower": measured.recall_lower,
        "mean_distance_relative_error": measured.mean_relative_error,
        "max_distance_relative_error": measured.max_relative_error,
    }


def _approximate(
    info: search.IndexInfo, queries: np.ndarray, query_ids: np.ndarray, probes: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """What a search of the probed cells finds, shard by shard in tasks: no search process has to start for it."""
    import ray

    shared = ray.put((queries, probes))
    probe = tasks.task(_probe_shard)
    best: tuple[np.ndarray, np.ndarray] | None = None
    for _, part in tasks.bounded(
        lambda s: probe.remote(info.uri, s, shared, k + 1), range(info.shards), tasks.in_flight
    ):
        best = part if best is None else knn.merge_topk([best, part], k + 1)
    assert best is not None
    return knn.merge_topk([best], k, query_ids)


def _probe_shard(uri: str, shard: int, shared: tuple[np.ndarray, np.ndarray], k: int) -> tuple[np.ndarray, np.ndarray]:
    queries, probes = shared
    data = files.read_bytes(files.join(uri, search.shard_name(shard)))
    return knn.ShardSearch.open([data], device="cpu").search_cells(queries, probes, k)


def _exact(
    stage: artifacts.Stage, queries: Any, query_ids: np.ndarray, groups: Sequence[Sequence[str]], k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Exact neighbors of the calibration queries over all rows, streamed: distances, ids, and the cells they lie in."""
    exact = tasks.task(_exact_in_group)
    best: tuple[np.ndarray, np.ndarray] | None = None
    cell_of_id: dict[int, int] = {}
    with console.progress("index: recall", len(groups), "groups") as bar:
        for _, (distances, found, cells) in tasks.bounded(
            lambda g: exact.remote(stage, k + 1, queries, g), groups, tasks.in_flight
        ):
            cell_of_id.update(zip(found.ravel().tolist(), cells.ravel().tolist(), strict=True))
            best = (distances, found) if best is None else knn.merge_topk([best, (distances, found)], k + 1)
            cell_of_id = {i: cell_of_id[i] for i in best[1].ravel().tolist()}  # only what is still among the nearest
            bar.update(1)
    assert best is not None
    distances, found = knn.merge_topk([best], k, query_ids)
    return distances, found, np.vectorize(cell_of_id.__getitem__, otypes=[np.int32])(found)


def _exact_in_group(
    stage: artifacts.Stage, k: int, queries: np.ndarray, group: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    sample_id, features = load_group(group)
    distances, found = knn.exact_search(queries, [(sample_id, features)], k, device="cpu")
    quantizer = search.read_quantizer(stage.uri)
    order = np.argsort(sample_id)
    at = order[np.searchsorted(sample_id, np.where(found < 0, sample_id[0], found), sorter=order)]
    rows, place = np.unique(at, return_inverse=True)  # most rows are nobody's neighbor
    return distances, found, index_shards.cell_of(quantizer, features[rows])[place.reshape(at.shape)]
