"""Curves and tables as HTML, for pages that need no network, no other file and no script.

A chart is an SVG that is stretched to the width of the window. Its labels are HTML text beside the SVG, which
is not stretched, so they have the same size on a telephone and on a wide screen. Of a curve of many points
only the means of groups of consecutive points are drawn, and a band from the smallest to the largest value of
each group. So the page stays small, and a spike remains visible.

    chart("Loss", [Curve("training", HUES[0], tokens, loss)])        a figure
    page("gpt tiny", figure, table([("steps", 1400)]))               a page

The style sheet is report.css.
"""

import math
from collections.abc import Callable
from html import escape
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np

from formats.quantities import short

STYLE = Path(__file__).with_name("report.css")
HUES = [f"var(--h{i})" for i in range(6)]
POINTS = 400  # most points of a curve that are drawn
DOTS = 60  # most points that are also drawn as dots


class Curve(NamedTuple):
    label: str
    hue: str  # a CSS colour
    x: np.ndarray  # (n,)
    y: np.ndarray  # (n,), NaN where the value is not finite
    dots: bool = False  # mark each point, if there are at most DOTS


def settled(curves: list[Curve]) -> float | None:
    """Return the largest y after the first twentieth of each curve, None if there is none.

    The axis of a loss ends there. If it went up to the loss of a random model, the rest would be a flat line.
    """
    late = [curve.y[curve.x >= 0.05 * curve.x[-1]] for curve in curves if len(curve.x)]
    return max((y for part in late for y in part[np.isfinite(part)]), default=None)


def usual(y: np.ndarray) -> float | None:
    """Return five times the median of y, none of which is negative; None if no y is finite. A y axis ends
    there, so that a single spike does not flatten the curve."""
    finite = y[np.isfinite(y)]
    return 5 * np.median(finite) if len(finite) else None


def thinned(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return (4, n), n at most POINTS, for points x and y (m,): for n groups of consecutive points the last
    x, and the mean, the smallest and the largest y, NaN where no y is finite."""
    n = min(len(x), POINTS)
    begins = np.arange(n) * len(x) // n
    ends = np.append(begins[1:], len(x)) - 1
    sums, counts = (
        np.add.reduceat(values, begins) for values in (np.nan_to_num(y), np.isfinite(y).astype(float))
    )
    mean = np.divide(sums, counts, out=np.full(n, math.nan), where=counts > 0)
    return np.stack((x[ends], mean, np.fmin.reduceat(y, begins), np.fmax.reduceat(y, begins)))


def ticks(low: float, high: float) -> list[float]:
    """Return two to six round numbers between low and high."""
    step = 10.0 ** math.floor(math.log10((high - low) / 2))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (factor * step) < 6)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def path(kind: str, x: np.ndarray, y: np.ndarray) -> str:
    """Return an SVG path through points (n,), interrupted where y is NaN. kind: its CSS class."""
    drawn, pen = "", "M"
    for u, v in zip(x, y, strict=True):
        if math.isnan(v):
            pen = "M"
            continue
        # h0 is a line of length 0. Its round ends make a point without neighbours visible.
        drawn += f"{pen}{u:.0f} {v:.0f}{'h0' if pen == 'M' else ''}"
        pen = "L"
    return f'<path class="{kind}" d="{drawn}"/>'


def four_digits(value: float) -> str:
    """Return a number with four digits, by default the text of a value in a chart's legend."""
    return short(value, 4)


def chart(
    title: str,
    curves: list[Curve],
    *,
    over: str = "tokens",
    low: float = math.inf,
    high: float | None = None,
    band: bool = True,
    kind: str = "",
    text: Callable[[float], str] = four_digits,
) -> str:
    """Return a figure of the curves that have a finite point, or "" if none has.

    The y axis begins at `low`, or at the smallest y if that is lower. It ends at `high`, or at the largest y
    if that is lower; a larger value is noted in the legend. high: at least the smallest y. over: what x is.
    band: draw the range of thinned points. kind: a CSS class. text: returns a value of y as text.
    """
    # Choose the ends of the axes.
    curves = [curve for curve in curves if np.isfinite(curve.y).any()]
    if not curves:
        return ""
    thin = [thinned(curve.x, curve.y) for curve in curves]
    most = max(np.nanmax(curve.y) for curve in curves)
    least = min(low, *(np.nanmin(curve.y) for curve in curves))
    top = most if high is None else min(high, most)
    margin = 0.05 * (top - least) or 0.05 * abs(top) or 1.0
    low, high = least - (margin if least < low else 0.0), top + margin
    width = 1.01 * max(x[-1] for x, *_ in thin) or 1.0

    # Draw the grid, and label it.
    drawn, labels, legend, ends = [], [], [], []
    for mark in ticks(low, high):
        at = (high - mark) / (high - low)
        drawn.append(f'<path class="grid" d="M0 {1000 * at:.0f}H2000"/>')
        labels.append(f'<span class="y" style="top:{at:.2%}">{short(mark, 6)}</span>')
    for mark in ticks(0.0, width):
        drawn.append(f'<path class="grid" d="M{2000 * mark / width:.0f} 0V1000"/>')
        labels.append(f'<span class="x" style="left:{mark / width:.2%}">{short(mark, 6)}</span>')

    # Draw each curve in coordinates of 2000 x 1000. Values far outside of the chart are clipped.
    for curve, points in zip(curves, thin, strict=True):
        ys = np.clip(1000 * (high - points[1:]) / (high - low), -1000, 2000)
        drawn.append(curve_drawn(curve, 2000 * points[0] / width, *ys, band=band))
        last = text(curve.y[np.isfinite(curve.y)][-1])
        name = escape(curve.label)
        legend.append(f'<span><i style="--hue:{curve.hue}"></i>{name} <b>{last}</b></span>')
        ends.append(f"{name} {last}")
    if most > high:
        legend.append(f"<span>not shown: up to {text(most)}</span>")
    return (
        f'<figure class="{kind}"><figcaption><b>{escape(title)}</b> {" ".join(legend)}</figcaption>'
        '<div class="plot"><svg viewBox="0 0 2000 1000" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(title)} over {over}; at the end {", ".join(ends)}">{"".join(drawn)}</svg>'
        f'{"".join(labels)}<span class="name">{over}</span></div></figure>\n'
    )


def curve_drawn(
    curve: Curve, x: np.ndarray, mean: np.ndarray, least: np.ndarray, largest: np.ndarray, *, band: bool
) -> str:
    """Return the line of a thinned curve (n,) in SVG, with its dots and the band of its range."""
    drawn = [f'<g style="--hue:{curve.hue}">']
    if band and len(curve.x) > POINTS:
        known = ~np.isnan(mean)
        there_and_back = np.append(x[known], x[known][::-1])
        drawn.append(path("band", there_and_back, np.append(least[known], largest[known][::-1])))
    drawn.append(path("line", x, mean))
    if curve.dots and len(x) <= DOTS:
        drawn += [path("dot", x[i : i + 1], mean[i : i + 1]) for i in range(len(x))]
    return "".join((*drawn, "</g>"))


def page(title: str, *parts: str) -> str:
    """Return an HTML document of a title and parts, with the style sheet inside."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{escape(title)}</title>\n'
        f"<style>\n{STYLE.read_text(encoding='utf-8')}</style>\n</head>\n<body>\n<main>\n<h1>{escape(title)}</h1>\n"
        f"{''.join(parts)}</main>\n</body>\n</html>\n"
    )


def table(rows: list[tuple], headed: bool = False) -> str:
    """Return rows of cells as an HTML table; the first cell of each row is its heading.

    headed: the first row holds the headings of the columns. A narrow window shows each row as a block, with
    the column's heading before each cell.
    """
    lines, names = [], rows[0][1:] if headed else ()
    for i, (heading, *cells) in enumerate(rows):
        labels = [f' data-name="{escape(str(name))}"' for name in names] if i else []
        data = "".join(
            f"<td{label}>{escape(str(cell))}</td>" for cell, label in zip_longest(cells, labels, fillvalue="")
        )
        lines.append(f"<tr><th>{escape(str(heading))}</th>{data}</tr>\n")
    kind = "scroll headed" if headed else "scroll"
    return f'<div class="{kind}"><table>\n{"".join(lines)}</table></div>\n'
