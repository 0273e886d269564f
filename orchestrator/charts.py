"""Small charts as SVG for a page that has colours of its own, light and dark.

Knows matplotlib, and nothing of what is drawn. An SVG holds no fonts, no colours and no addresses:
text is set in the page's font, and each colour is one of the page's CSS variables.
"""

import io
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator
from numpy.typing import NDArray

Numbers = NDArray[np.float64]

# Drawn in colours that stand for the page's, which take their place in the text of the SVG.
VARIABLES = {
    "#010101": "var(--ink)",
    "#010102": "var(--muted)",
    "#010103": "var(--line)",
    "#010104": "var(--accent)",
    **{f"#0102{index:02x}": f"var(--series-{index})" for index in range(6)},
}
INK, MUTED, LINE, ACCENT, *SERIES = VARIABLES
MOST_POINTS = 400  # of a drawn line; longer ones are drawn as means and ranges of stretches
MOST_LOOKS = 200  # of a drawn line of looks, each with its interval
MOST_LABELLED = 1e3  # times: a logarithmic axis over less has labels inside of decades
SMOOTHED_FROM = 20  # points: fewer need no running mean
STYLE: Any = {  # matplotlib's types want literal keys
    "svg.fonttype": "none",
    "font.size": 10.5,
    "axes.edgecolor": LINE,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "lines.solid_capstyle": "round",
    "text.color": INK,
    "xtick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "ytick.major.size": 0,
}


@dataclass(frozen=True, slots=True)
class Points:
    """Values at steps, [n] each, steps ascending; values may be NaN."""

    steps: Numbers
    values: Numbers


def course(name: str, points: Points, *, smooth: bool = False, from_zero: bool = False) -> str:
    """A value over the steps; with `smooth`, the values pale behind their running mean."""
    with _figure(name) as (axes, svg):
        steps, values = points.steps, points.values
        if len(steps) > MOST_POINTS:
            steps, values, low, high = _stretches(points)
            axes.fill_between(steps, low, high, color=ACCENT, alpha=0.18, linewidth=0)
        pale = smooth and len(steps) >= SMOOTHED_FROM
        marker = "o" if len(steps) < SMOOTHED_FROM else None
        axes.plot(
            steps,
            values,
            color=ACCENT,
            alpha=0.35 if pale else 1.0,
            linewidth=1.0 if pale else 1.6,
            marker=marker,
            markersize=4,
        )
        if pale:
            axes.plot(steps, _running_mean(values), color=ACCENT, linewidth=2.0)
        if from_zero:
            axes.set_ylim(bottom=0)
            if not np.nanmax(values):
                axes.set_ylim(top=1)
        _fit_steps(axes, points.steps)
    return svg.text


def with_intervals(name: str, points: Points, low: Numbers, high: Numbers, *, percent: bool) -> str:
    """Values over the steps, each with its interval; the first one dashed. Shares (0 to 1) are
    shown as per cent."""
    scale, unit = (100, " %") if percent else (1, "")
    with _figure(name, width=7.4) as (axes, svg):
        shown = np.unique(np.linspace(0, len(points.steps) - 1, MOST_LOOKS).astype(int))
        steps, values = points.steps[shown], points.values[shown]
        low, high = low[shown], high[shown]
        axes.axhline(scale * values[0], color=MUTED, linewidth=1.0, linestyle=(0, (4, 3)))
        axes.plot(steps, scale * values, color=ACCENT, linewidth=1.6)
        errors = scale * np.stack([values - low, high - values])
        axes.errorbar(
            steps,
            scale * values,
            yerr=errors,
            color=ACCENT,
            fmt="o",
            markersize=5.5,
            elinewidth=1.4,
            capsize=3.5,
        )
        for index in {0, len(steps) - 1}:
            axes.annotate(
                f"{scale * values[index]:.{1 if percent else 3}f}{unit}",
                (steps[index], scale * high[index]),
                xytext=(0, 5),
                textcoords="offset points",
                ha="center",
                color=INK,
            )
        axes.margins(y=0.16)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}{unit}"))
        _fit_steps(axes, steps, room=0.06)
    return svg.text


def logarithmic(name: str, lines: Mapping[str, Points], marked: float) -> str:
    """Lines on logarithmic axes, with a dashed mark; what is not above 0 is left out."""
    with _figure(name) as (axes, svg):
        axes.set_xscale("log")
        axes.set_yscale("log", nonpositive="mask")
        axes.minorticks_off()
        axes.axvline(marked, color=MUTED, linewidth=1.0, linestyle=(0, (4, 3)))
        for colour, points in zip(itertools.cycle(SERIES), lines.values(), strict=False):
            values = np.where(points.values > 0, points.values, math.nan)
            axes.plot(points.steps, values, color=colour, linewidth=1.6, marker="o", markersize=4)
        for axis in (axes.xaxis, axes.yaxis):
            low, high = axis.get_view_interval()
            steps_of_decade = (1, 2, 5) if high < MOST_LABELLED * low else (1,)
            axis.set_major_locator(LogLocator(subs=steps_of_decade, numticks=9))
        # Plain text in the page's font, where powers would be set in one of matplotlib's own.
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    return svg.text


# -------------------------------------------------------------------- parts


class _Svg:
    text = ""


@contextmanager
def _figure(name: str, width: float = 3.7) -> Iterator[tuple[Axes, _Svg]]:
    """Axes to draw on within; afterwards, the drawing. `name` keeps its ids from others'."""
    svg = _Svg()
    # The salt makes ids, and so the page, the same whenever it is drawn.
    with mpl.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(width, 2.15), layout="constrained")
        axes = figure.add_subplot()
        axes.set_axisbelow(True)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        yield axes, svg
        file = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg.text = _for_page(file.getvalue())


def _for_page(svg: str) -> str:
    """The SVG element in the page's colours and font, scaled to its place."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg[^>]*?) (?:height|width)="[^"]*pt"', r"\1", svg)
    svg = re.sub(r'(<svg[^>]*?) (?:height|width)="[^"]*pt"', r"\1", svg)
    svg = re.sub(r' xmlns(?::xlink)?="[^"]*"| version="1.1"', "", svg)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # nothing points there, and other charts have them
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px var(--font)", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, variable)
    return svg


def _fit_steps(axes: Axes, steps: Numbers, room: float = 0.02) -> None:
    first, last = float(steps[0]), float(steps[-1])
    margin = max(0.5, room * (last - first))
    axes.set_xlim(first - margin, last + margin)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5, min_n_ticks=1))


def _stretches(points: Points) -> tuple[Numbers, Numbers, Numbers, Numbers]:
    """Middle steps, means, least and greatest values of at most MOST_POINTS stretches.

    What is NaN is left out; a stretch without anything else is NaN.
    """
    stretches = min(MOST_POINTS, len(points.steps))
    cuts = np.linspace(0, len(points.steps), stretches + 1).astype(int)
    rows = []
    for start, end in zip(cuts, cuts[1:], strict=False):
        values = points.values[start:end]
        values = values[np.isfinite(values)]
        of_values = (values.mean(), values.min(), values.max()) if len(values) else (math.nan,) * 3
        rows.append((points.steps[start:end].mean(), *of_values))
    steps, means, low, high = np.array(rows).T
    return steps, means, low, high


def _running_mean(values: Numbers) -> Numbers:
    """Each value's mean with its neighbours, a tenth of all; NaN is left out."""
    reach = max(2, len(values) // 20)
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0.0], np.cumsum(finite)])
    index = np.arange(len(values))
    start, end = np.maximum(index - reach, 0), np.minimum(index + reach + 1, len(values))
    with np.errstate(invalid="ignore"):  # no finite neighbour: NaN
        return np.asarray((sums[end] - sums[start]) / (counts[end] - counts[start]))


def legend(names: Sequence[str]) -> list[tuple[str, str]]:
    """Names and their colours where several are drawn, as CSS."""
    return [(name, VARIABLES[SERIES[i % len(SERIES)]]) for i, name in enumerate(names)]
