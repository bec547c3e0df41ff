"""What a benchmark reports, and its two files: benchmarks.json with all figures, benchmarks.md made of it."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.process import ROOT
from pd_core.core import artifacts
from pd_core.engine import resources

Cell = str | int | float | None


@dataclass
class Table:
    """Rows under a header. A float is shown with three significant digits; JSON keeps all of them."""

    title: str
    columns: Sequence[str]
    rows: list[list[Cell]] = field(default_factory=list)


@dataclass
class Claim:
    """A figure with a target. `met` is None where there is no target."""

    what: str
    measured: float
    unit: str
    target: str
    met: bool | None


def at_least(what: str, measured: float, bound: float, unit: str = "") -> Claim:
    """A claim that holds from `bound` up."""
    return Claim(what, measured, unit, f">= {bound:g}", measured >= bound)


def at_most(what: str, measured: float, bound: float, unit: str = "") -> Claim:
    """A claim that holds up to `bound`."""
    return Claim(what, measured, unit, f"<= {bound:g}", measured <= bound)


def reported(what: str, measured: float, unit: str = "") -> Claim:
    """A figure that has no target."""
    return Claim(what, measured, unit, "none", None)


@dataclass
class Section:
    """The result of one benchmark.

    Attributes:
        title: heading.
        text: what is compared with what; Markdown.
        claims: figures with targets.
        tables: everything else that is shown.
        raw: every single measurement.
        skipped: why the benchmark, or a part of it, was not run.
    """

    title: str
    text: str
    claims: list[Claim] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    raw: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def circumstances(quick: bool) -> dict[str, Any]:
    """Machine, date, versions and commit; taken before a benchmark starts."""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": machine(),
        "load_before": round(os.getloadavg()[0], 2),
        "versions": artifacts.package_versions(),
        "commit": commit(),
        "quick": quick,
    }


def machine() -> str:
    """Processor, cores, memory, operating system."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model} ({_simd(lines)}), {resources.cores()} cores, {gib:.0f} GiB, {platform.system()}, no GPU used"


def _simd(cpuinfo: Sequence[str]) -> str:
    flags = next((line for line in cpuinfo if line.startswith("flags")), "").split()
    return next((name for name, flag in (("AVX-512", "avx512f"), ("AVX2", "avx2")) if flag in flags), "no AVX2")


def commit() -> str:
    """Short hash, `+` behind it where tracked or new files differ from it."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        return "unknown"
    own = ("docs/benchmarks.md", "docs/benchmarks.json")  # written by this program itself
    status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    changed = [line for line in status.splitlines() if line[3:] not in own]
    return head.stdout.strip() + ("+" if changed else "")


def write(folder: Path, results: Mapping[str, Mapping[str, Any]], order: Sequence[str]) -> None:
    """Put the new results in the place of the old ones of the same names, then write both files.

    Args:
        folder: of benchmarks.json and benchmarks.md.
        results: by benchmark: `circumstances`, `seconds` and the `section` as a dict.
        order: of the benchmarks in the files.
    """
    path = folder / "benchmarks.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    known.update(results)
    ordered = {name: known[name] for name in [*order, *sorted(set(known) - set(order))] if name in known}
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(ordered, indent=1) + "\n")
    (folder / "benchmarks.md").write_text(markdown(json.loads(path.read_text())))


def result(section: Section, facts: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """What benchmarks.json keeps of a benchmark."""
    return {**facts, "seconds": round(seconds, 1), **asdict(section)}


def markdown(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The page; every number in it is one of `results`."""
    lines = ["# Benchmarks", "", "Written by `make bench` from benchmarks.json beside it; do not edit.", ""]
    for name, entry in results.items():
        lines += [f"## {entry['title']}", "", *_circumstances(name, entry), entry["text"], ""]
        lines += [f"**Not run:** {reason}\n" for reason in entry["skipped"]]
        if entry["claims"]:
            lines += _table(["figure", "measured", "target", "met"], [_claim_cells(c) for c in entry["claims"]])
        for table in entry["tables"]:
            lines += [f"**{table['title']}**", "", *_table(table["columns"], table["rows"])]
    return "\n".join(lines).rstrip() + "\n"


def _circumstances(name: str, entry: Mapping[str, Any]) -> list[str]:
    versions = ", ".join(f"{package} {version}" for package, version in entry["versions"].items())
    lines = [
        f"`make bench ARGS='--only {name}'`, {entry['date']}, commit {entry['commit']}, {entry['seconds']:.0f} s, "
        f"load average before: {entry['load_before']:g}",
        f"({entry['machine']}; {versions}).",
        "",
    ]
    if entry["quick"]:
        lines[:0] = ["**A smoke test (`--quick`): sizes too small to mean anything.**", ""]
    return lines


def _claim_cells(claim: Mapping[str, Any]) -> list[Cell]:
    met = {True: "yes", False: "**no**", None: ""}[claim["met"]]
    return [claim["what"], f"{shown(claim['measured'])} {claim['unit']}".strip(), claim["target"], met]


def _table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> list[str]:
    numeric = [rows and all(isinstance(row[i], int | float | None) for row in rows) for i in range(len(columns))]
    lines = ["| " + " | ".join(columns) + " |", "|" + "|".join("---:" if n else "---" for n in numeric) + "|"]
    lines += ["| " + " | ".join(shown(cell) for cell in row) + " |" for row in rows]
    return [*lines, ""]


def shown(cell: Cell) -> str:
    """A cell as text: three significant digits, never in scientific form above 0.0001."""
    if cell is None:
        return ""
    if isinstance(cell, float):
        if cell == 0 or abs(cell) >= 100:
            return f"{cell:,.0f}"
        return f"{cell:.3g}" if abs(cell) < 1e-4 else f"{float(f'{cell:.3g}'):.6f}".rstrip("0").rstrip(".")
    return f"{cell:,}" if isinstance(cell, int) else cell


def middle(values: Sequence[float]) -> float:
    """Median."""
    return float(median(values))


def spread(values: Sequence[float]) -> str:
    """Lowest and highest of several measurements."""
    return "-" if len(values) < 2 else f"{shown(float(min(values)))} to {shown(float(max(values)))}"
