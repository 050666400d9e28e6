"""Points that the law does not describe: one rule finds them in every file, names them and leaves them out.

    r = ln predicted - ln measured loss      by the law fitted to the points that are kept
    s = 1.4826 median |r|                    over the points that are kept
    |r| > LEFT_OUT s     the point is left out, and the law fitted anew, until no further point is left out
    |r| > SUSPECT s      the point is named and kept

s estimates the standard deviation of r if r is normal, and hardly depends on outliers. On the 245 points that
Besiroglu et al. 2024 read off a figure, the rule leaves out the five that they leave out: the runs of the
fewest tokens per parameter, 12 s and more away. The next point is 10 s away.
"""

from dataclasses import dataclass

import numpy as np

from chinchilla import Fit, fit
from formats.quantities import short
from scaling.points import Table

LEFT_OUT, SUSPECT = 11, 5  # times s
LEAST_POINTS = 20  # through fewer, a law of five parameters passes too closely for s to mean anything
MOST = 0.05  # share of the points; where more are far, it is the law that does not describe the points
MOST_PRINTED = 10  # rows that are left out, and rows that are named
LEAST_S = 1e-3  # relative error: points without noise have no outliers


@dataclass(frozen=True)
class Chosen:
    """Points that the law is fitted to, and the others."""

    kept: np.ndarray  # (n,) bool
    reason: str  # why the others are left out, or why none is


def robust_deviation(r: np.ndarray) -> float:
    """Return s of the residuals r (n,), at least LEAST_S."""
    return max(float(1.4826 * np.median(np.abs(r))), LEAST_S)


def distances(law, table: Table, kept: np.ndarray) -> np.ndarray:
    """Return r / s (n,) of every point, with s of the points that are kept."""
    r = np.log(law.loss(table.N, table.D) / table.L)
    return r / robust_deviation(r[kept])


def leave_out_outliers(table: Table, delta: float) -> Chosen:
    """Return the points without those that are more than LEFT_OUT s away from the law of the others."""
    n = len(table.L)
    everything = np.ones(n, dtype=bool)
    if n < LEAST_POINTS:
        return Chosen(everything, f"outliers are looked for among {LEAST_POINTS} rows or more")
    rule = f"more than {LEFT_OUT} robust standard deviations away from the law of the others"
    kept = everything
    while True:
        law = fit(table.N[kept], table.D[kept], table.L[kept], delta).law
        far = kept & (np.abs(distances(law, table, kept)) > LEFT_OUT)
        if not far.any():
            return Chosen(kept, f"none is {rule}" if kept.all() else rule)
        kept = kept & ~far
        if (~kept).sum() > MOST * n:
            too_many = (
                f"{(~kept).sum()} and more are {rule}: too many for outliers, this law does not hold here"
            )
            return Chosen(everything, too_many)


def describe(fitted: Fit, table: Table, chosen: Chosen) -> list[dict]:
    """Return every point that is left out, or more than SUSPECT s away, in the order of the file."""
    r = distances(fitted.law, table, chosen.kept)
    predicted = fitted.law.loss(table.N, table.D)
    return [
        {
            "line": int(table.lines[i]),
            "N": float(table.N[i]),
            "D": float(table.D[i]),
            "loss": float(table.L[i]),
            "predicted": float(predicted[i]),
            "deviations": float(r[i]),
            "left_out": not chosen.kept[i],
        }
        for i in np.flatnonzero(~chosen.kept | (np.abs(r) > SUSPECT))
    ]


def print_outliers(found: dict) -> None:
    """Print how many rows are left out and why, each of them, and the exponent with all rows."""
    n_out = sum(row["left_out"] for row in found["outliers"])
    print(f"{found['rows']} rows, {n_out} left out: {found['left_out_because']}")
    kept = f"kept, though more than {SUSPECT} robust standard deviations away"
    for is_out, title in ((True, "left out"), (False, kept)):
        rows = [row for row in found["outliers"] if row["left_out"] == is_out]
        for row in rows[:MOST_PRINTED]:
            print(f"  {title}: line {row['line']}, N {short(row['N'])}, D {short(row['D'])} ", end="")
            print(f"({short(row['D'] / row['N'])} tokens per parameter), loss {row['loss']:.4g}, ", end="")
            print(f"by the law {row['predicted']:.4g}: {abs(row['deviations']):.1f} robust deviations")
        if len(rows) > MOST_PRINTED:
            print(f"  and {len(rows) - MOST_PRINTED} more rows {title}: they are in fit.json")
    if n_out:
        print(f"  with all rows (--drop 0) a is {found['a_with_all_rows']:.4f}")
