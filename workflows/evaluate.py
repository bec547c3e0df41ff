"""Sets of generated images against the real one: precision, recall, density, coverage, Fréchet distance, Vendi score.

python workflows/evaluate.py --real DIR --samples DIR [DIR ...]
python workflows/evaluate.py --help
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
    """Parse settings, then measure."""
    settings = config.load(config.EvaluateSettings, argv, prog="evaluate.py")

    from pd_core import evaluation  # late: --help and refused settings need neither Ray nor torch

    if settings.dry_run:
        evaluation.plan_evaluate(settings)
    else:
        evaluation.evaluate(settings)


if __name__ == "__main__":
    raise SystemExit(errors.exit_code(lambda: main(sys.argv[1:])))
