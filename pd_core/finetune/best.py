"""The stage `best/`: the fine-tuned generator in the format that came in, which every other workflow opens as it is."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from pd_core.core import artifacts, files
from pd_core.core.settings.generate import GeneratorSettings
from pd_core.engine import tasks
from pd_core.finetune import checkpoints, merge
from pd_core.finetune.models import opened
from pd_core.finetune.protocol import Share


def stage_of(output: str, trained: artifacts.Artifact, merged: artifacts.Artifact | None) -> artifacts.Stage:
    """The stage under `output`: of the combination where there is one that beats the best step."""
    chosen = merged if merged is not None and merged.totals["beats"] else trained
    identity = {"from": chosen.fingerprint, "step": trained.totals["best"], "merged": chosen is merged}
    return artifacts.Stage(files.join(output, "best"), "best", 1, identity)


def run(
    stage: artifacts.Stage, output: str, spec: opened.ModelSpec, trained: artifacts.Artifact
) -> tuple[list[artifacts.Part], dict[str, Any]]:
    """Write the generator's files, in a Ray task; returns the parts and totals to commit."""
    step, merged = stage.identity["step"], stage.identity["merged"]
    training, companions = files.join(output, "training"), checkpoints.companions_name(step)
    weights = files.join(training, checkpoints.average_name(step))
    if merged:
        weights = files.join(output, "merging", merge.MERGED)
    beside = files.join(training, companions) if companions in {part.name for part in trained.parts} else None
    tasks.get(tasks.task(_write).remote(stage, spec, weights, beside))
    parts = list(stage.finished_parts().values())
    return parts, {"step": step, "merged": merged, "bytes": sum(part.bytes for part in parts)}


def _write(stage: artifacts.Stage, spec: opened.ModelSpec, weights: str, companions: str | None) -> None:
    """The model with weights of a part, and a GAN's networks in training of another."""
    model = spec.open(Share(0, 1, "cpu", 1))
    if companions is not None:
        model.load_companions(checkpoints.read_weights(companions))
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder, checkpoints.read_weights(weights))
        for file in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            stage.write_part(file.relative_to(folder).as_posix(), file.read_bytes(), 0)


def result_of(generator: GeneratorSettings, folder: str) -> GeneratorSettings:
    """Settings that open what was written into a folder from what `generator` opened."""
    if generator.kind == "python":
        arguments = {**generator.arguments, "weights": files.join(folder, "weights.safetensors")}
        return generator.model_copy(update={"arguments": arguments})
    name = {"diffusers": "", "torchscript": "generator.pt", "stylegan": "network.pkl"}[generator.kind]
    return generator.model_copy(update={"path": files.join(folder, name) if name else folder})
