"""Results of cases in docs/reliability.json, and the tables of docs/reliability.md."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from chaos.compare import MAY_DIFFER, MAY_DIFFER_TOTALS
from chaos.faults import FAULTS
from chaos.workflows import WORKFLOWS
from pd_core.core import artifacts, files
from pd_core.engine import resources

RESULTS, PAGE = "reliability.json", "reliability.md"
KEY = ("workflow", "fault", "number", "seed")
Result = Mapping[str, Any]


def add(docs: Path, result: Result) -> None:
    """Write a result in place of an earlier one of the same case, and the page's tables."""
    file = docs / RESULTS
    known = json.loads(file.read_text())["cases"] if file.exists() else []
    kept = [one for one in known if any(one[name] != result[name] for name in KEY)]
    today = {**result, "date": date.today().isoformat()}
    order = [list(WORKFLOWS), list(FAULTS)]
    cases = sorted(
        [*kept, today],
        key=lambda one: (order[0].index(one["workflow"]), order[1].index(one["fault"]), one["seed"], one["number"]),
    )
    machine = f"{resources.cores()} cores, Python {platform.python_version()}"
    facts = {"machine": machine, "versions": artifacts.package_versions(), "cases": cases}
    files.write_bytes(str(file), json.dumps(facts, indent=1).encode() + b"\n")
    page = docs / PAGE
    if page.exists():
        text = page.read_text()
        for name, lines in (("matrix", matrix(cases)), ("faults", by_fault(cases)), ("differ", may_differ())):
            before, mark, rest = text.partition(f"<!-- {name} -->\n")
            text = before + mark + "\n".join(lines) + "\n" + rest[rest.index("<!-- end -->") :] if mark else text
        files.write_bytes(str(page), text.encode())


def told(result: Result) -> str:
    """One line for the console."""
    if result["broken"]:
        return f"NOT DONE: {result['broken']}"
    text = (
        f"{result['hits']} of {result['kills']} hit, {result['runs']} runs, {result['reruns']} of them to resume, "
        f"{result['lost']} rows lost, {result['doubled']} doubled, {len(result['differing'])} parts differ, "
        f"{result['seconds']} s"
    )
    return "; ".join([text, *result["differing"][:5], *result["lines"][-1:]])


def matrix(cases: Sequence[Result]) -> list[str]:
    """A row for each workflow and fault, and the sums."""
    head = (
        "workflow",
        "fault",
        "cases",
        "runs",
        "hits",
        "resumed by itself",
        "re-run needed",
        "rows lost",
        "rows doubled",
        "parts that differ",
    )
    rows = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for workflow in dict.fromkeys(c["workflow"] for c in cases):
        own = [c for c in cases if c["workflow"] == workflow]
        rows += [_row(workflow, f, [c for c in own if c["fault"] == f]) for f in dict.fromkeys(c["fault"] for c in own)]
        rows.append(_row(f"**{workflow}**", "all", own))
    return [*rows, _row("**all**", "all", cases)]


def _row(workflow: str, fault: str, cases: Sequence[Result]) -> str:
    whole = [c for c in cases if not c["broken"]]
    by_itself = sum(not c["reruns"] for c in whole)
    sums = [sum(c[name] for c in cases) for name in ("runs", "hits")]
    kills = sum(c["kills"] for c in cases)
    found = [sum(c[name] for c in whole) for name in ("lost", "doubled")]
    differing = sum(len(c["differing"]) for c in whole)
    open_ends = f" ({len(cases) - len(whole)} not done)" if len(whole) < len(cases) else ""
    cells = [
        len(cases),
        sums[0],
        f"{sums[1]} of {kills}",
        by_itself,
        f"{len(whole) - by_itself}{open_ends}",
        *found,
        differing,
    ]
    return f"| {workflow} | {fault} | {' | '.join(map(str, cells))} |"


def by_fault(cases: Sequence[Result]) -> list[str]:
    """What each fault said to the operator, and how often."""
    lines = []
    for fault in FAULTS:
        seen = Counter(line.replace("`", "'") for c in cases if c["fault"] == fault for line in c["lines"])
        lines += [f"- `{fault}` ({count} times): `{line}`" for line, count in seen.most_common(3)]
    return lines


def may_differ() -> list[str]:
    """The list of exceptions."""
    lines = [f"- `{name}`: {why}" for name, why in MAY_DIFFER.items()]
    return [*lines, *(f"- `{name}` in the totals of `artifact.json`: {why}" for name, why in MAY_DIFFER_TOTALS.items())]
