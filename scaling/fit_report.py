"""`python chinchilla.py fit`: fit the law to your own runs, with intervals, checks and a picture.

    python chinchilla.py fit                        the 240 runs of Hoffmann et al. 2022
    python chinchilla.py fit points.csv --by-size   your own: columns N, loss, and D or C

It prints, and writes to --out: the law with bootstrap intervals; N*, D* and loss at larger budgets; the
exponents by approaches 1 and 2 for comparison; and how well a law fitted without the runs of most compute
predicts them.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np

from chinchilla import HOFFMANN, MANY_TOKENS, OUTLIERS, Fit, Law, fit
from formats import command
from formats.atomic import replace_file
from formats.quantities import quantity, short
from scaling.isoflop import IsoFLOP, envelope, isoflop, parabola_bias
from scaling.points import beyond, group_equal, interval, read_points, without_highest

LEAST_RESAMPLES = 20  # fewer do not give a 95 % interval


def predict_largest(fitted: Fit) -> dict:
    """Fit the law without the tenth of the points of most compute, and return its relative error on these."""
    C = 6 * fitted.N * fitted.D
    last = np.quantile(C, 0.9) <= C
    law = fit(fitted.N[~last], fitted.D[~last], fitted.L[~last], fitted.delta).law
    error = law.loss(fitted.N[last], fitted.D[last]) / fitted.L[last] - 1
    compute = {"fitted_up_to": float(C[~last].max()), "up_to": float(C[last].max())}
    rms = float(np.sqrt(np.mean(error**2)))
    return {"points": int(last.sum()), **compute, "error": float(error.mean()), "error_rms": rms}


def optimum_at(law: Law, laws: Law, C: float) -> dict[str, list[float]]:
    """Return value and 95 % interval of N*, D*, D*/N* and the loss at C. laws: the resampled laws, in one."""
    (N, D), (many_N, many_D) = law.optimal(C), laws.optimal(C)
    pairs = {"N": (N, many_N), "D": (D, many_D), "D/N": (D / N, many_D / many_N)}
    pairs["loss"] = law.loss(N, D), laws.loss(many_N, many_D)
    return {name: [float(value), *interval(many)] for name, (value, many) in pairs.items()}


def findings(fitted: Fit, args: argparse.Namespace) -> tuple[dict, IsoFLOP | None]:
    """Return what is printed and written to fit.json, and the valleys of approach 2 if there are any."""
    law, laws = fitted.law, Law(*fitted.bootstrap(args.bootstrap, args.seed, args.by_size).T)
    C = 6 * fitted.N * fitted.D

    # The points, the fit, and the law with intervals.
    found = {"points": len(C), "sizes": int(group_equal(fitted.N).max()) + 1}
    for name, values in (("N", fitted.N), ("D", fitted.D), ("C", C)):
        found[name] = [float(values.min()), float(values.max())]
    found |= {"delta": fitted.delta, "objective": fitted.objective}
    found |= {"residual_rms": fitted.residual_rms}
    found["bootstrap"] = {"resamples": args.bootstrap, "seed": args.seed, "by_size": args.by_size}
    names = ("E", "A", "B", "alpha", "beta", "a", "b")
    found["law"] = {name: [getattr(law, name), *interval(getattr(laws, name))] for name in names}

    # The best model at some budgets.
    budgets = [float(budget) for budget in args.at or C.max() * np.array([1, 10, 100])]
    found["budgets"] = [{"C": budget} | optimum_at(law, laws, budget) for budget in budgets]
    found["approach3"] = {"k": float(law.optimal(1.0)[0]), "a": law.a}
    if found["law"]["B"][2] > 3 * found["law"]["B"][1]:
        fitted.warnings.append("B and E are hardly determined: compare laws by a, D*/N* and loss, not by B")
    if any(row["D/N"][0] > MANY_TOKENS for row in found["budgets"]):
        fitted.warnings.append(
            f"above {MANY_TOKENS} tokens per parameter laws overstate what more of them are worth"
        )

    compared, valleys = other_approaches(fitted, max(budgets))
    found |= compared | {"warnings": fitted.warnings, "residuals": fitted.residuals.tolist()}
    return found, valleys


def other_approaches(fitted: Fit, largest_budget: float) -> tuple[dict, IsoFLOP | None]:
    """Return approaches 1 and 2 and the prediction of the largest runs, and approach 2's valleys. Those that
    the points do not allow are left out, and added to the warnings."""
    found, valleys = {}, None
    try:
        found["approach1"] = vars(envelope(fitted.N, fitted.D, fitted.L))
    except ValueError as error:
        fitted.warnings.append(f"no approach 1: {error}")
    try:
        valleys = isoflop(fitted.N, fitted.D, fitted.L)
        bias = parabola_bias(fitted.law, valleys.factor, valleys.budgets, largest_budget)
        found["approach2"] = vars(valleys.law) | {"budgets": valleys.budgets.tolist()}
        found["approach2"]["bias"] = {"D": bias, "C": largest_budget, "factor": valleys.factor}
    except ValueError as error:
        fitted.warnings.append(f"no approach 2: {error}")
    try:
        found["held_out"] = predict_largest(fitted)
    except ValueError as error:
        fitted.warnings.append(f"no prediction of the points of most compute: {error}")
    return found, valleys


def print_findings(found: dict) -> None:
    ends = [f"{name} {short(found[name][0])} to {short(found[name][1])}" for name in "NDC"]
    print(f"{found['points']} points: {found['sizes']} sizes, {', '.join(ends)}")
    print("N as in the file, C = 6 N D, loss in nats per token of the tokenizer that these runs had")
    print(f"Huber delta {found['delta']:g}: objective {found['objective']:.7g}, ", end="")
    print(f"residuals {found['residual_rms']:.2%} rms\n")

    drawn = "sizes" if found["bootstrap"]["by_size"] else "points"
    print(f"{'':14}value  95 % interval, {found['bootstrap']['resamples']} resamples of {drawn}")
    for name, (value, low, high) in found["law"].items():
        print(f"{name:8}{value:11.5g}  {low:.5g} to {high:.5g}")
    print_budgets(found)
    print_other_approaches(found)
    for warning in found["warnings"]:
        print(f"warning: {warning}")


def print_budgets(found: dict) -> None:
    """Print the best model at each budget, and how far the budget lies outside of the points."""
    print(f"\ncompute  {'N*':28}{'D*':28}{'D*/N*':28}loss")
    for row in found["budgets"]:
        cells = [f"{row['C']:7.2g}"]
        for name in ("N", "D", "D/N", "loss"):
            value, low, high = (short(x, 4 if name == "loss" else 3) for x in row[name])
            cells.append(f"{f'{value} ({low} to {high})':26}")
        orders = beyond(row["C"], found["C"])
        side = "above" if row["C"] > found["C"][1] else "below"
        cells.append(f"{orders:.1f} orders of magnitude {side} the points" if orders else "")
        print("  ".join(cells).rstrip())


def print_other_approaches(found: dict) -> None:
    """Print the exponents by all three approaches, and the prediction of the largest runs."""
    print("\nN* = k C^a by                        a          k")
    ways = {"approach3": "the law above", "approach1": "envelope", "approach2": "IsoFLOP parabolas"}
    for way, title in ways.items():
        if way in found:
            print(f"approach {way[-1]}, {title:22}{found[way]['a']:7.4f}{found[way]['k']:11.4g}")
    if "approach2" in found:
        bias = found["approach2"]["bias"]
        print(f"Were the law true, parabolas would put D* off by {bias['D']:+.1%} at {bias['C']:.2g} FLOPs.")
    if "held_out" in found:
        last = found["held_out"]
        compute = f"{last['fitted_up_to']:.2g} FLOPs"
        print(f"\nFitted up to {compute}, the law predicts the {last['points']} points")
        print(
            f"up to {last['up_to']:.2g} with an error of {last['error']:+.2%}, rms {last['error_rms']:.2%}."
        )


def plot_fit(fitted: Fit, valleys: IsoFLOP | None, file) -> None:
    """Plot the loss over compute with the frontier, the residuals, and the valleys if there are any."""
    import matplotlib  # here, since --help does without it

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # Left the points and the law's least loss, in the middle the residuals.
    panels = 3 if valleys else 2
    figure, axes = pyplot.subplots(1, panels, figsize=(5 * panels, 4.4), layout="constrained")
    C = 6 * fitted.N * fitted.D
    along = np.geomspace(C.min(), C.max(), 200)
    for panel, height in zip(axes, (fitted.L, 100 * fitted.residuals), strict=False):
        dots = panel.scatter(C, height, c=np.log10(fitted.N), s=14)
        panel.set(xscale="log", xlabel="compute 6 N D (FLOPs)")
    axes[0].plot(
        along, fitted.law.loss(*fitted.law.optimal(along)), color="black", label="least loss, by the law"
    )
    axes[0].axhline(fitted.law.E, color="grey", linestyle=":", label="E")
    axes[0].set(ylabel="loss (nats per token)")
    axes[0].legend()
    axes[1].axhline(0, color="black", linewidth=1)
    axes[1].set(ylabel="ln predicted - ln measured loss (%)")

    if valleys:
        plot_valleys(axes[2], valleys, pyplot.get_cmap("plasma"))
    for panel in axes:
        panel.grid(alpha=0.3)
    figure.colorbar(dots, ax=axes, label="log10 N")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def plot_valleys(panel, valleys: IsoFLOP, colors) -> None:
    """Plot the loss over N at each budget, the parabolas, and their minima."""
    for i, (N, loss) in enumerate(valleys.valleys):
        color = colors(0.9 * i / len(valleys.valleys))
        fine = np.linspace(np.log(N[0]), np.log(N[-1]), 100)
        panel.plot(N, loss, "o", color=color, markersize=4, label=f"{valleys.budgets[i]:.1e} FLOPs")
        panel.plot(np.exp(fine), np.polyval(valleys.parabolas[i], fine), color=color)
    lowest = [np.polyval(c, math.log(N)) for c, N in zip(valleys.parabolas, valleys.N, strict=True)]
    panel.plot(valleys.N, lowest, "kx", label="minimum")
    panel.set(xscale="log", xlabel="parameters N", ylabel="loss at equal compute")
    panel.legend(fontsize=8)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "csv",
        nargs="?",
        type=command.path,
        help="columns N, loss, and D or C (default: the 240 runs of the paper)",
    )
    add("--delta", type=quantity, default=1e-3, help="relative error above which f is linear (default 1e-3)")
    add("--drop", type=int, metavar="K", help="leave out the K highest losses (default 0; of the paper's, 5)")
    add("--bootstrap", type=int, default=4000, metavar="N", help="resamples for intervals (default 4000)")
    add("--by-size", action="store_true", help="resample whole sizes: the points of one may err together")
    add("--seed", type=int, default=0, help="seed of the resamples (default 0)")
    add("--at", type=quantity, nargs="+", metavar="C", help="budgets (default: the greatest, x10, x100)")
    add(
        "--out",
        type=command.path,
        default=Path("runs/fit"),
        metavar="DIR",
        help="fit.json, fit.png (runs/fit)",
    )


def main(args: argparse.Namespace) -> int:
    """Fit, print and write; return the exit code. Raises ValueError for arguments that are out of range."""
    # Everything that can be wrong is found before the fit.
    path = args.csv or HOFFMANN
    N, D, L = read_points(path)
    drop = args.drop if args.drop is not None else 0 if args.csv else OUTLIERS
    if not 0 <= drop < len(N):
        raise ValueError(f"--drop {drop}: expected 0 to {len(N) - 1}, as {path} has {len(N)} points")
    if args.bootstrap < LEAST_RESAMPLES:
        raise ValueError(f"--bootstrap {args.bootstrap}: expected at least {LEAST_RESAMPLES}")
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed}: expected at least 0")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {args.out}: cannot be made a directory ({error.strerror})") from None

    fitted = fit(*without_highest(N, D, L, drop), args.delta)
    found, valleys = findings(fitted, args)
    print_findings(found)
    with replace_file(args.out / "fit.json") as new:
        found = {"file": path.name, "dropped": drop} | found
        new.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    with replace_file(args.out / "fit.png") as new, open(new, "wb") as file:
        plot_fit(fitted, valleys, file)
    print(f"\n{args.out}: fit.json and fit.png")
    return 0
