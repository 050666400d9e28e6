"""Approaches 1 and 2 of Hoffmann et al. 2022: the best size from training curves, without a law of the loss.

    approach 1    envelope    which size has the least loss at C?              a line through (ln C, ln N)
    approach 2    IsoFLOP     loss = c0 (ln N)^2 + c1 ln N + c2 at equal C     a line through the minima

Both give an allocation, N* = k C^a (sections 3.1 and 3.2). They assume less about the data than approach 3,
the fit of chinchilla.py, and are a check on it. But a *valley*, the loss over N at equal compute, is not
exactly a parabola if the law is true: `parabola_bias` computes the error that this causes.
"""

import math
from dataclasses import dataclass

import numpy as np

from chinchilla import Law, PowerLaw
from scaling.points import group_equal


def curves(N, D, L) -> list[tuple[float, np.ndarray, np.ndarray]]:
    """Return the training curve of every size: N, ln C (n,) ascending, and the loss there (n,); C = 6 N D."""
    N, D, L = (np.asarray(values, dtype=np.float64) for values in (N, D, L))
    labels, found = group_equal(N), []
    for label in range(labels.max() + 1):
        mine = np.flatnonzero(labels == label)
        mine = mine[np.argsort(D[mine])]
        size = float(np.exp(np.log(N[mine]).mean()))
        found.append((size, np.log(6 * N[mine] * D[mine]), L[mine]))
    return found


def loss_at(log_C: float, curve_log_C: np.ndarray, loss: np.ndarray) -> float | None:
    """Return the loss of one curve at compute C: that of the nearest point if it is within 2 %, else a linear
    interpolation between neighbours less than 5 times apart, else None."""
    i = np.abs(curve_log_C - log_C).argmin()
    if abs(curve_log_C[i] - log_C) < 0.02:
        return loss[i]
    right = np.searchsorted(curve_log_C, log_C)
    if 0 < right < len(curve_log_C) and curve_log_C[right] - curve_log_C[right - 1] < math.log(5):
        return np.interp(log_C, curve_log_C, loss)
    return None


def power_law(log_C, log_N) -> PowerLaw:
    """Return the least-squares line through (ln C, ln N) as N* = k C^a.

    Raises ValueError unless a is between 0 and 1: otherwise N* or D* would fall with compute."""
    a, log_k = np.polyfit(log_C, log_N, 1)
    if not 0 < a < 1:
        raise ValueError(
            f"the points do not decide it: a line through {len(log_N)} minima would let "
            f"{'D*' if a > 0 else 'N*'} fall as compute grows"
        )
    return PowerLaw(float(np.exp(log_k)), float(a))


def envelope(N, D, L) -> PowerLaw:
    """Return N* = k C^a by approach 1 (Hoffmann et al. 2022, section 3.1): the size of least loss at every C.

    Each size is the best along an interval of compute; N* is a line through the middles of these intervals,
    in logarithms. (The paper fits all points of the envelope instead. That depends on where the grid of
    sizes ends: with 10 sizes of a known law it errs in a by 0.005 instead of 0.0002.) The first and the last
    interval are left out, because smaller or larger sizes would have cut them short.

    Raises ValueError unless 4 sizes or more are the best somewhere, each with losses at two D or more, and as
    `power_law` does."""
    found = [curve for curve in curves(N, D, L) if len(curve[1]) > 1]
    if len(found) < 4:
        raise ValueError(f"envelope: {len(found)} sizes with several D: expected at least 4 training curves")
    # The best size at every point of a fine grid over ln C, without the gaps that no curve reaches.
    grid = np.linspace(min(c[0] for _, c, _ in found), max(c[-1] for _, c, _ in found), 20000)
    losses = np.stack([np.interp(grid, c, loss, left=np.inf, right=np.inf) for _, c, loss in found])
    winner = losses.argmin(axis=0)[np.isfinite(losses).any(axis=0)]
    grid = grid[np.isfinite(losses).any(axis=0)]
    winners = np.unique(winner)
    if len(winners) < 4:
        raise ValueError(f"envelope: {len(winners)} sizes win somewhere: expected at least 4; add sizes")
    # The line through the middles of the inner intervals.
    middles = [(grid[winner == i].min() + grid[winner == i].max()) / 2 for i in winners[1:-1]]
    return power_law(middles, [math.log(found[i][0]) for i in winners[1:-1]])


@dataclass(frozen=True)
class IsoFLOP:
    """The result of approach 2: a valley (loss over N) for each of m budgets, its parabola, and the law."""

    law: PowerLaw
    budgets: np.ndarray  # (m,) FLOPs
    valleys: list[tuple[np.ndarray, np.ndarray]]  # m times (N, loss)
    parabolas: np.ndarray  # (m, 3): loss = c0 (ln N)^2 + c1 ln N + c2
    N: np.ndarray  # (m,): the minimum of each parabola
    factor: float  # mean reach of the valleys to either side, as in `parabola_bias`


def common_budgets(found: list[tuple[float, np.ndarray, np.ndarray]]) -> np.ndarray:
    """Return the budgets that 4 points or more share, to 2 %, if most points lie on them; else 8 budgets from
    the least compute of the curves to the greatest."""
    every = np.sort(np.concatenate([log_C for _, log_C, _ in found]))
    labels = group_equal(np.exp(every), 0.02)
    groups = [every[labels == i] for i in range(labels.max() + 1)]
    groups = [group for group in groups if len(group) >= 4]
    # More than 20 groups are no design: they are points of dense training curves that happen to lie close.
    common = 1 < len(groups) <= 20 and sum(map(len, groups)) > len(every) / 2
    spread = np.linspace(every[0], every[-1], 10)[1:-1]
    return np.exp([group.mean() for group in groups] if common else spread)


def fit_valley(found, log_C: float, within: float):
    """Return for one budget the valley (N, loss), its parabola (3,), ln N of the minimum, and how far in ln N
    the valley reaches to either side.

    Return None for a budget with fewer than 4 sizes, or with the least loss at either end of its sizes, where
    the minimum may lie beyond."""
    row = [(n, loss_at(log_C, curve, loss)) for n, curve, loss in found]
    row = [(n, loss) for n, loss in row if loss is not None]
    if len(row) < 4:
        return None
    n, loss = np.array(row).T
    near = np.abs(np.log(n / n[loss.argmin()])) <= math.log(within) + 1e-9
    n, loss = n[near], loss[near]
    if len(n) < 4 or loss.argmin() in (0, len(n) - 1):
        return None
    parabola = np.polyfit(np.log(n), loss, 2)
    lowest = -parabola[1] / (2 * parabola[0])
    if parabola[0] <= 0 or not math.log(n[0]) < lowest < math.log(n[-1]):
        return None
    return (n, loss), parabola, lowest, math.log(n[-1] / n[0]) / 2


def isoflop(N, D, L, budgets=None, within: float = 8.0) -> IsoFLOP:
    """Return N* = k C^a by approach 2 (Hoffmann et al. 2022, section 3.2): parabolas through the loss over
    ln N at equal compute.

    budgets: FLOPs, by default `common_budgets`. Each size's loss at a budget is `loss_at` of its curve. Only
    sizes within a factor `within` of the best are used, because the valley is no parabola further out.
    Budgets without a clear minimum are left out (`fit_valley`).

    Raises ValueError where fewer than 2 budgets remain, or none beyond 10 % of another, and as `power_law`
    does."""
    found = curves(N, D, L)
    if budgets is None:
        budgets = common_budgets(found)
    fitted = []
    for budget in np.log(np.asarray(budgets, dtype=np.float64)):
        valley = fit_valley(found, budget, within)
        if valley is not None:
            fitted.append((math.exp(budget), *valley))
    if len(fitted) < 2:
        raise ValueError(
            f"isoflop: {len(fitted)} budgets have a minimum among 4 sizes or more: expected at least 2; add "
            "sizes, or several D for each"
        )
    kept, valleys, parabolas, lowest, reach = zip(*fitted, strict=True)
    if group_equal(kept, 0.1).max() == 0:
        raise ValueError(
            f"isoflop: all budgets are near {kept[0]:.2g} FLOPs: expected runs of other compute too"
        )
    law = power_law(np.log(kept), lowest)
    factor = math.exp(np.mean(reach))
    return IsoFLOP(law, np.array(kept), list(valleys), np.array(parabolas), np.exp(lowest), factor)


def parabola_bias(
    law: Law, factor: float = 8, budgets=(1e17, 1e18, 1e19, 1e20, 1e21), at: float = 1e24
) -> float:
    """Return the relative error of approach 2's D* at a compute `at`, if `law` is true and there is no noise.

    Each budget has 15 sizes, evenly spaced in the logarithm, from D* / factor to D* factor. Only the shape
    errs: unless alpha = beta, a valley is steeper on one side, and that shifts its parabola's minimum
    ("Problems with Chinchilla Approach 2", arXiv 2603.22339). The exponent is not affected where the valleys
    are cut alike at every budget, as here. The relative error of N* is 1 / (1 + error) - 1."""
    steps = np.linspace(-math.log(factor), math.log(factor), 15)
    lowest = []
    for budget in budgets:
        N, D = law.optimal(budget)
        c0, c1, _ = np.polyfit(steps, law.loss(N / np.exp(steps), D * np.exp(steps)), 2)
        lowest.append(math.log(D) - c1 / (2 * c0))
    b, log_k = np.polyfit(np.log(budgets), lowest, 1)
    return float(math.exp(b * math.log(at) + log_k) / law.optimal(at)[1] - 1)
