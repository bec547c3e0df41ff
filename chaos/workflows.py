"""What is disturbed: one line for each workflow, with tiny inputs that are made once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pd_core.core import errors
from pd_core.curate import releases
from pd_core.engine.runs import RUN
from tests import tiny, tiny_generators, toy_generator

ROOT = tiny.ROOT


@dataclass(frozen=True)
class Inputs:
    """Where the inputs lie: images and index are local paths or s3:// URIs.

    Attributes:
        images: 150 images of 16 px in three folders, and three files that are none.
        index: output of build_index on them.
        few: half of the images, as a set to evaluate.
        checkpoint: of the tiny extractor. bars: a differentiable TorchScript generator. ddpm: a tiny diffusion
            pipeline.
    """

    images: str
    index: str
    few: str
    checkpoint: str
    bars: str
    ddpm: str


Settings = Mapping[str, Any]
TOY = {
    "generator.kind": "python",
    "generator.path": f"{toy_generator.__file__}:make",
    "generator.arguments": json.dumps({"pause_s": 0.05}),  # so that there is time to be killed in
}
BARS = {"generator.kind": "torchscript", "generator.latent_shape": "[4]"}
DDPM = {"generator.scheduler": "DDIMScheduler", "generator.steps": 2}
SMALL = {"features.batch_size": 8, "features.part_rows": 16, "density.k": 5, "density.block_rows": 64}
SHORT = {"estimator.epochs": 3, "report.images": 4, "report.neighbors": 2}
EXTRACTION = {"extraction.batch_size": 8, "extraction.part_rows": 16}
TRAINING = {"training.batch_size": 16, "training.learning_rate": 1e-3, "checkpoint_every": 2}
CHAIN = {
    "recipes": json.dumps(
        [
            {"name": "typical", "n": 40, "threshold": "p60", "weight": 10},
            {"name": "varied", "n": 30, "threshold": "p40", "weight": 0.2},
        ]
    ),
    "gates": json.dumps([{"metric": "n", "min": 30}]),
    "lock.lease_s": 5,  # so that the one who comes after a killed run need not wait long
    "generation.chunk": 16,
    "generation.pilot": 64,
    "evaluation.extraction.part_rows": 16,
}
JUDGED = {"evaluation.every": 4, "evaluation.n": 24, "evaluation.chunk": 8}


def _source(i: Inputs) -> dict[str, Any]:
    """Images, a few of them bad, and their extractor."""
    return {
        "data.source": i.images,
        "data.labels": "parent",
        "data.max_bad_fraction": 0.1,
        "features.model": tiny.MODEL,
        "features.checkpoint": i.checkpoint,
    }


WORKFLOWS: dict[str, Callable[[Inputs], Settings]] = {  # by the name of its file in workflows/, without --output
    "build_index": lambda i: _source(i) | SMALL | SHORT,
    "generate": lambda i: (
        {
            "index": i.index,
            "checkpoint": i.checkpoint,
            "n": 90,
            "weighting.threshold": "p60",
            "weighting.weight": 10,
            "chunk": 16,
            "pilot": 64,
            "images": 6,
            "score": "both",
            "keep_rejected": True,
            "export": "webdataset",
        }
        | TOY
    ),
    "perturb": lambda i: (
        {
            "index": i.index,
            "checkpoint": i.checkpoint,
            "generator.path": i.bars,
            "n": 32,
            "chunk": 4,
            "part_rows": 8,
            "direction": "both",
            "epsilon": 0.3,
            "steps": 5,
            "images": 5,
        }
        | BARS
    ),
    "evaluate": lambda i: (
        {
            "real": i.index,
            "checkpoint": i.checkpoint,
            "samples": [i.few, i.images],
            "data.max_bad_fraction": 0.1,
            "images": 2,
        }
        | EXTRACTION
    ),
    "tradeoff": lambda i: (
        {
            "index": i.index,
            "checkpoint": i.checkpoint,
            "n": 70,
            "thresholds": '["p30", "p60"]',
            "weights": "[0.2, 5]",
            "chunk": 16,
            "pilot": 64,
            "images": 2,
        }
        | TOY
        | EXTRACTION
    ),
    "finetune": lambda i: (
        {
            "index": i.index,
            "checkpoint": i.checkpoint,
            "generator.path": i.ddpm,
            "weighting.threshold": "p80",
            "weighting.weight": 33,
            "steps": 12,
            "images": 4,
        }
        | DDPM
        | TRAINING
        | JUDGED
    ),
    "curate": lambda i: _source(i) | SMALL | {"estimator.epochs": 3} | CHAIN | TOY,
}


LAST = {"curate": releases.LATEST}  # the file that is written last, where that is not run.json
DONE = {
    "curate": (errors.EXIT_DONE, errors.EXIT_NOTHING_NEW)
}  # exit codes of a run that has nothing more to do, where not 0 alone


def last_file(workflow: str) -> str:
    """The file of an output that is written last."""
    return LAST.get(workflow, RUN)


def is_done(workflow: str, exit_code: int) -> bool:
    """Whether a run that ended so leaves nothing to do."""
    return exit_code in DONE.get(workflow, (errors.EXIT_DONE,))


def arguments(workflow: str, inputs: Inputs, output: str, *more: str) -> list[str]:
    """The command line of a workflow, without its program."""
    argv = [f"--output={output}"]
    for name, value in WORKFLOWS[workflow](inputs).items():
        if isinstance(value, list):
            argv += [f"--{name}", *map(str, value)]
        else:
            argv.append(f"--{name.replace('_', '-')}" if value is True else f"--{name}={value}")
    return [*argv, *more]


def make_inputs(folder: Path) -> Inputs:
    """The inputs under a folder, where they are not there yet; the index is made by whoever needs it first."""
    inputs = Inputs(
        images=str(folder / "images"),
        index=str(folder / "undisturbed" / "build_index"),
        few=str(folder / "few"),
        checkpoint=str(folder / "tiny.safetensors"),
        bars=str(folder / "bars.pt"),
        ddpm=str(folder / "ddpm"),
    )
    ready = folder / "inputs.ready"
    if not ready.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        tiny.write_images(Path(inputs.images))
        tiny.write_checkpoint(Path(inputs.checkpoint))
        tiny_generators.save_bars(Path(inputs.bars))
        tiny_generators.save_ddpm(Path(inputs.ddpm))
        for i in range(0, tiny.GOOD, 2):
            image = Path(inputs.few) / f"{i:03d}.png"
            image.parent.mkdir(exist_ok=True)
            image.write_bytes(tiny.png(i))
        ready.touch()
    return inputs
