"""How long does the fit of a scaling law to 240 runs take: by chinchilla.py, and by scipy.optimize?

    python -m results.fit_speed --out results/fit_speed.json      (needs tests/requirements.txt)

The points are those of Hoffmann et al. 2022, as Besiroglu et al. 2024 read them from a figure. Their way to
fit is L-BFGS-B with gradients by finite differences, from each of the 4,500 points of a grid, then BFGS from
the optimum for each of 4,000 bootstrap resamples. scipy computes --starts random points of the grid and
--resamples resamples, and its seconds are scaled up to all of them. chinchilla.py computes everything,
--rounds times, of which the median is taken. Both run in one process, on one thread; seconds are processor
time.
"""

import argparse
import itertools
import json
import math
import os
import platform
import statistics
import time
from importlib.metadata import version

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy reads it when imported

import numpy as np

from chinchilla import Fit, Law, fit, points
from engine import cpu
from formats import command
from formats.json_file import write_json
from results.peers import require
from scaling.huber_fit import huber

DELTA, RESAMPLES = 1e-3, 4000
GRID = list(  # a, b, e, alpha, beta
    itertools.product(
        np.arange(0, 30, 5), np.arange(0, 30, 5), np.arange(-1, 1.5, 0.5), np.arange(0, 2.5, 0.5),
        np.arange(0, 2.5, 0.5),
    )
)  # fmt: skip


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Return the flags. Raises ValueError for more starts or resamples than there are."""
    parser = command.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--starts", type=command.count, default=500, help="points of the grid's 4,500 (default %(default)s)")
    add("--resamples", type=command.count, default=40, help="of the 4,000 (default %(default)s)")
    add("--rounds", type=command.count, default=5, help="rounds of our measurement (default %(default)s)")
    add("--out", type=command.new_file, help="write the figures to this file, as JSON")
    args = parser.parse_args(argv)
    for flag, most in (("starts", len(GRID)), ("resamples", RESAMPLES)):
        if getattr(args, flag) > most:
            raise ValueError(f"--{flag} {getattr(args, flag)}: expected at most {most}")
    return args


def measure_ours(N, D, L, rounds: int) -> tuple[Fit, np.ndarray, dict[str, float]]:
    """Return our fit, its bootstrap samples (RESAMPLES, 5), and the median seconds of each."""
    seconds = {"fit": [], "bootstrap": []}
    for _ in range(rounds):
        began = time.process_time()
        found = fit(N, D, L, delta=DELTA)
        between = time.process_time()
        samples = found.bootstrap(RESAMPLES)
        seconds["fit"].append(between - began)
        seconds["bootstrap"].append(time.process_time() - between)
    return found, samples, {name: statistics.median(values) for name, values in seconds.items()}


def measure_grid(objective, n_starts: int) -> tuple[list[float], float]:
    """Return scipy's optima from random points of the grid, and the seconds scaled up to all of them."""
    from scipy.optimize import minimize

    generator = np.random.default_rng(0)
    results = []
    began = time.process_time()
    with np.errstate(all="ignore"):  # many of the grid's points overflow
        for i in generator.choice(len(GRID), n_starts, replace=False):
            results.append(minimize(objective, GRID[i], method="L-BFGS-B").fun)
    return results, (time.process_time() - began) / n_starts * len(GRID)


def measure_bootstrap(objective, law: Law, samples: np.ndarray, n: int) -> tuple[list[float], float]:
    """Return scipy's optima on n resamples over ours, and the seconds scaled up to all RESAMPLES."""
    from scipy.optimize import minimize

    n_points = len(points()[0])
    optimum = [math.log(law.A), math.log(law.B), math.log(law.E), law.alpha, law.beta]
    drawn = np.random.default_rng(0).multinomial(n_points, np.full(n_points, 1 / n_points), n)
    began = time.process_time()
    ratios = [minimize(objective, optimum, (w,), method="BFGS").fun for w in drawn]
    seconds = (time.process_time() - began) / n * RESAMPLES
    # `bootstrap` draws the same resamples from the same seed, so each optimum can be compared with ours.
    for k, w in enumerate(drawn):
        E, A, B, alpha, beta = samples[k]
        ratios[k] /= objective([math.log(A), math.log(B), math.log(E), alpha, beta], w)
    return ratios, seconds


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    require("scipy")
    N, D, L = points()
    x, y, z = np.log(N), np.log(D), np.log(L)

    def objective(theta, w=1.0):
        """Return the sum over the points of the Huber losses of log(A / N^alpha + B / D^beta + E) - log L,
        where theta = (log A, log B, log E, alpha, beta). w: how often a resample has each point."""
        a, b, e, alpha, beta = theta
        r = np.logaddexp(np.logaddexp(a - alpha * x, b - beta * y), e) - z
        return float((w * huber(r, DELTA)).sum())

    found, samples, ours = measure_ours(N, D, L, args.rounds)
    print(f"ours: {ours['fit']:.2f} s fit, {ours['bootstrap']:.2f} s bootstrap", flush=True)
    results, grid_seconds = measure_grid(objective, args.starts)
    print(f"scipy: {grid_seconds:.0f} s for {len(GRID)} starts, by {args.starts} of them", flush=True)
    ratios, bootstrap_seconds = measure_bootstrap(objective, found.law, samples, args.resamples)

    our_seconds, best = sum(ours.values()), min(value for value in results if math.isfinite(value))
    figures = {
        "command": "python -m results.fit_speed --out results/fit_speed.json",
        "cpu": cpu.name(),
        "threads": 1,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "scipy": version("scipy"),
        "ours": ours | {"seconds": our_seconds, "objective": found.objective, "resamples": RESAMPLES},
        "scipy_grid": {
            "starts": args.starts,
            "of": len(GRID),
            "seconds_scaled": grid_seconds,
            "objective": best,
            "median_objective": float(np.nanmedian(results)),
            "within_1e-6_of_ours": sum(value <= found.objective * (1 + 1e-6) for value in results),
        },
        "scipy_bootstrap": {
            "resamples": args.resamples,
            "of": RESAMPLES,
            "seconds_scaled": bootstrap_seconds,
            "objective_over_ours": [min(ratios), max(ratios)],
        },
        "ratio": (grid_seconds + bootstrap_seconds) / our_seconds,
        "ratio_of_grid_alone": grid_seconds / our_seconds,
    }
    print(json.dumps(figures, indent=1))
    if args.out:
        write_json(args.out, figures, indent=1)
    if found.objective > best or min(ratios) < 1 - 1e-9:
        raise ValueError(f"scipy found a lower objective: {best}, or {min(ratios)} of ours on a resample")


if __name__ == "__main__":
    command.run(main)
