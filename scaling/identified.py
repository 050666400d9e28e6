"""Checks of what the points of a fit determine: a law or an optimum that they leave open is not shown.

A law is determined if its points have 3 sizes and 3 numbers of tokens, and D does not follow from N; if no
parameter is on the border of the search; and if the 95 % interval of the exponent a is at most WIDE_A wide.

An optimum (N*, D*, loss) at a budget C is shown if the law is determined and

    C          at most FAR times the greatest compute of the points, at least 1 / FAR of the least
    N*         the ends of its 95 % interval are at most a factor WIDE_N apart
    D*/N*      at most ABSURD times the greatest of the points, at least 1 / ABSURD of the least
    loss       at least LEAST times the least measured loss: no text is known to have an entropy so far below
"""

import numpy as np

from chinchilla import MANY_TOKENS, Fit, Law, fit
from formats.quantities import short
from scaling.huber_fit import BORDER, on_border
from scaling.points import beyond, group_equal, interval, on_one_line

FAR, WIDE_N, ABSURD, LEAST = 1000, 100, 100, 0.5
WIDE_A, UNSURE_A = 0.5, 0.15  # an interval of a that is wider than the second is marked as uncertain
NAMES = ("E", "A", "B", "alpha", "beta")


def reasons_against_law(fitted: Fit, laws: Law) -> list[str]:
    """Return why the points do not determine the law, an empty list if they do.

    laws: those of all resamples, one Law whose fields are arrays."""
    reasons = []
    for name, values in (("sizes", fitted.N), ("numbers of tokens", fitted.D)):
        count = group_equal(values).max() + 1
        if count < 3:
            reasons.append(f"there are only {count} {name}: a power law and its limit need 3 or more")
    if on_one_line(np.log([fitted.N, fitted.D])):
        reasons.append("D follows from N: what is due to size cannot be told from what is due to data")
    names = on_the_border(fitted)
    if names:
        verb = "is" if len(names) == 1 else "are"
        reasons.append(f"{' and '.join(names)} {verb} on the border of the search ({BORDER})")
    low, high = interval(laws.a)
    if high - low > WIDE_A:
        reasons.append(f"the 95 % interval of a, the exponent of N* over compute, is {low:.2f} to {high:.2f}")
    return reasons


def determined_law(N, D, L) -> Law:
    """Return the law of the points. Raises ValueError where a parameter is on the border of the search."""
    fitted = fit(N, D, L)
    names = on_the_border(fitted)
    if names:
        raise ValueError(
            f"the points do not decide it: {' and '.join(names)} would be on the border of the search"
        )
    return fitted.law


def on_the_border(fitted: Fit) -> list[str]:
    """Return the names of the parameters that are on the border of the search."""
    return [name for name, out in zip(NAMES, on_border(fitted.theta)[0], strict=True) if out]


def reason_against_optimum(row: dict, found: dict) -> str | None:
    """Return why no optimum is shown at a budget, or None if it is shown.

    row: C, and value, low and high of N, D, D/N and loss. found: the findings of the fit."""
    if found["undetermined"]:
        return "the points do not determine the law"
    C, (least, greatest) = row["C"], found["C"]
    if not least / FAR <= C <= greatest * FAR:
        return f"{far_in_words(C, found['C'])}, more than {FAR:,} times beyond them"
    _, low, high = row["N"]
    if high > WIDE_N * low:
        return f"the 95 % interval of N* is {short(low)} to {short(high)}"
    ratio, (least, greatest) = row["D/N"][0], found["D/N"]
    if not least / ABSURD <= ratio <= greatest * ABSURD:
        measured = f"the points have {short(least)} to {short(greatest)}"
        return f"it would have {short(ratio)} tokens per parameter, where {measured}"
    if row["loss"][0] < LEAST * found["loss"][0]:
        return f"its loss would be {row['loss'][0]:.3g}, where the least measured is {found['loss'][0]:.3g}"
    return None


def far_in_words(C: float, compute: tuple[float, float]) -> str:
    """Return how far a budget lies outside of the points' compute; empty if it lies inside."""
    orders = beyond(C, compute)
    side = "above" if compute[1] < C else "below"
    return f"{orders:.1f} orders of magnitude {side} the points" if orders else ""


def doubts_of_optimum(row: dict, found: dict) -> str:
    """Return the reasons to doubt an optimum that is shown, extrapolation first; empty if there are none."""
    doubts = [far_in_words(row["C"], found["C"])]
    if row["D/N"][0] > MANY_TOKENS:
        doubts.append(f"above {MANY_TOKENS} tokens per parameter laws overstate what more are worth")
    return "; ".join(doubt for doubt in doubts if doubt)


def doubt_of_parameter(name: str, low: float, high: float) -> str:
    """Return the reason to doubt a parameter, by its 95 % interval low to high; empty if there is none."""
    if name in ("a", "b") and high - low > UNSURE_A:
        return f"uncertain: the interval is wider than {UNSURE_A}"
    if name in ("E", "A", "B") and high > 3 * low:
        return "hardly determined"
    return ""


def print_reasons(reasons: list[str]) -> None:
    """Print, in the place of a law, why there is none, and what would determine it."""
    print("No law and no optimum: these points do not determine them.")
    for reason in reasons:
        print(f"  - {reason}")
    print("What determines a law: 4 sizes or more, the largest 10 times the smallest, each on several")
    print("numbers of tokens. For comparison, Besiroglu et al. 2024: a 0.51, about 20 tokens per parameter.")
