"""Figures of several seeds, drawn: their mean as a line, and their range as a band."""

import statistics
from collections.abc import Sequence


def means(curves: Sequence[Sequence[float]]) -> list[float]:
    """Return the mean of several curves, point by point."""
    return [statistics.mean(values) for values in zip(*curves, strict=True)]


def draw(axes, x: Sequence[float], curves: Sequence[Sequence[float]], alpha: float = 0.2, **style) -> None:
    """Draw the mean of the curves over x as a line, and their range as a band of the same colour.

    curves: for each seed its values at x. alpha: opacity of the band. style: arguments of `axes.plot`; with
    drawstyle="steps-post" each value holds until the next x.
    """
    values = list(zip(*curves, strict=True))
    (line,) = axes.plot(x, means(curves), **style)
    step = "post" if style.get("drawstyle") == "steps-post" else None
    low, high = [min(v) for v in values], [max(v) for v in values]
    axes.fill_between(x, low, high, step=step, color=line.get_color(), alpha=alpha)
