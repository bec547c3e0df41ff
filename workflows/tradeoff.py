"""Fidelity against diversity: every (tau, w), polarity and psi from one pool of candidates, on one precision-recall figure.

python workflows/tradeoff.py --index DIR --generator.path DIR --n 2000 --output DIR
python workflows/tradeoff.py ... --target recall=0.6
python workflows/tradeoff.py --help
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
    """Parse settings, then run the pilot alone, or all of it."""
    settings = config.load(config.TradeoffSettings, argv, prog="tradeoff.py")

    from pd_core import comparison  # late: --help and refused settings need neither Ray nor torch

    if settings.dry_run:
        comparison.plan_tradeoff(settings)
    else:
        comparison.compare(settings)


if __name__ == "__main__":
    raise SystemExit(errors.exit_code(lambda: main(sys.argv[1:])))
