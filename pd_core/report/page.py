"""One self-contained HTML page: templates, the numbers and texts in them, pictures as data."""

from __future__ import annotations

import base64
import datetime
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import numpy as np

from pd_core.core.settings.base import WorkflowSettings
from pd_core.core.settings.load import to_yaml


# --- what the page is made from ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Picture:
    """One image of the real set with its numbers.

    Attributes:
        key: name of the image within the source.
        label: its label, or None.
        density: pseudo density ρ.
        percentile: of ρ among the real set, in [0, 100].
        mean_knn_distance: Euclidean, not squared.
        thumbnail: PNG or JPEG (see `thumbnail`), or None when the original can no longer be read.
        distance: Euclidean distance to the image it is shown as a neighbor of, else None.
    """

    key: str
    label: str | None
    density: float
    percentile: float
    mean_knn_distance: float
    thumbnail: bytes | None
    distance: float | None = None


@dataclass(frozen=True)
class LabelRow:
    """Densities of the images of one label: number of images, mean and percentiles of ρ within the label."""

    label: str
    count: int
    mean: float
    p10: float
    p50: float
    p90: float


@dataclass(frozen=True)
class Calibration:
    """Held-out quality of the density predictor; r2 and spearman are of log ρ, None where undefined.

    Attributes:
        log_density: float64 [M], measured with the index; M may be a sample of the held-out rows (5,000 draw well).
        predicted_log_density: float64 [M].
        n_holdout: rows that r2, spearman and `more` are computed on.
        more: further figures. Names of `predictor.Calibration` get a description, others are shown as they are.
    """

    log_density: np.ndarray
    predicted_log_density: np.ndarray
    r2: float | None
    spearman: float | None
    n_holdout: int
    more: Mapping[str, float | None] = field(default_factory=dict)


_CALIBRATION_TEXT: Mapping[str, str] = {
    "r2_density": "R² of ρ itself",
    "low_decile_spearman": "Spearman within the tenth of lowest density",
    "low_decile_mean_abs_log_error": "mean |error| of log ρ in the tenth of lowest density",
    "high_decile_spearman": "Spearman within the tenth of highest density",
    "high_decile_mean_abs_log_error": "mean |error| of log ρ in the tenth of highest density",
}


def calibration_range(calibration: Calibration) -> tuple[float, float]:
    """Range of both axes: 0.1% to 99.9% of measured and of predicted log ρ, with a margin."""
    true, predicted = finite_pairs(calibration)
    if true.size == 0:
        return -1.0, 1.0
    ends = np.quantile(np.stack([true, predicted]), [0.001, 0.999], axis=1)
    low, high = float(ends.min()), float(ends.max())
    margin = 0.04 * (high - low) or 0.5
    return low - margin, high + margin


def finite_pairs(calibration: Calibration) -> tuple[np.ndarray, np.ndarray]:
    """True and predicted log densities, without those where one has none."""
    true, predicted = calibration.log_density, calibration.predicted_log_density
    assert true.shape == predicted.shape, (true.shape, predicted.shape)
    finite = np.isfinite(true) & np.isfinite(predicted)  # a network that regresses ρ itself may predict ρ <= 0
    return true[finite], predicted[finite]


def facts_of_run(
    title: str, settings: WorkflowSettings, timings_s: Mapping[str, float], versions: Mapping[str, str]
) -> dict[str, Any]:
    """What the page of any workflow says of its run, as templates name it."""
    return {
        "title": title,
        "output": str(settings.output),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "timings_s": timings_s,
        "versions": versions,
        "settings_yaml": to_yaml(settings),
    }


# --- text -------------------------------------------------------------------------------------------------------------
def visible(text: str) -> str:
    """The text with every character that does not print (newline, control, right-to-left mark, ...) as an escape."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def shorten(text: str, chars: int) -> str:
    """At most `chars` characters; the middle gives way, as the end of a path tells more than what precedes it."""
    if len(text) <= chars:
        return text
    head = chars // 3
    return f"{text[:head]}…{text[len(text) - (chars - head - 1) :]}"


def drawable(text: str) -> str:
    """The text with characters that the figures' font lacks as �."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties()))
    return "".join(c if font.get_char_index(ord(c)) else "\N{REPLACEMENT CHARACTER}" for c in text)


def significant(value: float) -> str:
    """Four significant digits, zeros included, so that values in a column compare at a glance."""
    return f"{value:#.4g}".removesuffix(".")


def number(value: float | None) -> str:
    """At most four significant digits; "not defined" for None."""
    return "not defined" if value is None else f"{value:.4g}"


def percentile(value: float) -> str:
    """A percentile with one decimal, and towards 0 and 100 with as many as tell it from its neighbors."""
    tail = min(value, 100.0 - value)
    decimals = 1 if tail >= 1 or tail <= 0 else min(8, 1 - math.floor(math.log10(tail)))
    return f"{value:.{decimals}f}"


def seconds(value: float) -> str:
    """`0.42 s`, `12.3 s`, `3 min 5 s` or `2 h 14 min`."""
    if value < 60:
        return f"{value:.2f} s" if value < 10 else f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _data_uri(image: bytes) -> str:
    kind = "png" if image.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode('ascii')}"


def page(template: str, context: Mapping[str, Any]) -> bytes:
    """A page of the package's templates as UTF-8 HTML; every expression in it is made visible and escaped.

    The template extends `base.html.j2`, which needs `d.title`, `d.created` and `d.versions`.
    """
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment = Environment(
        loader=FunctionLoader(
            lambda name: resources.files("pd_core.report").joinpath("templates", name).read_text("utf-8")
        ),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_finalize,
    )
    environment.filters |= {
        "count": lambda value: f"{value:,}",
        "number": number,
        "significant": significant,
        "percent": lambda share: f"{100 * share:.3g}%",
        "percentile": percentile,
        "seconds": seconds,
        "shorten": lambda text, chars: shorten(visible(text), chars),
        "multiline": _multiline,
        "data_uri": _data_uri,
        "hidden_points": hidden_points,
        "calibration_rows": calibration_rows,
    }
    return environment.get_template(template).render(context).encode("utf-8")


def _finalize(value: Any) -> Any:
    # Applied to every expression of the template, before escaping. Markup is a str that is finished already.
    return visible(value) if type(value) is str else value


def _multiline(text: str) -> Any:
    from markupsafe import Markup, escape

    return Markup("\n").join(escape(visible(line)) for line in text.splitlines())


def calibration_rows(calibration: Calibration) -> list[tuple[str, float | None]]:
    """(what, value) of every figure of a calibration."""
    rows = [("R² of log ρ", calibration.r2), ("Spearman rank correlation", calibration.spearman)]
    return rows + [(_CALIBRATION_TEXT.get(name, name), value) for name, value in calibration.more.items()]


def hidden_points(calibration: Calibration) -> int:
    """Points that the drawing leaves out: beyond its axes, or not finite."""
    true, predicted = finite_pairs(calibration)
    low, high = calibration_range(calibration)
    inside = (true >= low) & (true <= high) & (predicted >= low) & (predicted <= high)
    return calibration.log_density.size - int(np.count_nonzero(inside))
