"""`python chinchilla.py fit`: the law of your own runs, how sure of it one can be, and a picture.

    python chinchilla.py fit                        the 240 runs of Hoffmann et al. 2022
    python chinchilla.py fit points.csv --by-size   your own: columns N, loss, and D or C

Printed, and written to --out: the law with bootstrap intervals; N*, D* and loss at larger budgets; approaches
1 and 2 beside it; and how well the runs of most compute are predicted by the others.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np

from chinchilla import (
    HOFFMANN,
    Fit,
    Law,
    beyond,
    fit,
    interval,
    quantity,
    read_points,
    same,
    short,
    without_highest,
)
from isoflop import IsoFLOP, envelope, isoflop, parabola_bias


def held_out(of: Fit) -> dict:
    """The law fitted without the tenth of the points of most compute, and its error on these."""
    C = 6 * of.N * of.D
    last = np.quantile(C, 0.9) <= C
    law = fit(of.N[~last], of.D[~last], of.L[~last], delta=of.delta).law
    error = law.loss(of.N[last], of.D[last]) / of.L[last] - 1
    compute = {"fitted_up_to": float(C[~last].max()), "up_to": float(C[last].max())}
    rms = float(np.sqrt(np.mean(error**2)))
    return {"points": int(last.sum()), **compute, "error": float(error.mean()), "error_rms": rms}


def at_budget(law: Law, laws: Law, C: float) -> dict[str, list[float]]:
    """Of the best model for C: value and 95 % interval, with `laws` the bootstrap's."""
    (N, D), (many_N, many_D) = law.optimal(C), laws.optimal(C)
    pairs = {"N": (N, many_N), "D": (D, many_D), "D/N": (D / N, many_D / many_N)}
    pairs["loss"] = law.loss(N, D), laws.loss(many_N, many_D)
    return {name: [float(value), *interval(many)] for name, (value, many) in pairs.items()}


def plot(of: Fit, valleys: IsoFLOP | None, file) -> None:
    """Loss over compute with the frontier, residuals, and the IsoFLOP valleys if there are any."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = 3 if valleys else 2
    figure, axes = pyplot.subplots(1, panels, figsize=(5 * panels, 4.4), layout="constrained")
    C = 6 * of.N * of.D
    along = np.geomspace(C.min(), C.max(), 200)
    for panel, height in zip(axes, (of.L, 100 * of.residuals), strict=False):
        dots = panel.scatter(C, height, c=np.log10(of.N), s=14)
        panel.set(xscale="log", xlabel="compute 6 N D (FLOPs)")
    axes[0].plot(along, of.law.loss(*of.law.optimal(along)), color="black", label="least loss, by the law")
    axes[0].axhline(of.law.E, color="grey", linestyle=":", label="E")
    axes[0].set(ylabel="loss (nats per token)")
    axes[0].legend()
    axes[1].axhline(0, color="black", linewidth=1)
    axes[1].set(ylabel="ln predicted - ln measured loss (%)")
    if valleys:
        for i, (N, loss) in enumerate(valleys.valleys):
            color = pyplot.get_cmap("plasma")(0.9 * i / len(valleys.valleys))
            fine = np.linspace(np.log(N[0]), np.log(N[-1]), 100)
            axes[2].plot(N, loss, "o", color=color, markersize=4, label=f"{valleys.budgets[i]:.1e} FLOPs")
            axes[2].plot(np.exp(fine), np.polyval(valleys.parabolas[i], fine), color=color)
        lowest = [np.polyval(c, math.log(N)) for c, N in zip(valleys.parabolas, valleys.N, strict=True)]
        axes[2].plot(valleys.N, lowest, "kx", label="minimum")
        axes[2].set(xscale="log", xlabel="parameters N", ylabel="loss at equal compute")
        axes[2].legend(fontsize=8)
    for panel in axes:
        panel.grid(alpha=0.3)
    figure.colorbar(dots, ax=axes, label="log10 N")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("csv", nargs="?", type=Path, help="columns N, loss, and D or C (default: the 240 runs of the paper)")
    add("--delta", type=quantity, default=1e-3, help="from where an error counts linearly (default 1e-3)")
    add("--drop", type=int, metavar="K", help="leave out the K highest losses (default 0; of the paper's, 5)")
    add("--bootstrap", type=int, default=4000, metavar="N", help="resamples for intervals (default 4000)")
    add("--by-size", action="store_true", help="resample whole sizes: the points of one may err together")
    add("--seed", type=int, default=0)
    add("--at", type=quantity, nargs="+", metavar="C", help="budgets (default: the greatest, x10, x100)")
    add("--out", type=Path, default=Path("runs/fit"), metavar="DIR", help="fit.json, fit.png (runs/fit)")


def main(args: argparse.Namespace) -> int:
    path = args.csv or HOFFMANN
    N, D, L = read_points(path)
    drop = args.drop if args.drop is not None else 0 if args.csv else 5
    if not 0 <= drop < len(N):
        raise ValueError(f"--drop {drop}: expected 0 to {len(N) - 1}, as {path} has {len(N)} points")
    of = fit(*without_highest(N, D, L, drop), delta=args.delta)
    law, laws = of.law, Law(*of.bootstrap(args.bootstrap, args.seed, args.by_size).T)

    C = 6 * of.N * of.D
    rms = float(np.sqrt(np.mean(of.residuals**2)))
    figures = {"file": path.name, "dropped": drop, "points": len(C), "sizes": int(same(of.N).max()) + 1}
    figures |= {"delta": of.delta, "objective": of.objective, "residual_rms": rms}
    for name, values in (("N", of.N), ("D", of.D), ("C", C)):
        figures[name] = [float(values.min()), float(values.max())]
    ends = [f"{name} {short(figures[name][0])} to {short(figures[name][1])}" for name in "ND"]
    print(f"{len(C)} points: {figures['sizes']} sizes, {', '.join(ends)}, C {C.min():.2g} to {C.max():.2g}")
    print(f"Huber delta {of.delta:g}: objective {of.objective:.7g}, residuals {rms:.2%} rms\n")

    figures["bootstrap"] = {"resamples": args.bootstrap, "seed": args.seed, "by_size": args.by_size}
    print(
        f"{'':14}value  95 % interval, {args.bootstrap} resamples of {'sizes' if args.by_size else 'points'}"
    )
    figures["law"] = {}
    for name in ("E", "A", "B", "alpha", "beta", "a", "b"):
        figures["law"][name] = value, low, high = getattr(law, name), *interval(getattr(laws, name))
        print(f"{name:8}{value:11.5g}  {low:.5g} to {high:.5g}")

    print(f"\ncompute  {'N*':28}{'D*':28}{'D*/N*':28}loss")
    figures["budgets"] = []
    for budget in args.at or [C.max(), 10 * C.max(), 100 * C.max()]:
        best, orders = at_budget(law, laws, budget), beyond(budget, figures["C"])
        figures["budgets"].append({"C": float(budget), "orders_beyond": orders} | best)
        print(f"{budget:7.2g}", end="")
        for name, row in best.items():
            value, low, high = (short(x, 4 if name == "loss" else 3) for x in row)
            print(f"  {f'{value} ({low} to {high})':26}", end="")
        print(f"{orders:.1f} orders of magnitude beyond the points" if orders >= 0.05 else "")

    print(
        f"\nN* = k C^a by                        a          k\n{'approach 3, the law above':34}{law.a:7.4f}",
        end="",
    )
    print(f"{law.optimal(1.0)[0]:11.4g}")
    valleys = None
    try:
        figures["approach1"] = vars(envelope(of.N, of.D, of.L))
        print("{:34}{a:7.4f}{k:11.4g}".format("approach 1, envelope", **figures["approach1"]))
    except ValueError as error:
        of.warnings.append(f"no approach 1: {error}")
    try:
        valleys = isoflop(of.N, of.D, of.L)
        bias = parabola_bias(law, valleys.factor, valleys.budgets, budget)
        figures["approach2"] = vars(valleys.law) | {"budgets": valleys.budgets.tolist()}
        figures["approach2"]["bias"] = {"D": bias, "C": float(budget), "factor": valleys.factor}
        print(
            "{:34}{a:7.4f}{k:11.4g}".format("approach 2, IsoFLOP parabolas", **figures["approach2"]), end=""
        )
        print(f"  of the parabolas' making: D* {bias:+.1%} at {budget:.2g} FLOPs, were the law above true")
    except ValueError as error:
        of.warnings.append(f"no approach 2: {error}")
    try:
        figures["held_out"] = last = held_out(of)
        print(
            f"\nFitted up to {last['fitted_up_to']:.2g} FLOPs, the law predicts the {last['points']} points ",
            end="",
        )
        print(
            f"up to {last['up_to']:.2g} with an error of {last['error']:+.2%}, rms {last['error_rms']:.2%}."
        )
    except ValueError as error:
        of.warnings.append(f"no prediction of the points of most compute: {error}")
    for warning in of.warnings:
        print(f"warning: {warning}")

    from checkpoint import replace_file  # here, since it loads torch, for which the law has no use

    args.out.mkdir(parents=True, exist_ok=True)
    with replace_file(args.out / "fit.json") as new:
        new.write_text(json.dumps(figures | {"warnings": of.warnings}, indent=1) + "\n")
    with replace_file(args.out / "fit.png") as new, open(new, "wb") as file:
        plot(of, valleys, file)
    print(f"\n{args.out}: fit.json and fit.png")
    return 0
