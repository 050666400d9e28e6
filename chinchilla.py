"""Scaling laws: how large a model, and how many tokens, for a given amount of compute?

    L(N, D) = E + A / N^alpha + B / D^beta          loss of N parameters after D tokens, nats per token

E is the entropy of text, A / N^alpha the price of a finite model, B / D^beta that of finite data. Training
costs C = 6 N D FLOPs. With C fixed, a larger N leaves fewer D, and the loss is least at

    N* = G (C/6)^a,  D* = (C/6)^b / G        a = beta / (alpha + beta),  b = alpha / (alpha + beta)
                                             G = (alpha A / (beta B))^(1 / (alpha + beta))

The law is that of Hoffmann et al. 2022 (arXiv 2203.15556, "Chinchilla"), section 3.3. This file holds the
law, what has been published of it, and its fit to runs, which is approach 3 of that paper. (The search for
the optimum is in scaling/huber_fit.py; scaling/isoflop.py has approaches 1 and 2.)

    python chinchilla.py                        N* and D* by each published law, at a few budgets
    python chinchilla.py plan 1e22              plan a training run: scaling/plan.py and plan_report.py
    python chinchilla.py fit points.csv         fit the law to your own runs: scaling/fit_report.py
    python chinchilla.py sweep --minutes 20     make runs, fit them, predict a larger one: scaling/sweep.py
    python chinchilla.py page                   explore the law in one HTML file: scaling/page.py

Units: N parameters, D tokens, C FLOPs, everywhere; losses in nats per token. These depend on the tokenizer:
laws from different tokenizers can be compared by N and D, but not by their losses.
"""

import argparse
import importlib
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from formats import command
from formats.quantities import short
from scaling.huber_fit import BORDER, centre, on_border, search, search_near, uncentre
from scaling.points import (
    all_but_highest,
    beyond,
    check_points,
    describe_weak_design,
    draw_resamples,
    group_equal,
    interval,
    read_points,
)


@dataclass(frozen=True)
class Law:
    """L(N, D) = E + A / N^alpha + B / D^beta. Fields and arguments are numbers, or arrays that broadcast."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, N, D):
        """Return the loss of N parameters after D tokens, nats per token."""
        return self.E + self.A / np.power(N, self.alpha) + self.B / np.power(D, self.beta)

    @property
    def a(self) -> float:
        """Return the exponent of N* as a power of C."""
        return self.beta / (self.alpha + self.beta)

    @property
    def b(self) -> float:
        """Return the exponent of D* as a power of C."""
        return self.alpha / (self.alpha + self.beta)

    def optimal(self, C):
        """Return (N, D) of least loss with 6 N D = C (Hoffmann et al. 2022, equation 4)."""
        G = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        return G * np.power(C / 6, self.a), np.power(C / 6, self.b) / G

    def tokens_for(self, N, loss):
        """Return the tokens D after which N parameters reach this loss; inf where no D is enough."""
        left = np.asarray(loss - self.E - self.A / np.power(N, self.alpha), dtype=np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(left > 0, np.power(self.B / left, 1 / self.beta), np.inf)[()]


@dataclass(frozen=True)
class PowerLaw:
    """N* = k C^a and D* = C / (6 N*): how to divide compute, without a law of the loss."""

    k: float
    a: float

    def optimal(self, C):
        """Return (N, D) of least loss with 6 N D = C."""
        N = self.k * np.power(C, self.a)
        return N, C / (6 * N)


@dataclass(frozen=True)
class Kaplan(PowerLaw):
    """L(N, D) = ((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D of Kaplan et al. 2020, equation 1.5.

    The constants are those of equations 1.1 and 1.2; the joint fit in table 2 has slightly different ones. N
    is counted without embeddings and head. N* = k C^a does not follow from this law: it is a fit of its own
    (section 6)."""

    alpha_N: float = 0.076
    N_c: float = 8.8e13
    alpha_D: float = 0.095
    D_c: float = 5.4e13

    def loss(self, N, D):
        """Return the loss of N parameters after D tokens, nats per token."""
        of_N = np.power(self.N_c / N, self.alpha_N / self.alpha_D)
        return np.power(of_N + self.D_c / D, self.alpha_D)


@dataclass(frozen=True)
class Published:
    """A published law with its source, the compute of the runs behind it, and its limits."""

    law: Law | PowerLaw
    title: str
    source: str
    compute: tuple[float, float]  # least and greatest FLOPs of the runs it was fitted to
    note: str = ""


PF_DAY = 1e15 * 86400  # FLOPs

LAWS = {
    "besiroglu": Published(
        Law(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658),
        "Besiroglu et al. 2024",
        "arXiv 2404.10102",
        (1.4e18, 1.3e22),
        "approach 3 anew, on 240 points read off figure 4 of Hoffmann et al.; least absolute deviations",
    ),
    "hoffmann1": Published(
        PowerLaw(k=0.0991589, a=0.498099),
        "Hoffmann et al. 2022, approach 1",
        "arXiv 2203.15556, through the rows of table 3",
        (1.4e18, 1.3e22),
        "envelope of the training curves; a 0.488 to 0.502 (10 to 90 %)",
    ),
    "hoffmann2": Published(
        PowerLaw(k=0.144877, a=0.489942),
        "Hoffmann et al. 2022, approach 2",
        "arXiv 2203.15556, through the rows of table A3",
        (6e18, 3e21),
        "parabolas through runs of equal compute; a 0.462 to 0.534 (10 to 90 %)",
    ),
    # With all the digits of the paper's TeX source. The rounded exponents that it prints, 0.34 and 0.28, put
    # N* 20 % lower at Gopher's budget, and tokens per parameter at 93 instead of 59.
    "hoffmann3": Published(
        Law(E=1.693374, A=406.4010, B=410.7228, alpha=0.33917084, beta=0.2849083),
        "Hoffmann et al. 2022, approach 3",
        "arXiv 2203.15556, TeX source of equation 10",
        (1.4e18, 1.3e22),
        "its search stopped before the optimum, and the interval of a, 0.454 to 0.455, is far too narrow for "
        "its points (Besiroglu et al. 2024)",
    ),
    "kaplan": Published(
        Kaplan(k=1.3e9 / PF_DAY**0.73, a=0.73),
        "Kaplan et al. 2020",
        "arXiv 2001.08361, section 6.1",
        (9e12, 5e20),  # according to Pearce and Song 2024
        "N without embeddings and head, from runs of one long schedule: too few tokens by the later papers",
    ),
}
DEFAULT_LAW = "besiroglu"

# Laws fitted near 20 tokens per parameter overstate the worth of tokens far beyond: refitted on runs of up to
# 10,000, the exponents come out twice as large (Sardana and Frankle 2024).
MANY_TOKENS = 300  # per parameter

HOFFMANN = Path(__file__).parent / "scaling" / "hoffmann.csv"
OUTLIERS = 5  # points of HOFFMANN that are left out


def points() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (N, D, loss), float64 (240,) each, of the runs of Hoffmann et al. 2022.

    scaling/hoffmann.csv holds the 245 points that Besiroglu et al. 2024 read off figure 4 of that paper. As
    there, the 5 of highest loss are left out. They are the runs of the fewest tokens per parameter, 0.04 to
    0.40, which the law does not describe; with them B would come out six times as large."""
    N, D, L = read_points(HOFFMANN)
    kept = all_but_highest(L, OUTLIERS)
    return N[kept], D[kept], L[kept]


@dataclass
class Fit:
    """A law fitted to n points, and the points."""

    law: Law
    objective: float  # f of scaling/huber_fit.py at the optimum
    N: np.ndarray  # float64 (n,), like D and L
    D: np.ndarray
    L: np.ndarray
    delta: float  # of Huber's function, as `fit` took it
    clusters: np.ndarray  # (n,) int64: the bootstrap by size draws points of one label together
    theta: np.ndarray  # (1, 5): the optimum in the unknowns of scaling/huber_fit.py
    warnings: list[str]  # reasons to doubt the law

    @property
    def residuals(self) -> np.ndarray:
        """Return ln predicted - ln measured loss of each point, float64 (n,)."""
        return np.log(self.law.loss(self.N, self.D) / self.L)

    @property
    def residual_rms(self) -> float:
        """Return the root mean square of the residuals."""
        return float(np.sqrt(np.mean(self.residuals**2)))

    def bootstrap(self, n: int = 4000, seed: int = 0, by_size: bool = False) -> np.ndarray:
        """Return E, A, B, alpha, beta (n, 5), float64, of laws fitted to n resamples of the points.

        Law(*samples.T) holds all n laws at once: `interval(Law(*samples.T).optimal(C)[0])` is that of N*.
        by_size resamples whole sizes instead of points, for points of one size that may err together (one
        run, or one learning rate). Resamples with fewer than 3 sizes or 3 values of D are drawn again; those
        whose optimum is on the border keep it, and widen the intervals. `warnings` gets a line for each.

        Raises ValueError for fewer than one resample, and for by_size with fewer than 4 sizes."""
        units = self.clusters if by_size else np.arange(len(self.N))
        w, n_redrawn = draw_resamples(units, (self.clusters, group_equal(self.D)), n, seed)

        logs, means = centre(self.N, self.D, self.L)
        theta, solved = search_near(self.theta, w, logs, self.delta)
        samples = uncentre(theta, means)

        # Note what was wrong with some of the resamples, once.
        counts = {
            "were drawn anew: they had fewer than 3 sizes or 3 values of D": n_redrawn,
            f"have no optimum within the border ({BORDER})": on_border(theta).any(axis=1).sum(),
            "stopped before the gradient vanished": (~solved).sum(),
        }
        kind = "resamples of sizes" if by_size else "resamples"
        notes = [f"{count} of {n} {kind} {problem}" for problem, count in counts.items() if count]
        low, high = interval(Law(*samples.T).a)
        if high - low > 0.15:
            notes.append(f"a is not identified: its 95 % interval is {low:.2f} to {high:.2f}")
        self.warnings += [note for note in notes if note not in self.warnings]
        return samples


def fit(N, D, L, delta: float = 1e-3, *, clusters=None) -> Fit:
    """Return the law that minimises f of scaling/huber_fit.py on points N, D, L, (n,) each.

    This is approach 3 of Hoffmann et al. 2022, section 3.3. delta: relative error from which on errors count
    linearly. clusters (n,): labels of points that the bootstrap by size draws together, by default one label
    for each N.

    On the 240 points of the paper, delta 1e-3 gives E 1.8172, A 477.83, B 2143.4, alpha 0.3473, beta 0.3672.
    Besiroglu et al. 2024 print 1.8172, 482.01, 2085.43, 0.3478, 0.3658 for the same points and the same
    delta. But they maximise a likelihood whose width is free, and it went to 5e-6. What counts is delta times
    the width, 5e-9 on our scale, where f is in effect the sum of absolute errors. With a delta of 1e-6 or
    less, `fit` returns their numbers.

    Raises ValueError for fewer than 6 points, a single size or D, and numbers that are not positive."""
    N, D, L = (np.asarray(values, dtype=np.float64) for values in (N, D, L))
    if not 0 < delta < math.inf:
        raise ValueError(f"fit: delta {delta}: expected a positive number")
    check_points(N, D, L)
    logs, means = centre(N, D, L)
    theta, objective, solved = search(logs, delta)
    warnings = describe_weak_design(N, logs)
    for name, out in zip(("E", "A", "B", "alpha", "beta"), on_border(theta)[0], strict=True):
        if out:
            warnings.append(f"{name} is on the border ({BORDER}): these points do not determine it")
    if not solved:
        warnings.append("the search stopped before the gradient vanished")
    clusters = group_equal(N) if clusters is None else np.unique(clusters, return_inverse=True)[1]
    law = Law(*(float(value) for value in uncentre(theta, means)[0]))
    return Fit(law, objective, N, D, L, delta, clusters, theta, warnings)


def print_laws() -> None:
    """Print N*, D* and the least loss by each published law, for budgets of 1e19 to 1e25 FLOPs."""
    print("compute  law                                     N*       D*  D*/N*   loss  extrapolated by")
    print("FLOPs                                       params   tokens  (1)     (2)")
    for C in 10.0 ** np.arange(19, 26):
        for i, published in enumerate(LAWS.values()):
            N, D = published.law.optimal(C)
            loss = f"{published.law.loss(N, D):6.3f}" if hasattr(published.law, "loss") else "     -"
            orders = beyond(C, published.compute)
            far = f"{orders:.1f} orders of magnitude" if orders else ""
            print(f"{'' if i else f'{C:.0e}':8} {published.title:34} {short(N):>7}  {short(D):>7}", end="")
            print(f"  {D / N:5.3g} {loss}  {far}".rstrip())
    print("\n(1) tokens per parameter; the rule of thumb is 20, of Hoffmann et al. 2022.  (2) nats per token")
    print("N* parameters and D* tokens have the least loss of all that take this compute, C = 6 N D.")
    print("N counts the head, not the embedding (Kaplan: neither). Losses are nats per token of each paper's")
    print("own text and tokenizer: compare them within a law, not between laws.")


COMMANDS = {  # name: the file that has its add_arguments(parser) and main(args), and what it does
    "plan": ("scaling.plan_report", "plan a training run"),
    "fit": ("scaling.fit_report", "fit the law to your own runs, or to those of the paper"),
    "sweep": ("scaling.sweep", "make the runs, fit them, predict a larger one"),
    "page": ("scaling.page", "explore the law in one HTML file"),
}


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(message)  # without the usage: every mistake is one line


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 2 after a mistake, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(prog="chinchilla.py", description="Scaling laws. Without arguments: the published ones.")
    commands = parser.add_subparsers(dest="command")
    for name, (file, help) in COMMANDS.items():
        subparser = commands.add_parser(name, help=help)
        if argv[:1] == [name]:
            # Import by name, and only the command in use: these files import this one. (Started as a script,
            # this file is __main__, and they import it once more as chinchilla; nothing passes between.)
            module = importlib.import_module(file)
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.main)

    def run_command() -> int:
        for text in argv:
            if re.match(r"-[\d.]", text):  # argparse would take -1e22 for an unknown flag
                raise ValueError(f"{text}: expected a positive number")
        args = parser.parse_args(argv)
        if args.command is None:
            print_laws()
            return 0
        return args.run(args)

    return command.exit_code(run_command)


if __name__ == "__main__":
    command.run(main)
