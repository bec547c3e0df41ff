"""The demo as a whole, with a generator of few training steps: what its two sets hold, and at which rate they were
accepted.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from demo import make_digits, train_ddpm
from pd_core.core import errors
from pd_core.engine.resources import Cluster
from workflows import build_index, generate

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CONFIGS = Path(build_index.DEFAULT_CONFIG).parent


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, ray_cluster: Cluster) -> Path:
    """index/ of the digits and generator/, in one folder."""
    root = tmp_path_factory.mktemp("demo")
    images = make_digits.write_digits(root)
    checkpoint = make_digits.write_checkpoint(root / make_digits.CHECKPOINT_NAME)
    generator = ["--data", str(images), "--output", str(root / "generator"), "--steps", "250"]
    assert train_ddpm.main(generator) == errors.EXIT_DONE
    argv = [
        f"--config={build_index.DEFAULT_CONFIG}",
        f"--data.source={images}",
        f"--features.checkpoint={checkpoint}",
        f"--output={root / 'index'}",
        "--no-tracking.enabled",
    ]
    assert errors.exit_code(lambda: build_index.main(argv)) == errors.EXIT_DONE
    return root


@pytest.mark.parametrize("name", ["demo-typical", "demo-varied"])
def test_the_demo_accepts_at_the_rate_of_the_formula(made: Path, tmp_path: Path, name: str) -> None:
    """n over candidates against P + (1 - P)/w, or its mirror for w < 1, within 5 standard errors of the draws of u."""
    argv = [
        f"--config={CONFIGS / name}.yaml",
        f"--index={made / 'index'}",
        f"--generator.path={made / 'generator'}",
        f"--output={tmp_path}",
        "--n=60",
        "--keep-rejected",
        "--no-tracking.enabled",
    ]
    assert errors.exit_code(lambda: generate.main(argv)) == errors.EXIT_DONE
    record: dict[str, Any] = json.loads((tmp_path / "samples" / "artifact.json").read_text())
    weighting = record["totals"]["settings"]["weighting"]
    tau = np.quantile(column(made / "index" / "densities", "density"), float(weighting["threshold"][1:]) / 100)
    densities = np.concatenate([column(tmp_path / stage, "density") for stage in ("samples", "rejected")])
    assert len(densities) == record["totals"]["candidates"]
    weight = float(weighting["weight"])
    chances = np.where(densities > tau, weight, 1.0) / max(weight, 1.0)
    error = np.sqrt((chances * (1 - chances)).sum()) / len(chances)
    assert abs(record["totals"]["acceptance_rate"] - chances.mean()) < 5 * error


def column(folder: Path, name: str) -> np.ndarray:
    return pq.ParquetDataset(sorted(map(str, folder.glob("*.parquet")))).read([name])[name].to_numpy()
