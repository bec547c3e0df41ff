"""An index that is updated with 1% of new images, against one that is built anew."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import datasets, process, table

SHARE = 0.01
FILE_ROWS = 5000
CHECKED = 300  # rows compared with brute force
TARGET = 10.0

TEXT = f"""\
N different pictures of 64 px (crops of emoji, digits and photographs, benchmarks/datasets.py) as PNG in Parquet files;
EfficientNet-lite0 at 64 px, exact index, k = 20, all defaults. Anew: `build_index.py` on N images, from Ray's start to
the report. Update: the same command with `--base` after a file with {SHARE:.0%} of N more was put beside the others.
The whole build would have had those too: the ratio is a little too low. Check: neighbors and distances of {CHECKED}
rows after the update, half of them new, are those of brute force over the features of all."""


def measure(quick: bool) -> table.Section:
    """One build, one update."""
    section = table.Section("Update of an index", TEXT)
    rows = 3000 if quick else 100_000
    source, work = process.WORK / "images", process.WORK
    images = None if quick else str(datasets.emoji())
    values = {"images": images, "checkpoint": str(datasets.checkpoint()), "source": str(source), "work": str(work)}
    process.call("benchmarks.update.write", {**values, "rows": rows, "first": 0})
    anew = process.call("benchmarks.update.build", {**values, "output": "anew", "base": None}).value
    print(f"update: anew: {anew}", flush=True)
    process.call("benchmarks.update.write", {**values, "rows": int(rows * SHARE), "first": rows})
    updated = process.call("benchmarks.update.build", {**values, "output": "updated", "base": "anew"}).value
    print(f"update: update: {updated}", flush=True)
    wrong = process.call("benchmarks.update.compare", {**values, "output": "updated", "known": rows}).value
    shown = table.Table("Seconds", ["stage", f"anew, {rows:,} images", f"update, {int(rows * SHARE):,} more"])
    stages = [*anew["stages"], *(name for name in updated["stages"] if name not in anew["stages"])]
    for name in stages:
        shown.rows.append([name, anew["stages"].get(name), updated["stages"].get(name)])
    shown.rows.append(["all, Ray's start included", anew["seconds"], updated["seconds"]])
    section.tables.append(shown)
    section.claims += [
        table.at_least("anew over update: seconds", anew["seconds"] / updated["seconds"], TARGET),
        table.at_most(f"of {CHECKED} rows, those whose neighbors or distances differ from brute force", wrong, 0),
    ]
    section.raw += [{"anew": anew, "updated": updated, "rows": rows, "wrong": wrong}]
    return section


def write(images: str | None, checkpoint: str, source: str, work: str, rows: int, first: int) -> None:
    """Parquet files of PNGs; the same picture for the same number, whatever was written before."""
    del checkpoint, work
    Path(source).mkdir(parents=True, exist_ok=True)
    for start in range(first, first + rows, FILE_ROWS):
        count = min(FILE_ROWS, first + rows - start)
        pictures = [_png(view) for view in datasets.pictures(images, count, seed=start)]
        keys = [f"{number:08d}" for number in range(start, start + count)]
        pq.write_table(pa.table({"key": keys, "image": pictures}), f"{source}/{start:08d}.parquet", row_group_size=500)


def _png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG", compress_level=1)
    return sink.getvalue()


def build(images: str | None, checkpoint: str, source: str, work: str, output: str, base: str | None) -> dict[str, Any]:
    """Seconds of build_index, and of each of its stages."""
    from pd_core.core import artifacts
    from workflows import build_index

    start = time.perf_counter()
    build_index.main(
        [
            *(
                "--data.source",
                source,
                "--data.key_column",
                "key",
                "--output",
                f"{work}/{output}",
                "--no-tracking.enabled",
            ),
            *(
                "--features.model",
                "tf_efficientnet_lite0",
                "--features.checkpoint",
                checkpoint,
                "--features.image_size",
                "64",
            ),
            *("--index.kind", "flat"),
            *(("--base", f"{work}/{base}") if base else ()),
        ]
    )
    seconds = time.perf_counter() - start
    stages: dict[str, float] = {}
    for name in ("listing", "added/features", "features", "index", "neighbors", "densities", "estimator", "report"):
        artifact = artifacts.load_artifact(f"{work}/{output}/{name}")
        if artifact is not None:
            stages[name] = sum(artifact.timings_s.values())
    return {"seconds": seconds, "stages": stages}


def compare(images: str | None, checkpoint: str, source: str, work: str, output: str, known: int) -> int:
    """Rows of a sample whose neighbors are not those of brute force."""
    from pd_core.core import artifacts, files
    from pd_core.index import knn
    from pd_core.index.features import load_features

    folder = f"{work}/{output}"
    artifact = artifacts.load_artifact(f"{folder}/features")
    assert artifact is not None
    loaded = [load_features(f"{folder}/features/{part.name}") for part in artifact.parts]
    sample_id = np.concatenate([t["sample_id"].to_numpy() for t, _ in loaded])
    keys = np.concatenate([t["key"].to_numpy(zero_copy_only=False) for t, _ in loaded]).astype(np.int64)
    vectors = np.concatenate([f for _, f in loaded])
    found = pa.concat_tables([files.read_table(f"{folder}/neighbors/{part.name}") for part in artifact.parts])
    assert np.array_equal(found["sample_id"].to_numpy(), sample_id)
    rng = np.random.default_rng(0)
    half = CHECKED // 2
    chosen = np.concatenate(
        [rng.choice(np.flatnonzero(keys < known), half), rng.choice(np.flatnonzero(keys >= known), half)]
    )
    k = len(found["neighbor_ids"][0])
    distances, neighbors = knn.exact_search(vectors[chosen], [(sample_id, vectors)], k + 1, device="cpu")
    distances, neighbors = knn.merge_topk([(distances, neighbors)], k, sample_id[chosen])
    ours = found.take(pa.array(chosen))
    same = (np.stack(ours["neighbor_ids"].to_numpy()) == neighbors).all(1)
    same &= (np.stack(ours["neighbor_distances"].to_numpy()) == distances).all(1)
    return int((~same).sum())
