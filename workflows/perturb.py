"""Samples of a generator moved towards common or unique by their pseudo densities, each beside its original, in a Parquet dataset.

python workflows/perturb.py --index DIR --generator.path DIR --n 64 --direction up --epsilon 0.1 --output DIR
python workflows/perturb.py ... --dry-run
python workflows/perturb.py --help
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
    settings = config.load(config.PerturbSettings, argv, prog="perturb.py")

    from pd_core import perturb_workflow  # late: --help and refused settings need neither Ray nor torch

    if settings.dry_run:
        perturb_workflow.plan_perturb(settings)
    else:
        perturb_workflow.perturb(settings)


if __name__ == "__main__":
    raise SystemExit(errors.exit_code(lambda: main(sys.argv[1:])))
