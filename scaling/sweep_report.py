"""The findings of scaling/sweep.py: the law of its points, and two pictures.

sweep.png        loss over compute of every size, the law and its frontier, the prediction and the measured
                 loss; and loss over N at equal compute
emergence.png    the best models by two measures: the share p of tokens that are predicted correctly, and the
                 share of k tokens in a row that are all correct, about p^k

p grows smoothly with compute, while p^k stays near 0 and then rises steeply. The models are the same: the
sudden rise is due to the measure (Schaeffer et al. 2023, arXiv 2304.15004).
"""

import csv
import math
from pathlib import Path

import numpy as np

from chinchilla import DEFAULT_LAW, LAWS, Law, fit
from formats import atomic
from formats.figures import load_pyplot, save_figure
from formats.quantities import short
from scaling import identified
from scaling.isoflop import envelope, isoflop
from scaling.pictures import label_logarithmic, plot_frontier, write_no_frontier
from scaling.points import interval

RESAMPLES = 4000  # of the points, for intervals
SPANS = (1, 2, 4, 8, 12)  # numbers of tokens in a row that are all to be right
EXACT = tuple(f"exact_{k}" for k in SPANS)


def write_csv(rows: list[dict], path: Path) -> None:
    """Write the points to a CSV file with a header. rows: numbers by column name, the same names in each."""
    with atomic.replace_file(path) as new, open(new, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: f"{value:.8g}" for name, value in row.items()})


def columns(rows: list[dict], *names: str) -> list[np.ndarray]:
    """Return an array (n_rows,), float64, for each name."""
    return [np.array([row[name] for row in rows], dtype=np.float64) for name in names]


def find_law(rows: list[dict], seed: int) -> tuple[Law, np.ndarray, dict]:
    """Return the law of the points, its parameters (RESAMPLES, 5) on resamples of whole sizes, and the
    findings for sweep.json."""
    N, D, L = columns(rows, "N", "D", "loss")
    fitted = fit(N, D, L)
    samples = fitted.bootstrap(RESAMPLES, seed, by_size=True)
    laws, names = Law(*samples.T), ("E", "A", "B", "alpha", "beta", "a")
    found = {name: getattr(fitted.law, name) for name in names}
    found |= {"rms of ln loss": fitted.residual_rms}
    found["intervals"] = {name: interval(getattr(laws, name)) for name in names}
    found["undetermined"] = identified.reasons_against_law(fitted, laws)

    # The exponent by other counts of N (all parameters, or those of the layers as in Kaplan et al. 2020), and
    # by the other approaches.
    ways = {
        "with N all parameters": lambda: identified.determined_law(*columns(rows, "parameters", "D", "loss")),
        "with N less the head": lambda: identified.determined_law(
            *columns(rows, "without_head", "D", "loss")
        ),
        "by approach 1": lambda: envelope(N, D, L),
        "by approach 2": lambda: isoflop(N, D, L).law,
    }
    found["other a"], found["no other a"] = {}, {}
    for name, way in ways.items():
        try:
            found["other a"][name] = way().a
        except ValueError as error:
            found["no other a"][name] = str(error)
    found["warnings"] = fitted.warnings
    return fitted.law, samples, found


def print_law(found: dict) -> None:
    """Print the law beside a published one, and the exponent by other ways; or why there is none."""
    print()
    if found["undetermined"]:
        identified.print_reasons(found["undetermined"])
    else:
        published = LAWS[DEFAULT_LAW]
        print(f"{'law':10}{'value':>10}   {'95 % interval, by drawing sizes':34}{published.title}")
        for name, (low, high) in found["intervals"].items():
            reference, doubt = getattr(published.law, name), identified.doubt_of_parameter(name, low, high)
            cells = f"{found[name]:10.4g}   {f'{low:.4g} to {high:.4g}':34}{reference:<12.4g}{doubt}"
            print(f"{name:10}{cells}".rstrip())
        print("E is in nats per token. E, A and B depend on the text: compare alpha, beta and a alone.")
    print(f"residuals of ln loss: {found['rms of ln loss']:.2%} rms")
    print(
        "a, the exponent of the best N over compute (Hoffmann et al. 2022: 0.46 to 0.50; Kaplan et al.: 0.73)"
    )
    for name, value in found["other a"].items():
        print(f"  {name}: {value:.3f}")
    for name, reason in found["no other a"].items():
        print(f"  {name}: none: {reason}")
    for warning in found["warnings"]:
        print(f"warning: {warning}")


def plot_sweep(found: dict, law: Law, rows: list[dict], largest: dict, prediction: dict, path: Path) -> None:
    """Plot the curves of all sizes with the prediction, and beside them valleys of equal compute."""
    pyplot = load_pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    plot_curves(left, found, law, rows, largest, prediction, pyplot.cm.viridis)
    plot_valleys(right, found, law, rows, pyplot.cm.plasma)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        label_logarithmic(axes.xaxis)
    save_figure(figure, path)


def plot_curves(
    axes, found: dict, law: Law, rows: list[dict], largest: dict, prediction: dict, color_map
) -> None:
    """Plot the loss over compute of every size, the law's frontier, and the largest run as predicted and as
    measured."""
    widths = sorted({row["width"] for row in rows})
    colors = dict(zip(widths, color_map(np.linspace(0, 0.9, len(widths))), strict=True))
    for width in widths:
        N, D, C, L = columns([row for row in rows if row["width"] == width], "N", "D", "C", "loss")
        axes.plot(C, L, "o", color=colors[width], markersize=4, label=label_of(width, N[0]))
        tokens = np.geomspace(D[0], D[-1])
        axes.plot(6 * N[0] * tokens, law.loss(N[0], tokens), color=colors[width], linewidth=0.8)
    if not found["undetermined"]:
        (C,) = columns(rows, "C")
        plot_frontier(axes, law, (C.min(), C.max()), C.min(), 1.5 * largest["C"], "least loss, by the law")
    else:
        write_no_frontier(axes)

    # The interval need not contain the prediction: its ends are percentiles of resamples.
    low, high = prediction["interval"]
    C, loss, size = largest["C"], prediction["loss"], label_of(largest["width"], largest["N"])
    reach = [[max(0, loss - low)], [max(0, high - loss)]]
    axes.errorbar(C, loss, reach, fmt="_", color="tab:red", capsize=4, label=f"{size}, predicted")
    axes.plot(C, largest["loss"], "*", color="tab:red", markersize=11, label=f"{size}, measured")
    axes.set(xscale="log", xlabel="training FLOPs", ylabel="held-out loss (nats per token)")
    axes.set(title="Every size while it trains (dots), and the law fitted to them (lines)")
    axes.legend(fontsize=7, ncols=2, title="width, N = FLOPs per token / 6", title_fontsize=7)


def label_of(width: int, N: float) -> str:
    """Return the name of a size in the pictures: both numbers are in the table that `sweep` prints."""
    return f"{width}, N {short(N)}"


def plot_valleys(axes, found: dict, law: Law, rows: list[dict], color_map) -> None:
    """Plot the loss over N at five budgets: by the law, within the sizes that it is fitted to, and by linear
    interpolation between the points of each size."""
    budgets = np.geomspace(*np.quantile([row["C"] for row in rows], [0.1, 0.95]), 5)
    sizes = np.geomspace(min(row["N"] for row in rows), max(row["N"] for row in rows))
    for budget, color in zip(budgets, color_map(np.linspace(0, 0.85, len(budgets))), strict=True):
        axes.plot(sizes, law.loss(sizes, budget / (6 * sizes)), color=color, linewidth=0.8)
        for width in sorted({row["width"] for row in rows}):
            N, C, L = columns([row for row in rows if row["width"] == width], "N", "C", "loss")
            if C[0] <= budget <= C[-1]:
                axes.plot(N[0], np.interp(math.log(budget), np.log(C), L), "o", color=color, markersize=4)
        axes.plot([], [], "o-", color=color, markersize=4, label=f"{budget:.1e} FLOPs")
    if not found["undetermined"]:
        lowest = law.optimal(budgets)
        axes.plot(lowest[0], law.loss(*lowest), "k--", linewidth=1, label="N*, the best size")
    losses = [row["loss"] for row in rows]
    axes.set(xscale="log", xlabel="N (FLOPs per token / 6)", ylim=(min(losses) - 0.05, max(losses) + 0.1))
    axes.set(ylabel="held-out loss (nats per token)", title="Loss over size at equal compute")
    axes.legend(fontsize=8)


def plot_emergence(rows: list[dict], path: Path) -> None:
    """Plot the same models by two measures: how often a token is right, and how often k in a row are."""
    # Keep the models that no other beats with less compute, so that the loss falls from each to the next.
    frontier = []
    for row in sorted(rows, key=lambda row: row["C"]):
        if not frontier or row["loss"] < frontier[-1]["loss"]:
            frontier.append(row)
    C, p = columns(frontier, "C", "exact_1")

    # Left p, the share of tokens that are right; right the share of k in a row, and p^k for comparison, both
    # relative to the last model's.
    pyplot = load_pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.4), layout="constrained")
    left.plot(C, p, "o-", color="black", markersize=4)
    left.set(title="Share p of tokens predicted correctly", ylabel="share of the tokens", ylim=(0, 1))
    for k, color in zip(SPANS[1:], pyplot.cm.viridis(np.linspace(0, 0.9, len(SPANS) - 1)), strict=True):
        (share,) = columns(frontier, f"exact_{k}")
        if share[-1] == 0:
            right.plot([], [], color=color, label=f"k = {k}: never")
            continue
        label = f"k = {k}: {share[-1]:.1%}"
        right.plot(C, share / share[-1], "o-", color=color, markersize=4, label=label)
        right.plot(C, (p / p[-1]) ** k, "--", color=color, linewidth=0.8)
    right.plot([], [], "k--", linewidth=0.8, label="$p^k$: if tokens were independent")
    right.set(title="Share of k tokens in a row that are all predicted correctly")
    right.set(ylabel="share, relative to that of the last model")
    right.set_ylim(bottom=0)
    right.legend(title="share that the last model reaches", fontsize=8)
    for axes in (left, right):
        axes.set(xscale="log", xlabel="training FLOPs (each dot: the best model so far)")
        axes.grid(alpha=0.3)
        label_logarithmic(axes.xaxis)
    save_figure(figure, path)
