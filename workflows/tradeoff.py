"""Fidelity against diversity: every (tau, w), polarity and psi from one pool, on one precision-recall figure."""

import sys
from functools import partial
from pathlib import Path

if (root := str(Path(__file__).resolve().parent.parent)) not in sys.path:
    sys.path.insert(0, root)  # a Ray job runs this file from a copy of the tree, where pd_core is not installed

from pd_core import cli
from pd_core.core import errors

main = partial(cli.run, "tradeoff", prog="tradeoff.py")

if __name__ == "__main__":
    raise SystemExit(errors.exit_code(lambda: main(sys.argv[1:])))
