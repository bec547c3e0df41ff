"""A trade-off curve from one pool against a run of generate.py and one of evaluate.py for each of its settings."""

from __future__ import annotations

import time
from typing import Any

from benchmarks import process, table

THRESHOLDS = ["p20", "p50", "p80"]
WEIGHTS = [0.01, 0.02, 0.05, 0.1, 0.2, 5, 10, 20, 50, 100]
STEPS = 10

TEXT = f"""\
The demo's index and generator (8 px digits, DDIM at {STEPS} steps), 2 cores. Ours: `tradeoff.py` over {len(THRESHOLDS)}
thresholds x {len(WEIGHTS)} weights and the generator itself, from the pilot to the report. Other side: for a setting
`generate.py` and then `evaluate.py` on what it made, reports included; three of the {len(THRESHOLDS) * len(WEIGHTS)}
settings are run (of low, middle and high acceptance rate), their mean times {len(THRESHOLDS) * len(WEIGHTS)} is the
other side's time. Each run begins with Ray's start, as both would. Check: precision and recall of the three must be
those of the curve, up to the difference between reading the pool's pictures in one batch order or another."""

SETTINGS = [("p80", 100), ("p50", 5), ("p20", 0.2)]


def measure(quick: bool) -> table.Section:
    """One curve, three separate runs."""
    section = table.Section("Trade-off curve", TEXT)
    made = process.call("benchmarks.generate.prepare", {"cache": str(process.CACHE), "work": str(process.WORK)}).value
    n = 70 if quick else 300
    curve = process.call("benchmarks.tradeoff.curve", {**made, "work": str(process.WORK), "n": n}).value
    print(f"tradeoff: curve: {curve['seconds']:.0f} s", flush=True)
    shown = table.Table("Seconds", ["run", "s", "precision", "recall"])
    shown.rows.append([f"tradeoff.py, {curve['settings']} settings", curve["seconds"], None, None])
    seconds, apart = [], 0.0
    for threshold, weight in SETTINGS[:1] if quick else SETTINGS:
        values = {**made, "work": str(process.WORK), "n": n, "threshold": threshold, "weight": weight}
        found = process.call("benchmarks.tradeoff.separate", values).value
        print(f"tradeoff: {threshold}, w = {weight}: {found}", flush=True)
        seconds.append(found["seconds"])
        shown.rows.append(
            [
                f"generate.py and evaluate.py, {threshold}, w = {weight:g}",
                found["seconds"],
                found["precision"],
                found["recall"],
            ]
        )
        on_curve = curve["points"][f"{threshold}, w = {weight:g}"]
        apart = max(apart, *(abs(found[m] - on_curve[m]) for m in ("precision", "recall")))
        section.raw.append({"threshold": threshold, "weight": weight, **found, "on_curve": on_curve})
    many = len(THRESHOLDS) * len(WEIGHTS)
    separate_s = many * sum(seconds) / len(seconds)
    section.claims += [
        table.reported(
            f"{many} separate runs over one curve: seconds (from {len(seconds)} runs)", separate_s / curve["seconds"]
        ),
        table.at_most("largest difference of precision or recall, curve against separate", apart, 0.02),
    ]
    section.tables.append(shown)
    section.raw.append({"curve": curve})
    return section


def curve(index: str, generator: str, work: str, n: int) -> dict[str, Any]:
    """The sweep: seconds, and precision and recall of every setting."""
    from pd_core.core import artifacts
    from pd_core.evaluate.tradeoff import curve as tradeoff_curve
    from workflows import tradeoff

    output, start = f"{work}/curve", time.perf_counter()
    tradeoff.main(
        [
            *("--index", index, "--generator.path", generator, "--generator.scheduler", "DDIMScheduler"),
            *("--generator.steps", str(STEPS), "--n", str(n), "--thresholds", str(THRESHOLDS).replace("'", '"')),
            *("--weights", str(WEIGHTS), "--output", output, "--no-tracking.enabled"),
        ]
    )
    seconds = time.perf_counter() - start
    artifact = artifacts.load_artifact(f"{output}/curve")
    assert artifact is not None
    rows = tradeoff_curve.read_curve(f"{output}/curve", artifact.parts)
    points = {row["setting"]: {m: row[m] for m in ("precision", "recall")} for row in rows}
    return {"seconds": seconds, "settings": len(rows), "points": points}


def separate(index: str, generator: str, work: str, n: int, threshold: str, weight: float) -> dict[str, Any]:
    """One setting by itself: seconds, precision, recall."""
    from pd_core.core import artifacts
    from workflows import evaluate
    from workflows import generate as generating

    name, start = f"{threshold}-{weight:g}", time.perf_counter()
    generating.main(
        [
            *("--index", index, "--generator.path", generator, "--generator.scheduler", "DDIMScheduler"),
            *("--generator.steps", str(STEPS), "--n", str(n), "--weighting.threshold", threshold),
            *("--weighting.weight", str(weight), "--output", f"{work}/{name}", "--no-tracking.enabled"),
        ]
    )
    output = f"{work}/{name}-evaluation"
    evaluate.main(["--real", index, "--samples", f"{work}/{name}", "--output", output, "--no-tracking.enabled"])
    seconds = time.perf_counter() - start
    artifact = artifacts.load_artifact(f"{output}/metrics")
    assert artifact is not None
    values = artifact.totals["index"][name]
    return {"seconds": seconds, "precision": values["precision"], "recall": values["recall"]}
