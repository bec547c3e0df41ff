"""Sets of samples side by side: how their densities lie among the real set's, and what they look like.

python demo/compare.py runs/digits runs/digits-typical runs/digits-varied --output runs/demo.html
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from pd_core.core import artifacts, errors, files
from pd_core.core.errors import UserError
from pd_core.density import realset
from pd_core.images import resize
from pd_core.report import figures

SHOWN = 60  # images of each set
BINS = 20  # of equally many real images


@dataclass(frozen=True)
class Samples:
    """A finished output of generate.py: its name, its commit record and its rows without the images but those shown."""

    name: str
    artifact: artifacts.Artifact
    rows: pa.Table
    pictures: list[bytes]


def read(folder: Path) -> Samples:
    """The samples under `folder`. Raises UserError where none are finished."""
    uri = files.join(str(folder.absolute()), "samples")
    artifact = artifacts.load_artifact(uri)
    if artifact is None:
        raise UserError(f"{folder}: no finished samples there; run generate.py with this --output first")
    tables = [files.read_table(files.join(uri, part.name)) for part in artifact.parts]
    table = pa.concat_tables(tables)
    shown = table["image"].slice(0, SHOWN).to_pylist()
    pictures = [resize.thumbnail(Image.open(io.BytesIO(image["bytes"]))) for image in shown]
    return Samples(folder.name, artifact, table.drop_columns(["image"]), pictures)


def histogram(sets: list[Samples], real: realset.RealSet) -> bytes:
    """Share of each set in bins of equally many real images; the real set is the flat line."""
    figure, axes = figures.new_figure(False, height_in=3.4)
    edges = np.linspace(0, 100, BINS + 1)
    axes.stairs(np.full(BINS, 100 / BINS), edges, fill=True, color=figures.BAR, alpha=0.55, label="real")
    for samples, color, style in zip(sets, (figures.MARK, figures.INK, figures.MUTED), ("-", "--", ":"), strict=False):
        shares, _ = np.histogram(real.percentile(_by_index(samples)), edges)
        axes.stairs(100 * shares / shares.sum(), edges, color=color, linestyle=style, linewidth=2, label=samples.name)
    axes.set_xlim(0, 100)
    axes.set_xlabel("percentile of the pseudo density among the real images (measured by the index)")
    axes.set_ylabel("share of the images (%)")
    figure.legend(loc="outside upper left", ncols=4, frameon=False, fontsize=9)
    return figures.to_png(figure)


def _by_index(samples: Samples) -> np.ndarray:
    column = samples.rows["density_index"]
    return (samples.rows["density"] if column.null_count else column).to_numpy()


def facts(samples: Samples, real: realset.RealSet) -> list[str]:
    """One row of the table."""
    percentiles = real.percentile(_by_index(samples))
    totals = samples.artifact.totals
    weighting = totals["settings"]["weighting"]
    asked = (
        weighting["kind"] if weighting["weight"] is None else f"{weighting['threshold']}, w = {weighting['weight']:g}"
    )
    return [
        samples.name,
        asked,
        f"{totals['rows']:,} of {totals['candidates']:,}",
        f"{100 * totals['acceptance_rate']:.3g}%",
        f"p{np.median(percentiles):.0f}",
        f"{100 * np.mean(percentiles > 80):.0f}%",
        f"{100 * np.mean(percentiles < 20):.0f}%",
        str(totals["copies"]),
    ]


def page(sets: list[Samples], real: realset.RealSet) -> str:
    """The page: one table, one figure, a grid of each set."""
    head = ["set", "asked for", "accepted", "rate", "median", "above real p80", "below real p20", "likely copies"]
    rows = "".join(f"<tr>{''.join(f'<td>{html.escape(v)}</td>' for v in facts(s, real))}</tr>" for s in sets)
    grids = "".join(
        f"<h2>{html.escape(s.name)}</h2><div class=grid>{''.join(map(_picture, s.pictures))}</div>" for s in sets
    )
    return f"""<!doctype html><html lang=en><meta charset=utf-8><title>Typical and varied</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2rem auto; padding: 0 1rem; color: #1c2430; }}
td, th {{ text-align: left; padding: .3rem 1rem .3rem 0; border-bottom: 1px solid #dfe4ea; }} .plot {{ width: 100%; }}
.grid {{ display: grid; grid-template-columns: repeat(auto-fill, 56px); gap: 6px; }}
.grid img {{ width: 56px; }}</style>
<h1>One generator, {len(sets)} sets of samples</h1>
<p>Same generator, same real images; what differs is the weight given to samples by their pseudo density.</p>
<table><tr>{"".join(f"<th>{name}</th>" for name in head)}</tr>{rows}</table>
<img class=plot src={_data(histogram(sets, real))} alt="Densities of the sets among the real ones">{grids}</html>"""


def _picture(png: bytes) -> str:
    return f'<img src={_data(png)} alt="">'


def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def main(arguments: list[str] | None = None) -> int:
    """Write the page and say where it is."""
    parser = argparse.ArgumentParser(description="Compare sets of samples of one index.")
    parser.add_argument("index", type=Path, help="output of build_index.py")
    parser.add_argument("samples", type=Path, nargs="+", help="outputs of generate.py")
    parser.add_argument("--output", type=Path, default=Path("runs/demo.html"), help="default: %(default)s")
    args = parser.parse_args(arguments)

    def program() -> None:
        text = page([read(folder) for folder in args.samples], realset.open_realset(str(args.index.absolute())))
        files.write_bytes(str(args.output.absolute()), text.encode())
        print(f"compared: {args.output.absolute()}")

    return errors.exit_code(program)


if __name__ == "__main__":
    sys.exit(main())
