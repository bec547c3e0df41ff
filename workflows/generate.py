"""Images from a generator, accepted or rejected by their pseudo densities, in a Parquet dataset.

python workflows/generate.py --index DIR --generator.path DIR --n 1000 --weighting.threshold p80 --weighting.weight 100 --output DIR
python workflows/generate.py ... --dry-run
python workflows/generate.py --verify DIR --rows 20
python workflows/generate.py --help
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
    """Parse settings, then run the pilot, the workflow, or the check of an earlier run."""
    settings = config.load(config.GenerateSettings, argv, prog="generate.py")

    from pd_core import generation, verification  # late: --help and refused settings need neither Ray nor torch

    if settings.verify is not None:
        told = (settings.generator, settings.verify_seed, settings.index, settings.checkpoint)
        verification.verify(settings.verify, settings.rows, *told)
    elif settings.dry_run:
        generation.plan_generate(settings)
    else:
        generation.generate(settings)


if __name__ == "__main__":
    raise SystemExit(errors.exit_code(lambda: main(sys.argv[1:])))
