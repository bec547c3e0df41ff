"""A folder of small images with planted faults, a tiny extractor, and the settings that run build_index on them."""

import io
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
MODEL = "test_efficientnet"
GOOD = 150
BAD = {"broken/empty.png": b"", "broken/text.jpg": b"<html>not an image</html>", "broken/cut.png": None}


def png(seed: int, side: int = 16) -> bytes:
    rng = np.random.default_rng(seed)
    pixels = np.full((side, side, 3), rng.integers(0, 255, 3), np.uint8)
    pixels[rng.integers(side) :, rng.integers(side) :] = rng.integers(0, 255, 3)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()


def files() -> dict[str, bytes]:
    """Every file of the source by key: GOOD images in three folders, and BAD ones."""
    made = {f"{'abc'[i % 3]}/image {i:03d}.png": png(i) for i in range(GOOD)}
    return made | {key: png(0)[:60] if data is None else data for key, data in BAD.items()}


def write_images(root: Path) -> Path:
    for key, data in files().items():
        (root / key).parent.mkdir(parents=True, exist_ok=True)
        (root / key).write_bytes(data)
    return root


def write_checkpoint(path: Path) -> Path:
    """A tiny timm model with fixed random weights."""
    import safetensors.torch
    import timm
    import torch

    torch.manual_seed(0)
    model = timm.create_model(MODEL, num_classes=3)
    safetensors.torch.save_file(model.state_dict(), path)
    return path


def arguments(source: str | Path, checkpoint: str | Path, output: str | Path, *more: str) -> list[str]:
    values = {
        "data.source": source,
        "data.labels": "parent",
        "data.max_bad_fraction": 0.1,
        "output": output,
        "features.model": MODEL,
        "features.checkpoint": checkpoint,
        "features.batch_size": 8,
        "features.part_rows": 32,
        "density.k": 5,
        "density.block_rows": 64,
        "estimator.epochs": 3,
        "report.images": 4,
        "report.neighbors": 2,
    }
    return [f"--{name}={value}" for name, value in values.items()] + list(more)


def start(*argv: str, workflow: str = "build_index.py", **environment: str) -> subprocess.Popen[str]:
    """A workflow in a process of its own."""
    import os

    return subprocess.Popen(
        [sys.executable, str(ROOT / "workflows" / workflow), *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
        cwd=ROOT,
    )


def kill_when(pattern: str, output: Path, *argv: str, workflow: str) -> None:
    """Start a workflow, and kill its driver with SIGKILL as soon as a file of the output is there."""
    first = start(*argv, workflow=workflow)
    deadline = time.monotonic() + 240
    while not list(output.glob(pattern)) and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert first.poll() is None, first.communicate()[0]
    first.kill()
    first.communicate()


def tables(output: Path) -> dict[str, bytes]:
    """Bytes of every table and index file of a run, by path."""
    return {
        str(file.relative_to(output)): file.read_bytes()
        for file in sorted(output.rglob("*"))
        if file.suffix in (".parquet", ".faiss", ".safetensors")
    }
