"""The rule of outliers, on the paper's points and on known laws."""

import numpy as np
from test_chinchilla import grid

from chinchilla import HOFFMANN, LAWS, points
from scaling.outliers import describe, leave_out_outliers
from scaling.points import Table, read_table

LAW = LAWS["besiroglu"].law


def table(N, D, L):
    return Table(N, D, L, np.arange(2, len(N) + 2), ("N", "D", "loss"), True)


def test_the_rule_leaves_out_the_five_points_that_besiroglu_et_al_leave_out():
    paper = read_table(HOFFMANN)
    chosen = leave_out_outliers(paper, 1e-3)
    assert (paper.L[chosen.kept] == points()[2]).all()
    assert (paper.D / paper.N)[~chosen.kept].max() < 0.41  # the fewest tokens per parameter
    assert list(paper.lines[~chosen.kept]) == [190, 198, 207, 213, 229]
    assert HOFFMANN.read_text().splitlines()[213 - 1].split(",")[2].startswith("4.66")


def test_points_of_a_law_have_no_outliers():
    for noise in (0.0, 0.01):
        chosen = leave_out_outliers(table(*grid(LAW, noise=noise)), 1e-3)
        assert chosen.kept.all() and chosen.reason.startswith("none is more than 11")


def test_a_row_with_a_slip_is_left_out_and_described():
    from chinchilla import fit

    N, D, L = grid(LAW, noise=0.005)
    L[20] *= 1.3
    rows = table(N, D, L)
    chosen = leave_out_outliers(rows, 1e-3)
    assert list(np.flatnonzero(~chosen.kept)) == [20]
    kept = chosen.kept
    (row,) = (row for row in describe(fit(N[kept], D[kept], L[kept]), rows, chosen) if row["left_out"])
    assert row["line"] == 22 and abs(row["predicted"] * 1.3 / row["loss"] - 1) < 0.02


def test_few_points_and_many_outliers_are_kept():
    few = leave_out_outliers(table(*grid(LAW, sizes=4, tokens=4)), 1e-3)
    assert few.kept.all() and "among 20 rows or more" in few.reason
    N, D, L = grid(LAW, noise=0.002)
    L[::8] *= 1.5
    many = leave_out_outliers(table(N, D, L), 1e-3)
    assert many.kept.all() and "too many for outliers" in many.reason
