"""Settings of build_index: features, index, densities, predictor, and its update."""

from __future__ import annotations

from typing import Literal

from pydantic import (
    Field,
    PositiveInt,
    model_validator,
)

from pd_core.core.settings.base import ReportSettings, ResolvedSettings, Section, WorkflowSettings
from pd_core.core.settings.data import DataSettings, ExtractionSettings, ExtractorSettings

IndexKind = Literal["auto", "flat", "ivf_flat", "ivf_sq8", "ivf_pq"]


class FeatureSettings(ExtractorSettings, ExtractionSettings):
    """The extractor F of the index and how its stage runs."""


class IndexSettings(Section):
    """The sharded FAISS index over the features."""

    kind: IndexKind = Field("auto", description="auto: exact where that is cheaper at the target recall")
    shards: int | None = Field(None, gt=0, description="index files; default: one per GiB of vectors")
    cells: int | None = Field(None, gt=0, description="cells of the coarse quantizer (nlist); default 4*sqrt(N)")
    target_recall: float = Field(0.99, gt=0, le=1, description="recall@k that the self-join must reach")
    max_scan_fraction: float = Field(
        0.9, gt=0, le=1, description="largest mean share of the rows a query may scan before the target is out of reach"
    )
    train_rows_per_cell: int = Field(64, ge=39, description="training sample of the quantizer, rows per cell")
    calibration_queries: int = Field(1000, ge=100, description="rows searched exactly to measure recall and error")
    pq_bytes: int = Field(48, gt=0, description="ivf_pq: bytes per vector; must divide the feature dimension")
    actors: int | None = Field(
        None, gt=0, description="search processes; default: one per core; never more than shards"
    )
    actor_cpus: int = Field(
        1, gt=0, description="threads of one search process, cores; more where there are fewer shards than cores"
    )
    seed: int = Field(0, ge=0, description="seed of the training sample and of k-means")


class DensitySettings(Section):
    """Pseudo density: k and n of docs/method.md, section 1."""

    k: int = Field(20, gt=0, description="nearest neighbors per image")
    volume_dim: float = Field(1.0, gt=0, description="n in density ~ mean_knn_distance**-n: a sharpness")
    exact: bool = Field(False, description="compare with every row, whatever the index")
    block_rows: int = Field(65_536, gt=0, description="queries searched together and committed together, rows")


class EstimatorSettings(Section):
    """The density predictor: a small MLP from features to density."""

    hidden: tuple[PositiveInt, ...] = Field((512, 256, 128), description="widths of the hidden layers")
    learning_rate: float = Field(1e-3, gt=0, description="of Adam")
    batch_size: int = Field(256, gt=0, description="rows per step")
    epochs: int = Field(100, gt=0, description="at most")
    patience: int = Field(10, ge=0, description="epochs without better held-out loss before the stop; 0: never stop")
    standardize: bool = Field(True, description="standardise inputs and target, statistics kept in the model")
    target: Literal["log_density", "density"] = Field("log_density", description="what the network regresses")
    split: Literal["hash", "random"] = Field("hash", description="held-out rows by hash of sample_id, or drawn")
    holdout_fraction: float = Field(0.2, gt=0, lt=1, description="share of rows never trained on")
    seed: int = Field(0, ge=0, description="of initial weights, shuffling and the random split")
    threads: int = Field(1, gt=0, description="of the training process, cores")


class UpdateSettings(Section):
    """When an update (`base`) makes anew what it could have taken over."""

    max_growth: float = Field(
        0.5,
        gt=0,
        description="rows added or taken away since the quantizer was trained, as a share of those it had then",
    )
    max_cell_distance: float = Field(
        1.2,
        gt=1,
        description="mean squared distance of new rows to their cell's centroid, over that of the rows there were",
    )
    max_r2_drop: float = Field(
        0.05, ge=0, description="fall of the predictor's held-out R2 of log density since it was fitted"
    )


class BuildIndexSettings(WorkflowSettings):
    """Give every image of a source its pseudo density."""

    base: str | None = Field(
        None,
        description="earlier output of build_index with the same settings: what is unchanged in the source is taken "
        "over from it",
    )
    update: UpdateSettings = UpdateSettings()

    preset: Literal["default", "paper", "million"] = Field(
        "default", description="paper: the authors' settings; million: settings for 10^6 images and more"
    )
    data: DataSettings = DataSettings()
    features: FeatureSettings = FeatureSettings()
    index: IndexSettings = IndexSettings()
    density: DensitySettings = DensitySettings()
    estimator: EstimatorSettings = EstimatorSettings()
    report: ReportSettings = ReportSettings()

    @model_validator(mode="after")
    def _consistent(self) -> BuildIndexSettings:
        if self.density.exact and self.index.kind not in ("auto", "flat"):
            raise ValueError(
                f"density.exact compares with every row, which makes index.kind {self.index.kind!r} idle; "
                "set index.kind to flat or drop density.exact"
            )
        if self.index.kind == "flat" and self.index.cells is not None:
            raise ValueError("index.cells has no meaning for index.kind 'flat'; drop one of them")
        return self


class ResolvedBuildIndex(ResolvedSettings, BuildIndexSettings):
    """Of build_index, checked."""
