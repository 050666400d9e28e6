"""Common parts of the pictures in scaling/: ticks that do not overlap, and the frontier of a law."""

import math

import numpy as np

EXTRAPOLATED = "extrapolated"  # the label of what lies outside of the points


def choose_ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Return 3 to `most` round numbers from low to high, for a logarithmic axis."""
    for digits in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [digit * 10.0**exponent for exponent in exponents for digit in digits]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 3:
            return ticks[:: math.ceil(len(ticks) / most)]
    return [float(f"{tick:.3g}") for tick in np.geomspace(low, high, 5)[1:4]]


def label_logarithmic(axis) -> None:
    """Label a logarithmic axis with a few round numbers. matplotlib's own labels overlap where the axis spans
    less than two powers of ten. Called when everything is drawn: the ends of the axis are then fixed."""
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullFormatter

    ticks = choose_ticks(*axis.get_view_interval())
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(
        FixedFormatter([f"{tick:.3g}".replace("e+0", "e").replace("e+", "e") for tick in ticks])
    )
    axis.set_minor_formatter(NullFormatter())


def plot_frontier(axes, law, compute: tuple[float, float], low: float, high: float, label: str) -> None:
    """Plot the law's least loss from low to high FLOPs: solid within the points' compute, dashed outside."""
    least, greatest = compute
    inside = np.geomspace(least, greatest, 200)
    axes.plot(inside, law.loss(*law.optimal(inside)), "k-", linewidth=1.2, label=label)
    parts = [np.geomspace(*ends, 100) for ends in ((low, least), (greatest, high)) if ends[0] < ends[1]]
    for i, outside in enumerate(parts):
        name = None if i else f"the same, {EXTRAPOLATED}"
        axes.plot(outside, law.loss(*law.optimal(outside)), "k--", linewidth=1, label=name)
        axes.axvspan(outside[0], outside[-1], color="grey", alpha=0.12, linewidth=0)


def write_no_frontier(axes) -> None:
    """Write into the picture, in the place of the frontier, why there is none."""
    text = "No frontier: these points\ndo not determine the law."
    axes.text(0.03, 0.04, text, transform=axes.transAxes, color="tab:red")
