"""Measures pd_core against what one would use instead, and writes docs/benchmarks.md and docs/benchmarks.json.

    make bench
    make bench ARGS="--only selfjoin"
    make bench ARGS=--quick

Meant for a machine that does nothing else. A full run takes about 40 minutes on 2 cores, `--quick` a few; the latter
only shows that everything runs, so it writes to runs/bench-quick unless --output says otherwise.
"""

from __future__ import annotations

import argparse
import importlib
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not this folder: its modules are benchmarks.X

from benchmarks import process, table  # noqa: E402

NAMES = (
    "features",
    "decoding",
    "selfjoin",
    "memory",
    "update",
    "commit",
    "startup",
    "generate",
    "perturb",
    "metrics",
    "tradeoff",
    "finetune",
    "stream",
    "autoscaling",
)


def main(argv: Sequence[str]) -> int:
    """Run the benchmarks one after the other; each writes its section when it is done."""
    parser = argparse.ArgumentParser(
        prog="make bench", description="Write docs/benchmarks.md and docs/benchmarks.json."
    )
    parser.add_argument(
        "--only", choices=NAMES, action="append", help="run this one, keep the other sections; repeatable"
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--short", action="store_true", help="full sizes, but each side once")
    parser.add_argument("--output", type=Path, help="folder (default: docs; with --quick: runs/bench-quick)")
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that process.call ends what it started
    process.short = arguments.short
    output = arguments.output or ROOT / ("runs/bench-quick" if arguments.quick else "docs")
    for name in arguments.only or NAMES:
        print(f"{name}: started", flush=True)
        shutil.rmtree(process.WORK, ignore_errors=True)
        facts, start = table.circumstances(arguments.quick), time.perf_counter()
        section = importlib.import_module(f"benchmarks.{name}").measure(arguments.quick)
        seconds = time.perf_counter() - start
        table.write(output, {name: table.result(section, facts, seconds)}, NAMES)
        print(f"{name}: {seconds:.0f} s", flush=True)
        for reason in section.skipped:
            print(f"{name}: not run: {reason}", flush=True)
    shutil.rmtree(process.WORK, ignore_errors=True)
    print(f"written: {output / 'benchmarks.md'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
