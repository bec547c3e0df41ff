"""Settings of evaluate and tradeoff: the sets, the judge and the metrics."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    Field,
    FiniteFloat,
    PositiveFloat,
    model_validator,
)

from pd_core.core.settings.base import ResolvedSettings, Section, WorkflowSettings
from pd_core.core.settings.data import INCEPTION, DataSettings, ExtractionSettings, ExtractorSettings
from pd_core.core.settings.generate import CandidateSettings


class JudgeSettings(ExtractorSettings):
    """A second extractor whose features measure too: to judge in the space that selected is circular."""

    model: str = Field(
        "none",
        description=f"timm model name, hf_hub:ORG/NAME, or {INCEPTION} for FID; none: measure in the index's space "
        "only",
    )


class MetricSettings(Section):
    """Neighbors of the metrics, docs/method.md, section 7."""

    k_precision: int = Field(3, gt=0, description="neighbors of precision, recall, realism and rarity")
    k_coverage: int = Field(5, gt=0, description="neighbors of density and coverage")


class SpaceSettings(BaseModel):
    """In which features images are measured, and how."""

    extraction: ExtractionSettings = ExtractionSettings()
    judge: JudgeSettings = JudgeSettings()
    metrics: MetricSettings = MetricSettings()


class MeasuringSettings(SpaceSettings):
    """Measuring against the real images of an index."""

    source: str | None = Field(
        None, description="place of the index's images, where its record leads to another bucket than its own"
    )
    n_real: int | None = Field(
        None, gt=0, alias="n-real", description="real images that they are measured against; default: all"
    )


class EvaluateSettings(WorkflowSettings, MeasuringSettings):
    """Measure sets of generated images against the real one."""

    real: str | None = Field(None, description="output of build_index: the real set; local directory or s3://")
    samples: list[str] = Field(
        [],
        description="sets to measure: outputs of generate.py or perturb.py, folders of images, Parquet, tars, outputs "
        "of build_index.py",
    )
    output: str | None = Field(
        None, description="where the artifacts go; local directory or s3://; default: that of --real with -evaluation"
    )
    checkpoint: str | None = Field(
        None, description="weights of the index's extractor, where they are not at the place they had then"
    )
    data: DataSettings = DataSettings()
    n: int | None = Field(
        None,
        gt=0,
        description="images of each set that are measured; default: as many as the smallest set has, since most "
        "metrics move with the number",
    )
    per_label: bool = Field(False, alias="per-label", description="measure each label's images by themselves too")
    images: int = Field(8, gt=0, description="images in each row of the report")

    @model_validator(mode="after")
    def _no_source(self) -> EvaluateSettings:
        if self.data.source is not None:
            raise ValueError("data.source has no meaning here; name the sets with --samples")
        return self


class TradeoffSettings(CandidateSettings, MeasuringSettings):
    """Show fidelity against diversity of many settings, from one pool."""

    n: int = Field(2000, gt=0, description="images measured of each setting")
    thresholds: list[str] = Field(
        ["p20", "p50", "p80"], description="tau of the paper's rule, each with every weight; pNN or a density"
    )
    weights: list[PositiveFloat] = Field(
        [0.01, 0.05, 0.2, 5, 20, 100], description="w of the paper's rule: above 1 typical, below 1 varied"
    )
    polarities: list[FiniteFloat] | None = Field(
        None,
        description="of Polarity Sampling; 1 is MaGNET; default: -1 and 1 for --generator.kind stylegan and "
        "torchscript",
    )
    rank: int = Field(
        8, gt=0, description="Polarity and MaGNET: singular values of the Jacobian that make a log-volume"
    )
    output_size: int = Field(
        64,
        gt=0,
        description="Polarity and MaGNET: larger images are averaged to this side before they are differentiated, px",
    )
    bins: int = Field(
        20, gt=1, description="Polarity and MaGNET: steps of the weight, as --weighting.bins of generate.py"
    )
    truncations: list[Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None = Field(
        None,
        description="stylegan: psi towards the mean latent; torchscript: bounds of a truncated normal; default: 0.5 "
        "and 0.7 there",
    )
    score: Literal["predictor", "index"] = Field("predictor", description="which densities decide")
    target: str | None = Field(
        None, description="METRIC=VALUE, e.g. recall=0.6: name the setting of best precision among those that reach it"
    )
    chunk: int = Field(64, gt=0, description="candidates generated as one batch; part of the pool's identity")
    pilot: int = Field(256, gt=0, description="candidates from which the size of the pool is planned")
    max_candidates: int | None = Field(
        None,
        gt=0,
        alias="max-candidates",
        description="largest pool; default: 20 times --n; settings that need more are left out",
    )
    images: int = Field(8, gt=0, description="images in each row of the report")


class ResolvedEvaluate(ResolvedSettings, EvaluateSettings):
    """Of evaluate, checked."""

    real: str


class ResolvedTradeoff(ResolvedSettings, TradeoffSettings):
    """Of tradeoff, checked."""

    index: str
