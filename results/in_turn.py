"""Measure the sides of a comparison in turn, A B A B ..., so that a slow minute of the machine slows all."""

import statistics
from collections.abc import Callable


def measure_in_turn(sides: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Return for each side its figure in each round, such as tokens per second."""
    figures = {side: [] for side in sides}
    for _ in range(rounds):
        for side, measure in sides.items():
            figures[side].append(measure())
    return figures


def compared(figures: dict[str, list[float]], baseline: str, **labels) -> list[dict]:
    """Return a row for each side, and print it: the labels, the median of its tokens per second, and the
    median and range of its ratio to the baseline of the same round."""
    rows = []
    for side, rates in figures.items():
        ratios = [rate / other for rate, other in zip(rates, figures[baseline], strict=True)]
        row = labels | {"side": side, "tokens_per_second": statistics.median(rates)}
        row |= {"ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}
        rows.append(row)
        print(f"  {side:18} {row['tokens_per_second']:9,.0f} tokens/s   {row['ratio']:.2f}x", end="")
        print(f" ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})", flush=True)
    return rows
