"""Peak memory of the driver, for few and for many rows: it holds metadata only, so it should not grow with N."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import datasets, joins, process, table
from pd_core.core import artifacts, files
from pd_core.core.settings.data import DataSettings
from pd_core.core.settings.index import DensitySettings, FeatureSettings, IndexSettings
from pd_core.density import densities as density_densities
from pd_core.engine import session, tasks
from pd_core.images import decode, listing, sources
from pd_core.index import build, extractor, features, neighbors, search

MODEL = "test_efficientnet"  # timm's model for tests, random weights: what it computes is not the question here
PX = 32
IMAGES = 100
VECTORS: dict[str, Any] = {"count": 50, "latent_dim": 8, "separation": 1.5, "dim": 64}
FLAT = 1.1

TEXT = f"""\
The driver runs the stages as the workflow does, everything else happens in Ray's processes. Two drivers per N, since
extracting good features of 300,000 images would take hours: one lists N files ({IMAGES} PNG files of 16 px, hard-linked
N times in folders of 1,000) and runs the features stage with a tiny model (timm's {MODEL}, {PX} px, default batches and
parts); the other takes N committed features (D = {VECTORS["dim"]}, clusters) through index (IVF, 4 shards), neighbors
and densities. Peak: high-water mark of resident memory up to the end of the stage, MiB; it includes what Python,
pyarrow and Ray take before the first row. Flat is taken to be a growth of at most {FLAT:g}; the increase is shown
beside it."""


def measure(quick: bool) -> table.Section:
    """Both drivers, for few and for many rows."""
    sizes = (2_000, 6_000) if quick else (10_000, 300_000)
    section = table.Section("Memory of the driver", TEXT)
    peaks: dict[int, dict[str, float]] = {}
    for rows in sizes:
        found: dict[str, dict[str, int]] = {
            "images": process.call("benchmarks.memory.images_driver", _images(rows)).value,
            "features": process.call("benchmarks.memory.vectors_driver", _vectors(rows)).value,
        }
        section.raw.append({"rows": rows, "peak_rss_bytes": found})
        peaks[rows] = {f"{driver}: {stage}": b / 2**20 for driver, s in found.items() for stage, b in s.items()}
        print(f"memory: {rows} rows: {peaks[rows]}", flush=True)
    few, many = sizes
    shown = table.Table(
        "Peak of the driver, MiB", ["driver: up to", *(f"N = {n:,}" for n in sizes), "increase", "growth"]
    )
    for name, low in peaks[few].items():
        high = peaks[many][name]
        shown.rows.append([name, low, high, high - low, high / low])
    for driver in ("images", "features"):
        low, high = (max(v for name, v in peaks[n].items() if name.startswith(f"{driver}:")) for n in sizes)
        section.claims.append(
            table.at_most(f"driver from {driver}: peak at {many:,} over {few:,} rows", high / low, FLAT)
        )
    section.tables.append(shown)
    return section


def _images(rows: int) -> dict[str, Any]:
    folder = process.WORK / f"files-{rows}"
    arguments = {"folder": str(folder), "rows": rows, "checkpoint": str(process.CACHE / f"{MODEL}.safetensors")}
    process.call("benchmarks.memory.make_images", arguments)
    return {
        "source": str(folder),
        "checkpoint": arguments["checkpoint"],
        "output": str(process.WORK / f"images-{rows}"),
    }


def _vectors(rows: int) -> dict[str, Any]:
    path, work = process.WORK / f"vectors-{rows}.npy", str(process.WORK / f"vectors-{rows}")
    process.call("benchmarks.datasets.save_clusters", {"path": str(path), "rows": rows, **VECTORS})
    process.call("benchmarks.memory.make_features", {"vectors": str(path), "work": work})
    return {"work": work}


# ---- inputs, made in processes of their own --------------------------------------------------------------------------


def make_images(folder: str, rows: int, checkpoint: str) -> None:
    """`rows` tiny PNG files, and random weights of the tiny model."""
    import numpy as np
    import timm
    import torch
    from PIL import Image
    from safetensors.torch import save

    originals = Path(f"{folder}-originals")
    originals.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        Image.fromarray(rng.integers(256, size=(16, 16, 3), dtype=np.uint8)).save(originals / f"{number}.png")
    datasets.repeat_files(sorted(originals.iterdir()), rows, Path(folder))
    torch.manual_seed(0)
    model = timm.create_model(MODEL, pretrained=False, num_classes=0)
    Path(checkpoint).parent.mkdir(parents=True, exist_ok=True)
    Path(checkpoint).write_bytes(save({name: t.contiguous() for name, t in model.state_dict().items()}))


def make_features(vectors: str, work: str) -> None:
    """Commit features/ of the given rows."""
    import numpy as np

    joins.write_features(np.load(vectors, mmap_mode="r"), work, "features")


# ---- the drivers -----------------------------------------------------------------------------------------------------


def images_driver(source: str, checkpoint: str, output: str) -> dict[str, int]:
    """Listing and features; peak memory after each, bytes."""
    data = DataSettings(source=source)
    settings = FeatureSettings(model=MODEL, checkpoint=checkpoint, actors=2)
    limits = decode.limits_of(data)
    peaks = {}
    with session.session(output) as now:
        peaks["Ray started"] = process.peak_rss_bytes()
        spec = tasks.get(extractor.describe_remotely(settings))
        spec = replace(spec, preprocess=replace(spec.preprocess, height=PX, width=PX))
        opened = sources.open_source(data)
        listed, _ = tasks.get(listing.start(opened, output, settings.whole_part_rows, overwrite=False))
        peaks["listing"] = process.peak_rss_bytes()
        stage = features.stage_of(output, listed, spec, data, settings, "cpu")
        work = features.Work(opened, listed, spec, limits, settings.batch_size, stage)
        done = stage.complete(lambda: features.run(work, now, settings, max_bad_fraction=0.0), overwrite=False)
        peaks["features"] = process.peak_rss_bytes()
    assert done.rows == listed.rows
    return peaks


def vectors_driver(work: str) -> dict[str, int]:
    """Index, neighbors and densities; peak memory after each, bytes."""
    uri = files.join(work, "features")
    featured = artifacts.load_artifact(uri)
    assert featured is not None
    settings, density_settings = IndexSettings(kind="ivf_flat", shards=4), DensitySettings()
    peaks = {}
    with session.session(work) as now:
        peaks["Ray started"] = process.peak_rss_bytes()
        index_stage, resolved = build.stage_of(work, featured, settings, density_settings)
        index_stage.complete(lambda: build.run(index_stage, uri, featured, resolved, density_settings), overwrite=False)
        peaks["index"] = process.peak_rss_bytes()
        info = search.open_index(index_stage.uri)
        near_stage = neighbors.neighbors_stage(work, info, density_settings)
        near = near_stage.complete(
            lambda: neighbors.find_neighbors(near_stage, info, uri, featured, density_settings, resolved, now),
            overwrite=False,
        )
        peaks["neighbors"] = process.peak_rss_bytes()
        densities = density_densities.stage_of(work, near_stage, density_settings)
        done = densities.complete(
            lambda: density_densities.write_densities(densities, near_stage.uri, near, uri, density_settings),
            overwrite=False,
        )
        peaks["densities"] = process.peak_rss_bytes()
    assert done.rows == featured.rows
    return peaks
