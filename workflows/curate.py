"""The scheduled job: index what is new, generate by recipes, measure, and release what passes its gates.

python workflows/curate.py --config FILE
python workflows/curate.py --verify DIR/releases/NAME
python workflows/curate.py --help

Exit codes: 0 released, 3 nothing new, 4 held back by a gate, 2 wrong settings or input, 130 interrupted, 1 anything else; of --verify and
--dry-run 0 where all is well.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # a Ray job runs this file from a copy of the tree, where pd_core is not installed
    sys.path.insert(0, str(ROOT))

from pd_core import config, errors  # noqa: E402


def main(argv: Sequence[str]) -> int:
    """Parse settings, then run the job, its plan, or the check of a release; returns the exit code."""
    settings = config.load(config.CurateSettings, argv, prog="curate.py")

    from pd_core import curation, verification  # late: --help and refused settings need neither Ray nor torch

    if settings.verify is not None:
        verification.verify_release(settings.verify)
        return errors.EXIT_DONE
    if settings.dry_run:
        curation.plan_curate(settings)
        return errors.EXIT_DONE
    return curation.curate(settings)


if __name__ == "__main__":
    raise SystemExit(errors.exit_code(lambda: main(sys.argv[1:])))
