"""Tables and figures of docs/results.md from outputs of tradeoff.py and perturb.py.

python benchmarks/results.py --output docs digits-ddpm=runs/results/digits-ddpm emoji-gan=runs/results/emoji-gan ...

Writes OUTPUT/results-NAME-SPACE.png, a copy of each figure, and prints a Markdown table for each NAME. What the tables
mean is written by hand in docs/results.md, since no program can say it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not this folder: its modules are benchmarks.X

from pd_core.core import artifacts, files  # noqa: E402
from pd_core.evaluate.tradeoff import curve as tradeoff_curve  # noqa: E402

COLUMNS = ("precision", "recall", "density", "coverage", "frechet_distance", "vendi_generated")


def main() -> None:
    """Print the tables and copy the figures."""
    parser = argparse.ArgumentParser(description="Tables and figures of docs/results.md.")
    parser.add_argument("runs", nargs="+", help="NAME=DIR, outputs of tradeoff.py or perturb.py")
    parser.add_argument("--output", type=Path, default=Path("docs"), help="default: %(default)s")
    arguments = parser.parse_args()
    for run in arguments.runs:
        name, _, folder = run.partition("=")
        if (curve := artifacts.load_artifact(files.join(folder, "curve"))) is not None:
            _tradeoff(
                name, folder, tradeoff_curve.read_curve(files.join(folder, "curve"), curve.parts), arguments.output
            )
        elif (perturbed := artifacts.load_artifact(files.join(folder, "perturbed"))) is not None:
            _perturbed(name, perturbed.totals)
        else:
            parser.error(f"{folder}: no finished output of tradeoff.py or perturb.py")


def _tradeoff(name: str, folder: str, rows: list[dict[str, Any]], output: Path) -> None:
    for space in dict.fromkeys(row["space"] for row in rows):
        figure = Path(folder, "report", f"tradeoff_{space}.png")
        (output / f"results-{name}-{space}.png").write_bytes(figure.read_bytes())
        own = [row for row in rows if row["space"] == space]
        print(f"\n**{name}, {space}: {own[0]['extractor']}**, n = {max(row['n'] for row in own)}\n")
        print("| setting | accepted | effective size | " + " | ".join(COLUMNS) + " |")
        print("|---|--:|--:|" + "--:|" * len(COLUMNS))
        for row in own:
            values = " | ".join(_cell(row, metric) for metric in COLUMNS)
            mark = " *" if row["frontier"] else ""
            accepted, size = 100 * row["acceptance_rate"], row["effective_sample_size"]
            print(f"| {row['setting']}{mark} | {accepted:.3g}% | {size:.0f} | {values} |")


def _cell(row: dict[str, Any], metric: str) -> str:
    if row[metric] is None:
        return "–"
    if row[f"{metric}_low"] is None:
        return f"{row[metric]:.3g}"
    return f"{row[metric]:.3g} ({row[f'{metric}_low']:.3g} … {row[f'{metric}_high']:.3g})"


def _perturbed(name: str, totals: dict[str, Any]) -> None:
    print(f"\n**{name}**\n\n| direction | samples | confirmed by the index (95%) | predictor says |\n|---|--:|--:|--:|")
    for way in ("down", "up"):
        if way in totals:
            t = totals[way]
            interval = f"{t['confirmed_low']:.3f} … {t['confirmed_high']:.3f}"
            says = "–" if t["predicted_share"] is None else f"{t['predicted_share']:.3f}"
            print(f"| {way} | {t['rows']} | {t['confirmed_share']:.3f} ({interval}) | {says} |")


if __name__ == "__main__":
    main()
