"""What settings classes are built of: a section that refuses unknown keys, and the sections that all commands share."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    SettingsConfigDict,
)

from pd_core.core.errors import redact

ENV_PREFIX = "PD_CORE_"
MIB = 1 << 20
MAX_LEASE_S = 7 * 86_400.0  # for so long a run that died may block the next


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
                "must not hold a query (what follows a ?), which may be a signature or a token, since settings are "
                "printed and stored; name the file or bucket itself, credentials come from the environment"
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


class ResolvedSettings(WorkflowSettings):
    """Settings that a workflow has checked; its class of them tells what is set by then, and paths are absolute."""

    output: str


class LockSettings(Section):
    """The run lock of an output."""

    lease_s: float = Field(
        900, gt=1, le=MAX_LEASE_S, description="a run that has not renewed its lease for so long is taken for dead, s"
    )


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and leaves of nested settings or totals."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


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
