"""Images to pseudo densities: list, extract features, index, find neighbors, densities, predictor, report.

python workflows/build_index.py --data.source DIR --output DIR
python workflows/build_index.py --help
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # a Ray job runs this file from a copy of the tree, where pd_core is not installed
    sys.path.insert(0, str(ROOT))

from pd_core import cluster, config, errors  # noqa: E402

DEFAULT_CONFIG = ROOT / "workflows" / "configs" / "default.yaml"
DEMO = ROOT / "demo" / "make_digits.py"


def main(argv: Sequence[str]) -> None:
    """Parse settings, then run the plan or the workflow."""
    defaults = not argv and not any(name.startswith(config.ENV_PREFIX) for name in os.environ)
    if defaults:
        print(f"no settings given: using {DEFAULT_CONFIG.relative_to(ROOT)} and the demo images", flush=True)
        argv = ["--config", str(DEFAULT_CONFIG)]
    settings = config.load(config.BuildIndexSettings, argv, prog="build_index.py")
    if defaults:
        settings = prepare_demo(settings)

    from pd_core import pipeline  # late: --help and refused settings need neither Ray nor torch

    if settings.dry_run:
        pipeline.plan_build_index(settings)
    else:
        pipeline.build_index(settings)


def prepare_demo(settings: config.BuildIndexSettings) -> config.BuildIndexSettings:
    """Make those of the demo images that are absent, and say where the demo's output goes."""
    folder = Path(str(settings.data.source)).parent
    print(f"making the demo images in {folder}, where they are absent", flush=True)
    made = subprocess.run([sys.executable, str(DEMO), "--output", str(folder)], check=False)
    if made.returncode:
        raise errors.RunError("the demo images could not be made, as said above; name your own with --data.source")
    output = Path(str(settings.output)).absolute()
    if cluster.in_job_copy():
        print(f"ray: {output} is in the job's temporary copy of this tree and goes with it; to keep it, give --output")
    return settings.model_copy(update={"output": str(output)})


if __name__ == "__main__":
    raise SystemExit(errors.exit_code(lambda: main(sys.argv[1:])))
