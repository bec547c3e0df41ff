"""Images to pseudo densities, an index and a predictor; without any settings, of the demo."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # a Ray job runs this file from a copy of the tree, where pd_core is not installed

from pd_core import cli  # noqa: E402
from pd_core.core import errors  # noqa: E402
from pd_core.core.settings import load  # noqa: E402
from pd_core.core.settings.base import ENV_PREFIX  # noqa: E402
from pd_core.core.settings.index import BuildIndexSettings  # noqa: E402
from pd_core.engine import session  # noqa: E402

PROG = "build_index.py"
DEFAULT_CONFIG = ROOT / "workflows" / "configs" / "default.yaml"
DEMO = ROOT / "demo" / "make_digits.py"


def main(argv: Sequence[str]) -> None:
    """Run `pd-core build-index`; without any settings, on the demo images."""
    if not argv and not any(name.startswith(ENV_PREFIX) for name in os.environ):
        argv = prepare_demo()
    cli.run("build-index", argv, prog=PROG)


def prepare_demo() -> list[str]:
    """Make those of the demo images that are absent, and say where the output goes; returns its settings."""
    print(f"no settings given: using {DEFAULT_CONFIG.relative_to(ROOT)} and the demo images", flush=True)
    argv = [f"--config={DEFAULT_CONFIG}"]
    settings = load.load(BuildIndexSettings, argv, prog=PROG)
    folder = Path(str(settings.data.source)).parent
    print(f"making the demo images in {folder}, where they are absent", flush=True)
    made = subprocess.run([sys.executable, str(DEMO), "--output", str(folder)], check=False)
    if made.returncode:
        raise errors.RunError("the demo images could not be made, as said above; name your own with --data.source")
    output = Path(str(settings.output)).absolute()
    if session.in_job_copy():
        print(f"ray: {output} is in the job's temporary copy of this tree and goes with it; to keep it, give --output")
    return [*argv, f"--output={output}"]


if __name__ == "__main__":
    raise SystemExit(errors.exit_code(lambda: main(sys.argv[1:])))
