"""How long a user waits for `--help`, and for `make demo` after installation."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import table
from benchmarks.process import ROOT, WORK

HELP_REPEATS = 5
WORKFLOW = "workflows/build_index.py"

TEXT = """\
`--help`: the whole process, from the shell. The demo: the two commands that `make demo` runs once `.venv` is there,
into empty folders, so it includes writing the images and the checkpoint, starting Ray, every stage, MLflow and the
report."""


def measure(quick: bool) -> table.Section:
    """Both, in processes of their own."""
    repeats = 2 if quick else HELP_REPEATS
    helps = [_seconds([WORKFLOW, "--help"], "help") for _ in range(repeats + 1)][1:]  # the first writes the .pyc files
    images, output = WORK / "demo-data", WORK / "digits"
    making = _seconds(["demo/make_digits.py", "--output", str(images)], "make_digits")
    building = _seconds(
        [
            *(WORKFLOW, "--config", "workflows/configs/default.yaml", "--output", str(output)),
            *("--data.source", str(images / "digits")),
            *("--features.checkpoint", str(images / "efficientnet_lite0.safetensors")),
        ],
        "build_index",
    )
    claims = [
        table.at_most(f"`--help`, median of {repeats}", table.middle(helps), 1.0, "s"),
        table.at_most("`make demo` after installation", making + building, 180.0, "s"),
    ]
    rows: list[list[table.Cell]] = [["images and checkpoint", making], ["build_index", building]]
    stages: list[dict[str, Any]] = [{"command": "help", "seconds": s} for s in helps]
    stages += [{"command": row[0], "seconds": row[1]} for row in rows]
    return table.Section("Start-up", TEXT, claims, [table.Table("The demo", ["step", "seconds"], rows)], stages)


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
