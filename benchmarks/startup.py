"""How long a user waits for `--help`, `make demo` after installation, a small index, and one that is there."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks import table
from benchmarks.process import ROOT, WORK

HELP_REPEATS = 5
SMALL = 120
WORKFLOW = "workflows/build_index.py"

TEXT = """\
`--help`: the whole process, from the shell. The demo: the two commands that `make demo` runs once `.venv` is there,
into empty folders, so it includes writing the images and the checkpoint, starting Ray, every stage, MLflow and the
report. A small index: 120 of these images at 64 px into an empty folder, then the same command again, whose output is
finished."""


def measure(quick: bool) -> table.Section:
    """Both, in processes of their own."""
    repeats = 2 if quick else HELP_REPEATS
    helps = [_seconds([WORKFLOW, "--help"], "help") for _ in range(repeats + 1)][1:]  # the first writes the .pyc files
    images, output = WORK / "demo-data", WORK / "digits"
    making = _seconds(["demo/make_digits.py", "--output", str(images)], "make_digits")
    command = [
        *(WORKFLOW, "--config", "workflows/configs/default.yaml"),
        *("--features.checkpoint", str(images / "efficientnet_lite0.safetensors")),
    ]
    building = _seconds([*command, "--output", str(output), "--data.source", str(images / "digits")], "build_index")
    command += ["--output", str(WORK / "small"), "--data.source", str(_small(images / "digits"))]
    small, again = _seconds(command, "small"), _seconds(command, "again")
    claims = [
        table.at_most(f"`--help`, median of {repeats}", table.middle(helps), 1.0, "s"),
        table.at_most("`make demo` after installation", making + building, 180.0, "s"),
        table.at_most(f"an index of {SMALL} images of 64 px", small, 12.0, "s"),
        table.at_most("the same command again", again, 2.5, "s"),
    ]
    rows: list[list[table.Cell]] = [
        ["images and checkpoint", making],
        ["build_index", building],
        ["small index", small],
        ["the same again", again],
    ]
    stages: list[dict[str, Any]] = [{"command": "help", "seconds": s} for s in helps]
    stages += [{"command": row[0], "seconds": row[1]} for row in rows]
    return table.Section("Start-up", TEXT, claims, [table.Table("The demo", ["step", "seconds"], rows)], stages)


def _small(digits: Path) -> Path:
    """Some of the digits, enlarged, in a folder of their own."""
    folder = WORK / "digits-64px"
    folder.mkdir(parents=True, exist_ok=True)
    for number, path in enumerate(sorted(digits.rglob("*.png"))[:SMALL]):
        Image.open(path).resize((64, 64)).save(folder / f"{number:03d}.png")
    return folder


def _seconds(command: Sequence[str], name: str) -> float:
    WORK.mkdir(parents=True, exist_ok=True)
    log = Path(WORK, f"{name}.log")
    start = time.perf_counter()
    with log.open("w") as stream:
        done = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT)
    seconds = time.perf_counter() - start
    if done.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}\n{tail}")
    return seconds
