"""Tries the claim of fine-tuning by pseudo density: some weightings, several seeds, and the control that matters.

    python demo/try_finetuning.py --output runs/results/finetuned --seeds 3 --jobs 2 -- --index runs/digits
    --generator.path ... --steps 200

What follows -- goes to workflows/finetune.py as it is. Each setting of SETTINGS is trained from each seed into
OUTPUT/SETTING-SEED; a run that is there is kept, and refused where it was made with other settings. The table,
OUTPUT/table.md, is of the model at the last step, not at the best one: every row has had the same steps. `plain` is the
control: the same steps on all images alike. Numbers: mean over seeds; intervals of 95% by Student's t, those of
differences from `plain` with the same seed (the same noise, latents and evaluation seeds) paired.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder: its modules are demo.X

from pd_core.core import errors, files
from pd_core.core.errors import RunError
from pd_core.engine import console

ROOT = Path(__file__).resolve().parent.parent
METRICS = ("precision", "recall", "density", "coverage", "frechet_distance")
# The authors' command lines (docs/method.md, section 5) in percentiles: fidelity, its opposite, and the one for the
# best FID, which takes every generated image; a GAN's generated images have 1/w by default, as Algorithm 3 says.
SETTINGS: dict[str, list[str]] = {
    "plain": ["--weighting.kind=none"],
    "p80, w = 33": ["--weighting.threshold=p80", "--weighting.weight=33"],
    "p20, w = 0.03": ["--weighting.threshold=p20", "--weighting.weight=0.03"],
    "p30, w = 0.5": ["--weighting.threshold=p30", "--weighting.weight=0.5"],
}
FAKES_ALIKE = "p30, w = 0.5"


def folder_of(output: Path, setting: str, seed: int) -> Path:
    """Where a run lies."""
    return output / f"{setting.replace(' ', '').replace(',', '-').replace('=', '')}-{seed}"


def train(output: Path, setting: str, seed: int, gan: bool, options: Sequence[str]) -> None:
    """One run, in a process of its own. Raises RunError where it fails."""
    folder = folder_of(output, setting, seed)
    command = [sys.executable, str(ROOT / "workflows" / "finetune.py"), *options, *SETTINGS[setting], f"--seed={seed}"]
    if gan and setting == FAKES_ALIKE:
        command.append("--fake.weight=1")
    done = subprocess.run(
        [*command, f"--output={folder}", "--no-tracking.enabled"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RunError(f"{folder}: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else done.returncode}")
    console.say(f"{setting}, seed {seed}: {folder}")


def measured(folder: Path) -> dict[str, dict[str, float]]:
    """Metrics before and after, and the acceptance rate of a GAN's generated images."""
    rows = files.read_table(str(folder / "training" / "evaluations.parquet")).to_pylist()
    last = max(row["step"] for row in rows)
    found = {
        when: {row["metric"]: row["value"] for row in rows if row["step"] == step}
        for when, step in (("before", 0), ("after", last))
    }
    history = files.read_table(str(folder / "training" / "history.parquet")).to_pylist()
    if rates := [row["value"] for row in history if row["name"] == "acceptance"]:
        found["after"]["acceptance"] = float(np.mean(rates))
    return found


def interval(values: np.ndarray) -> float:
    """Half of the 95% interval of a mean; NaN of one value."""
    from scipy import stats

    if len(values) < 2:
        return float("nan")
    return float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5)


def table(output: Path, seeds: Sequence[int]) -> str:
    """Markdown."""
    runs = {(s, seed): measured(folder_of(output, s, seed)) for s in SETTINGS for seed in seeds}
    lines = [f"| setting | {' | '.join(METRICS)} | acceptance |", f"|---|{'--:|' * (len(METRICS) + 1)}"]

    def number(values: np.ndarray) -> str:
        return f"{values.mean():.3g} ± {interval(values):.2g}"

    untouched = [np.array([runs["plain", seed]["before"][m] for seed in seeds]) for m in METRICS]
    lines.append(f"| untouched | {' | '.join(map(number, untouched))} |  |")
    for setting in SETTINGS:
        cells = []
        for metric in METRICS:
            after, control = (np.array([runs[s, seed]["after"][metric] for seed in seeds]) for s in (setting, "plain"))
            difference = after - control
            apart = setting != "plain" and abs(difference.mean()) > interval(difference)
            change = "" if setting == "plain" else f" ({difference.mean():+.3g} ± {interval(difference):.2g})"
            cells.append(f"{'**' if apart else ''}{number(after)}{change}{'**' if apart else ''}")
        rates = [runs[setting, seed]["after"].get("acceptance") for seed in seeds]
        shown = f"{np.mean([r for r in rates if r is not None]):.2g}" if None not in rates else ""
        lines.append(f"| {setting} | {' | '.join(cells)} | {shown} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> None:
    """Train everything that is not there, then write the table."""
    own, options = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(description="Fine-tune a generator with several weightings and seeds.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3, help="0, 1, ... (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time (default: %(default)s)")
    arguments = parser.parse_args(own)
    gan = any("discriminator" in option or "stylegan" in option for option in options)
    wanted = [(s, seed) for seed in range(arguments.seeds) for s in SETTINGS]
    given = arguments.output / "options.json"
    if given.exists() and json.loads(given.read_text()) != options:
        raise errors.UserError(f"--output {arguments.output}: holds runs of other options ({given}); choose another")
    files.write_bytes(str(given), json.dumps(options).encode())
    missing = [w for w in wanted if not (folder_of(arguments.output, w[0], w[1]) / "run.json").exists()]
    with ThreadPoolExecutor(arguments.jobs) as runs:
        list(runs.map(lambda w: train(arguments.output, w[0], w[1], gan, options), missing))
    text = table(arguments.output, range(arguments.seeds))
    (arguments.output / "table.md").write_text(text)
    console.say(text)


if __name__ == "__main__":
    raise SystemExit(errors.exit_code(lambda: main(sys.argv[1:])))
