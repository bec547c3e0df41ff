"""The estimator stage on Ray: fit the density predictor to the committed features and densities."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import pyarrow as pa

from pd_core.core import artifacts, files, schemas
from pd_core.core.settings.index import EstimatorSettings
from pd_core.density import fit, predictor
from pd_core.engine import console, resources, tasks
from pd_core.index.features import load_features

HELDOUT = "heldout.parquet"


def stage_of(output: str, densities: artifacts.Stage, settings: EstimatorSettings) -> artifacts.Stage:
    """The estimator stage under `output`."""
    identity = {
        "densities": densities.fingerprint,
        "settings": settings.model_dump(mode="json"),
        "torch": version("torch"),  # not torch.__version__: tasks would import torch to unpickle it
    }
    uri = files.join(output, "estimator")
    return artifacts.Stage(uri, "estimator", schemas.VERSIONS["estimator"], identity)


def run(
    stage: artifacts.Stage,
    features_uri: str,
    densities_uri: str,
    densities: artifacts.Artifact,
    feature_dim: int,
    settings: EstimatorSettings,
) -> tuple[list[artifacts.Part], dict[str, Any]]:
    """Fit in one Ray task that streams the parts; returns the parts and totals to commit."""
    import ray

    task = ray.remote(_fit).options(num_cpus=resources.feasible_cpus(settings.threads), **tasks.TASK_OPTIONS)
    names = [part.name for part in densities.parts]
    console.say(f"estimator: fitting to {densities.rows} rows")
    totals = tasks.get(task.remote(stage, features_uri, densities_uri, names, feature_dim, settings))
    console.say(f"estimator: {_quality(totals)}")
    return list(stage.finished_parts().values()), totals


def _quality(totals: dict[str, Any]) -> str:
    """How well the predictor does on rows it has not seen, where these can tell."""
    r2, spearman = totals["heldout"]["r2_log_density"], totals["heldout"]["spearman"]
    if r2 is None or spearman is None:
        return f"{totals['n_heldout']} held-out images are too few or too equal to tell how well it predicts"
    text = f"R² of log density {r2:.3f}, Spearman {spearman:.3f} on {totals['n_heldout']:,} held-out images"
    return text if r2 > 0 else f"{text}; no better than their mean, so decide nothing by it"


def _fit(
    stage: artifacts.Stage,
    features_uri: str,
    densities_uri: str,
    names: Sequence[str],
    feature_dim: int,
    settings: EstimatorSettings,
) -> dict[str, Any]:
    def loader(name: str) -> fit.LoadPart:
        return lambda: load_part(features_uri, densities_uri, name)

    result = fit.fit([loader(name) for name in names], settings, feature_dim=feature_dim, device="cpu")
    for name, data in predictor.to_bytes(result.predictor, result.metrics).items():
        stage.write_part(name, data, 0)
    heldout = {
        "log_density": result.heldout_log_density,
        "predicted_log_density": result.heldout_predicted_log_density,
    }
    stage.write_table(HELDOUT, pa.table(heldout))
    metrics = result.metrics
    return {
        "heldout": dataclasses.asdict(metrics.heldout),
        "n_train": metrics.n_train,
        "n_heldout": metrics.n_heldout,
        "epochs": len(metrics.losses),
        "best_epoch": metrics.best_epoch,
    }


def load_part(features_uri: str, densities_uri: str, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """sample_id int64 [n], features float32 [n, D] and log densities float64 [n] of a part."""
    table, features = load_features(files.join(features_uri, name))
    density = files.read_table(files.join(densities_uri, name), ["sample_id", "log_density"])
    assert density["sample_id"].equals(table["sample_id"]), name
    return table["sample_id"].to_numpy(), features, density["log_density"].to_numpy()
