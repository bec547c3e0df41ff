"""Typed settings of each workflow: one place for every name, default, bound and unit.

Precedence, lowest first: defaults, `--preset`, the YAML file of `--config`, environment (`PD_CORE_DATA__SOURCE`),
command line (`--data.source`). Unknown names are refused with the nearest known one, wherever they come from.
This module imports neither torch nor Ray, so `--help` is instant.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import os
import re
import sys
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal, NoReturn, TypeVar, cast, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from pd_core.errors import EXIT_BAD_INPUT, UserError, printable, redact, shown
from pd_core.schemas import METRICS

ENV_PREFIX = "PD_CORE_"
MIB = 1 << 20
MAX_LEASE_S = 7 * 86_400.0  # for so long a run that died may block the next
INCEPTION = "inception-v3-compat"  # torch-fidelity's name for the network of FID
CONFIG_BYTES = MIB  # of a --config file
MAX_DEPTH, MAX_ALIASES = 32, 100  # in it
_LONG_NUMBER = re.compile(
    r"[-+]?[0-9][0-9a-fA-FxXoO_:.]{63,}"
)  # as YAML reads them, in time that grows with their square
PERTURB_EPSILON, PERTURB_STEPS = 0.1, 10  # the reference of Algorithm 1

SourceKind = Literal["auto", "directory", "glob", "parquet", "webdataset"]
IndexKind = Literal["auto", "flat", "ivf_flat", "ivf_sq8", "ivf_pq"]
GeneratorKind = Literal["diffusers", "stylegan", "torchscript", "python"]
TRUNCATION_SETTINGS: dict[GeneratorKind, str] = {
    "stylegan": "truncation",
    "torchscript": "latent_bound",
}  # of each kind that has it
WeightingKind = Literal["two_level", "quantiles", "match", "polarity", "magnet", "none"]


def _without_password(value: Any) -> Any:
    """The value of a setting, unless it is, or holds, a URL with a name, a password or a query in it.

    Raises:
        ValueError: it is. Settings are printed, stored beside the data and sent to MLflow.
    """
    for text in _texts(value):
        found = re.match(r"[a-z][a-z0-9+.-]*://([^/]*)", text, re.IGNORECASE)
        # with the colon: a password may hold a slash, before which no @ is
        if found and ("@" in found[1] or re.search(r":(?!\d*$)", re.sub(r"\[.*?\]", "", found[1]))):
            raise ValueError(
                "must not hold a name or password, since settings are printed and stored; credentials come from the "
                "environment (AWS_ACCESS_KEY_ID ..., MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD)"
            )
        if found and redact(text) != text:
            raise ValueError(
                "must not hold a query (what follows a ?), which may be a signature or a token, since settings are printed "
                "and stored; name the file or bucket itself, credentials come from the environment"
            )
    return value


def _texts(value: Any) -> Iterator[str]:
    """The texts in a value, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(item)


class Section(BaseModel):
    """A group of settings; unknown names are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True)
    _no_password = field_validator("*")(_without_password)

    @model_validator(mode="before")
    @classmethod
    def _one_spelling(cls, values: Any) -> Any:
        # what was given as allow-pickle meets the default, which pydantic-settings adds under the name of the field
        if not isinstance(values, dict):
            return values
        twice = {name for name, field in cls.model_fields.items() if field.alias in values}
        return {name: value for name, value in values.items() if name not in twice}


class DataSettings(Section):
    """Where the images are and which of them are acceptable."""

    source: str | None = Field(
        None, description="images: a directory, a glob, Parquet file(s) or WebDataset tar(s); local or s3://"
    )
    kind: SourceKind = Field("auto", description="how to read the source; auto decides by its names")
    labels: str = Field(
        "none",
        description="none; parent (name of the image's folder); column:NAME (Parquet); member:EXT (tar, e.g. member:cls)",
    )
    image_column: str = Field("image", description="Parquet: column of bytes or struct<bytes, path>")
    key_column: str | None = Field(None, description="Parquet: column that names each image; default FILE#ROW")
    metadata_columns: list[str] | None = Field(
        None, description="Parquet: columns to carry to every table; default all but image, key and label"
    )
    max_bad_fraction: float = Field(0.01, ge=0, le=1, description="stop when more than this share is quarantined")
    max_image_bytes: int = Field(64 * MIB, gt=0, description="larger files are quarantined unread, bytes")
    max_image_pixels: int = Field(
        100_000_000,
        gt=0,
        description="larger images are quarantined undecoded, px; decoding one may take 28 bytes for each, 4 for each of "
        "max_image_bytes, and 768 MiB",
    )
    max_image_cpu_s: int = Field(
        60,
        gt=0,
        description="an image whose decoding takes more is quarantined, seconds of CPU; the slowest clean ones take 30",
    )
    background: tuple[int, int, int] = Field(
        (255, 255, 255), description="RGB 0..255 that transparent images are laid over"
    )
    follow_links: bool = Field(
        False, alias="follow-links", description="follow links that lead out of the source; for a source that you trust"
    )

    @field_validator("labels")
    @classmethod
    def _labels_form(cls, value: str) -> str:
        if value in ("none", "parent") or (value.partition(":")[0] in ("column", "member") and value.partition(":")[2]):
            return value
        raise ValueError("expected none, parent, column:NAME or member:EXT")

    @field_validator("background")
    @classmethod
    def _background_range(cls, value: tuple[int, int, int]) -> tuple[int, int, int]:
        if not all(0 <= channel <= 255 for channel in value):
            raise ValueError("expected three values in 0..255")
        return value


class ExtractorSettings(Section):
    """A frozen feature extractor F."""

    model: str = Field("vit_base_patch16_224", description="timm model name, or hf_hub:ORG/NAME")
    checkpoint: str | None = Field(
        None, description="weights file, local or s3:// (.safetensors, or torch with weights only); default: timm's hub"
    )
    preprocess: Literal["model", "paper"] = Field(
        "model", description="model: timm's own config for the model; paper: 224x224 without crop, ImageNet mean/std"
    )
    image_size: int | None = Field(
        None, gt=0, description="side of the model's input instead of the one in its config, px; small images need less"
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="arithmetic of the model")

    @model_validator(mode="after")
    def _one_size(self) -> ExtractorSettings:
        if self.model == INCEPTION and (self.preprocess, self.image_size, self.precision) != ("model", None, "fp32"):
            raise ValueError(
                f"{INCEPTION} sees images at 299 px in fp32, as FID has it; drop preprocess, image_size and precision"
            )
        if self.preprocess == "paper" and self.image_size is not None:
            raise ValueError("image_size has no meaning for preprocess 'paper' (224 px); drop one of them")
        return self


class ExtractionSettings(Section):
    """How the stage of an extractor runs."""

    batch_size: int = Field(64, gt=0, description="images per forward pass; part of the features' identity")
    part_rows: int = Field(4096, gt=0, description="images per committed part, rounded up to whole batches")
    actors: int | None = Field(None, gt=0, description="model replicas; default: autoscale from 1 to what fits")
    actor_cpus: int = Field(1, gt=0, description="threads of one replica without GPU, cores")
    actor_gpus: float | None = Field(
        None,
        ge=0,
        description="GPUs of one replica, a fraction shares one; default: 1 where the cluster has any at the start",
    )

    @property
    def whole_part_rows(self) -> int:
        """Images per features part: whole batches."""
        return -(-self.part_rows // self.batch_size) * self.batch_size


class FeatureSettings(ExtractorSettings, ExtractionSettings):
    """The extractor F of the index and how its stage runs."""


class JudgeSettings(ExtractorSettings):
    """A second extractor whose features measure too: to judge in the space that selected is circular."""

    model: str = Field(
        "none",
        description=f"timm model name, hf_hub:ORG/NAME, or {INCEPTION} for FID; none: measure in the index's space only",
    )


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


class ReportSettings(Section):
    """report/index.html."""

    images: int = Field(32, gt=0, description="images in each grid")
    neighbors: int = Field(6, gt=0, description="images shown with their nearest neighbors")
    thresholds: list[str] = Field(["p20", "p50", "p80"], description="marked in the histogram; pNN or a density")


class TrackingSettings(Section):
    """MLflow."""

    enabled: bool = Field(True, description="log the run to MLflow")
    uri: str | None = Field(
        None, description="default: MLFLOW_TRACKING_URI, else mlflow.db (SQLite) beside a local output, else off"
    )
    experiment: str = Field("pd_core", description="MLflow experiment")


class GeneratorSettings(Section):
    """The image generator G and what it is asked for."""

    kind: GeneratorKind = Field("diffusers", description="format of the generator")
    path: str | None = Field(
        None,
        description="diffusers: directory of a saved pipeline or hub id; stylegan: NVIDIA's pickle; torchscript: file; "
        "python: MODULE:FACTORY or FILE.py:FACTORY",
    )
    labels: str = Field("none", description="class numbers drawn for the samples: none, all, or a list such as 0,3,7")
    label_names: list[str] | None = Field(
        None, description="names of class 0, 1, ... as the index's labels have them; default: the numbers themselves"
    )
    prompts: str | None = Field(None, description="text file, one prompt per line, drawn for the samples")
    steps: int | None = Field(None, gt=0, description="diffusers: denoising steps; default: the pipeline's own")
    scheduler: str | None = Field(
        None, description="diffusers: scheduler class, e.g. DDIMScheduler; default: the one saved with the pipeline"
    )
    guidance: float | None = Field(
        None, ge=0, description="diffusers: classifier-free guidance scale; default: the pipeline's own"
    )
    eta: float | None = Field(None, ge=0, le=1, description="diffusers, DDIM: noise added per step, 0 none, 1 as DDPM")
    height: int | None = Field(None, gt=0, description="diffusers: of the images where the pipeline can choose, px")
    width: int | None = Field(None, gt=0, description="diffusers: of the images where the pipeline can choose, px")
    safety_checker: bool = Field(
        True, description="diffusers: false loads the pipeline without its safety checker, which blacks images out"
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="arithmetic of the generator; stylegan: fp16 is its own mixed precision, GPU only"
    )
    truncation: float = Field(1.0, description="stylegan: psi towards the mean latent; 1 is none")
    noise: Literal["const", "none"] = Field("const", description="stylegan: per-pixel noise inputs")
    code: str | None = Field(
        None,
        description="stylegan: directory of NVIDIA's stylegan2-ada-pytorch or stylegan3 code, which the pickle needs",
    )
    latent_shape: tuple[PositiveInt, ...] | None = Field(
        None, description="torchscript: shape of one standard normal latent, e.g. [128] or [3, 32, 32]"
    )
    latent_bound: float | None = Field(
        None,
        gt=0,
        description="torchscript: entries of a latent beyond +- this are drawn again, BigGAN's truncation; e.g. 0.5; default: none",
    )
    value_range: Literal["-1..1", "0..1", "0..255"] = Field("-1..1", description="torchscript: of the output's values")
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="python: keyword arguments of the factory, JSON"
    )
    allow_pickle: bool = Field(
        False, alias="allow-pickle", description="load a pickle, which can run any code it holds; for files you trust"
    )

    @model_validator(mode="after")
    def _fits_kind(self) -> GeneratorSettings:
        meant_for: dict[str, tuple[str, ...]] = {
            **dict.fromkeys(
                ("steps", "scheduler", "guidance", "eta", "height", "width", "safety_checker"), ("diffusers",)
            ),
            **dict.fromkeys(("truncation", "noise", "code"), ("stylegan",)),
            **dict.fromkeys(("latent_shape", "latent_bound", "value_range"), ("torchscript",)),
            "arguments": ("python",),
            "precision": ("diffusers", "stylegan"),
            "allow_pickle": ("diffusers", "stylegan"),
        }
        for name, kinds in meant_for.items():
            field = type(self).model_fields[name]
            if self.kind not in kinds and getattr(self, name) != field.get_default(call_default_factory=True):
                raise ValueError(
                    f"generator.{field.alias or name} has no meaning for generator.kind {self.kind!r}; drop one of them"
                )
        return self


class WeightingSettings(Section):
    """The weight function, docs/method.md, sections 4 and 6: what is asked for more often, and how much."""

    kind: WeightingKind = Field(
        "two_level",
        description="two_level: the paper's, one threshold; quantiles: one weight per bin of the real densities; match: the "
        "real set's densities; polarity: exp(polarity * v), v the log-volume of the generator at the sample, whatever its density; "
        "magnet: polarity 1, uniform on what the generator can make; none: as the generator draws",
    )
    threshold: str = Field(
        "p80",
        coerce_numbers_to_str=True,
        description="two_level: tau, a percentile of the real set (p80) or a density (1.19)",
    )
    weight: float | None = Field(
        None, gt=0, description="two_level: w of samples above the threshold; above 1 typical, below 1 varied; required"
    )
    weights: list[float] | None = Field(
        None, description="quantiles: a weight for each of equally large bins of the real set, lowest densities first"
    )
    bins: int = Field(
        20,
        gt=1,
        description="match: bins of equally many real images; polarity, magnet: of equally many pilot candidates, steps of the weight",
    )
    max_weight: float = Field(
        20.0,
        gt=1,
        description="match: largest weight, 1 being the generator's mean; the pilot's acceptance rate is at least 1 over it",
    )
    per_label: bool = Field(False, description="thresholds and bins of the sample's own label instead of all images")
    polarity: float | None = Field(
        None, description="polarity: below 0 the generator's modes, above 0 its anti-modes, 0 as it draws; required"
    )
    rank: int = Field(8, gt=0, description="polarity, magnet: singular values of the Jacobian that make a log-volume")
    output_size: int = Field(
        64,
        gt=0,
        description="polarity, magnet: larger images are averaged to this side before they are differentiated, px",
    )

    @property
    def exponent(self) -> float | None:
        """Of the volume in the weights, where log-volumes decide and not densities."""
        return {"polarity": self.polarity, "magnet": 1.0}.get(self.kind)

    @model_validator(mode="after")
    def _fits_kind(self) -> WeightingSettings:
        # by value, not by model_fields_set: settings that are printed and read again are all set
        meant_for: dict[str, tuple[str, ...]] = {
            "threshold": ("two_level",),
            "weight": ("two_level",),
            "weights": ("quantiles",),
            "bins": ("match", "polarity", "magnet"),
            "polarity": ("polarity",),
            "rank": ("polarity", "magnet"),
            "output_size": ("polarity", "magnet"),
            "max_weight": ("match",),
            "per_label": ("two_level", "quantiles", "match"),
        }
        for name, kinds in meant_for.items():
            if self.kind not in kinds and getattr(self, name) != type(self).model_fields[name].get_default():
                raise ValueError(f"weighting.{name} has no meaning for weighting.kind {self.kind!r}; drop one of them")
        return self


class SearchSettings(Section):
    """The processes that hold the index while samples are scored."""

    actors: int | None = Field(
        None, gt=0, description="search processes; default: one per core; never more than shards"
    )
    actor_cpus: int = Field(1, gt=0, description="threads of one search process, cores")


class WorkflowSettings(BaseSettings):
    """What every workflow takes. The docstring of a workflow's own class is what its --help says first."""

    model_config = SettingsConfigDict(
        extra="forbid",
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
        nested_model_default_partial_update=True,
        populate_by_name=True,
        frozen=True,
    )

    config: str | None = Field(None, description="YAML file of settings")
    output: str | None = Field(None, description="where the artifacts go; local directory or s3://")
    overwrite: bool = Field(False, description="replace stages that were made with other settings")
    dry_run: bool = Field(False, alias="dry-run", description="print the settings and the plan, then stop")
    tracking: TrackingSettings = TrackingSettings()

    _no_password = field_validator("*")(_without_password)


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
        description="earlier output of build_index with the same settings: what is unchanged in the source is taken over from it",
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


class GenerateSettings(WorkflowSettings):
    """Generate images, accepted or rejected by their pseudo densities."""

    index: str | None = Field(None, description="output of build_index: the real set; local directory or s3://")
    checkpoint: str | None = Field(
        None, description="weights of the index's extractor, where they are not at the place they had then"
    )
    source: str | None = Field(
        None, description="place of the index's images, where its record leads to another bucket than its own"
    )
    generator: GeneratorSettings = GeneratorSettings()
    weighting: WeightingSettings = WeightingSettings()
    n: int | None = Field(None, gt=0, description="accepted images wanted")
    score: Literal["predictor", "index", "both"] = Field(
        "predictor",
        description="what decides: predictor; index (true k-NN); both: the predictor decides, the accepted are scored by the index too",
    )
    seed: int = Field(0, ge=0, description="of the run; candidate i's image depends on it, on i and on the generator")
    chunk: int = Field(64, gt=0, description="candidates generated as one batch; part of the samples' identity")
    part_rows: int = Field(1000, gt=0, description="accepted images per committed part, about; fewer where n is small")
    pilot: int = Field(256, gt=0, description="candidates of the pilot, rounded up to whole chunks")
    actors: int | None = Field(None, gt=0, description="generator replicas; default: autoscale from 1 to what fits")
    actor_cpus: int = Field(1, gt=0, description="threads of one replica without GPU, cores")
    actor_gpus: float | None = Field(
        None, ge=0, description="GPUs of one replica, a fraction shares one; default: 1 where the cluster has any"
    )
    search: SearchSettings = SearchSettings()
    max_candidates: int | None = Field(
        None, gt=0, alias="max-candidates", description="stop before more than these are generated"
    )
    max_hours: float | None = Field(None, gt=0, alias="max-hours", description="stop this run after so many hours")
    copies_quantile: float = Field(
        0.01, ge=0, le=1, description="likely copy: nearer to a real image than this quantile of real nearest distances"
    )
    drop_copies: bool = Field(False, alias="drop-copies", description="do not accept likely copies of real images")
    keep_rejected: bool = Field(
        False, alias="keep-rejected", description="keep a table of the rejected candidates' densities in rejected/"
    )
    export: Literal["none", "png", "webdataset"] = Field("none", description="write the images in this form too")
    images: int = Field(32, gt=0, description="images in each grid of the report")
    verify: str | None = Field(None, description="output of an earlier run: make some of its rows again and compare")
    rows: int = Field(20, gt=0, description="verify: rows to make again")
    verify_seed: int | None = Field(
        None,
        ge=0,
        alias="verify-seed",
        description="verify: seed of the choice of rows, as an earlier verify printed it",
    )

    @model_validator(mode="after")
    def _consistent(self) -> GenerateSettings:
        if self.score == "index" and self.weighting.kind in ("polarity", "magnet"):
            raise ValueError(
                f"score index, the decision by true neighbors, has no meaning for weighting.kind {self.weighting.kind!r}, which "
                "decides by the log-volume; use predictor or both"
            )
        return self


class PerturbSettings(WorkflowSettings):
    """Move samples of a generator towards common or unique ones."""

    index: str | None = Field(None, description="output of build_index: the real set; local directory or s3://")
    checkpoint: str | None = Field(
        None, description="weights of the index's extractor, where they are not at the place they had then"
    )
    generator: GeneratorSettings = GeneratorSettings()
    n: int | None = Field(None, gt=0, description="samples: the first n candidates of the seed, as generate draws them")
    direction: Literal["up", "down", "both"] = Field(
        "up", description="up: towards common, higher density; down: towards unique; both: each sample each way"
    )
    epsilon: float = Field(PERTURB_EPSILON, gt=0, description="largest change of any element of a latent")
    step_size: float | None = Field(
        None, gt=0, description="alpha, change of each element in one step; default: epsilon / 4"
    )
    steps: int = Field(PERTURB_STEPS, gt=0, description="T, steps of projected gradient descent")
    random_start: bool = Field(False, description="begin anywhere in the box around the latent, not at the latent")
    seed: int = Field(0, ge=0, description="of the run; candidate i's image depends on it, on i and on the generator")
    chunk: int = Field(8, gt=0, description="samples perturbed as one batch; part of the rows' identity")
    part_rows: int = Field(64, gt=0, description="rows per committed part, rounded up to whole chunks")
    actors: int | None = Field(None, gt=0, description="generator replicas; default: autoscale from 1 to what fits")
    actor_cpus: int = Field(1, gt=0, description="threads of one replica without GPU, cores")
    actor_gpus: float | None = Field(
        None, ge=0, description="GPUs of one replica, a fraction shares one; default: 1 where the cluster has any"
    )
    search: SearchSettings = SearchSettings()
    images: int = Field(24, gt=0, description="samples shown in the report, before and after")
    copies_quantile: float = Field(
        0.01, ge=0, le=1, description="likely copy: nearer to a real image than this quantile of real nearest distances"
    )

    @property
    def directions(self) -> tuple[str, ...]:
        """Those of one sample, in the order of its rows."""
        return ("down", "up") if self.direction == "both" else (self.direction,)


class MetricSettings(Section):
    """Neighbors of the metrics, docs/method.md, section 7."""

    k_precision: int = Field(3, gt=0, description="neighbors of precision, recall, realism and rarity")
    k_coverage: int = Field(5, gt=0, description="neighbors of density and coverage")


class EvaluateSettings(WorkflowSettings):
    """Measure sets of generated images against the real one."""

    real: str | None = Field(None, description="output of build_index: the real set; local directory or s3://")
    samples: list[str] = Field(
        [],
        description="sets to measure: outputs of generate.py or perturb.py, folders of images, Parquet, tars, outputs of build_index.py",
    )
    output: str | None = Field(
        None, description="where the artifacts go; local directory or s3://; default: that of --real with -evaluation"
    )
    checkpoint: str | None = Field(
        None, description="weights of the index's extractor, where they are not at the place they had then"
    )
    source: str | None = Field(
        None, description="place of the index's images, where its record leads to another bucket than its own"
    )
    data: DataSettings = DataSettings()
    extraction: ExtractionSettings = ExtractionSettings()
    judge: JudgeSettings = JudgeSettings()
    metrics: MetricSettings = MetricSettings()
    n: int | None = Field(
        None,
        gt=0,
        description="images of each set that are measured; default: as many as the smallest set has, since most metrics move "
        "with the number",
    )
    n_real: int | None = Field(
        None, gt=0, alias="n-real", description="real images that they are measured against; default: all"
    )
    per_label: bool = Field(False, alias="per-label", description="measure each label's images by themselves too")
    images: int = Field(8, gt=0, description="images in each row of the report")

    @model_validator(mode="after")
    def _no_source(self) -> EvaluateSettings:
        if self.data.source is not None:
            raise ValueError("data.source has no meaning here; name the sets with --samples")
        return self


class TradeoffSettings(WorkflowSettings):
    """Show fidelity against diversity of many settings, from one pool."""

    index: str | None = Field(None, description="output of build_index: the real set; local directory or s3://")
    checkpoint: str | None = Field(
        None, description="weights of the index's extractor, where they are not at the place they had then"
    )
    source: str | None = Field(
        None, description="place of the index's images, where its record leads to another bucket than its own"
    )
    generator: GeneratorSettings = GeneratorSettings()
    n: int = Field(2000, gt=0, description="images measured of each setting")
    n_real: int | None = Field(
        None, gt=0, alias="n-real", description="real images that they are measured against; default: all"
    )
    thresholds: list[str] = Field(
        ["p20", "p50", "p80"], description="tau of the paper's rule, each with every weight; pNN or a density"
    )
    weights: list[PositiveFloat] = Field(
        [0.01, 0.05, 0.2, 5, 20, 100], description="w of the paper's rule: above 1 typical, below 1 varied"
    )
    polarities: list[FiniteFloat] | None = Field(
        None,
        description="of Polarity Sampling; 1 is MaGNET; default: -1 and 1 for --generator.kind stylegan and torchscript",
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
        description="stylegan: psi towards the mean latent; torchscript: bounds of a truncated normal; default: 0.5 and 0.7 there",
    )
    score: Literal["predictor", "index"] = Field("predictor", description="which densities decide")
    target: str | None = Field(
        None, description="METRIC=VALUE, e.g. recall=0.6: name the setting of best precision among those that reach it"
    )
    seed: int = Field(0, ge=0, description="of the run; candidate i's image depends on it, on i and on the generator")
    chunk: int = Field(64, gt=0, description="candidates generated as one batch; part of the pool's identity")
    pilot: int = Field(256, gt=0, description="candidates from which the size of the pool is planned")
    max_candidates: int | None = Field(
        None,
        gt=0,
        alias="max-candidates",
        description="largest pool; default: 20 times --n; settings that need more are left out",
    )
    actors: int | None = Field(None, gt=0, description="generator replicas; default: autoscale from 1 to what fits")
    actor_cpus: int = Field(1, gt=0, description="threads of one replica without GPU, cores")
    actor_gpus: float | None = Field(
        None, ge=0, description="GPUs of one replica, a fraction shares one; default: 1 where the cluster has any"
    )
    search: SearchSettings = SearchSettings()
    extraction: ExtractionSettings = ExtractionSettings()
    judge: JudgeSettings = JudgeSettings()
    metrics: MetricSettings = MetricSettings()
    images: int = Field(8, gt=0, description="images in each row of the report")


class FakeWeightingSettings(Section):
    """Which generated images a GAN trains on (Algorithm 3): those of its D step and of its G step are drawn with these weights."""

    threshold: str | None = Field(
        None, description="tau of generated images, a percentile of the real set or a density; default: the weighting's"
    )
    weight: float | None = Field(
        None, gt=0, description="w of generated images above it; default: 1 / weighting.weight; 1: all of them"
    )
    max_candidates: int = Field(
        2000, gt=0, description="stop where an image of a batch is still rejected after so many"
    )


class TrainingSettings(Section):
    """The optimisation. Sizes are those of one step of all workers together."""

    batch_size: int = Field(64, gt=0, description="real images of one step, of all workers together")
    accumulate: int = Field(1, gt=0, description="passes that a worker's share of a step is cut into, to save memory")
    learning_rate: float = Field(
        1e-4, gt=0, description="of Adam, after warm-up; of a GAN's generator and discriminator"
    )
    warmup_steps: int = Field(10, ge=0, description="steps over which the learning rate rises to it")
    clip: float = Field(1.0, gt=0, description="diffusion: largest norm of the gradient")
    ema_decay: float = Field(
        0.999, ge=0, lt=1, description="of the average of the weights, which is what is saved; lower in the first steps"
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="diffusion: arithmetic of the network (autocast); weights and averages stay fp32"
    )
    gradient_checkpointing: bool = Field(
        False, description="diffusion: compute activations twice instead of keeping them"
    )
    min_snr: float | None = Field(
        None, gt=0, description="diffusion: gamma of the min-SNR loss weights, e.g. 5; default: the plain loss"
    )
    r1_weight: float = Field(1.0, ge=0, description="GAN: gamma of the R1 penalty on real images")
    r1_interval: int = Field(
        16, gt=0, description="GAN: steps from one R1 penalty to the next; it is scaled to make up"
    )
    mirror: bool = Field(False, description="show half of the real images mirrored")
    resize: Literal["crop", "none"] = Field(
        "crop", description="crop: shorter side to the model's, centre cut out; none: refuse images of other sizes"
    )


class InLoopSettings(Section):
    """Evaluation while training, in the index's feature space, from the same seeds each time."""

    every: int = Field(100, gt=0, description="steps between two evaluations; checkpoints are written there")
    n: int = Field(500, gt=0, description="images generated for one")
    n_real: int = Field(10_000, gt=0, description="real images that they are measured against, at most")
    chunk: int = Field(50, gt=0, description="images generated as one batch")
    metric: Literal["auto", "frechet_distance", "precision", "recall", "density", "coverage"] = Field(
        "auto",
        description="by which the best step is chosen; auto: precision where weighting.weight is above 1, recall where it is below, "
        "frechet_distance for other weightings",
    )
    patience: int = Field(0, ge=0, description="stop after so many evaluations without a better one; 0: never")
    metrics: MetricSettings = MetricSettings()


class FinetuneSettings(WorkflowSettings):
    """Train a generator further, on real images drawn by their densities."""

    index: str | None = Field(None, description="output of build_index: the real set; local directory or s3://")
    checkpoint: str | None = Field(
        None, description="weights of the index's extractor, where they are not at the place they had then"
    )
    generator: GeneratorSettings = GeneratorSettings()
    discriminator: str | None = Field(
        None, description="torchscript: file of the discriminator, images and labels to logits; local or s3://"
    )
    data: DataSettings = DataSettings()
    weighting: WeightingSettings = WeightingSettings()
    fake: FakeWeightingSettings = FakeWeightingSettings()
    steps: int = Field(500, gt=0, description="optimiser steps")
    workers: int = Field(1, gt=0, description="data-parallel processes that share each batch")
    worker_cpus: int = Field(1, gt=0, description="threads of one worker without GPU, cores")
    worker_gpus: float | None = Field(
        None, ge=0, description="GPUs of one worker; default: 1 where the cluster has any"
    )
    training: TrainingSettings = TrainingSettings()
    evaluation: InLoopSettings = InLoopSettings()
    checkpoint_every: int = Field(
        100, gt=0, description="steps between two checkpoints: what is lost at most when a worker dies"
    )
    keep: int = Field(2, gt=0, description="checkpoints kept to go on from; the averages of all evaluations stay")
    merge: Literal["none", "best-of"] = Field(
        "none",
        description="best-of: search for the combination of the saved averages that is best, and save it if it beats the best step",
    )
    merge_candidates: int = Field(64, gt=1, description="combinations that --merge tries")
    seed: int = Field(0, ge=0, description="of the run: images drawn, noise, latents, labels")
    images: int = Field(24, gt=0, description="images in each grid of the report, from the same seeds before and after")


RELEASE_METRICS = (  # that a gate may name, beside those of evaluate
    "n",
    "likely_copies",
    "acceptance_rate",
)


SET_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")


class RecipeSettings(WeightingSettings):
    """One curated set of a release: what is asked for, and how much of it."""

    name: str = Field(description="of the set: a folder of the release")
    n: int = Field(gt=0, description="accepted images")
    labels: str | None = Field(None, description="class numbers, as generator.labels; default: those of the generator")
    seed: int = Field(0, ge=0, description="of its candidates")
    score: Literal["predictor", "index", "both"] = Field("both", description="what decides, as generate's")
    drop_copies: bool = Field(False, description="do not accept likely copies of real images")

    @field_validator("name")
    @classmethod
    def _folder(cls, value: str) -> str:
        if not SET_NAME.fullmatch(value):
            raise ValueError("expected a folder name of a-z, 0-9, '.', '_' and '-'")
        return value

    @property
    def weighting(self) -> WeightingSettings:
        """As generate has it."""
        return WeightingSettings(**{name: getattr(self, name) for name in WeightingSettings.model_fields})


class GateSettings(Section):
    """A condition for a release to become the latest one."""

    metric: str = Field(description="a metric of evaluate; or n, likely_copies (share), acceptance_rate")
    recipe: str | None = Field(None, description="of this set; default: of each")
    space: Literal["index", "judge"] = Field("index", description="where it is measured")
    min: float | None = Field(None, description="at least")
    max: float | None = Field(None, description="at most")
    max_increase: float | None = Field(None, ge=0, description="over the latest release, as a share of its value")
    max_decrease: float | None = Field(None, ge=0, description="under the latest release, as a share of its value")

    @model_validator(mode="after")
    def _known(self) -> GateSettings:
        if self.metric not in (known := [*METRICS, *RELEASE_METRICS]):
            raise ValueError(
                f"unknown metric {self.metric!r}; {nearest_name(self.metric, known)} (one of {', '.join(known)})"
            )
        if all(bound is None for bound in (self.min, self.max, self.max_increase, self.max_decrease)):
            raise ValueError(f"gate on {self.metric} sets no bound; give min, max, max_increase or max_decrease")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(
                f"gate on {self.metric}: min {self.min:g} is above max {self.max:g}; no release can hold it"
            )
        return self


class ReleaseEvaluationSettings(Section):
    """How the sets of a release are measured, as evaluate does."""

    n: int | None = Field(None, gt=0, description="images of each set; default: as many as the smallest has")
    n_real: int | None = Field(None, gt=0, description="real images that they are measured against; default: all")
    judge: JudgeSettings = JudgeSettings()
    metrics: MetricSettings = MetricSettings()
    extraction: ExtractionSettings = ExtractionSettings()


class GenerationSettings(Section):
    """How the samples of every recipe are made, as generate's settings of the same names."""

    chunk: int = Field(64, gt=0, description="candidates generated as one batch; part of the samples' identity")
    part_rows: int = Field(1000, gt=0, description="accepted images per committed part, about")
    pilot: int = Field(256, gt=0, description="candidates of the pilot")
    actors: int | None = Field(None, gt=0, description="generator replicas; default: autoscale from 1 to what fits")
    actor_cpus: int = Field(1, gt=0, description="threads of one replica without GPU, cores")
    actor_gpus: float | None = Field(
        None, ge=0, description="GPUs of one replica; default: 1 where the cluster has any"
    )
    max_candidates: int | None = Field(None, gt=0, description="stop before more than these are generated for a recipe")


class LockSettings(Section):
    """The run lock of an output."""

    lease_s: float = Field(
        900, gt=1, le=MAX_LEASE_S, description="a run that has not renewed its lease for so long is taken for dead, s"
    )


class CurateSettings(WorkflowSettings):
    """Run the scheduled job: index what is new, generate, measure, release.

    Exit codes: 0 released, 3 nothing new, 4 held back by a gate, 2 wrong settings or
    input, 130 interrupted, 1 anything else; of --verify and --dry-run 0 where all is well.
    """

    data: DataSettings = DataSettings()
    features: FeatureSettings = FeatureSettings()
    index: IndexSettings = IndexSettings()
    density: DensitySettings = DensitySettings()
    estimator: EstimatorSettings = EstimatorSettings()
    update: UpdateSettings = UpdateSettings()
    generator: GeneratorSettings = GeneratorSettings()
    generation: GenerationSettings = GenerationSettings()
    recipes: list[RecipeSettings] = Field([], description="sets of a release, each as below")
    evaluation: ReleaseEvaluationSettings = ReleaseEvaluationSettings()
    gates: list[GateSettings] = Field([], description="conditions for a release to become the latest, each as below")
    keep: int = Field(3, gt=0, description="index versions, and sets of candidates, that are kept; releases always are")
    lock: LockSettings = LockSettings()
    verify: str | None = Field(None, description="a folder of releases/: hold its files to their record, then stop")

    @model_validator(mode="after")
    def _consistent(self) -> CurateSettings:
        names = [recipe.name for recipe in self.recipes]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"recipes: {twice[0]!r} is named twice")
        for recipe in self.recipes:
            if self.evaluation.n is not None and recipe.n < self.evaluation.n:
                raise ValueError(
                    f"recipes: {recipe.name!r} has n {recipe.n}, evaluation.n is {self.evaluation.n}; raise the recipe's n"
                )
        for gate in self.gates:
            if gate.recipe is not None and gate.recipe not in names:
                raise ValueError(f"gates: unknown recipe {gate.recipe!r}; {nearest_name(gate.recipe, names)}")
            for recipe in self.recipes:
                if (
                    gate.metric == "n"
                    and gate.min is not None
                    and gate.recipe in (None, recipe.name)
                    and recipe.n < gate.min
                ):
                    raise ValueError(
                        f"gates: n of {recipe.name!r} is {recipe.n}, the gate wants {gate.min:g}; raise its n"
                    )
            if gate.space == "judge" and self.evaluation.judge.model == "none":
                raise ValueError(f"gates: {gate.metric} in the judge's space, but evaluation.judge.model is none")
        return self


_LISTED: Mapping[str, type[Section]] = {
    "recipes": RecipeSettings,
    "gates": GateSettings,
}  # settings that are lists of sections

WORKFLOWS: Sequence[type[WorkflowSettings]] = (
    BuildIndexSettings,
    GenerateSettings,
    PerturbSettings,
    EvaluateSettings,
    TradeoffSettings,
    FinetuneSettings,
    CurateSettings,
)

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "paper": {
        # timm 0.5.4, which the authors used, knew these weights as vit_base_patch16_224; today that name means newer ones
        "features": {
            "model": "vit_base_patch16_224.augreg_in21k_ft_in1k",
            "preprocess": "paper",
            "precision": "fp32",
        },
        "index": {"kind": "flat"},
        "density": {"k": 20, "volume_dim": 1.0, "exact": True},
        "estimator": {
            "hidden": (512, 256, 128),
            "learning_rate": 1e-3,
            "batch_size": 64,
            "epochs": 100,
            "patience": 0,
            "standardize": False,
            "target": "density",
            "split": "random",
            "holdout_fraction": 0.2,
        },
    },
    "million": {
        "features": {"precision": "bf16", "batch_size": 128, "part_rows": 8192},
        "density": {"block_rows": 131_072},
        "estimator": {"batch_size": 4096, "epochs": 20, "patience": 3},
    },
}

Settings = TypeVar("Settings", bound=WorkflowSettings)


def setting_names(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted name of every leaf setting, e.g. `data.source`."""
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from setting_names(annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{field.alias or name}"


def nearest_name(name: str, known: Sequence[str], of: str = "settings") -> str:
    """`did you mean 'x'?` or a pointer to --help, for an unknown name of these."""
    canonical = {candidate.replace("-", "_"): candidate for candidate in known}
    wanted = name.replace("-", "_")
    match = difflib.get_close_matches(wanted, list(canonical), n=1, cutoff=0.6)
    if not match:  # right leaf in the wrong section, or without its section
        leaf = wanted.rpartition(".")[2]
        by_leaf = {candidate.rpartition(".")[2]: candidate for candidate in canonical}
        match = [by_leaf[m] for m in difflib.get_close_matches(leaf, list(by_leaf), n=1, cutoff=0.7)]
    return f"did you mean '{canonical[match[0]]}'?" if match else f"see --help for all {of}"


EXAMPLES = {  # as JSON on the command line
    "recipes": '[{"name": "typical", "n": 1000, "threshold": "p80", "weight": 20}]',
    "gates": '[{"metric": "precision", "recipe": "typical", "min": 0.6}]',
}


def _help_of_items(name: str, section: type[Section]) -> str:
    """The fields of what a list of sections holds, in the form of the options above it, which argparse does not know."""
    fields = sorted(section.model_fields.items(), key=lambda item: not item[1].is_required())
    lines = [f"each of {name}, in a file or as --{name} '{EXAMPLES[name]}':"]
    for key, field in fields:
        choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
        told = f"{{{','.join(choices)}}} " if choices else ""
        told += str(field.description)
        if field.is_required():
            told += " (required)"
        elif field.default is not None:
            told += f" (default: {field.default})"
        lines += textwrap.wrap(told, 79, initial_indent=f"  {key:<20}  ", subsequent_indent=" " * 24)
    return "\n".join(lines)


class _Parser(argparse.ArgumentParser):
    """argparse that reports a wrong option as one line with the nearest name."""

    known: Sequence[str] = ()

    def spell_out_letters(self) -> None:
        """Let a setting of one letter be written --n like all others, where pydantic-settings offers -n alone."""
        for action in self._actions:
            for option in [o for o in action.option_strings if len(o) == 2 and o != "-h"]:
                action.option_strings = [*action.option_strings, f"-{option}"]
                self._option_string_actions[f"-{option}"] = action

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ").split()[0] if "unrecognized" in message else None
        if unknown and unknown.startswith("-"):
            name = unknown.lstrip("-").partition("=")[0]
            message = f"unknown setting --{name}; {nearest_name(name, self.known)}"
        elif unknown:
            message = f"unexpected argument {unknown!r}; settings are written --section.name value"
        print(shown(f"{self.prog}: error: {message}"), file=sys.stderr)
        raise SystemExit(EXIT_BAD_INPUT)


def _flat_keys(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat_keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


@dataclass
class _Level:
    """A list or a mapping of a YAML file while it is read: the keys so far, and whether the next node is one."""

    keys: set[str] | None
    anchored: bool
    at_key: bool = True


def _check_yaml(data: bytes, where: str) -> None:
    """Hold a file to what settings need, before anything is made of it.

    Raises:
        UserError: it nests or repeats itself too much, or has a key twice; names the place.
        yaml.YAMLError: it is no YAML.
    """
    levels: list[_Level] = []
    aliases = 0
    for event in yaml.parse(data, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionEndEvent):
            levels.pop()
        if not isinstance(event, yaml.NodeEvent):
            continue
        fault = _fault_of_key(levels[-1], event) if levels else ""
        if isinstance(event, yaml.ScalarEvent) and event.style is None and _LONG_NUMBER.fullmatch(event.value):
            fault = "a number of so many digits"
        if isinstance(event, yaml.AliasEvent):
            aliases += 1
            if aliases > MAX_ALIASES or any(level.anchored for level in levels):
                fault = "what is repeated repeats something itself, or too much is"
        elif isinstance(event, yaml.CollectionStartEvent):
            keys: set[str] | None = set() if isinstance(event, yaml.MappingStartEvent) else None
            levels.append(_Level(keys, event.anchor is not None))
            fault = fault or ("is nested too deeply" if len(levels) > MAX_DEPTH else "")
        if fault:
            mark = event.start_mark
            place = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
            raise UserError(f"{where}: {place}{fault}; mend the file")


def _fault_of_key(level: _Level, event: yaml.NodeEvent) -> str:
    """That a node of the level is a key that it has already, in either spelling; else nothing."""
    is_key, level.at_key = level.at_key, not level.at_key
    if level.keys is None or not is_key or not isinstance(event, yaml.ScalarEvent):
        return ""
    key = str(event.value).replace("-", "_")
    if key in level.keys:
        return f"{printable(key)[:80]!r} is set twice"
    level.keys.add(key)
    return ""


def _read_config(path: str, where: str) -> bytes:
    from pd_core import storage

    try:
        with storage.explained(where):
            return storage.read_file(path, where, CONFIG_BYTES)
    except UserError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise UserError(f"{where}: no such file; check the path") from None
        raise


def _read_yaml(path: str, known: Sequence[str]) -> dict[str, Any]:
    where = f"--config {path}"
    data = _read_config(path, where)
    try:
        _check_yaml(data, where)
        values = yaml.safe_load(data) or {}
    except UserError:
        raise
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # of a date or a number that none is
        raise UserError(f"{where}: not YAML ({' '.join(str(error).split())}); mend the file") from None
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: expected 'section:' entries, found {type(values).__name__}; mend the file")
    accepted = {name.replace("-", "_") for name in known}
    for key in _flat_keys(values):
        path_of = key.replace("-", "_").split(".")
        # a setting that is itself a mapping holds keys of its own
        if not any(".".join(path_of[:depth]) in accepted for depth in range(1, len(path_of) + 1)):
            raise UserError(f"--config {path}: unknown setting '{key}'; {nearest_name(key, known)}")
    return values


def _refuse_unknown_environment(known: Sequence[str]) -> None:
    everywhere = [*known, *(name for workflow in WORKFLOWS for name in setting_names(workflow))]  # one shell, many runs
    accepted = {ENV_PREFIX + name.replace(".", "__").replace("-", "_").upper() for name in everywhere}
    for variable in os.environ:
        if variable.upper().startswith(ENV_PREFIX) and variable.upper() not in accepted:
            name = variable[len(ENV_PREFIX) :].lower().replace("__", ".")
            raise UserError(f"environment {variable}: unknown setting '{name}'; {nearest_name(name, known)}")


def _explain(error: ValidationError) -> str:
    lines = []
    for item in error.errors():
        name = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden" and (of := _LISTED.get(str(item["loc"][0]))):
            message = f"unknown setting; {nearest_name(str(item['loc'][-1]), list(of.model_fields))}"
        found = f" (found {item['input']!r})" if item["loc"] and not isinstance(item["input"], BaseModel | dict) else ""
        found = redact(re.sub(r"//.*@", "//***@", found))  # a URL with a password in it, which may hold a slash
        lines.append(f"{name}: {message[0].lower()}{message[1:]}{found}" if name else message)
    return "; ".join(lines)


def _is_list(model: type[BaseModel], name: str) -> bool:
    """Whether a setting of the workflow itself, not of a section, is a list."""
    return any((f.alias or n) == name and get_origin(f.annotation) is list for n, f in model.model_fields.items())


def _spread(argv: Sequence[str], lists: Collection[str]) -> list[str]:
    """`--samples a b` as `--samples a --samples b`, which is what pydantic-settings reads."""
    spread: list[str] = []
    option, waiting = "", False  # the list that is being given; whether its first value is still to come
    for argument in argv:
        if argument.startswith("--"):
            name, given, _ = argument[2:].partition("=")
            option = argument.partition("=")[0] if name in lists else ""
            waiting = bool(option) and not given
        elif option and not waiting:
            spread.append(option)
        else:
            waiting = False
        spread.append(argument)
    return spread


def load(settings_class: type[Settings], argv: Sequence[str], prog: str) -> Settings:
    """Resolve settings from presets, YAML, environment and command line.

    Args:
        settings_class: the workflow's settings.
        argv: arguments without the program name.
        prog: program name shown by --help.

    Raises:
        UserError: a file, a variable or a value is wrong.
        SystemExit: --help (0), or an unknown option (2, after one line on standard error).
    """
    known = list(setting_names(settings_class))
    _refuse_unknown_environment(known)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", default=os.environ.get(f"{ENV_PREFIX}CONFIG"))
    first.add_argument("--preset", default=os.environ.get(f"{ENV_PREFIX}PRESET"))
    early, _ = first.parse_known_args([a for a in argv if a not in ("-h", "--help")])
    from_yaml = _read_yaml(early.config, known) if early.config else {}
    preset = early.preset or from_yaml.get("preset", "default")
    from_preset = dict(PRESETS.get(preset, {})) if "preset" in settings_class.model_fields else {}

    parser = _Parser(prog=prog, description=inspect.getdoc(settings_class), allow_abbrev=False)
    parser.known = known
    if listed := [name for name in _LISTED if name in settings_class.model_fields]:
        parser.formatter_class = argparse.RawDescriptionHelpFormatter  # of the epilog, which has its lines
        parser.epilog = "\n\n".join(_help_of_items(name, _LISTED[name]) for name in listed)

    class Resolved(settings_class):  # type: ignore[valid-type, misc]
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            # pydantic-settings puts the command line in front of these by itself
            return (
                EnvSettingsSource(settings_cls),
                InitSettingsSource(settings_cls, from_yaml),
                InitSettingsSource(settings_cls, from_preset),
            )

    argv = _spread(argv, {name for name in known if _is_list(settings_class, name)})
    cli: CliSettingsSource[Any] = CliSettingsSource(
        Resolved,
        root_parser=parser,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
    )
    parser.spell_out_letters()
    try:
        resolved = Resolved(_cli_settings_source=cli(args=list(argv)))
        values = {name: getattr(resolved, name) for name in settings_class.model_fields}
        return cast(Settings, settings_class.model_construct(**values))
    except SettingsError as error:
        raise UserError(f"settings: {_told_unparsed(error)}") from None
    except ValidationError as error:
        raise UserError(f"settings: {_explain(error)}") from None
    except RecursionError:
        raise UserError(f"settings: {_deepest(argv)}: is nested too deeply; write it in a --config file") from None


def _deepest(argv: Sequence[str]) -> str:
    """The option or variable whose value opens most brackets."""
    named = {argument.partition("=")[0]: argument for argument in argv}
    named |= {option: value for option, value in pairwise(argv) if option.startswith("--")}
    named |= {name: value for name, value in os.environ.items() if name.upper().startswith(ENV_PREFIX)}
    return max(named, key=lambda name: named[name].count("[") + named[name].count("{"))[:80]


def _told_unparsed(error: SettingsError) -> str:
    """Of a value that is no JSON, where a list or a section is wanted."""
    found = re.search(r'field "(\w+)" from source "(\w+)"', str(error))
    if found is None:
        return " ".join(str(error).split())
    name = f"{ENV_PREFIX}{found[1].upper()}" if found[2].startswith("Env") else f"--{found[1]}"
    why = "" if error.__cause__ is None else f" ({' '.join(str(error.__cause__).split())})"
    return f"{name}: is not JSON{why}; names in it are quoted, as --help shows, or write it in a --config file"


def made(settings_class: type[Settings], **values: Any) -> Settings:
    """Settings of a workflow that another one starts: these values, defaults for the others, the environment unread.

    Raises:
        UserError: as `load`.
    """

    class Given(settings_class):  # type: ignore[valid-type, misc]
        @classmethod
        def settings_customise_sources(
            cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, **_: Any
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return (init_settings,)

    try:
        resolved = Given(**values)
    except ValidationError as error:
        raise UserError(f"settings: {_explain(error)}") from None
    return cast(
        Settings, settings_class.model_construct(**{n: getattr(resolved, n) for n in settings_class.model_fields})
    )


def to_yaml(settings: BaseModel) -> str:
    """Resolved settings as YAML that `--config` accepts again."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)
