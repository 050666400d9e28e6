"""Curves and tables as HTML, for pages that need no network, no other file and no script.

A picture is SVG, stretched to whatever width there is; its labels stand beside it as text, which is not
stretched, so that a telephone shows them as large as a wide screen does. Where a curve has many points, the
mean of each few is drawn, and a band from the least of them to the largest: the page stays small, and a spike
can still be seen.

    chart("Loss", [Curve("training", HUES[0], tokens, loss)])        a figure
    page("gpt tiny", figure, table([("steps", 1400)]))               all of it

report.css has the look.
"""

import math
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np

from formats.numbers import short

STYLE = Path(__file__).with_name("report.css")
HUES = [f"var(--h{i})" for i in range(6)]
POINTS = 400  # the most of a curve that are drawn
DOTS = 60  # the most that are also drawn as dots


class Curve(NamedTuple):
    label: str
    hue: str  # a CSS colour
    x: np.ndarray  # (n,)
    y: np.ndarray  # (n,), NaN where it was not finite
    dots: bool = False  # where each point was measured, if they are few


def settled(curves: list[Curve]) -> float | None:
    """The largest y after the first twentieth of each curve. A loss axis ends there: one that held all of the
    fall from chance would leave no room for what comes after."""
    late = [curve.y[curve.x >= 0.05 * curve.x[-1]] for curve in curves if len(curve.x)]
    return max((y for part in late for y in part[np.isfinite(part)]), default=None)


def usual(y: np.ndarray) -> float | None:
    """Five times the median: an end for a y axis, so that one step that went wrong does not flatten all the
    others."""
    finite = y[np.isfinite(y)]
    return 5 * np.median(finite) if len(finite) else None


def thinned(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(4, n) of x and y (m,), n at most POINTS: of each few consecutive points the last x, and the mean, the
    least and the largest y, NaN where none is finite."""
    n = min(len(x), POINTS)
    begins = np.arange(n) * len(x) // n
    ends = np.append(begins[1:], len(x)) - 1
    sums, counts = (
        np.add.reduceat(values, begins) for values in (np.nan_to_num(y), np.isfinite(y).astype(float))
    )
    mean = np.divide(sums, counts, out=np.full(n, math.nan), where=counts > 0)
    return np.stack((x[ends], mean, np.fmin.reduceat(y, begins), np.fmax.reduceat(y, begins)))


def ticks(low: float, high: float) -> list[float]:
    """Round numbers between low and high, two to six of them."""
    step = 10.0 ** math.floor(math.log10((high - low) / 2))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (factor * step) < 6)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def path(kind: str, x: np.ndarray, y: np.ndarray) -> str:
    """An SVG path through points (n,), broken where y is NaN."""
    drawn, pen = "", "M"
    for u, v in zip(x, y, strict=True):
        if math.isnan(v):
            pen = "M"
            continue
        # h0: a line of no length has round ends, so that a point without neighbours is a dot.
        drawn += f"{pen}{u:.0f} {v:.0f}{'h0' if pen == 'M' else ''}"
        pen = "L"
    return f'<path class="{kind}" d="{drawn}"/>'


def chart(
    title: str,
    curves: list[Curve],
    *,
    over: str = "tokens",
    low: float = math.inf,
    high: float | None = None,
    band: bool = True,
    kind: str = "",
) -> str:
    """A figure of those curves that have a finite point, or nothing. The y axis begins at `low`, or lower if
    a curve does, and ends at `high`, or lower if all curves do. kind: a CSS class."""
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

    drawn, labels, legend, said = [], [], [], []
    for mark in ticks(low, high):
        at = (high - mark) / (high - low)
        drawn.append(f'<path class="grid" d="M0 {1000 * at:.0f}H2000"/>')
        labels.append(f'<span class="y" style="top:{at:.2%}">{short(mark, 6)}</span>')
    for mark in ticks(0.0, width):
        drawn.append(f'<path class="grid" d="M{2000 * mark / width:.0f} 0V1000"/>')
        labels.append(f'<span class="x" style="left:{mark / width:.2%}">{short(mark, 6)}</span>')
    for curve, points in zip(curves, thin, strict=True):
        x = 2000 * points[0] / width
        # What is far above the picture is cut off anyway.
        mean, least, largest = np.clip(1000 * (high - points[1:]) / (high - low), -1000, 2000)
        drawn.append(f'<g style="--hue:{curve.hue}">')
        if band and len(curve.x) > POINTS:
            known = ~np.isnan(mean)
            there_and_back = np.append(x[known], x[known][::-1])
            drawn.append(path("band", there_and_back, np.append(least[known], largest[known][::-1])))
        drawn.append(path("line", x, mean))
        if curve.dots and len(x) <= DOTS:
            drawn += [path("dot", x[i : i + 1], mean[i : i + 1]) for i in range(len(x))]
        drawn.append("</g>")
        last = short(curve.y[np.isfinite(curve.y)][-1], 4)
        name = escape(curve.label)
        legend.append(f'<span><i style="--hue:{curve.hue}"></i>{name} <b>{last}</b></span>')
        said.append(f"{name} {last}")
    return (
        f'<figure class="{kind}"><figcaption><b>{escape(title)}</b> {" ".join(legend)}</figcaption>'
        '<div class="plot"><svg viewBox="0 0 2000 1000" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(title)} over {over}; at the end {", ".join(said)}">{"".join(drawn)}</svg>'
        f'{"".join(labels)}<span class="name">{over}</span></div></figure>\n'
    )


def page(title: str, *parts: str) -> str:
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{escape(title)}</title>\n'
        f"<style>\n{STYLE.read_text()}</style>\n</head>\n<body>\n<main>\n<h1>{escape(title)}</h1>\n"
        f"{''.join(parts)}</main>\n</body>\n</html>\n"
    )


def table(rows: list[tuple]) -> str:
    """The first cell of each row is its heading."""
    lines = []
    for heading, *cells in rows:
        told = "".join(f"<td>{escape(str(cell))}</td>" for cell in cells)
        lines.append(f"<tr><th>{escape(str(heading))}</th>{told}</tr>\n")
    return f'<div class="scroll"><table>\n{"".join(lines)}</table></div>\n'
