"""One run on Ray, told and tracked: the session, what each stage asks for, bounded tasks, what a person reads, MLflow, metrics."""

import os

# whoever uses any of this, in the driver or a worker: no package tells its makers about the run
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
