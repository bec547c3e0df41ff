"""The estimator stage on Ray: the predictor is fitted to the committed features and densities, or kept from a base."""

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
from pd_core.index.base import Base
from pd_core.index.features import load_features

HELDOUT = "heldout.parquet"


def stage_of(
    output: str, densities: artifacts.Stage, settings: EstimatorSettings, base: Base | None = None
) -> artifacts.Stage:
    """The estimator stage under `output`; base: whose predictor is kept while it holds."""
    identity = {
        "densities": densities.fingerprint,
        "settings": settings.model_dump(mode="json"),
        "torch": version("torch"),  # not torch.__version__: tasks would import torch to unpickle it
    }
    uri = files.join(output, "estimator")
    stage = artifacts.Stage(uri, "estimator", schemas.VERSIONS["estimator"], identity)
    return stage if base is None else base.continued(stage)


def run(
    stage: artifacts.Stage,
    features_uri: str,
    densities_uri: str,
    densities: artifacts.Artifact,
    feature_dim: int,
    settings: EstimatorSettings,
    base: Base | None = None,
    max_r2_drop: float = 0.0,
) -> tuple[list[artifacts.Part], dict[str, Any]]:
    """Fit in one Ray task that streams the parts; returns the parts and totals to commit.

    base: its predictor, on the new scale, is kept while its R² on held-out rows has not dropped by more than
        `max_r2_drop`.
    """
    uris = features_uri, densities_uri
    totals = None if base is None else _kept(stage, base, uris, densities, settings, max_r2_drop)
    if totals is None:
        names = [part.name for part in densities.parts]
        console.say(f"estimator: fitting to {densities.rows} rows")
        task = tasks.task(_fit, resources.feasible_cpus(settings.threads))
        totals = tasks.get(task.remote(stage, *uris, names, feature_dim, settings))
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

    result = fit.fit([loader(name) for name in names], settings, feature_dim=feature_dim)
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


# ---- an update -------------------------------------------------------------------------------------------------------


def _kept(
    stage: artifacts.Stage,
    base: Base,
    uris: tuple[str, str],
    densities: artifacts.Artifact,
    settings: EstimatorSettings,
    max_r2_drop: float,
) -> dict[str, Any] | None:
    """Totals of a stage that has the base's predictor now; None where one is to be fitted anew, which is said."""
    before = base.artifacts["estimator"]
    asked = {name: stage.identity[name] for name in ("settings", "torch")}
    of_base = {name: before.identity[name] for name in asked}
    old, new = base.artifacts["densities"].totals, densities.totals
    fitted_r2 = before.totals.get("fitted_r2", before.totals["heldout"]["r2_log_density"])
    if asked != of_base or old["volume_dim"] != new["volume_dim"] or settings.split != "hash" or fitted_r2 is None:
        console.say(
            "estimator: fitted anew, since the base's was made with other settings or cannot be judged on held-out "
            "images"
        )
        return None
    shift = new["log_normalizer"] - old["log_normalizer"]
    keep = tasks.task(_keep, resources.feasible_cpus(settings.threads))
    least = fitted_r2 - max_r2_drop
    names = spread(densities, settings)
    heldout = tasks.get(keep.remote(stage, base.folder("estimator"), shift, uris, names, settings, least))
    if heldout is None:
        console.say(f"estimator: the base's predictor has lost more than {max_r2_drop:g} of its R²; fitting anew")
        return None
    console.say(
        f"estimator: kept from the base; R² of log density {heldout['r2_log_density']:.3f}, {fitted_r2:.3f} when fitted"
    )
    totals = {name: before.totals[name] for name in ("n_train", "epochs", "best_epoch")}
    return totals | {"heldout": heldout, "n_heldout": heldout["n"], "fitted_r2": fitted_r2}


def spread(densities: artifacts.Artifact, settings: EstimatorSettings) -> list[str]:
    """Parts with about `fit.HELDOUT_ROWS` held-out rows, evenly from all: in a listing's order new images are last."""
    names = [part.name for part in densities.parts if part.rows]
    wanted = len(names) * fit.HELDOUT_ROWS / max(1.0, densities.rows * settings.holdout_fraction)
    if wanted >= len(names):
        return names
    return [names[i] for i in np.unique(np.linspace(0, len(names) - 1, max(2, round(wanted))).round().astype(int))]


def _keep(
    stage: artifacts.Stage,
    folder: str,
    shift: float,
    uris: tuple[str, str],
    names: Sequence[str],
    settings: EstimatorSettings,
    least: float,
) -> dict[str, Any] | None:
    """Write the base's predictor, its target moved by `shift`, the change of log c; None where it does not hold."""
    described = files.read_bytes(files.join(folder, predictor.DESCRIPTION_FILE))
    weights = files.read_bytes(files.join(folder, predictor.WEIGHTS_FILE))
    kept = predictor.from_bytes({predictor.WEIGHTS_FILE: weights, predictor.DESCRIPTION_FILE: described}).rescaled(
        shift
    )
    true, predicted = [np.empty(0)], [np.empty(0)]
    for name in names:
        sample_id, vectors, log_density = load_part(*uris, name)
        held = fit.held_out(sample_id, settings)
        if held.any():
            true.append(log_density[held])
            predicted.append(kept.predict(vectors[held]).log_density)
    heldout = {"log_density": np.concatenate(true), "predicted_log_density": np.concatenate(predicted)}
    if not len(heldout["log_density"]):
        return None
    measured = fit.calibration(*heldout.values())
    if measured.r2_log_density is None or measured.r2_log_density < least:
        return None
    stage.write_part(predictor.WEIGHTS_FILE, predictor.weights_bytes(kept), 0)
    stage.write_part(predictor.DESCRIPTION_FILE, described, 0)
    stage.write_table(HELDOUT, pa.table({name: values[: fit.CALIBRATION_ROWS] for name, values in heldout.items()}))
    return dataclasses.asdict(measured)
