"""Cap sets: sets of points without three on a line, as large as possible. The problem of funsearch.py.

    points     vectors of n numbers 0, 1, 2, which are added modulo 3: the space F_3^n
    a line     three points a, b, c with a + b + c = 0; so two points determine the third, c = -(a + b)
    known      the largest sets have 2, 4, 9, 20, 45, 112 points for n = 1 ... 6; for 7 and 8 the largest that
               are known have 236 and 512. That for n = 8 was found by FunSearch (Romera-Paredes et al. 2023,
               "Mathematical discoveries from program search with large language models", Nature 625)

A greedy algorithm goes through the points by priority, the highest first, and takes each point that is on no
line with two points taken before. Only the priority is searched for: an expression (expressions.py) of the
point x, which is evaluated for all points at once:

    sum(x[i] == 2 for i in range(n)) == 2           x[i]: coordinate i; x[-1] is the last

    python -m evaluation.cap_sets       sizes that a few priorities give, and a check of the published 512

Shapes: P = 3^n points, n coordinates, m points of a set.
"""

import ast
from functools import cache

import numpy as np

from evaluation.expressions import Grammar, evaluate
from formats import command

BEST_KNOWN = {1: 2, 2: 4, 3: 9, 4: 20, 5: 45, 6: 112, 7: 236, 8: 512}

# The grammar of priorities. In a loop over i a term may have other coordinates than x[i]: x[i - 1] and x[-i],
# where negative indices count from the end. The rule that stands four times is drawn more often.
PRIORITIES = Grammar(
    {
        "number": 4 * "sum({term} for i in range(n)) | " + "({number} + {number}) | ({number} - {number})"
        " | ({number} * {number}) | ({number} % {modulus}) | ({number} == {value}) | x[{value}] | {value}",
        "term": "({term} + {term}) | ({term} - {term}) | ({term} * {term}) | ({term} % {modulus})"
        " | ({term} == {value}) | x[i] | x[i] | x[i - {shift}] | x[-i] | i",
        "value": "0 | 1 | 2",
        "shift": "1 | 2 | 3",
        "modulus": "2 | 3",
    },
    "number",
)


@cache
def points_of(n: int) -> np.ndarray:
    """Return all points (P, n), in lexicographic order. Raises ValueError for n outside of 1 to 8."""
    if not 1 <= n <= 8:
        raise ValueError(f"dimension {n}: expected 1 to 8")
    return np.indices((3,) * n).reshape(n, -1).T


@cache
def third_points(n: int) -> np.ndarray:
    """Return the index of the third point on the line through two points, for all pairs: int16 (P, P).

    Two equal points have their own index. The index of a point has its coordinates as digits in base 3, so
    the table is made coordinate by coordinate. For n = 8 it takes 86 MB.
    """
    digit = -(np.arange(3)[:, None] + np.arange(3)) % 3
    third = np.zeros((1, 1), dtype=np.int16)
    for _ in range(n):
        third = (3 * third[:, None, :, None] + digit[None, :, None, :]).astype(np.int16)
        third = third.reshape(3 * len(third), -1)
    return third


def is_cap_set(points: np.ndarray) -> bool:
    """Return whether the points (m, n) are all different, and no three of them are on a line."""
    base = 3 ** np.arange(points.shape[1])[::-1]
    indices = points @ base  # (m,)
    third = -(points[:, None] + points) % 3 @ base  # (m, m), the third point on the line through two
    different = len(np.unique(indices)) == len(indices)
    return different and not np.isin(third[~np.eye(len(indices), dtype=bool)], indices).any()


def greedy(n: int, priority: np.ndarray) -> np.ndarray:
    """Return the cap set (m, n) that the greedy algorithm makes of a priority (P,), int64.

    Points of equal priority are taken in lexicographic order.
    """
    points, third = points_of(n), third_points(n)
    blocked, taken = np.zeros(len(points), dtype=bool), np.zeros(len(points), dtype=np.int64)
    m = 0
    for point in np.argsort(-priority, kind="stable").tolist():
        if not blocked[point]:
            blocked[third[point, taken[:m]]] = True  # the lines with all points taken before
            taken[m] = point
            m += 1
    return points[taken[:m]]


def priority_of(program: str | ast.expr, n: int) -> np.ndarray:
    """Return the values (P,), int64, of an expression for all points. Raises ValueError if it has none, or if
    they are no numbers."""
    points = points_of(n)
    with np.errstate(all="ignore"):  # a remainder of a division by 0 is 0
        value = evaluate(program, {"x": list(points.T), "n": n})
    if isinstance(value, list):
        raise ValueError("priority: expected a number, found a list")
    return np.broadcast_to(value, len(points))


def size(program: str | ast.expr, n: int) -> int:
    """Return the size of the cap set that an expression gives. Raises ValueError if it has no value."""
    return len(greedy(n, priority_of(program, n)))


# The published construction (Romera-Paredes et al. 2023, figure 4c). The support of a point is the set of its
# coordinates that are not 0. Its reflections are those i from 1 to 3 with x[i] == x[-i]. Points with these
# supports are in the set if they have any number of reflections, one, or at most one.
ANY_REFLECTION = "0123 0125 0367 0567 1346 1456 2347 2457"
ONE_REFLECTION = "0127 0126 0137 0167 0157 0236 0267 0256 1247 1246 1347 1467 1457 2346 2467 2456"
FEW_REFLECTIONS = "12356 13567 23567 12357 03457 01345 03456 02345"


def published_cap_set() -> np.ndarray:
    """Return the points (512, 8) of the published cap set for n = 8."""
    points = points_of(8)
    x = points.T
    support = np.array(["".join(str(i) for i in range(8) if point[i]) for point in points])
    reflections = sum((x[i] == x[-i]).astype(int) for i in (1, 2, 3))
    chosen = (support == "01234567") & (reflections >= 2)  # points without a 0
    chosen |= np.isin(support, ANY_REFLECTION.split())
    chosen |= np.isin(support, ONE_REFLECTION.split()) & (reflections == 1)
    apart = (x[1] * x[7] % 3 != 1) & (x[2] * x[6] % 3 != 1)  # both pairs differ, or have a 0
    chosen |= np.isin(support, FEW_REFLECTIONS.split()) & (reflections <= 1) & apart
    return points[chosen]


EXAMPLES = {
    "all points are equal": "0",
    "minus the sum of squares modulo 3": "0 - sum(x[i] * x[i] for i in range(n)) % 3",
    "sum of squares is 2 modulo 3": "sum(x[i] * x[i] for i in range(n)) % 3 == 2",
    "just two coordinates are 2": "sum(x[i] == 2 for i in range(n)) == 2",
    "the number of 2s modulo 3": "sum(x[i] == 2 for i in range(n)) % 3",
}


def main(argv: list[str] | None = None) -> None:
    command.Parser(description="Print the sizes that a few priorities give.").parse_args(argv)
    print(f"{'n':42}" + "".join(f"{n:6}" for n in range(1, 8)))
    for name, program in EXAMPLES.items():
        print(f"{name:42}" + "".join(f"{size(program, n):6}" for n in range(1, 8)))
    print(f"{'best known':42}" + "".join(f"{BEST_KNOWN[n]:6}" for n in range(1, 8)))
    cap = published_cap_set()
    print(f"\nn = 8, published: {len(cap)} points, {'a' if is_cap_set(cap) else 'not a'} cap set")
    # Two points of it, and the third one on their line, which lies outside.
    spoiled = np.vstack([cap, -(cap[0] + cap[1]) % 3])
    print(f"with one more on the line of two: {'a' if is_cap_set(spoiled) else 'not a'} cap set")


if __name__ == "__main__":
    command.run(main)
