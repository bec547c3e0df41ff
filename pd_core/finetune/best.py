"""The stage `best/`: the fine-tuned generator in the format that came in, which every other workflow opens as it is."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pd_core.core import artifacts, files
from pd_core.core.settings.generate import GeneratorSettings
from pd_core.engine import tasks
from pd_core.finetune import checkpoints
from pd_core.finetune.models import opened
from pd_core.finetune.protocol import Share


@dataclass(frozen=True)
class Source:
    """Which weights: a part of the training or merging stage.

    Attributes:
        uri: of the stage. part: name. fingerprint: of the stage.
        companions: uri of what is saved with them, or None. step: of the training. merged: a combination of several steps.
    """

    uri: str
    part: str
    companions: str | None
    fingerprint: str
    step: int
    merged: bool


def stage_of(output: str, source: Source) -> artifacts.Stage:
    """The stage under `output`."""
    identity = {"from": source.fingerprint, "step": source.step, "merged": source.merged}
    return artifacts.Stage(files.join(output, "best"), "best", 1, identity)


def run(stage: artifacts.Stage, spec: opened.ModelSpec, source: Source) -> tuple[list[artifacts.Part], dict[str, Any]]:
    """Write the generator's files, in a Ray task; returns the parts and totals to commit."""
    tasks.get(tasks.task(_write).remote(stage, spec, source))
    parts = list(stage.finished_parts().values())
    return parts, {"step": source.step, "merged": source.merged, "bytes": sum(part.bytes for part in parts)}


def _write(stage: artifacts.Stage, spec: opened.ModelSpec, source: Source) -> None:
    model = spec.open(Share(0, 1, "cpu", 1))
    weights = checkpoints.read_weights(files.join(source.uri, source.part))
    if source.companions is not None:
        model.load_companions(checkpoints.read_weights(source.companions))
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder, weights)
        for file in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            stage.write_part(file.relative_to(folder).as_posix(), file.read_bytes(), 0)


def result_of(generator: GeneratorSettings, folder: str) -> GeneratorSettings:
    """Settings that open what was written into a folder from what `generator` opened."""
    if generator.kind == "python":
        arguments = {**generator.arguments, "weights": files.join(folder, "weights.safetensors")}
        return generator.model_copy(update={"arguments": arguments})
    name = {"diffusers": "", "torchscript": "generator.pt", "stylegan": "network.pkl"}[generator.kind]
    return generator.model_copy(update={"path": files.join(folder, name) if name else folder})
