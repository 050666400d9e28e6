"""Scaling laws: how large a model, and how many tokens, for a given amount of compute?

    L(N, D) = E + A / N^alpha + B / D^beta          loss of N parameters after D tokens, nats per token

E is the entropy of text, A / N^alpha the price of a finite model, B / D^beta that of finite data. Training
costs C = 6 N D FLOPs, so along a budget one falls as the other rises, and the least loss lies where

    N* = G (C/6)^a,  D* = (C/6)^b / G        a = beta / (alpha + beta),  b = alpha / (alpha + beta)
                                             G = (alpha A / (beta B))^(1 / (alpha + beta))

The law is that of Hoffmann et al. 2022 (arXiv 2203.15556, "Chinchilla"), section 3.3. This file holds the
law, what has been published of it, and its fit to runs (approach 3 of that paper; the search is in
scaling/huber_fit.py, and scaling/isoflop.py has approaches 1 and 2):

    python chinchilla.py                        what each published law makes of a few budgets
    python chinchilla.py plan 1e22              plan a training run: scaling/plan.py, printed by scaling/plan_report.py
    python chinchilla.py fit points.csv         fit the law to your own runs: scaling/fit_report.py
    python chinchilla.py sweep --minutes 20     make the runs, fit them, predict a larger one: scaling/sweep.py
    python chinchilla.py page                   the law to play with, in one HTML file: scaling/page.py

Units: N parameters, D tokens, C FLOPs, everywhere; losses in nats per token, which depend on the tokenizer:
laws of different ones can be compared by N and D, not by their losses.
"""

import argparse
import csv
import importlib
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scaling.huber_fit import BORDER, centre, on_border, parameters, search, search_again


@dataclass(frozen=True)
class Law:
    """L(N, D) = E + A / N^alpha + B / D^beta. Numbers or arrays, which broadcast."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, N, D):
        return self.E + self.A / np.power(N, self.alpha) + self.B / np.power(D, self.beta)

    @property
    def a(self) -> float:
        """Exponent of the best N over compute."""
        return self.beta / (self.alpha + self.beta)

    @property
    def b(self) -> float:
        """Exponent of the best D over compute."""
        return self.alpha / (self.alpha + self.beta)

    def optimal(self, C):
        """(N, D) of least loss with 6 N D = C (Hoffmann et al. 2022, equation 4)."""
        G = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        return G * np.power(C / 6, self.a), np.power(C / 6, self.b) / G

    def tokens_for(self, N, loss):
        """Tokens D after which N parameters reach this loss; inf where no number of tokens is enough."""
        left = np.asarray(loss - self.E - self.A / np.power(N, self.alpha), dtype=np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(left > 0, np.power(self.B / left, 1 / self.beta), np.inf)[()]


@dataclass(frozen=True)
class PowerLaw:
    """N* = k C^a, for what was published as an allocation alone; D* = C / (6 N*)."""

    k: float
    a: float

    def optimal(self, C):
        N = self.k * np.power(C, self.a)
        return N, C / (6 * N)


@dataclass(frozen=True)
class Kaplan(PowerLaw):
    """L(N, D) = ((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D of Kaplan et al. 2020, equation 1.5, with N
    without embeddings and head; and their allocation, which is a fit of its own (section 6)."""

    alpha_N: float = 0.076
    N_c: float = 8.8e13
    alpha_D: float = 0.095
    D_c: float = 5.4e13

    def loss(self, N, D):
        of_N = np.power(self.N_c / N, self.alpha_N / self.alpha_D)
        return np.power(of_N + self.D_c / D, self.alpha_D)


@dataclass(frozen=True)
class Published:
    """A law, and what to know of it before believing it."""

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
    # To all the digits of the paper's TeX source: the rounded ones it prints, 0.34 and 0.28, put N* 20 %
    # lower at Gopher's budget, and tokens per parameter at 93 instead of 59.
    "hoffmann3": Published(
        Law(E=1.693374, A=406.4010, B=410.7228, alpha=0.33917084, beta=0.2849083),
        "Hoffmann et al. 2022, approach 3",
        "arXiv 2203.15556, TeX source of equation 10",
        (1.4e18, 1.3e22),
        "stopped before the optimum, and the interval of a, 0.454 to 0.455, is far too narrow for its points "
        "(Besiroglu et al. 2024)",
    ),
    "kaplan": Published(
        Kaplan(k=1.3e9 / PF_DAY**0.73, a=0.73),
        "Kaplan et al. 2020",
        "arXiv 2001.08361, section 6.1",
        (9e12, 5e20),  # as Pearce and Song 2024 have it
        "N without embeddings and head, from runs of one long schedule: too few tokens by the later papers",
    ),
}
DEFAULT_LAW = "besiroglu"

HOFFMANN = Path(__file__).parent / "scaling" / "hoffmann.csv"
OUTLIERS = 5  # of its points
# Per parameter. Laws fitted near 20 overstate what tokens far beyond are worth: refitted on runs of up to
# 10,000 the exponents come out twice as large (Sardana and Frankle 2024).
MANY_TOKENS = 300
COLUMNS = {  # as they are called in the files of several papers
    "N": ("n", "params", "parameters", "model size"),
    "D": ("d", "tokens", "training tokens"),
    "C": ("c", "flop", "flops", "compute", "training flop"),
    "loss": ("loss", "l", "val_loss"),
}


def points() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(N, D, loss), float64 (240,) each, of the runs of Hoffmann et al. 2022.

    chinchilla.csv holds the 245 points that Besiroglu et al. 2024 read off figure 4 of that paper. As there,
    the 5 of highest loss are left out: the runs of the fewest tokens per parameter, 0.04 to 0.40, which the
    law does not describe, and which would make B six times as large."""
    return without_highest(*read_points(HOFFMANN), OUTLIERS)


def without_highest(N, D, L, drop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The points less the `drop` highest losses, in their order."""
    kept = np.sort(np.argsort(L, kind="stable")[: len(L) - drop])
    return N[kept], D[kept], L[kept]


def read_points(path: str | Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(N, D, loss), float64 (n,) each, of a CSV with a header: N, loss, and D or C; then D = C / (6 N).

    Raises ValueError, with file and line, for missing columns and for what is not a positive number."""
    rows = []
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        reader = csv.DictReader(file, skipinitialspace=True)
        header = {(name or "").strip().lower(): name for name in reader.fieldnames or ()}
        found = {key: [header[n] for n in names if n in header] for key, names in COLUMNS.items()}
        second = "D" if found["D"] else "C"
        if not (found["N"] and found[second] and found["loss"]):
            told = ", ".join(header) or "nothing"
            raise ValueError(f"{path}, line 1: expected columns N, loss, and D or C; it has {told}")
        names = [found[key][0] for key in ("N", second, "loss")]
        for name in names:
            if [n.strip().lower() for n in reader.fieldnames].count(name.strip().lower()) > 1:
                raise ValueError(f"{path}, line 1: there is more than one column {name}")
        for row in reader:
            if None in row:
                raise ValueError(f"{path}, line {reader.line_num}: more cells than columns; a decimal comma?")
            rows.append([])
            for name in names:
                try:
                    value = float(row[name] or "")
                except ValueError:
                    value = math.nan
                if not 0 < value < math.inf:
                    raise ValueError(
                        f"{path}, line {reader.line_num}: {name} is {row[name]!r}: expected a positive number"
                    )
                rows[-1].append(value)
    if not rows:
        raise ValueError(f"{path}: no points below the header")
    N, D, L = np.array(rows).T
    return N, D if second == "D" else D / (6 * N), L


class Unreadable(ValueError, argparse.ArgumentTypeError):
    """Both, since argparse shows the message of the latter alone."""


def quantity(text: str) -> float:
    """1e22, 7b, 1.4t, 300m or 20k. Raises ValueError for what is not a positive, finite number."""
    units = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
    body, unit = (text[:-1], units[text[-1].lower()]) if text[-1:].lower() in units else (text, 1.0)
    try:
        value = float(body) * unit
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise Unreadable(f"{text!r}: expected a positive number such as 1e22, 7b, 1.4t, 300m or 20k")
    return value


def flops(config, tokens: float) -> float:
    """Exact training FLOPs (matmuls, attention, head) of a gpt.Config, or of any that counts as it does, at
    full length of context. 6 N D leaves out attention and counts embeddings that are only looked up."""
    return config.flops_per_token(config.max_seq_len) * tokens


def same(values, tolerance: float = 0.005) -> np.ndarray:
    """Labels 0, 1, ... (n,), ascending: values within half a per cent are one. Read off a figure, or worked
    out as C / (6 D), equal ones differ a little."""
    labels, first = np.zeros(len(values), dtype=np.int64), 0.0
    label = -1
    for i in np.argsort(values, kind="stable"):
        if values[i] > first * (1 + tolerance):
            label, first = label + 1, values[i]
        labels[i] = label
    return labels


@dataclass
class Fit:
    """A law fitted to n points, the objective f of scaling/huber_fit.py there, and the points. `warnings` is what to
    know of it."""

    law: Law
    objective: float
    N: np.ndarray
    D: np.ndarray
    L: np.ndarray
    delta: float
    clusters: np.ndarray  # (n,) int64: points of one label are drawn together by the bootstrap by size
    theta: np.ndarray  # (1, 5): the optimum, as scaling/huber_fit.py has it
    warnings: list[str]

    @property
    def residuals(self) -> np.ndarray:
        """ln predicted - ln measured (n,)."""
        return np.log(self.law.loss(self.N, self.D) / self.L)

    @property
    def residual_rms(self) -> float:
        return float(np.sqrt(np.mean(self.residuals**2)))

    def bootstrap(self, n: int = 4000, seed: int = 0, by_size: bool = False) -> np.ndarray:
        """E, A, B, alpha, beta (n, 5), float64, of n resamples of the points, with replacement.

        Law(*samples.T) is all of them at once: `interval(Law(*samples.T).optimal(C)[0])` is that of N*.
        Points of one size may err together (one run, or one learning rate): by_size draws whole sizes
        instead. Resamples with less than 3 sizes or 3 D are drawn anew; those whose optimum is on the border
        keep it, and widen the intervals. `warnings` tells of both.

        Raises ValueError for less than one resample, and for by_size with less than 4 sizes."""
        if n < 1:
            raise ValueError(f"bootstrap: {n} resamples: expected at least 1")
        units = self.clusters if by_size else np.arange(len(self.N))
        n_units = units.max() + 1
        if n_units < 4:
            raise ValueError(f"bootstrap by size: {n_units} sizes: expected at least 4; draw points instead")
        generator = np.random.default_rng(seed)
        members = [np.eye(label.max() + 1)[label] for label in (self.clusters, same(self.D))]
        w, poor, redrawn = np.empty((n, len(self.N))), np.ones(n, dtype=bool), -n
        while poor.any():
            redrawn += poor.sum()
            w[poor] = generator.multinomial(n_units, np.full(n_units, 1 / n_units), poor.sum())[:, units]
            distinct = [((w @ member > 0).sum(axis=1), member.shape[1]) for member in members]
            poor = np.any([count < min(3, most) for count, most in distinct], axis=0)

        logs, means = centre(self.N, self.D, self.L)
        theta, solved = search_again(self.theta, w, logs, self.delta)
        samples = parameters(theta, means)
        counts = {
            "were drawn anew: they had less than 3 sizes, or 3 D": redrawn,
            f"have no optimum within the border ({BORDER})": on_border(theta).any(axis=1).sum(),
            "stopped before the gradient vanished": (~solved).sum(),
        }
        drawn = "resamples of sizes" if by_size else "resamples"
        notes = [f"{count} of {n} {drawn} {what}" for what, count in counts.items() if count]
        low, high = interval(Law(*samples.T).a)
        if high - low > 0.15:
            notes.append(f"a is not identified: its 95 % interval is {low:.2f} to {high:.2f}")
        self.warnings += [note for note in notes if note not in self.warnings]
        return samples


def interval(values, level: float = 0.95) -> tuple[float, float]:
    """The percentile interval of bootstrap values (n,): what lies outside, half each side, is 1 - level."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def fit(N, D, L, delta: float = 1e-3, *, clusters=None) -> Fit:
    """The law of least f (approach 3 of Hoffmann et al. 2022, section 3.3) for points N, D, L, (n,) each.

    clusters (n,): what the bootstrap by size draws together, by default the points of one N.

    On the 240 points of the paper, delta 1e-3 gives E 1.8172, A 477.83, B 2143.4, alpha 0.3473, beta 0.3672.
    Besiroglu et al. 2024 print 1.8172, 482.01, 2085.43, 0.3478, 0.3658 of the same points and, as they
    write, the same delta. Their estimate is that of greatest likelihood, however, with the width of the
    distribution free, and the width went to 5e-6; what counts is delta times that, so it is 5e-9 on this
    scale, and f no more than the sum of absolute errors. delta 1e-6 or less finds their numbers here.

    scaling/huber_fit.py has the search.

    Raises ValueError for less than 6 points, one size or one D alone, and numbers that are not positive."""
    N, D, L = (np.asarray(values, dtype=np.float64) for values in (N, D, L))
    if not (N.ndim == 1 and N.shape == D.shape == L.shape):
        raise ValueError(f"fit: N {N.shape}, D {D.shape}, loss {L.shape}: expected three rows of one length")
    if len(N) < 6:
        raise ValueError(f"fit: {len(N)} points: expected at least 6 for the law's 5 parameters")
    for name, values in (("N", N), ("D", D), ("loss", L), ("delta", np.array([delta]))):
        bad = values[~((values > 0) & np.isfinite(values))]
        if len(bad):
            raise ValueError(f"fit: {name} {bad[0]}: expected positive numbers")
    with np.errstate(over="ignore", under="ignore"):
        C = 6 * N * D
    if not (np.isfinite(C) & (C > 0)).all():
        raise ValueError("fit: 6 N D is out of the range of float64: look at the units of N and D")
    sizes = same(N)
    for name, count in (("size N", sizes.max() + 1), ("number of tokens D", same(D).max() + 1)):
        if count == 1:
            raise ValueError(f"fit: one {name} alone: its part of the loss cannot be told from E; vary it")

    logs, means = centre(N, D, L)
    theta, objective, solved = search(logs, delta)
    warnings = []
    if sizes.max() < 3:
        warnings.append(f"only {sizes.max() + 1} sizes: E, A and alpha cannot be told apart; use 4 or more")
    if N.max() < 3 * N.min():
        warnings.append(f"N varies by a factor of {N.max() / N.min():.3g} only: alpha wants 10 or more")
    if abs(np.corrcoef(logs[:2])[0, 1]) > 0.999:
        warnings.append("one D for each N: A and alpha cannot be told from B and beta; vary D at equal N")
    for name, out in zip(("E", "A", "B", "alpha", "beta"), on_border(theta)[0], strict=True):
        if out:
            warnings.append(f"{name} is on the border ({BORDER}): these points do not determine it")
    if not solved:
        warnings.append("the search stopped before the gradient vanished")
    clusters = sizes if clusters is None else np.unique(clusters, return_inverse=True)[1]
    law = Law(*(float(value) for value in parameters(theta, means)[0]))
    return Fit(law, objective, N, D, L, delta, clusters, theta, warnings)


def beyond(C: float, compute: tuple[float, float]) -> float:
    """By how many orders of magnitude C lies outside of the least and greatest compute; 0 inside, and where
    it would be printed as 0.0."""
    orders = max(math.log10(C / compute[1]), math.log10(compute[0] / C))
    return orders if orders >= 0.05 else 0.0


def short(value: float, digits: int = 3) -> str:
    """1.4T for 1.4e12, 5.76e23 from 1e15 on."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if 0.9995 * size <= value < 999.5e12:
            return f"{value / size:.{digits}g}{unit}"
    return f"{value:.{digits}g}".replace("e+", "e")


def print_laws() -> None:
    print("compute  law                                     N*       D*  D*/N*   loss  extrapolated by")
    for C in 10.0 ** np.arange(19, 26):
        for i, published in enumerate(LAWS.values()):
            N, D = published.law.optimal(C)
            loss = f"{published.law.loss(N, D):6.3f}" if hasattr(published.law, "loss") else "     -"
            orders = beyond(C, published.compute)
            told = f"{orders:.1f} orders of magnitude" if orders else ""
            print(f"{'' if i else f'{C:.0e}':8} {published.title:34} {short(N):>7}  {short(D):>7}", end="")
            print(f"  {D / N:5.3g} {loss}  {told}".rstrip())
    print("\nN* parameters and D* tokens have the least loss of all that take this compute, C = 6 N D.")
    print("N counts the head, not the embedding (Kaplan: neither). Losses are nats per token of each paper's")
    print("own text and tokenizer: compare them within a law, not between laws.")


COMMANDS = {
    "plan": ("scaling.plan_report", "plan a training run"),
    "fit": ("scaling.fit_report", "fit the law to your own runs, or to those of the paper"),
    "sweep": ("scaling.sweep", "make the runs, fit them, predict a larger one"),
    "page": ("scaling.page", "the law to play with, in one HTML file"),
}


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(message)  # one line, as every other mistake


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(prog="chinchilla.py", description="Scaling laws. Without arguments: the published ones.")
    commands = parser.add_subparsers(dest="command")
    for name, (file, help) in COMMANDS.items():
        command = commands.add_parser(name, help=help)
        if argv[:1] == [name]:  # the others are left alone: they import this file, and scaling/sweep.py torch
            module = importlib.import_module(file)
            module.add_arguments(command)
            command.set_defaults(run=module.main)
    try:
        for text in argv:
            if re.match(r"-[\d.]", text):  # argparse would take -1e22 for an unknown flag
                raise ValueError(f"{text}: expected a positive number")
        args = parser.parse_args(argv)
        if args.command is None:
            print_laws()
            return 0
        return args.run(args)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, csv.Error) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


# Run as a script this file is the module __main__; scaling/plan.py and the others import it as chinchilla, and a Law
# of one would be none of the other.
if __name__ == "__main__":
    sys.exit(importlib.import_module("chinchilla").main())
