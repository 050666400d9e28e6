"""The two other ways to the best size: from the winners of each compute, and from valleys of equal compute.

    approach 1    envelope    which size has the least loss at C?              a line through (ln C, ln N)
    approach 2    IsoFLOP     loss = c0 (ln N)^2 + c1 ln N + c2 at equal C     a line through the minima

Both give N* = k C^a and no law of the loss (Hoffmann et al. 2022, sections 3.1 and 3.2). They ask less of
the data than approach 3, and are a check on it; but a valley of the law is no parabola, and `parabola_bias`
says by how much that misleads.
"""

import math
from dataclasses import dataclass

import numpy as np

from chinchilla import Law, PowerLaw, same


def curves(N, D, L) -> list[tuple[float, np.ndarray, np.ndarray]]:
    """(N, ln C ascending, loss) of every size: its loss over compute C = 6 N D."""
    N, D, L = (np.asarray(values, dtype=np.float64) for values in (N, D, L))
    labels, found = same(N), []
    for label in range(labels.max() + 1):
        mine = np.flatnonzero(labels == label)
        mine = mine[np.argsort(D[mine])]
        size = float(np.exp(np.log(N[mine]).mean()))
        found.append((size, np.log(6 * N[mine] * D[mine]), L[mine]))
    return found


def loss_at(log_C: float, along: np.ndarray, loss: np.ndarray) -> float | None:
    """Off a curve: of a point within 2 %, else straight between two that are less than fivefold apart."""
    i = np.abs(along - log_C).argmin()
    if abs(along[i] - log_C) < 0.02:
        return loss[i]
    right = np.searchsorted(along, log_C)
    if 0 < right < len(along) and along[right] - along[right - 1] < math.log(5):
        return np.interp(log_C, along, loss)
    return None


def power_law(log_C, log_N) -> PowerLaw:
    a, log_k = np.polyfit(log_C, log_N, 1)
    return PowerLaw(float(np.exp(log_k)), float(a))


def envelope(N, D, L) -> PowerLaw:
    """Approach 1 (Hoffmann et al. 2022, section 3.1): which size has the least loss, at every compute?

    Each size wins along an interval of compute; N* is a line through their middles, in logarithms. (Through
    all points of the hull, as in the paper, it hangs on where the grid ends: with 10 sizes of a known law it
    errs in a by 0.005 instead of 0.0002.) The first and the last interval are cut off by the sizes at hand,
    so they do not count.

    Raises ValueError unless 4 sizes or more win somewhere, each with losses at two D or more."""
    found = [curve for curve in curves(N, D, L) if len(curve[1]) > 1]
    if len(found) < 4:
        raise ValueError(f"envelope: {len(found)} sizes with several D: expected at least 4 training curves")
    grid = np.linspace(min(c[0] for _, c, _ in found), max(c[-1] for _, c, _ in found), 20000)
    losses = np.stack([np.interp(grid, c, loss, left=np.inf, right=np.inf) for _, c, loss in found])
    winner = losses.argmin(axis=0)[np.isfinite(losses).any(axis=0)]
    grid = grid[np.isfinite(losses).any(axis=0)]
    winners = np.unique(winner)
    if len(winners) < 4:
        raise ValueError(f"envelope: {len(winners)} sizes win somewhere: expected at least 4; add sizes")
    middles = [(grid[winner == i].min() + grid[winner == i].max()) / 2 for i in winners[1:-1]]
    return power_law(middles, [math.log(found[i][0]) for i in winners[1:-1]])


@dataclass(frozen=True)
class IsoFLOP:
    """Approach 2: a valley, loss over N, for each of m budgets, the parabola through it, and the law."""

    law: PowerLaw
    budgets: np.ndarray  # (m,) FLOPs
    valleys: list[tuple[np.ndarray, np.ndarray]]  # N and loss
    parabolas: np.ndarray  # (m, 3): loss = c0 (ln N)^2 + c1 ln N + c2
    N: np.ndarray  # (m,): where it is least
    factor: float  # how far the valleys reach to either side, as `parabola_bias` has it: mean over m


def isoflop(N, D, L, budgets=None, within: float = 8.0) -> IsoFLOP:
    """Approach 2 (Hoffmann et al. 2022, section 3.2): at equal compute, loss over ln N is nearly a parabola.

    budgets: FLOPs; by default those that 4 points or more share, to 2 %, if most points lie on them, else 8
    from the least compute to the greatest. The loss of a size is read off its curve (`loss_at`). Only sizes
    `within` this factor of the best count, since further out it is no parabola. Left out are budgets with
    less than 4 of them, or with the least loss at the end of the row, where the minimum may lie beyond.
    `parabola_bias` says what the parabola itself does to the answer.

    Raises ValueError where less than 2 budgets remain."""
    found = curves(N, D, L)
    every = np.sort(np.concatenate([c for _, c, _ in found]))
    if budgets is None:
        labels = same(np.exp(every), 0.02)
        groups = [every[labels == i] for i in range(labels.max() + 1)]
        groups = [group for group in groups if len(group) >= 4]
        # More than 20 are no design, but the points of dense training curves that happen to lie close.
        common = 1 < len(groups) <= 20 and sum(map(len, groups)) > len(every) / 2
        spread = np.linspace(every[0], every[-1], 10)[1:-1]
        budgets = np.exp([group.mean() for group in groups] if common else spread)
    kept, valleys, parabolas, lowest, reach = [], [], [], [], []
    for budget in np.log(np.asarray(budgets, dtype=np.float64)):
        row = [(n, loss_at(budget, c, loss)) for n, c, loss in found]
        row = [(n, loss) for n, loss in row if loss is not None]
        if len(row) < 4:
            continue
        n, loss = np.array(row).T
        near = np.abs(np.log(n / n[loss.argmin()])) <= math.log(within) + 1e-9
        n, loss = n[near], loss[near]
        if len(n) < 4 or loss.argmin() in (0, len(n) - 1):
            continue
        parabola = np.polyfit(np.log(n), loss, 2)
        best = -parabola[1] / (2 * parabola[0])
        if parabola[0] <= 0 or not math.log(n[0]) < best < math.log(n[-1]):
            continue
        kept.append(math.exp(budget))
        valleys.append((n, loss))
        parabolas.append(parabola)
        lowest.append(best)
        reach.append(math.log(n[-1] / n[0]) / 2)
    if len(kept) < 2:
        raise ValueError(
            f"isoflop: {len(kept)} budgets have a minimum inside a row of 4 sizes or more: expected at least "
            "2; add sizes, or several D for each"
        )
    law = power_law(np.log(kept), lowest)
    factor = math.exp(np.mean(reach))
    return IsoFLOP(law, np.array(kept), valleys, np.array(parabolas), np.exp(lowest), factor)


def parabola_bias(
    law: Law, factor: float = 8, budgets=(1e17, 1e18, 1e19, 1e20, 1e21), at: float = 1e24
) -> float:
    """The relative error of approach 2's D* at a compute `at`, on this very law, without any noise.

    15 sizes for each budget, evenly spaced in the logarithm, reach from D* / factor to D* factor. Nothing but
    the shape errs: unless alpha = beta, a valley is steeper to one side, and its parabola leans the other way
    ("Problems with Chinchilla Approach 2", arXiv 2603.22339). The exponent is not touched where the valleys
    are cut alike at every budget, as here; N* errs by 1 / (1 + error) - 1."""
    steps = np.linspace(-math.log(factor), math.log(factor), 15)
    lowest = []
    for budget in budgets:
        N, D = law.optimal(budget)
        c2, c1, _ = np.polyfit(steps, law.loss(N / np.exp(steps), D * np.exp(steps)), 2)
        lowest.append(math.log(D) - c1 / (2 * c2))
    b, log_k = np.polyfit(np.log(budgets), lowest, 1)
    return float(math.exp(b * math.log(at) + log_k) / law.optimal(at)[1] - 1)
