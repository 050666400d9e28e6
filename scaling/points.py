"""Points that a scaling law is fitted to: reading them from a CSV file, checking, grouping, resampling.

A point is one training run, or one evaluation during it: N parameters, D tokens, and the loss L after them.
Points are held as three arrays of shape (n,), float64.
"""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

COLUMNS = {  # column names in the files of several papers, in lower case
    "N": ("n", "params", "parameters", "model size"),
    "D": ("d", "tokens", "training tokens"),
    "C": ("c", "flop", "flops", "compute", "training flop"),
    "loss": ("loss", "l", "val_loss"),
}


@dataclass(frozen=True)
class Table:
    """The points of a CSV file. N, D and L: float64 (n,) each."""

    N: np.ndarray
    D: np.ndarray
    L: np.ndarray
    lines: np.ndarray  # (n,) int: the line of the file that each point is in
    columns: tuple[str, str, str]  # the file's own names of N, of D or C, and of the loss
    has_D: bool  # False where D is computed from C

    @property
    def described_columns(self) -> str:
        """Return which column is which, in words."""
        N, second, loss = self.columns
        D_or_C = f"D from {second!r}" if self.has_D else f"D = C / (6 N) with C from {second!r}"
        return f"N from column {N!r}, {D_or_C}, loss from {loss!r}"


def read_table(path: str | Path) -> Table:
    """Return the points of a CSV file with a header.

    The file has columns for N, for the loss, and for D or C; from C follows D = C / (6 N). Other columns are
    not read.

    Raises ValueError, with file and line, for missing columns and for cells that are not positive numbers.
    """
    rows, lines = [], []
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        reader = csv.DictReader(file, skipinitialspace=True)
        try:
            names, has_D = choose_columns(reader.fieldnames or (), path)
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if None in row:
                    raise ValueError(f"{where}: more cells than columns; a decimal comma?")
                rows.append([positive_number(row[name], f"{where}: {name.strip()}") for name in names])
                lines.append(reader.line_num)
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: {error}") from None
    if not rows:
        raise ValueError(f"{path}: no points below the header")
    N, D_or_C, L = np.array(rows).T
    columns = tuple(name.strip() for name in names)
    return Table(N, D_or_C if has_D else D_or_C / (6 * N), L, np.array(lines), columns, has_D)


def read_points(path: str | Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return N, D and loss, float64 (n,) each, of a CSV file. Raises ValueError as `read_table` does."""
    table = read_table(path)
    return table.N, table.D, table.L


def choose_columns(header: Sequence[str], path: str | Path) -> tuple[list[str], bool]:
    """Return the header's names for N, for D or C, and for the loss; and True if the second is D."""
    by_name = {(name or "").strip().lower(): name for name in header}
    found = {key: [by_name[n] for n in names if n in by_name] for key, names in COLUMNS.items()}
    second = "D" if found["D"] else "C"
    missing = [key for key in ("N", second, "loss") if not found[key]]
    if missing:
        # Name the file's own columns, and what each missing one may be called.
        present = ", ".join((name or "").strip() for name in header) or "nothing"
        accepted = {key: " or ".join(names) for key, names in COLUMNS.items()}
        accepted["C"] = f"{accepted['D']} (D), or {accepted['C']} (C)"
        called = "; ".join(
            f"{'D or C' if key == 'C' else key} may be called {accepted[key]}" for key in missing
        )
        expected = "expected columns N, loss, and D or C"
        raise ValueError(f"{path}, line 1: {expected}; it has {present}. Rename a column: {called}")
    chosen = [found[key][0] for key in ("N", second, "loss")]
    for name in chosen:
        alike = [n.strip() for n in header if n.strip().lower() == name.strip().lower()]
        if len(alike) > 1:
            raise ValueError(f"{path}, line 1: columns {' and '.join(alike)}: expected one of this name")
    return chosen, second == "D"


def positive_number(text: str | None, where: str) -> float:
    """Return the number in a cell. Raises ValueError unless it is positive and finite."""
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ValueError(f"{where} is {text!r}: expected a positive number")
    return value


def all_but_highest(L: np.ndarray, n: int) -> np.ndarray:
    """Return a mask, bool (n_points,), of all points but the n of highest loss. L: losses (n_points,)."""
    kept = np.ones(len(L), dtype=bool)
    kept[np.argsort(L, kind="stable")[len(L) - n :]] = False
    return kept


def group_equal(values, tolerance: float = 0.005) -> np.ndarray:
    """Return group labels 0, 1, ... (n,), int64, ascending with the values.

    A group begins at its smallest value and holds those up to 1 + tolerance times it. Values that are meant
    to be equal differ a little where they were read off a figure, or computed as C / (6 D).
    """
    labels, first = np.zeros(len(values), dtype=np.int64), 0.0
    label = -1
    for i in np.argsort(values, kind="stable"):
        if values[i] > first * (1 + tolerance):
            label, first = label + 1, values[i]
        labels[i] = label
    return labels


def beyond(C: float, compute: tuple[float, float]) -> float:
    """Return how many orders of magnitude a budget C lies outside of `compute`, the least and the greatest
    FLOPs of a law's points: 0 inside, and also where it would be printed as 0.0."""
    at, least, greatest = (math.log10(flops) for flops in (C, *compute))
    orders = max(at - greatest, least - at)
    return orders if orders >= 0.05 else 0.0


def check_points(N: np.ndarray, D: np.ndarray, L: np.ndarray) -> None:
    """Raise ValueError where the law cannot be fitted: fewer than 6 points, numbers that are not positive, a
    compute 6 N D outside of float64's range, or only one size N or one number of tokens D."""
    if not (N.ndim == 1 and N.shape == D.shape == L.shape):
        raise ValueError(f"fit: N {N.shape}, D {D.shape}, loss {L.shape}: expected three rows of one length")
    if len(N) < 6:
        raise ValueError(f"fit: {len(N)} points: expected at least 6 for the law's 5 parameters")
    for name, values in (("N", N), ("D", D), ("loss", L)):
        bad = values[~((values > 0) & np.isfinite(values))]
        if len(bad):
            raise ValueError(f"fit: {name} {bad[0]}: expected positive numbers")
    with np.errstate(over="ignore", under="ignore"):
        C = 6 * N * D
    if not (np.isfinite(C) & (C > 0)).all():
        raise ValueError("fit: 6 N D is out of the range of float64: look at the units of N and D")
    for name, values in (("size N", N), ("number of tokens D", D)):
        if group_equal(values).max() == 0:
            raise ValueError(f"fit: one {name} alone: its part of the loss cannot be told from E; vary it")


def describe_weak_design(N: np.ndarray, logs: np.ndarray) -> list[str]:
    """Return warnings of what these points cannot determine. N (n,); logs (3, n): ln N, ln D and ln L."""
    warnings = []
    n_sizes = group_equal(N).max() + 1
    if n_sizes < 4:
        warnings.append(f"only {n_sizes} sizes: E, A and alpha cannot be told apart; use 4 or more")
    if N.max() < 3 * N.min():
        warnings.append(f"N varies by a factor of {N.max() / N.min():.3g} only: alpha takes 10 or more")
    if on_one_line(logs):
        warnings.append("one D for each N: A and alpha cannot be told from B and beta; vary D at equal N")
    return warnings


def on_one_line(logs: np.ndarray) -> bool:
    """Return True where D follows from N, as with 20 tokens per parameter throughout. logs (2 or 3, n): ln N,
    ln D."""
    return bool(abs(np.corrcoef(logs[:2])[0, 1]) > 0.999)


def draw_resamples(
    units: np.ndarray, groupings: Sequence[np.ndarray], n: int, seed: int
) -> tuple[np.ndarray, int]:
    """Return n bootstrap resamples, and how many of them had to be drawn again.

    units (n_points,): labels 0, 1, ...; a resample draws as many units as there are, with replacement, and
    points of one unit are drawn together. The resamples are weights (n, n_points), float64: how many times a
    resample contains a point.
    groupings: labels (n_points,) each. A resample that contains fewer than 3 groups of one of them (or not
    all, where there are fewer than 3) determines no law, so it is drawn again.

    Raises ValueError for n below 1, and for fewer than 4 units.
    """
    if n < 1:
        raise ValueError(f"bootstrap: {n} resamples: expected at least 1")
    n_units = units.max() + 1
    if n_units < 4:
        raise ValueError(f"bootstrap by size: {n_units} sizes: expected at least 4; draw points instead")
    generator = np.random.default_rng(seed)
    members = [np.eye(labels.max() + 1)[labels] for labels in groupings]  # one-hot (n_points, n_groups)
    w, poor, n_redrawn = np.empty((n, len(units))), np.ones(n, dtype=bool), -n
    while poor.any():
        n_redrawn += poor.sum()
        w[poor] = generator.multinomial(n_units, np.full(n_units, 1 / n_units), poor.sum())[:, units]
        present = [((w @ member > 0).sum(axis=1), member.shape[1]) for member in members]
        poor = np.any([count < min(3, n_groups) for count, n_groups in present], axis=0)
    return w, n_redrawn


def interval(values, level: float = 0.95) -> tuple[float, float]:
    """Return the percentile interval of bootstrap values (n,): half of 1 - level lies beyond each end."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
