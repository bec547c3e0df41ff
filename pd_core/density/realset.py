"""The real set as later stages see it: what build_index committed, opened and checked once, small and picklable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field, FiniteFloat

from pd_core.core import artifacts, files, schemas, trust
from pd_core.core.errors import UserError
from pd_core.density import formula
from pd_core.density import predictor as density_predictor
from pd_core.index import search
from pd_core.index.extractor import ExtractorSpec

if TYPE_CHECKING:
    from pd_core.density.network import DensityPredictor

STAGES = ("features", "index", "densities", "estimator")
Quantiles = Annotated[tuple[trust.NotNegative, ...], Field(min_length=2, max_length=1001)]


@dataclass(frozen=True)
class _Totals:
    """What is used of the totals of a densities stage."""

    k: trust.Count
    volume_dim: Annotated[FiniteFloat, Field(gt=0)]
    log_normalizer: FiniteFloat
    distance_floor: trust.NotNegative
    density_quantiles: Quantiles
    nearest_distance_quantiles: Quantiles

    def __post_init__(self) -> None:
        for values in (self.density_quantiles, self.nearest_distance_quantiles):
            if any(b < a * (1 - 1e-9) for a, b in pairwise(values)):  # interpolation rounds
                raise ValueError("quantiles do not ascend")


@dataclass(frozen=True)
class RealSet:
    """Everything that scoring another image needs: (F, k, n, c), the index and the predictor.

    Attributes:
        uri: output of build_index.
        rows: N, real images.
        extractor: F.
        index: shards and cells.
        k: neighbors of a density. volume_dim: n. log_normalizer: c. distance_floor: of the mean k-NN distance.
        density_quantiles: p0, p0.1 ... p100 of the real densities, float64 [1001].
        nearest_quantiles: the same of the distance from a real image to its nearest other one, Euclidean.
        fingerprints: of the stages it was read from.
    """

    uri: str
    rows: int
    extractor: ExtractorSpec
    index: search.IndexInfo
    k: int
    volume_dim: float
    log_normalizer: float
    distance_floor: float
    density_quantiles: np.ndarray
    nearest_quantiles: np.ndarray
    fingerprints: Mapping[str, str]

    def log_density(self, neighbor_distances: np.ndarray) -> np.ndarray:
        """Log pseudo density of any images, float64 [m], from their distances to the k nearest real ones [m, k]."""
        mean = formula.mean_knn_distance(neighbor_distances)
        floored, _ = formula.apply_distance_floor(mean, self.distance_floor)
        return formula.log_pseudo_density(floored, self.volume_dim, self.log_normalizer)

    def percentile(self, values: np.ndarray) -> np.ndarray:
        """Percentile of densities [m] among the real set's, in [0, 100], by interpolation between its quantiles."""
        return np.interp(values, self.density_quantiles, np.linspace(0.0, 100.0, len(self.density_quantiles)))

    def copy_distance(self, quantile: float) -> float:
        """Distance to a real image within which a generated one is a likely copy of it; 0 where all are duplicates.

        This quantile of the distances from real images to their nearest other ones, without exact duplicates, which say
        nothing of how near a copy comes.
        """
        apart = self.nearest_quantiles[self.nearest_quantiles > self.distance_floor]
        return float(np.quantile(apart, quantile)) if len(apart) else 0.0

    def predictor(self) -> DensityPredictor:
        """f, loaded."""
        names = (density_predictor.WEIGHTS_FILE, density_predictor.DESCRIPTION_FILE)
        folder = files.join(self.uri, "estimator")
        places = {name: files.join(folder, name) for name in names}
        found = density_predictor.from_bytes(
            {name: files.read_file(place, place, trust.WEIGHTS_BYTES) for name, place in places.items()}
        )
        if found.architecture.feature_dim != self.extractor.feature_dim:
            raise UserError(f"{folder}: is of other features than its index has; run build_index.py on it again")
        return found


def open_realset(uri: str, checkpoint: str | None = None) -> RealSet:
    """What build_index wrote at `uri`.

    Args:
        uri: of its output.
        checkpoint: of the extractor's weights, absolute; None: where its record says that they lie.

    Raises:
        UserError: it is not finished, of another schema, its stages were not made from each other, or its record leads
            to weights that the command has to name.
    """
    found = {stage: _finished(uri, stage) for stage in STAGES}
    _check_lineage(uri, found)
    recorded, rows = found["densities"].totals, found["densities"].rows
    if "nearest_distance_quantiles" not in recorded:
        raise UserError(f"--index {uri}: made by an older pd_core; run build_index.py on it again with --overwrite")
    where = files.join(uri, "densities", files.ARTIFACT)
    totals = trust.checked(_Totals, recorded, where, whole=False)
    if totals.k >= rows:
        raise UserError(f"{where}: its k is {totals.k}, and there are {rows} rows; it is damaged, make it again")
    extractor = _extractor(files.join(uri, "features"), found["features"], checkpoint)
    index = search.open_index(files.join(uri, "index"))
    if index.dim != extractor.feature_dim:
        raise UserError(
            f"{files.join(index.uri, files.ARTIFACT)}: has {index.dim} dimensions, the features have "
            f"{extractor.feature_dim}; it is damaged, make it again"
        )
    return RealSet(
        uri=uri,
        rows=rows,
        extractor=extractor,
        index=index,
        k=totals.k,
        volume_dim=totals.volume_dim,
        log_normalizer=totals.log_normalizer,
        distance_floor=totals.distance_floor,
        density_quantiles=np.asarray(totals.density_quantiles),
        nearest_quantiles=np.asarray(totals.nearest_distance_quantiles),
        fingerprints={stage: artifact.fingerprint for stage, artifact in found.items()},
    )


def open_for(uri: str, checkpoint: str | None, setting: str) -> RealSet:
    """`open_realset` of a path as a user gives it under `setting`; checkpoint: of the extractor, where it is given.

    Raises:
        UserError: as `open_realset`.
    """
    try:
        with files.explained(uri):
            return open_realset(files.absolute(uri), files.absolute(checkpoint) if checkpoint else None)
    except UserError as error:
        raise UserError(str(error).replace("--index", setting, 1)) from None


def _extractor(uri: str, features: artifacts.Artifact, checkpoint: str | None) -> ExtractorSpec:
    """F as the record of a features stage has it, with weights that may be opened."""
    record = files.join(uri, files.ARTIFACT)
    spec = ExtractorSpec.from_json(features.totals.get("extractor"), record)
    if checkpoint is None and spec.checkpoint is not None:
        checkpoint = trust.recorded_path(spec.checkpoint, record, [uri], "--checkpoint")
    return replace(spec, checkpoint=checkpoint)


def _finished(uri: str, stage: str) -> artifacts.Artifact:
    folder = files.join(uri, stage)
    with files.explained(folder):
        artifact = artifacts.load_artifact(folder)
    if artifact is None:
        if files.exists(files.join(uri, "listing")):
            raise UserError(
                f"--index {uri}: is not finished ({stage}/ has no whole {files.ARTIFACT}); run build_index.py on it "
                "again"
            )
        what = "is no index" if files.exists(uri) else "does not exist"
        raise UserError(f"--index {uri}: {what} ({stage}/ is missing); name the --output of build_index.py")
    if artifact.kind != stage or artifact.schema_version != schemas.VERSIONS[stage]:
        raise UserError(
            f"--index {uri}: {stage}/ has schema {artifact.kind} {artifact.schema_version}, this pd_core reads "
            f"{stage} {schemas.VERSIONS[stage]}; run build_index.py again"
        )
    artifacts.check_whole(folder, artifact)
    return artifact


def _check_lineage(uri: str, found: Mapping[str, artifacts.Artifact]) -> None:
    """Each stage names the fingerprint it was made from."""
    made_from: dict[str, Any] = {
        "index": (found["index"].identity.get("features"), found["features"].fingerprint),
        "estimator": (found["estimator"].identity.get("densities"), found["densities"].fingerprint),
    }
    for stage, (named, there) in made_from.items():
        if named != there:
            raise UserError(
                f"--index {uri}: {stage}/ was made from another state of it; run build_index.py on it again"
            )
