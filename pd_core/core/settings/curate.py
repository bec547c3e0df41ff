"""Settings of curate: recipes, gates, and how a release is measured."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import (
    Field,
    field_validator,
    model_validator,
)

from pd_core.core.schemas import METRICS
from pd_core.core.settings.base import LockSettings, ResolvedSettings, Section, WorkflowSettings, nearest_name
from pd_core.core.settings.data import DataSettings
from pd_core.core.settings.evaluate import SpaceSettings
from pd_core.core.settings.generate import ActorSettings, GeneratorSettings, WeightingSettings
from pd_core.core.settings.index import (
    DensitySettings,
    EstimatorSettings,
    FeatureSettings,
    IndexSettings,
    UpdateSettings,
)

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


class ReleaseEvaluationSettings(Section, SpaceSettings):
    """How the sets of a release are measured, as evaluate does."""

    n: int | None = Field(None, gt=0, description="images of each set; default: as many as the smallest has")
    n_real: int | None = Field(None, gt=0, description="real images that they are measured against; default: all")


class GenerationSettings(Section, ActorSettings):
    """How the samples of every recipe are made, as generate's settings of the same names."""

    chunk: int = Field(64, gt=0, description="candidates generated as one batch; part of the samples' identity")
    part_rows: int = Field(1000, gt=0, description="accepted images per committed part, about")
    pilot: int = Field(256, gt=0, description="candidates of the pilot")
    max_candidates: int | None = Field(None, gt=0, description="stop before more than these are generated for a recipe")


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
                    f"recipes: {recipe.name!r} has n {recipe.n}, evaluation.n is {self.evaluation.n}; raise the "
                    "recipe's n"
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


class ResolvedCurate(ResolvedSettings, CurateSettings):
    """Of curate, checked."""
