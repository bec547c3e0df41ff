"""Settings of what is read: the source, its limits, and the extractor that turns images into features."""

from __future__ import annotations

from typing import Literal

from pydantic import (
    Field,
    field_validator,
    model_validator,
)

from pd_core.core.settings.base import MIB, Section

INCEPTION = "inception-v3-compat"  # torch-fidelity's name for the network of FID
SourceKind = Literal["auto", "directory", "glob", "parquet", "webdataset"]


class DataSettings(Section):
    """Where the images are and which of them are acceptable."""

    source: str | None = Field(
        None, description="images: a directory, a glob, Parquet file(s) or WebDataset tar(s); local or s3://"
    )
    kind: SourceKind = Field("auto", description="how to read the source; auto decides by its names")
    labels: str = Field(
        "none",
        description="none; parent (name of the image's folder); column:NAME (Parquet); member:EXT (tar, e.g. "
        "member:cls)",
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
        description="larger images are quarantined undecoded, px; decoding one may take 28 bytes for each, 4 for each "
        "of max_image_bytes, and 768 MiB",
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
