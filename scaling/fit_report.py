"""`python chinchilla.py fit`: fit the law to your own runs, with intervals, checks and a picture.

    python chinchilla.py fit                        the 240 runs of Hoffmann et al. 2022
    python chinchilla.py fit points.csv --by-size   your own: columns N, loss, and D or C

It prints, and writes to --out: the rows that are left out, and why (scaling/outliers.py); the law with
bootstrap intervals; N*, D* and loss at larger budgets; the exponents by approaches 1 and 2 for comparison;
and how well a law fitted without the runs of most compute predicts them. Where the points leave the law or an
optimum open, the reason is printed in its place (scaling/identified.py).
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np

from chinchilla import DEFAULT_LAW, HOFFMANN, LAWS, OUTLIERS, Fit, Law, fit
from formats import command
from formats.atomic import replace_file
from formats.figures import load_pyplot, save_figure
from formats.quantities import quantity, short
from scaling import identified
from scaling.isoflop import IsoFLOP, envelope, isoflop, parabola_bias
from scaling.outliers import Chosen, describe, leave_out_outliers, print_outliers
from scaling.pictures import label_logarithmic, plot_frontier, write_no_frontier
from scaling.points import Table, all_but_highest, group_equal, interval, read_table

OUT = Path("runs/fit")
# a of the allocation by each approach: Hoffmann et al. 2022, table 2.
PUBLISHED_A = {"approach1": "0.50", "approach2": "0.49", "approach3": "0.46; 0.51 by Besiroglu et al. 2024"}
LEAST_RESAMPLES = 20  # fewer do not give a 95 % interval


def predict_largest(fitted: Fit) -> dict:
    """Fit the law to all points but the tenth of most compute, and return the relative error of its loss on
    that tenth: the mean and the root mean square, beside the numbers and the compute of the points."""
    C = 6 * fitted.N * fitted.D
    last = np.quantile(C, 0.9) <= C
    law = fit(fitted.N[~last], fitted.D[~last], fitted.L[~last], fitted.delta).law
    error = law.loss(fitted.N[last], fitted.D[last]) / fitted.L[last] - 1
    compute = {"fitted_up_to": float(C[~last].max()), "up_to": float(C[last].max())}
    rms = float(np.sqrt(np.mean(error**2)))
    return {"points": int(last.sum()), **compute, "error": float(error.mean()), "error_rms": rms}


def optimum_at(law: Law, laws: Law, C: float) -> dict[str, list[float]]:
    """Return value and 95 % interval of N*, D*, D*/N* and the loss at C. laws: those of all resamples, one
    Law whose fields are arrays."""
    (N, D), (many_N, many_D) = law.optimal(C), laws.optimal(C)
    pairs = {"N": (N, many_N), "D": (D, many_D), "D/N": (D / N, many_D / many_N)}
    pairs["loss"] = law.loss(N, D), laws.loss(many_N, many_D)
    return {name: [float(value), *interval(many)] for name, (value, many) in pairs.items()}


def findings(fitted: Fit, args: argparse.Namespace) -> tuple[dict, IsoFLOP | None]:
    """Return what is printed and written to fit.json, and the result of approach 2 if there is one."""
    law, laws = fitted.law, Law(*fitted.bootstrap(args.bootstrap, args.seed, args.by_size).T)
    C = 6 * fitted.N * fitted.D

    # The points, the fit, and the law with intervals.
    found = {"points": len(C), "sizes": int(group_equal(fitted.N).max()) + 1}
    ranges = {"N": fitted.N, "D": fitted.D, "C": C, "D/N": fitted.D / fitted.N, "loss": fitted.L}
    for name, values in ranges.items():
        found[name] = [float(values.min()), float(values.max())]
    found |= {"delta": fitted.delta, "objective": fitted.objective}
    found |= {"residual_rms": fitted.residual_rms}
    found["bootstrap"] = {"resamples": args.bootstrap, "seed": args.seed, "by_size": args.by_size}
    names = ("E", "A", "B", "alpha", "beta", "a", "b")
    found["law"] = {name: [getattr(law, name), *interval(getattr(laws, name))] for name in names}
    found["undetermined"] = identified.reasons_against_law(fitted, laws)

    # The best model at some budgets, or the reason why none is shown.
    budgets = [float(budget) for budget in args.at or C.max() * np.array([1, 10, 100])]
    found["budgets"] = []
    for budget in budgets:
        row = {"C": budget} | optimum_at(law, laws, budget)
        reason = identified.reason_against_optimum(row, found)
        found["budgets"].append({"C": budget, "no_optimum": reason} if reason else row)
    found["approach3"] = {"k": float(law.optimal(1.0)[0]), "a": law.a}

    shown = [row["C"] for row in found["budgets"] if "no_optimum" not in row]
    compared, valleys = other_approaches(fitted, max(shown, default=float(C.max())))
    found |= compared | {"warnings": fitted.warnings, "residuals": fitted.residuals.tolist()}
    return found, valleys


def other_approaches(fitted: Fit, largest_budget: float) -> tuple[dict, IsoFLOP | None]:
    """Return approaches 1 and 2 with the prediction of the largest runs, and the result of approach 2 if
    there is one. Where the points do not allow one of the three, its entry is {"none": the reason}."""
    found, valleys = {}, None
    try:
        found["approach1"] = vars(envelope(fitted.N, fitted.D, fitted.L))
    except ValueError as error:
        found["approach1"] = {"none": str(error)}
    try:
        valleys = isoflop(fitted.N, fitted.D, fitted.L)
        bias = parabola_bias(fitted.law, valleys.factor, valleys.budgets, largest_budget)
        found["approach2"] = vars(valleys.law) | {"budgets": valleys.budgets.tolist()}
        found["approach2"]["bias"] = {"D": bias, "C": largest_budget, "factor": valleys.factor}
    except ValueError as error:
        found["approach2"] = {"none": str(error)}
    try:
        found["held_out"] = predict_largest(fitted)
    except ValueError as error:
        found["held_out"] = {"none": str(error)}
    return found, valleys


def print_findings(found: dict) -> None:
    """Print the rows, the law, the optimum at each budget, the other approaches and the warnings."""
    print(found["described_columns"])
    print_outliers(found)
    ends = [f"{name} {short(found[name][0])} to {short(found[name][1])}" for name in ("N", "D", "C", "D/N")]
    print(f"{found['points']} points: {found['sizes']} sizes, {', '.join(ends)}")
    print("N in parameters as in the file, D in tokens, C = 6 N D in FLOPs, loss in nats per token")
    print(f"Huber delta {found['delta']:g}: objective {found['objective']:.7g}, ", end="")
    print(f"residuals {found['residual_rms']:.2%} rms\n")

    if found["undetermined"]:
        identified.print_reasons(found["undetermined"])
    else:
        print_law(found)
        print_budgets(found)
    print_other_approaches(found)
    for warning in found["warnings"]:
        print(f"warning: {warning}")


def print_law(found: dict) -> None:
    """Print each parameter with its interval, beside that of the published law."""
    drawn = "sizes" if found["bootstrap"]["by_size"] else "points"
    title = f"95 % interval, {found['bootstrap']['resamples']} resamples of {drawn}"
    print(f"{'':14}value  {title:42}{LAWS[DEFAULT_LAW].title}")
    for name, (value, low, high) in found["law"].items():
        published = f"{getattr(LAWS[DEFAULT_LAW].law, name):.5g}"
        doubt = identified.doubt_of_parameter(name, low, high)
        print(f"{name:8}{value:11.5g}  {f'{low:.5g} to {high:.5g}':42}{published:12}{doubt}".rstrip())
    print("E is in nats per token; alpha, beta, a and b have no unit. E, A and B depend on the text and its")
    print("tokenizer: compare alpha, beta, a and b alone with the published law.")


def print_budgets(found: dict) -> None:
    """Print the best model at each budget, and how far the budget lies outside of the points."""
    print(f"\n{'compute':9}{'N*':28}{'D*':28}{'D*/N*':28}loss")
    print(f"{'FLOPs':9}{'parameters':28}{'tokens':28}{'tokens per parameter':28}nats per token")
    for row in found["budgets"]:
        if "no_optimum" in row:
            print(f"{row['C']:7.2g}  no optimum: {row['no_optimum']}")
            continue
        cells = [f"{row['C']:7.2g}"]
        for name in ("N", "D", "D/N", "loss"):
            value, low, high = (short(x, 4 if name == "loss" else 3) for x in row[name])
            cells.append(f"{f'{value} ({low} to {high})':26}")
        print("  ".join([*cells, identified.doubts_of_optimum(row, found)]).rstrip())
    print("published: about 20 tokens per parameter (Hoffmann et al. 2022; Besiroglu et al. 2024)")


def print_other_approaches(found: dict) -> None:
    """Print the exponents by all three approaches, and the prediction of the largest runs."""
    print(
        "\nN* = k C^a by                        a          k    published a (Hoffmann et al. 2022, table 2)"
    )
    ways = {"approach3": "the law above", "approach1": "envelope", "approach2": "IsoFLOP parabolas"}
    for way, title in ways.items():
        none = found[way].get("none")
        if way == "approach3" and found["undetermined"]:
            none = "the points do not determine the law"
        cells = (
            f"{found[way]['a']:7.4f}{found[way]['k']:11.4g}    {PUBLISHED_A[way]}"
            if not none
            else f"none: {none}"
        )
        print(f"approach {way[-1]}, {title:22}{cells}")
    if "bias" in found["approach2"] and not found["undetermined"]:
        bias = found["approach2"]["bias"]
        print(f"Were the law true, parabolas would put D* off by {bias['D']:+.1%} at {bias['C']:.2g} FLOPs.")
    last = found["held_out"]
    if "none" in last:
        print(f"\nNo prediction of the points of most compute: {last['none']}")
        return
    print(f"\nFitted up to {last['fitted_up_to']:.2g} FLOPs, the law predicts the loss of the points of most")
    error = f"an error of {last['error']:+.2%}, rms {last['error_rms']:.2%}"
    print(f"compute ({last['points']}, up to {last['up_to']:.2g} FLOPs) with {error}.")


def plot_fit(fitted: Fit, found: dict, left_out: tuple, valleys: IsoFLOP | None, path: Path) -> None:
    """Plot the loss over compute with the frontier, the residuals, and the valleys if there are any.

    left_out: C and loss, (m,) each, of the points that are left out."""
    pyplot = load_pyplot()
    panels = 3 if valleys else 2
    figure, axes = pyplot.subplots(1, panels, figsize=(5 * panels, 4.4), layout="constrained")
    C = 6 * fitted.N * fitted.D

    # The left panel has the points and the law's least loss, the next one the residuals.
    for panel, height in zip(axes, (fitted.L, 100 * fitted.residuals), strict=False):
        dots = panel.scatter(C, height, c=np.log10(fitted.N), s=14)
        panel.set(xscale="log", xlabel="compute C = 6 N D (FLOPs)")
    if len(left_out[0]):
        axes[0].plot(*left_out, "x", color="tab:red", label="left out of the fit")
    if found["undetermined"]:
        write_no_frontier(axes[0])
    else:
        shown = [row["C"] for row in found["budgets"] if "no_optimum" not in row]
        low, high = (end([*found["C"], *shown]) for end in (min, max))
        plot_frontier(axes[0], fitted.law, found["C"], low, high, "least loss, by the law")
        axes[0].axhline(fitted.law.E, color="grey", linestyle=":", label="E: the law's limit for N, D → ∞")
    axes[0].set(ylabel="loss (nats per token)", title="Loss of the runs")
    axes[1].axhline(0, color="black", linewidth=1)
    axes[1].set(ylabel="ln predicted - ln measured loss (%)", title="Residuals of the fit")

    if valleys:
        plot_valleys(axes[2], valleys, pyplot.get_cmap("plasma"))
    for panel in axes:
        panel.grid(alpha=0.3)
        label_logarithmic(panel.xaxis)
    if axes[0].get_legend_handles_labels()[0]:
        axes[0].legend(fontsize=8)
    figure.colorbar(dots, ax=axes, label="log10 of parameters N")
    save_figure(figure, path)


def plot_valleys(panel, valleys: IsoFLOP, colors) -> None:
    """Plot the loss over N at each budget, the parabolas, and their minima."""
    for i, (N, loss) in enumerate(valleys.valleys):
        color = colors(0.9 * i / len(valleys.valleys))
        fine = np.linspace(np.log(N[0]), np.log(N[-1]), 100)
        panel.plot(N, loss, "o", color=color, markersize=4, label=f"{valleys.budgets[i]:.1e} FLOPs")
        panel.plot(np.exp(fine), np.polyval(valleys.parabolas[i], fine), color=color)
    lowest = [np.polyval(c, math.log(N)) for c, N in zip(valleys.parabolas, valleys.N, strict=True)]
    panel.plot(valleys.N, lowest, "kx", label="minimum")
    panel.set(
        xscale="log", xlabel="parameters N", ylabel="loss (nats per token)", title="Loss at equal compute"
    )
    panel.legend(fontsize=8)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "csv",
        nargs="?",
        type=command.path,
        help="columns N, loss, and D or C (default: the 240 runs of the paper)",
    )
    add(
        "--delta",
        type=quantity,
        default=1e-3,
        help="relative error above which errors count linearly (default 1e-3)",
    )
    add("--drop", type=int, metavar="K", help="leave out the K highest losses (default: what is an outlier)")
    add("--bootstrap", type=int, default=4000, metavar="N", help="resamples for intervals (default 4000)")
    add("--by-size", action="store_true", help="resample whole sizes: the points of one may err together")
    add("--seed", type=int, default=0, help="seed of the resamples (default 0)")
    budgets = "budgets in FLOPs (default: the greatest compute of the points, and 10 and 100 times that)"
    add("--at", type=quantity, nargs="+", metavar="C", help=budgets)
    add(
        "--out",
        type=command.path,
        metavar="DIR",
        help=f"for fit.json and fit.png (default {OUT}, if it is new)",
    )


def choose_points(table: Table, args: argparse.Namespace) -> Chosen:
    """Return which points are fitted. Raises ValueError for a --drop that is out of range."""
    if args.drop is None and args.csv:
        return leave_out_outliers(table, args.delta)
    n = OUTLIERS if args.drop is None else args.drop
    if not 0 <= n < len(table.L):
        limit = len(table.L) - 1
        raise ValueError(
            f"--drop {n}: expected 0 to {limit}, as {args.csv or HOFFMANN} has {limit + 1} points"
        )
    reason = f"the {n} highest losses, by --drop {n}"
    if args.drop is None:
        reason = "those of highest loss and fewest tokens, as in Besiroglu et al. 2024"
    return Chosen(all_but_highest(table.L, n), reason if n else "by --drop 0")


def make_out(given: Path | None) -> Path:
    """Return the directory of the results, and make it. Raises ValueError where that is not possible, and for
    an earlier fit in the default directory."""
    out = given or OUT
    if given is None and (out / "fit.json").exists():
        raise ValueError(
            f"{out} holds an earlier fit: name another directory by --out, or replace it by --out {out}"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {out}: cannot be made a directory ({error.strerror})") from None
    return out


def main(args: argparse.Namespace) -> int:
    """Fit, print and write; return the exit code. Raises ValueError for arguments that are out of range."""
    # Everything that can be wrong is found before the fit.
    path = args.csv or HOFFMANN
    table = read_table(path)
    if args.bootstrap < LEAST_RESAMPLES:
        raise ValueError(f"--bootstrap {args.bootstrap}: expected at least {LEAST_RESAMPLES}")
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed}: expected at least 0")
    chosen = choose_points(table, args)
    out = make_out(args.out)

    kept, n_out = chosen.kept, int((~chosen.kept).sum())
    fitted = fit(table.N[kept], table.D[kept], table.L[kept], args.delta)
    found, valleys = findings(fitted, args)
    rows = {
        "file": path.name,
        "described_columns": table.described_columns,
        "rows": len(kept),
        "dropped": n_out,
    }
    rows |= {"left_out_because": chosen.reason, "outliers": describe(fitted, table, chosen)}
    if n_out:
        rows["a_with_all_rows"] = fit(table.N, table.D, table.L, args.delta).law.a
    found = rows | found
    print_findings(found)
    with replace_file(out / "fit.json") as new:
        new.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    left_out = (6 * table.N[~kept] * table.D[~kept], table.L[~kept])
    plot_fit(fitted, found, left_out, valleys, out / "fit.png")
    print(f"\n{out}: fit.json and fit.png")
    return 0
