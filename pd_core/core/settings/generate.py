"""Settings of generate and perturb: the generator, the weighting, how many images."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import (
    BaseModel,
    Field,
    PositiveInt,
    model_validator,
)

from pd_core.core.settings.base import ResolvedSettings, SearchSettings, Section, WorkflowSettings

PERTURB_EPSILON, PERTURB_STEPS = 0.1, 10  # the reference of Algorithm 1
GeneratorKind = Literal["diffusers", "stylegan", "torchscript", "python"]
TRUNCATION_SETTINGS: dict[GeneratorKind, str] = {
    "stylegan": "truncation",
    "torchscript": "latent_bound",
}  # of each kind that has it
WeightingKind = Literal["two_level", "quantiles", "match", "polarity", "magnet", "none"]


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
        description="torchscript: entries of a latent beyond +- this are drawn again, BigGAN's truncation; e.g. 0.5; "
        "default: none",
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
        description="two_level: the paper's, one threshold; quantiles: one weight per bin of the real densities; "
        "match: the real set's densities; polarity: exp(polarity * v), v the log-volume of the generator at the "
        "sample, whatever its density; magnet: polarity 1, uniform on what the generator can make; none: as the "
        "generator draws",
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
        description="match: bins of equally many real images; polarity, magnet: of equally many pilot candidates, "
        "steps of the weight",
    )
    max_weight: float = Field(
        20.0,
        gt=1,
        description="match: largest weight, 1 being the generator's mean; the pilot's acceptance rate is at least 1 "
        "over it",
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
    def statistic(self) -> Literal["density", "log_volume"]:
        """Column of `samples/` that the weight is a function of."""
        return "log_volume" if self.kind in ("polarity", "magnet") else "density"

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


class ActorSettings(BaseModel):
    """The processes that hold a generator."""

    actors: int | None = Field(None, gt=0, description="generator replicas; default: autoscale from 1 to what fits")
    actor_cpus: int = Field(1, gt=0, description="threads of one replica without GPU, cores")
    actor_gpus: float | None = Field(
        None, ge=0, description="GPUs of one replica, a fraction shares one; default: 1 where the cluster has any"
    )


class GeneratingSettings(WorkflowSettings):
    """What every workflow takes that sets a generator beside a real set."""

    index: str | None = Field(None, description="output of build_index: the real set; local directory or s3://")
    checkpoint: str | None = Field(
        None, description="weights of the index's extractor, where they are not at the place they had then"
    )
    generator: GeneratorSettings = GeneratorSettings()


class CandidateSettings(GeneratingSettings, ActorSettings):
    """What every workflow takes that generates candidates and scores them."""

    seed: int = Field(0, ge=0, description="of the run; candidate i's image depends on it, on i and on the generator")
    search: SearchSettings = SearchSettings()


class CopySettings(BaseModel):
    """Which images are likely copies."""

    copies_quantile: float = Field(
        0.01, ge=0, le=1, description="likely copy: nearer to a real image than this quantile of real nearest distances"
    )


class GenerateSettings(CandidateSettings, CopySettings):
    """Generate images, accepted or rejected by their pseudo densities."""

    source: str | None = Field(
        None, description="place of the index's images, where its record leads to another bucket than its own"
    )
    weighting: WeightingSettings = WeightingSettings()
    n: int | None = Field(None, gt=0, description="accepted images wanted")
    score: Literal["predictor", "index", "both"] = Field(
        "predictor",
        description="what decides: predictor; index (true k-NN); both: the predictor decides, the accepted are scored "
        "by the index too",
    )
    chunk: int = Field(64, gt=0, description="candidates generated as one batch; part of the samples' identity")
    part_rows: int = Field(1000, gt=0, description="accepted images per committed part, about; fewer where n is small")
    pilot: int = Field(256, gt=0, description="candidates of the pilot, rounded up to whole chunks")
    max_candidates: int | None = Field(
        None, gt=0, alias="max-candidates", description="stop before more than these are generated"
    )
    max_hours: float | None = Field(None, gt=0, alias="max-hours", description="stop this run after so many hours")
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
                "score index, the decision by true neighbors, has no meaning for weighting.kind "
                f"{self.weighting.kind!r}, which decides by the log-volume; use predictor or both"
            )
        return self


class PerturbSettings(CandidateSettings, CopySettings):
    """Move samples of a generator towards common or unique ones."""

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
    chunk: int = Field(8, gt=0, description="samples perturbed as one batch; part of the rows' identity")
    part_rows: int = Field(64, gt=0, description="rows per committed part, rounded up to whole chunks")
    images: int = Field(24, gt=0, description="samples shown in the report, before and after")

    @property
    def directions(self) -> tuple[str, ...]:
        """Those of one sample, in the order of its rows."""
        return ("down", "up") if self.direction == "both" else (self.direction,)


class ResolvedGenerate(ResolvedSettings, GenerateSettings):
    """Of generate, checked."""

    index: str
    n: int


class ResolvedPerturb(ResolvedSettings, PerturbSettings):
    """Of perturb, checked."""

    index: str
    n: int
