"""The inputs of the benchmarks: real images, synthetic clusters, and features of many views of real images."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.process import CACHE

EMOJI = "emoji-datasource-google@16.0.0"  # an npm package of images and JSON; no code of it is run
EMOJI_FOLDER = "package/img/google/64/"
MODEL = "tf_efficientnet_lite0"
DIM = 384


class MissingInputError(Exception):
    """An input cannot be had here; the message says why and what to do."""


# ---- images ----------------------------------------------------------------------------------------------------------


def emoji() -> Path:
    """Folder of 3,786 colour PNG files with alpha, 64 px, from the npm registry.

    Raises:
        MissingInputError: npm is not installed or cannot fetch the package.
    """
    folder = CACHE / "emoji"
    if folder.exists():
        return folder
    npm = shutil.which("npm")
    if npm is None:
        raise MissingInputError(f"npm is not installed, and the images come out of its package {EMOJI}; install npm")
    CACHE.mkdir(parents=True, exist_ok=True)
    packed = subprocess.run(
        [npm, "pack", EMOJI, "--ignore-scripts", "--json", "--pack-destination", str(CACHE)],
        capture_output=True,
        text=True,
    )
    if packed.returncode:
        raise MissingInputError(f"npm pack {EMOJI} failed: {' '.join(packed.stderr.split())[-300:]}")
    archive = CACHE / json.loads(packed.stdout)[0]["filename"]
    partial = CACHE / "emoji.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile() and member.name.startswith(EMOJI_FOLDER) and member.name.endswith(".png"):
                content = tar.extractfile(member)
                assert content is not None
                (partial / Path(member.name).name).write_bytes(content.read())
    archive.unlink()
    partial.rename(folder)
    return folder


def checkpoint() -> Path:
    """EfficientNet-lite0 with ImageNet weights, as the demo writes it."""
    from demo import make_digits

    return make_digits.write_checkpoint(CACHE / make_digits.CHECKPOINT_NAME)


def repeat_files(files: Sequence[Path], rows: int, folder: Path, per_folder: int = 1000) -> Path:
    """`rows` directory entries under `folder`, hard links to `files` in turn, so that they take no space."""
    for row in range(rows):
        target = folder / f"{row // per_folder:04d}" / f"{row:07d}{files[0].suffix}"
        if row % per_folder == 0:
            target.parent.mkdir(parents=True, exist_ok=True)
        os.link(files[row % len(files)], target)
    return folder


# ---- vectors ---------------------------------------------------------------------------------------------------------


def clusters(
    rows: int,
    count: int,
    latent_dim: int,
    separation: float,
    shared: bool = False,
    dim: int = DIM,
    noise: float = 0.05,
    seed: int = 0,
) -> np.ndarray:
    """A mixture of Gaussians on affine subspaces, plus isotropic noise: float32 [rows, dim].

    x = m_j + B_j z + noise·e with j uniform, z and e standard normal, B_j orthonormal [dim, latent_dim]. Each cluster
    has a subspace of its own and E‖m_j‖² = separation²·latent_dim over all dim directions; or all share one subspace,
    B_j = B, and their centres lie in it. Rows are independent, so any slice is a sample of the same mixture.

    Args:
        rows: N.
        count: of clusters.
        latent_dim: of the subspaces.
        separation: distance of two centres over that of two points of one cluster (root mean square).
        shared: one subspace for all.
        dim: D.
        noise: standard deviation in each of the D directions; 1 within the subspace.
        seed: of everything.
    """
    rng = np.random.default_rng(seed)
    basis = _orthonormal(rng, dim, latent_dim)
    if shared:
        centers = rng.standard_normal((count, latent_dim)) @ basis.T * separation
    else:
        centers = rng.standard_normal((count, dim)) * separation * np.sqrt(latent_dim / dim)
    x = np.empty((rows, dim), np.float32)
    members = rng.integers(count, size=rows)
    order = np.argsort(members, kind="stable")
    bounds = np.searchsorted(members[order], np.arange(count + 1))
    for j in range(count):
        own = order[bounds[j] : bounds[j + 1]]
        if not shared:
            basis = _orthonormal(rng, dim, latent_dim)
        z = rng.standard_normal((len(own), latent_dim))
        x[own] = centers[j] + z @ basis.T + noise * rng.standard_normal((len(own), dim))
    return x


def _orthonormal(rng: np.random.Generator, dim: int, columns: int) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((dim, columns)))[0]


def save_clusters(path: str, **parameters: Any) -> None:
    """`clusters` into a .npy file, whole or not at all."""
    partial = Path(f"{path}.partial.npy")
    partial.parent.mkdir(parents=True, exist_ok=True)
    np.save(partial, clusters(**parameters))
    partial.rename(path)


VIEW_PX = 64
VIEW_BATCH = 128


def save_views(path: str, images: str | None, checkpoint: str, rows: int, seconds: float, threads: int) -> int:
    """Features of random crops and flips of real images, D = 384 by PCA, into a .npy file; returns how many.

    Half of the views are crops of the emoji, a quarter each of scikit-learn's digits and of its two photographs (each
    crop is square, 40% to 100% of the image's side for emoji and digits, 32 to 256 px in the photographs; half of them
    mirrored), all resized to 64 px. The order is random. Without the emoji, photographs and digits share their part.

    Args:
        path: of the .npy file, float32 [n, 384].
        images: folder of the emoji, or None.
        checkpoint: weights.
        rows: n, unless time runs out.
        seconds: after these no further batch is made.
        threads: of torch.
    """
    import torch

    torch.set_num_threads(threads)
    extract = _extractor(checkpoint, threads)
    found: list[np.ndarray] = []
    start = time.perf_counter()
    for batch in _views(images, rows):
        found.append(extract(batch))
        if time.perf_counter() - start > seconds:
            break
    features = np.concatenate(found)
    partial = Path(f"{path}.partial.npy")
    partial.parent.mkdir(parents=True, exist_ok=True)
    np.save(partial, _principal(features, DIM))
    partial.rename(path)
    return len(features)


def _extractor(checkpoint: str, threads: int) -> Any:
    from dataclasses import replace

    from pd_core.core.settings.index import FeatureSettings
    from pd_core.index import extractor

    spec = extractor.describe(FeatureSettings(model=MODEL, checkpoint=checkpoint))
    spec = replace(spec, preprocess=replace(spec.preprocess, height=VIEW_PX, width=VIEW_PX))
    return extractor.Extractor(spec, threads=threads).extract


def pictures(images: str | None, rows: int, seed: int) -> Iterator[np.ndarray]:
    """The same views one by one, uint8 [64, 64, 3]."""
    for batch in _views(images, rows, seed):
        yield from batch


def _views(images: str | None, rows: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Batches uint8 [b, 64, 64, 3]."""
    from PIL import Image
    from sklearn.datasets import load_digits, load_sample_images

    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    digits = [
        Image.fromarray(np.rint(d * 255 / 16).astype(np.uint8))
        .convert("RGB")
        .resize((64, 64), Image.Resampling.BICUBIC)
        for d in load_digits().images
    ]
    pools = [photographs, digits]
    if images is not None:
        emojis = [_over_white(path) for path in sorted(Path(images).glob("*.png"))]
        pools += [emojis, emojis]
    rng = np.random.default_rng(seed)
    for start in range(0, rows, VIEW_BATCH):
        yield np.stack([_view(pools, rng) for _ in range(min(VIEW_BATCH, rows - start))])


def _over_white(path: Path) -> Any:
    from PIL import Image

    with Image.open(path) as image:
        rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _view(pools: Sequence[Sequence[Any]], rng: np.random.Generator) -> np.ndarray:
    from PIL import Image

    pool = pools[int(rng.integers(len(pools)))]
    image = pool[int(rng.integers(len(pool)))]
    short = min(image.size)
    side = rng.integers(32, 257) if short > 256 else rng.integers(round(0.4 * short), short + 1)
    left, top = rng.integers(image.width - side + 1), rng.integers(image.height - side + 1)
    view = image.resize((VIEW_PX, VIEW_PX), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    pixels = np.asarray(view)
    return pixels[:, ::-1] if rng.random() < 0.5 else pixels


def _principal(features: np.ndarray, dim: int) -> np.ndarray:
    """Scores on the first `dim` principal components: float32 [n, dim]."""
    mean = features.mean(0, dtype=np.float64)
    centered = features - mean.astype(np.float32)
    covariance = sum(
        (c.astype(np.float64).T @ c for c in np.array_split(centered, max(1, len(centered) // 8192))), np.zeros(())
    )
    _, vectors = np.linalg.eigh(covariance)  # ascending
    return centered @ vectors[:, ::-1][:, :dim].astype(np.float32)
