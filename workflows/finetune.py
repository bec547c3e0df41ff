"""A generator moved towards typical or varied images: fine-tuned on real images drawn by their pseudo densities.

python workflows/finetune.py --index DIR --generator.path DIR --weighting.threshold p80 --weighting.weight 33 --steps 500 --output DIR
python workflows/finetune.py ... --dry-run
python workflows/finetune.py --help
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # a Ray job runs this file from a copy of the tree, where pd_core is not installed
    sys.path.insert(0, str(ROOT))

from pd_core import config, errors  # noqa: E402


def main(argv: Sequence[str]) -> None:
    """Parse settings, then run the workflow or print its plan."""
    settings = config.load(config.FinetuneSettings, argv, prog="finetune.py")

    from pd_core import finetune_workflow  # late: --help and refused settings need neither Ray nor torch

    if settings.dry_run:
        finetune_workflow.plan_finetune(settings)
    else:
        finetune_workflow.finetune(settings)


if __name__ == "__main__":
    raise SystemExit(errors.exit_code(lambda: main(sys.argv[1:])))
