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

from pd_core import config, errors  # noqa: E402

DEFAULT_CONFIG = ROOT / "workflows" / "configs" / "default.yaml"
DEMO = ROOT / "demo" / "make_digits.py"


def main(argv: Sequence[str]) -> None:
    """Parse settings, then run the plan or the workflow."""
    defaults = not argv and not any(name.startswith(config.ENV_PREFIX) for name in os.environ)
    if defaults:
        print(f"no settings given: using {DEFAULT_CONFIG.relative_to(ROOT)} and the demo images", flush=True)
        argv = ["--config", str(DEFAULT_CONFIG)]
    settings = config.load(config.BuildIndexSettings, argv, prog="build_index.py")
    if defaults and not Path(str(settings.data.source)).exists():
        target = Path(str(settings.data.source)).parent
        print(f"making the demo images in {target}", flush=True)
        subprocess.run([sys.executable, str(DEMO), "--output", str(target)], check=True)

    from pd_core import pipeline  # late: --help and refused settings need neither Ray nor torch

    if settings.dry_run:
        pipeline.plan_build_index(settings)
    else:
        pipeline.build_index(settings)


if __name__ == "__main__":
    raise SystemExit(errors.exit_code(lambda: main(sys.argv[1:])))
