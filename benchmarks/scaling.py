"""Writes the tables of docs/scaling.md: what runs cost that nobody has paid for, by pd_core/costs.py and a simulation.

python benchmarks/scaling.py              # writes the tables between the marks in docs/scaling.md; seconds
python benchmarks/scaling.py --check      # exit code 1 where the page is not what the code gives
python benchmarks/scaling.py --measure    # first runs build_index and a self-join here, for the table of reality
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not this folder: its modules are benchmarks.X

from benchmarks import reality, simulation  # noqa: E402
from pd_core import costs  # noqa: E402
from pd_core.config import BuildIndexSettings  # noqa: E402

PAGE = ROOT / "docs" / "scaling.md"
UNIT_COSTS = ROOT / "docs" / "unit_costs.json"
SIZES = {"1M": 10**6, "100M": 10**8, "1B": 10**9}
NODES = (10, 100, 1000)
NODE = {"cores": 32.0, "memory_bytes": 128 * costs.GIB}
SPOT = simulation.Spot(losses_per_hour=0.05)
PACKED = 10_000  # images in a tar, where they are packed
GPU_SPEED = 100.0

Cells = Sequence[str]


# ---- what is looked at -----------------------------------------------------------------------------------------------


def fleet(nodes: int, **more: Any) -> costs.Fleet:
    """Machines of 32 vCPUs on one object store."""
    return costs.Fleet(
        nodes=nodes,
        network_bytes_per_s=costs.NETWORK_BYTES_PER_S,
        request_s=costs.REQUEST_S,
        gets_per_s=costs.GETS_PER_S,
        puts_per_s=costs.PUTS_PER_S,
        **NODE,
        **more,
    )


def build(rows: int, settings: BuildIndexSettings | None = None, packed: bool = False) -> costs.Build:
    """Photographs of 640 x 427 px, ViT-B/16 at 224 px, as measured."""
    measured = json.loads(UNIT_COSTS.read_text())
    decoding, models = measured["decoding"]["costs"], measured["models"]["costs"]
    return costs.build_of(
        settings or BuildIndexSettings(),
        rows,
        -(-rows // PACKED) if packed else rows,
        dim=768,
        pixels=224 * 224,
        image_bytes=decoding["photo_bytes"],
        decode_s=decoding["decode_s.photo"],
        model_s=models["model_s.vit_base_patch16_224"],
    )


def advised(rows: int, nodes: int) -> dict[str, dict[str, Any]]:
    """What to set for so many images on so many nodes, by section of the settings."""
    small = rows < 10**7
    shards = {10**6: max(nodes, 16), 10**8: max(600, nodes)}.get(rows, 1024)
    chosen: dict[str, dict[str, Any]] = {
        "features": {"actors": nodes * 30, "part_rows": 8192 if small else 65_536},
        "index": {"shards": min(shards, 100) if small else shards, "actor_cpus": 16},
        "density": {"block_rows": 16_384 if small else 65_536},
        "estimator": {"batch_size": 4096} | ({"epochs": 20, "patience": 3} if small else {"epochs": 1, "patience": 0}),
    }
    if rows > 10**8:
        chosen["index"] |= {"kind": "ivf_sq8", "train_rows_per_cell": 39}
    return chosen


def advised_build(rows: int, nodes: int) -> costs.Build:
    """The run with these settings, from packed images."""
    return build(rows, BuildIndexSettings(**advised(rows, nodes)), packed=True)
