"""Fitting the law to the 240 points of Hoffmann et al. 2022, beside the usual way with scipy.optimize.

    python -m results.fit_speed --out results/fit_speed.json      (needs tests/requirements.txt)

The usual way (Hoffmann et al. 2022; Besiroglu et al. 2024): L-BFGS-B with gradients by finite
differences, from each of the 4,500 points of a grid; then BFGS from the optimum for each of 4,000 bootstrap
resamples. Here --starts random ones of that grid and --resamples resamples are run, and their seconds scaled
up. Ours runs whole, --rounds times. Both in one process, on one thread; seconds are of CPU time.
"""

import argparse
import itertools
import json
import math
import os
import platform
import statistics
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"  # read when numpy is imported

import numpy as np

from chinchilla import fit, points
from engine import cpu
from formats.atomic import replace_file
from scaling.huber_fit import huber

ROOT = Path(__file__).parent.parent

DELTA, RESAMPLES = 1e-3, 4000
GRID = list(  # a, b, e, alpha, beta
    itertools.product(
        np.arange(0, 30, 5), np.arange(0, 30, 5), np.arange(-1, 1.5, 0.5), np.arange(0, 2.5, 0.5),
        np.arange(0, 2.5, 0.5),
    )
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--starts", type=int, default=500, help="of the grid's 4,500 (default 500)")
    parser.add_argument("--resamples", type=int, default=40, help="of the 4,000 (default 40)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    import scipy
    from scipy.optimize import minimize

    N, D, L = points()
    x, y, z = np.log(N), np.log(D), np.log(L)

    def objective(theta, w=1.0):
        a, b, e, alpha, beta = theta
        r = np.logaddexp(np.logaddexp(a - alpha * x, b - beta * y), e) - z
        return float((w * huber(r, DELTA)).sum())

    ours = {"fit": [], "bootstrap": []}
    for _ in range(args.rounds):
        began = time.process_time()
        found = fit(N, D, L, delta=DELTA)
        between = time.process_time()
        samples = found.bootstrap(RESAMPLES)
        ours["fit"].append(between - began)
        ours["bootstrap"].append(time.process_time() - between)
    ours = {name: statistics.median(seconds) for name, seconds in ours.items()}
    print(f"ours: {ours['fit']:.2f} s fit, {ours['bootstrap']:.2f} s bootstrap", flush=True)

    generator = np.random.default_rng(0)
    results = []
    began = time.process_time()
    with np.errstate(all="ignore"):  # of the grid's starts many overflow
        for i in generator.choice(len(GRID), args.starts, replace=False):
            results.append(minimize(objective, GRID[i], method="L-BFGS-B").fun)
    grid_seconds = (time.process_time() - began) / args.starts * len(GRID)
    print(f"scipy: {grid_seconds:.0f} s for {len(GRID)} starts, by {args.starts} of them", flush=True)

    law = found.law
    optimum = [math.log(law.A), math.log(law.B), math.log(law.E), law.alpha, law.beta]
    drawn = np.random.default_rng(0).multinomial(len(N), np.full(len(N), 1 / len(N)), args.resamples)
    above, began = [], time.process_time()
    for w in drawn:
        above.append(minimize(objective, optimum, (w,), method="BFGS").fun)
    bootstrap_seconds = (time.process_time() - began) / args.resamples * RESAMPLES
    # `bootstrap` with the same seed draws the same ones first, so each can be compared.
    for k, w in enumerate(drawn):
        E, A, B, alpha, beta = samples[k]
        above[k] /= objective([math.log(A), math.log(B), math.log(E), alpha, beta], w)

    theirs, whole = grid_seconds + bootstrap_seconds, sum(ours.values())
    best = min(value for value in results if math.isfinite(value))
    figures = {
        "command": "python -m results.fit_speed --out results/fit_speed.json",
        "cpu": cpu.name(),
        "threads": 1,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "ours": ours | {"seconds": whole, "objective": found.objective, "resamples": RESAMPLES},
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
            "objective_over_ours": [min(above), max(above)],
        },
        "ratio": theirs / whole,
        "ratio_of_grid_alone": grid_seconds / whole,
    }
    print(json.dumps(figures, indent=1))
    if args.out:
        with replace_file(args.out) as new:
            new.write_text(json.dumps(figures, indent=1) + "\n")
    if found.objective > best or min(above) < 1 - 1e-9:
        sys.exit("scipy found a lower objective")


if __name__ == "__main__":
    main()
