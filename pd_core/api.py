"""The library: an index that build_index made, opened in this process to score other images; and the papers' numbers.

Nothing of Ray is imported or started. An image that is a file of the index's source gets what the tables of the
workflow say of it, to the bit where torch, Pillow and the kind of processor are those of the run: the model sees
batches of the recorded size on the recorded number of threads, and an image whose bytes are in the index is no neighbor
of itself. torch's own settings are as they were when a call returns.
"""

from __future__ import annotations

import io
import itertools
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import ArrayLike
from PIL import Image
from tqdm import tqdm

from pd_core.core import artifacts, files
from pd_core.core.errors import RunError as RunError
from pd_core.core.errors import UserError as UserError
from pd_core.density import formula, realset
from pd_core.density.scorer import Scorer
from pd_core.engine import resources
from pd_core.evaluate import metrics
from pd_core.images import child
from pd_core.images.decode import BadImage, DecodeLimits, Reason
from pd_core.images.resize import Prepared
from pd_core.index import extractor, knn, search
from pd_core.index import features as index_features
from pd_core.index.shards import flat_rows

BLOCK_IMAGES = 4096  # whose features are held and searched together
PROGRESS_AFTER_S = 3.0  # work that is done before shows no bar
_PNG_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "I;16"})  # that a PNG holds as they are
_PIXELS = "give a path, the bytes of a file, a PIL image, or uint8 pixels [H, W], [H, W, 3] or [H, W, 4]"

_WHY = [pa.field("reason", pa.string()), pa.field("detail", pa.string())]
SCORED = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("density", pa.float64()),
        pa.field("log_density", pa.float64()),
        pa.field("percentile", pa.float64()),
        pa.field("nearest_key", pa.string()),
        pa.field("nearest_distance", pa.float32()),
        *_WHY,
    ]
)
NEIGHBORS = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("neighbor_keys", pa.list_(pa.string())),
        pa.field("neighbor_distances", pa.list_(pa.float32())),
        *_WHY,
    ]
)


# ---- an index --------------------------------------------------------------------------------------------------------


def open(uri: str | os.PathLike[str], checkpoint: str | None = None, device: str | None = None) -> Index:  # noqa: A001
    """Open what build_index wrote, with the extractor and the density predictor.

    Args:
        uri: its --output, a local path or s3://.
        checkpoint: of the extractor's weights; None: where the index says that they lie.
        device: cpu or cuda; None: the one that the index was made on, or cpu where there is no GPU.

    Raises:
        UserError: no finished index is there, its weights cannot be had or are others, or another version of the
            extractor's library is installed.
        RunError: a store or hub does not answer now.
    """
    try:
        real = realset.open_for(os.fspath(uri), checkpoint, "index")
        return Index(real, device)
    except UserError as error:
        text = str(error).replace("--features.checkpoint ", "checkpoint ").replace("--features.model ", "model ")
        raise UserError(text.replace("--checkpoint", "checkpoint =")) from None


class Index:
    """A finished index of real images: their densities, and those of any other image beside them.

    Images are paths (local or s3://), bytes of files, PIL images, or uint8 pixels; one, or any number of them. The rows
    of a result are in their order, under the path as it was given, or else the image's place, from 0. An image that
    cannot be used has a row with the `reason` (one of those of quarantine/) and a `detail`, nulls otherwise; `strict`
    raises instead.
    """

    def __init__(self, real: realset.RealSet, device: str | None = None) -> None:
        import torch

        self._real = real
        record = files.join(real.uri, "features", files.ARTIFACT)
        self._made = index_features.recorded(self._artifact("features"), record)
        has_gpu = torch.cuda.is_available()
        chosen = device or (self._made.device if has_gpu else "cpu")
        if torch.device(chosen).type not in (("cpu", "cuda") if has_gpu else ("cpu",)):
            raise UserError(f"device = {chosen!r}: torch has no such device here; choose cpu, or leave it out")
        with extractor.as_in_the_stage(self._made.threads, chosen):
            self._scorer = Scorer(real.extractor, real.predictor(), chosen, self._made.threads)

    def __repr__(self) -> str:
        return f"<pd_core.Index {self.uri}: {self.rows:,} images, k = {self.k}, {self._real.extractor.model}>"

    @property
    def uri(self) -> str:
        """Where it lies."""
        return self._real.uri

    @property
    def rows(self) -> int:
        """N, real images."""
        return self._real.rows

    @property
    def k(self) -> int:
        """Neighbors of a density."""
        return self._real.k

    def threshold(self, text: str | float) -> float:
        """A density from "p80", a percentile of the real images, or from a density itself.

        Raises:
            UserError: it is neither, or lies outside the real densities.
        """
        return formula.threshold_inside(text, self._real.density_quantiles, "threshold", self.uri)

    def features(self, images: Any, strict: bool = True) -> np.ndarray:
        """float32 [N, D] of N images.

        strict: raise where an image cannot be used; else its row is NaN.
        """
        blocks = list(self._blocks(images, strict))
        out = np.full((sum(len(b.keys) for b in blocks), self._real.extractor.feature_dim), np.nan, np.float32)
        start = 0
        for block in blocks:
            out[start + block.good] = block.features
            start += len(block.keys)
        return out

    def score(self, images: Any, by: Literal["index", "predictor"] = "index", strict: bool = False) -> pa.Table:
        """Pseudo density of each image and the real image nearest to it: SCORED, one row per image.

        Args:
            images: see the class.
            by: index: from the distances to the k nearest real images, as densities/ has it; predictor: by the network
                that was trained on these.
            strict: raise where an image cannot be used.
        """
        if by not in ("index", "predictor"):
            raise UserError(f"by = {by!r}: choose index or predictor")
        return _table(SCORED, (self._scored(block, by) for block in self._blocks(images, strict)))

    def neighbors(self, images: Any, k: int = 5, strict: bool = False) -> pa.Table:
        """The k nearest real images of each image, nearest first, distances Euclidean: NEIGHBORS, one row per image."""
        if not 1 <= k < self.rows:
            raise UserError(f"k = {k}: the index has {self.rows} images; choose 1 to {self.rows - 1}")
        return _table(NEIGHBORS, (self._near(block, k) for block in self._blocks(images, strict)))

    def _scored(self, block: _Block, by: str) -> pa.Table:
        own = self._catalogue.own(block.hashes)
        distances, ids = self._open_index.search(block.features, self.k if by == "index" else 1, own)
        log_density = self._real.log_density(distances) if by == "index" else self._predicted(block.features)
        values = formula.density_of(log_density)
        percentile = self._real.percentile(values)
        inside = own != knn.MISSING_ID
        if by == "index" and inside.any():  # these have a rank
            percentile[inside] = formula.mid_ranks(log_density[inside], self._ranks)
        columns: dict[str, Any] = {
            "density": values,
            "log_density": log_density,
            "percentile": percentile,
            "nearest_key": self._catalogue.keys_of(ids[:, 0]),
            "nearest_distance": distances[:, 0],
        }
        return block.table(SCORED, columns)

    def _near(self, block: _Block, k: int) -> pa.Table:
        distances, ids = self._open_index.search(block.features, k, self._catalogue.own(block.hashes))
        keys = self._catalogue.keys_of(ids.ravel())
        rows = range(0, len(keys), k)
        columns = {"neighbor_keys": [keys[i : i + k] for i in rows], "neighbor_distances": list(distances)}
        return block.table(NEIGHBORS, columns)

    def _predicted(self, features: np.ndarray) -> np.ndarray:
        import torch

        with extractor.as_in_the_stage(self._made.threads, self._device):
            tensor = torch.from_numpy(features).to(self._scorer.extractor.device)
            return self._scorer.log_density(tensor).cpu().numpy()

    def _blocks(self, images: Any, strict: bool) -> Iterator[_Block]:
        """Features of the images, some thousands at a time."""
        if isinstance(images, str | bytes) or not isinstance(images, Iterable) or getattr(images, "ndim", 4) < 4:
            images = [images]  # one
        total = len(images) if isinstance(images, Sized) else None
        keys: deque[str] = deque()
        contents = _contents(images, keys, self._made.limits)
        decoded = child.prepared(contents, self._made.limits, self._real.extractor.preprocess)
        size = self._made.batch_size
        with tqdm(total=total, desc="images", unit=" images", delay=PROGRESS_AFTER_S) as bar:
            while batches := list(itertools.islice(_batches(decoded, size), max(1, BLOCK_IMAGES // size))):
                parts = []
                for batch in batches:
                    parts.append(self._extracted([keys.popleft() for _ in batch], batch, strict))
                    bar.update(len(batch))
                yield _Block.of(parts)

    def _extracted(self, keys: list[str], batch: list[Prepared | BadImage], strict: bool) -> _Block:
        bad = [one if isinstance(one, BadImage) else None for one in batch]
        good = [one for one in batch if isinstance(one, Prepared)]
        features = np.empty((0, self._real.extractor.feature_dim), np.float32)
        if good:
            with extractor.as_in_the_stage(self._made.threads, self._device):
                pixels = np.stack([one.pixels for one in good])
                features = self._scorer.extractor.extract_some(pixels, self._made.batch_size)
        finite = np.array([np.isfinite(row).all() for row in features], bool)
        for place in np.flatnonzero([one is None for one in bad])[~finite].tolist():
            bad[place] = index_features.not_finite(self._real.extractor)
        for key, one in zip(keys, bad, strict=True) if strict else ():
            if one is not None:
                raise UserError(f"{key}: {one}; leave it out, or set strict=False for a row that says so")
        hashes = [one.content_hash for one, usable in zip(good, finite, strict=True) if usable]
        return _Block(keys, features[finite], hashes, bad)

    @property
    def _device(self) -> str:
        return str(self._scorer.extractor.device)

    def _artifact(self, stage: str) -> artifacts.Artifact:
        with files.explained(self.uri):
            found = artifacts.load_artifact(files.join(self.uri, stage))
        assert found is not None, "open_realset has seen it"
        return found

    def _column_tables(self, stage: str, columns: list[str]) -> pa.Table:
        parts = [part for part in self._artifact(stage).parts if part.rows]
        with files.explained(self.uri), tqdm(parts, stage, unit=" parts", delay=PROGRESS_AFTER_S) as bar:
            return pa.concat_tables(files.read_table(files.join(self.uri, stage, p.name), columns) for p in bar)

    @cached_property
    def _open_index(self) -> search.OpenIndex:
        with files.explained(self.uri):
            return search.OpenIndex(self._real.index, resources.cores(), self._scorer.extractor.device.type)

    @cached_property
    def _catalogue(self) -> _Catalogue:
        return _Catalogue(self.uri, self._column_tables("features", ["sample_id", "key", "content_hash"]))

    @cached_property
    def _ranks(self) -> np.ndarray:
        """Log densities of all real images, ascending."""
        return np.sort(self._column_tables("densities", ["log_density"])["log_density"].to_numpy())


@dataclass(frozen=True)
class _Block:
    """Some images: keys and what is wrong with each, if anything; features and hashes of the bytes of the others."""

    keys: list[str]
    features: np.ndarray
    hashes: list[str]
    bad: list[BadImage | None]

    @classmethod
    def of(cls, parts: list[_Block]) -> _Block:
        """All of them as one."""
        chain = itertools.chain.from_iterable
        features = np.concatenate([part.features for part in parts])
        return cls(
            list(chain(p.keys for p in parts)),
            features,
            list(chain(p.hashes for p in parts)),
            list(chain(p.bad for p in parts)),
        )

    @property
    def good(self) -> np.ndarray:
        """Places of the images that have a feature."""
        return np.flatnonzero([one is None for one in self.bad])

    def table(self, schema: pa.Schema, columns: dict[str, Any]) -> pa.Table:
        """A row for every image: `columns` of those that have a feature, and why the others have none."""
        place = np.full(len(self.keys), -1)
        place[self.good] = np.arange(len(self.features))
        taken = pa.array(np.maximum(place, 0), mask=place < 0)
        arrays = {
            "key": pa.array(self.keys, pa.string()),
            "reason": pa.array([one and one.reason.value for one in self.bad], pa.string()),
            "detail": pa.array([one and one.detail for one in self.bad], pa.string()),
            **{name: pa.array(values, schema.field(name).type).take(taken) for name, values in columns.items()},
        }
        return pa.table([arrays[name] for name in schema.names], schema=schema)


class _Catalogue:
    """Keys and content hashes of the real images by sample_id."""

    def __init__(self, uri: str, table: pa.Table) -> None:
        self._uri, self._table = uri, table
        self._ids = table["sample_id"].to_numpy()
        self._order = np.argsort(self._ids)

    def own(self, hashes: list[str]) -> np.ndarray:
        """sample_id of the real image of each hash, the lowest of several; knn.MISSING_ID for none. int64 [m]."""
        known = self._table.filter(pc.is_in(self._table["content_hash"], value_set=pa.array(hashes, pa.string())))
        pairs = zip(known["content_hash"].to_pylist(), known["sample_id"].to_pylist(), strict=True)
        lowest = dict(sorted(pairs, reverse=True))
        return np.array([lowest.get(one, knn.MISSING_ID) for one in hashes], np.int64)

    def keys_of(self, ids: np.ndarray) -> list[str]:
        """Key of each sample_id. Raises UserError: the index has a row that the features have not."""
        places = np.searchsorted(self._ids, ids, sorter=self._order)
        rows = self._order[np.minimum(places, len(self._order) - 1)]
        if not np.array_equal(self._ids[rows], ids):
            raise UserError(
                f"index {self._uri}: index/ has rows that features/ has not; run build_index.py on it again"
            )
        keys: list[str] = self._table["key"].take(pa.array(rows)).to_pylist()
        return keys


def _table(schema: pa.Schema, blocks: Iterable[pa.Table]) -> pa.Table:
    return pa.concat_tables([schema.empty_table(), *blocks]).combine_chunks()


# ---- images as they are given ----------------------------------------------------------------------------------------


def _batches(decoded: Iterator[Prepared | BadImage], size: int) -> Iterator[list[Prepared | BadImage]]:
    while batch := list(itertools.islice(decoded, size)):
        yield batch


def _contents(images: Iterable[Any], keys: deque[str], limits: DecodeLimits) -> Iterator[bytes | BadImage]:
    """The bytes of a file for each image; its key is added to `keys`."""
    for number, image in enumerate(images):
        is_path = isinstance(image, str | os.PathLike)
        keys.append(os.fspath(image) if is_path else str(number))
        try:
            yield _read(os.fspath(image), limits) if is_path else _encoded(image)
        except BadImage as bad:
            yield bad


def _read(path: str, limits: DecodeLimits) -> bytes:
    try:
        with files.explained(path), files.open_file(files.absolute(path)) as file:
            size = file.seek(0, io.SEEK_END)
            if size > limits.max_bytes:
                raise BadImage(Reason.TOO_MANY_BYTES, f"{size} bytes, the limit is {limits.max_bytes}")
            file.seek(0)
            data: bytes = file.read()
            return data
    except (UserError, RunError) as error:  # also of a store that fails: the others are not lost
        raise BadImage(Reason.UNREADABLE, str(error)) from error


def _encoded(image: Any) -> bytes:
    """A file with exactly the pixels of the image, for the decoder to treat like any other."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim in (2, 3):
        image = _from_pixels(image)
    if not isinstance(image, Image.Image):
        raise BadImage(Reason.NOT_AN_IMAGE, f"{_what(image)}; {_PIXELS}")
    sink = io.BytesIO()
    try:
        if image.mode in _PNG_MODES:
            image.save(sink, "PNG", compress_level=1, exif=image.getexif())
        else:
            image.save(sink, "TIFF", exif=image.getexif())
    except Exception as error:  # Pillow reads the file only now, and raises nearly anything
        raise BadImage(Reason.CORRUPT, f"PIL image of mode {image.mode}: {type(error).__name__}: {error}") from error
    return sink.getvalue()


def _from_pixels(pixels: np.ndarray) -> Any:
    """A PIL image, or the array as it is where its shape is none of an image."""
    pixels = pixels[:, :, 0] if pixels.shape[2:] == (1,) else pixels
    if pixels.size and (pixels.ndim == 2 or pixels.shape[2] in (3, 4)):
        return Image.fromarray(np.ascontiguousarray(pixels))
    return pixels


def _what(image: Any) -> str:
    dtype, shape = getattr(image, "dtype", None), getattr(image, "shape", None)
    return f"{type(image).__name__} of {dtype} {list(shape)}" if shape is not None else f"{type(image).__name__}"


# ---- numbers of features ---------------------------------------------------------------------------------------------


def pseudo_density(features: ArrayLike, k: int = 20, volume_dim: float = 1.0) -> np.ndarray:
    """Pseudo density of each row among the others, by exact search: float64 [N] with mean 1 (arXiv 2407.08659).

    Args:
        features: float [N, D], N > k. A row is no neighbor of itself; a duplicate is one.
        k: neighbors. volume_dim: n, a sharpness.

    Raises:
        UserError: not such an array, or all rows are equal.
    """
    rows = _rows("features", features, k)
    ids = np.arange(len(rows))
    found = knn.ShardSearch(flat_rows(ids, rows), resources.cores()).search_all(rows, k + 1)
    distances, _ = knn.merge_topk([found], k, ids)
    return formula.pseudo_density(formula.mean_knn_distance(distances), volume_dim)


def precision_recall(real: ArrayLike, generated: ArrayLike, k: int = metrics.K_PRECISION) -> tuple[float, float]:
    """(precision, recall) of features, float [N, D] and [M, D] (Kynkäänniemi et al. 2019). Raises UserError."""
    return metrics.precision_recall(*_sides(real, generated, k), k, resources.cores())


def density_coverage(real: ArrayLike, generated: ArrayLike, k: int = metrics.K_COVERAGE) -> tuple[float, float]:
    """(density, coverage) of features, float [N, D] and [M, D] (Naeem et al. 2020). Raises UserError."""
    return metrics.density_coverage(*_sides(real, generated, k), k, resources.cores())


def frechet_distance(real: ArrayLike, generated: ArrayLike) -> float:
    """Fréchet distance of features, float [N, D] and [M, D]; an FID where its Inception made them. Raises UserError."""
    return metrics.frechet_distance(*_sides(real, generated, 1))


def vendi_score(features: ArrayLike) -> float:
    """Effective number of different rows of features, float [N, D] (Friedman & Dieng 2022). Raises UserError."""
    return metrics.vendi_score(_rows("features", features, 1))


def _sides(real: ArrayLike, generated: ArrayLike, k: int) -> tuple[np.ndarray, np.ndarray]:
    one, other = _rows("real", real, k), _rows("generated", generated, k)
    if one.shape[1] != other.shape[1]:
        raise UserError(f"real has D = {one.shape[1]}, generated {other.shape[1]}; take both from one extractor")
    return one, other


def _rows(name: str, values: ArrayLike, k: int) -> np.ndarray:
    """float32 [N, D], contiguous, N > k."""
    rows = np.asarray(values)
    if rows.ndim != 2 or rows.shape[1] == 0 or rows.dtype.kind not in "fiu":
        raise UserError(f"{name}: {rows.dtype} {list(rows.shape)}, expected floats [N, D]; one row per image")
    if not 1 <= k < len(rows):
        raise UserError(f"{name}: {len(rows)} rows with k = {k}; give more than k rows, and k of at least 1")
    with np.errstate(over="ignore"):
        rows = np.ascontiguousarray(rows, np.float32)
    if not np.isfinite(rows).all():
        bad = int(np.flatnonzero(~np.isfinite(rows).all(1))[0])
        raise UserError(f"{name}: row {bad} is not finite in float32; leave it out")
    return rows
