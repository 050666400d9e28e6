"""Figures of several seeds: their mean and range, as text and as a line with a band."""

import statistics
from collections.abc import Sequence


def mean_and_range(values: Sequence[float], form: str = ".3f") -> str:
    """Return the mean, the smallest and the largest value as text, such as "0.512 (0.498 to 0.530)"."""
    return f"{statistics.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def draw(axes, x: Sequence[float], curves: Sequence[Sequence[float]], alpha: float = 0.2, **style) -> None:
    """Draw the mean of the curves over x as a line, and their range as a band of the same colour.

    curves: for each seed its values at x. alpha: opacity of the band. style: arguments of `axes.plot`; with
    drawstyle="steps-post" each value holds until the next x.
    """
    values = list(zip(*curves, strict=True))
    (line,) = axes.plot(x, [statistics.mean(v) for v in values], **style)
    step = "post" if style.get("drawstyle") == "steps-post" else None
    low, high = [min(v) for v in values], [max(v) for v in values]
    axes.fill_between(x, low, high, step=step, color=line.get_color(), alpha=alpha)
