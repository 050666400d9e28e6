"""Planning a training run: how large, on how many tokens, on which hardware, at what price, and alternatives.

    compute-optimal     least L(N, D) with 6 N D = C                                     Hoffmann et al. 2022
    the same loss       D such that L(N, D) = L(N*, D*), for any other N                        de Vries 2023
    to be served        least 6 N D + 2 N D_served with L(N, D) = L(N*, D*)         Sardana and Frankle 2024
    repeated data       least E + A / N'^alpha + B / D'^beta with 6 N D = C          Muennighoff et al. 2023
                        D' = U + U R (1 - exp(-(D/U - 1) / R)),  U unique tokens seen D/U times,  R = 15.4

L and the laws are those of chinchilla.py; what FLOPs cost on GPUs is in scaling/hardware.py. This file is the
arithmetic; the command, which prints it, is scaling/plan_report.py: `python chinchilla.py plan 1e22`.

Units: N parameters, D tokens, C FLOPs, losses nats per token.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np

from chinchilla import DEFAULT_LAW, LAWS, MANY_TOKENS, Law, PowerLaw, fit, points
from formats.quantities import short
from scaling.hardware import CO2, DEFAULT_MFU, DEVICES, PUE, check_mfu, hardware_cost
from scaling.points import beyond, interval
from scaling.shapes import SEQ_LEN, count_parameters, shape_for, training_flops

RESAMPLES = 400
SIZES = (0.125, 0.25, 0.5, 0.75, 1, 1.5, 2, 4)  # times N*, for other models of the same loss
TOO_HOPEFUL = "laws fitted near 20 overstate what tokens so far beyond are worth (Sardana and Frankle 2024)"
MOST_EPOCHS = 40  # from here on repeated tokens are worth next to nothing (Muennighoff et al. 2023)
LEAST, MOST = 1e-9, 1e50  # range of every number given, so that all results stay in float64's range


def minimise(f, low: float, high: float) -> float:
    """Return the x between low and high, both positive, where f is least. f takes an array and has a single
    minimum.

    The result has about 8 digits, half of float64's, because f is flat around its minimum.
    """
    for _ in range(14):
        x = np.geomspace(low, high, 33)
        i = int(np.argmin(f(x)))
        low, high = x[max(i - 1, 0)], x[min(i + 1, 32)]
    return float(math.sqrt(low * high))


def budget_for(law: Law | PowerLaw, params: float | None = None, tokens: float | None = None):
    """Return the C for which N* is `params`, or for which D* is `tokens`: give one. Both are powers of C."""
    N1, D1 = law.optimal(1.0)
    if params is not None:
        return np.power(params / N1, 1 / law.a)
    return np.power(tokens / D1, 1 / (1 - law.a))


def compute_for(law: Law, loss):
    """Return the C at which the least loss L* is `loss`, which must be above E. L* - E is a power of C."""
    reducible = law.loss(*law.optimal(1.0)) - law.E
    return np.power((loss - law.E) / reducible, -(law.alpha + law.beta) / (law.alpha * law.beta))


@cache
def refits(seed: int) -> Law:
    """Return RESAMPLES laws in one Law of arrays, fitted to resamples of the points of Hoffmann et al., which
    Besiroglu et al. fitted too. Here delta is 1e-3; their law is the limit for a delta near 0."""
    return Law(*fit(*points()).bootstrap(RESAMPLES, seed).T)


def bootstrap_interval(C: float, seed: int = 0) -> dict[str, list[float]]:
    """Return the 95 % intervals of N*, D*, D*/N* and the least loss at C, by `refits`."""
    law = refits(seed)
    N, D = law.optimal(C)
    values = {"N": N, "D": D, "tokens_per_parameter": D / N, "loss": law.loss(N, D)}
    return {name: list(interval(v)) for name, v in values.items()}


def same_loss(law: Law, C: float, size: float) -> tuple[float, float, float]:
    """Return (N, D, extra) of the model of `size` times N* that reaches the least loss of C. Its training
    takes (1 + extra) C FLOPs. D and extra are inf where no number of tokens is enough.

    For half of N*, extra is 0.21 by the coefficients of de Vries 2023 ("Go smol or go home"), and 0.26 by
    those of Besiroglu et al.
    """
    N0, D0 = law.optimal(C)
    N = size * N0
    D = law.tokens_for(N, law.loss(N0, D0))
    return float(N), float(D), float(6 * N * D / C - 1)


def inference_optimal(law: Law, C: float, served: float) -> tuple[float, float, float]:
    """Return (N, D, saving): the model with the least FLOPs of training and serving together, among all with
    the loss of the compute-optimal model of C, and the share of those FLOPs that it saves.

    served: tokens read and written in the model's life. Sardana and Frankle 2024, arXiv 2401.00448. A FLOP of
    serving counts like one of training, although serving has a lower MFU, which favours small models further.
    """
    N0, D0 = law.optimal(C)
    loss = law.loss(N0, D0)

    def total(N):
        return N * (6 * law.tokens_for(N, loss) + 2 * served)

    # N is between the size that would need infinitely many tokens, and N*.
    smallest = (law.A / (loss - law.E)) ** (1 / law.alpha)
    N = minimise(total, smallest, N0)
    return N, float(law.tokens_for(N, loss)), float(1 - total(N) / total(N0))


def effective(total, unique, R: float):
    """Return how many new tokens `total` tokens are worth if only `unique` of them differ: nearly all while
    repetitions are few, and at most (1 + R) `unique` (Muennighoff et al. 2023, section 3).

    Parameters beyond those that are optimal for the unique tokens are discounted in the same way."""
    return unique * (1 + R * (1 - np.exp(-(total / unique - 1) / R)))


def inference_optimal_within(law: Law, C: float, served: float) -> tuple[float, float]:
    """Return (N, D) with 6 N D = C of the model that is cheapest to train and serve, among all of its loss.

    It is the `inference_optimal` model of a smaller budget, the one for which that model's training takes C.
    So it is smaller than the compute-optimal model of C, and its loss is higher."""

    def training(budget):
        N, D, _ = inference_optimal(law, budget, served)
        return 6 * N * D

    low, high = C, C
    while training(low) > C:
        low /= 1000
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if training(middle) < C else (low, middle)
    N, D, _ = inference_optimal(law, low, served)
    return N, D


@dataclass(frozen=True)
class RepeatedData:
    """The law for tokens that are seen more than once (Muennighoff et al. 2023, arXiv 2305.16264)."""

    law: Law
    R_D: float
    R_N: float
    largest: float  # FLOPs of the largest run that it was fitted to

    def loss(self, N, D, unique):
        """Return the loss of N parameters after D tokens, of which `unique` are unique."""
        # Unique tokens that are never seen must not count: the optimum would become a huge model on almost
        # no tokens.
        unique = np.minimum(unique, D)
        N_unique = np.minimum(N, self.law.optimal(budget_for(self.law, tokens=unique))[0])
        return self.law.loss(effective(N, N_unique, self.R_N), effective(D, unique, self.R_D))

    def optimal(self, C: float, unique: float) -> tuple[float, float]:
        """Return (N, D) of least loss with 6 N D = C, and `unique` unique tokens."""
        N0 = float(self.law.optimal(C)[0])
        N = minimise(lambda N: self.loss(N, C / (6 * N), unique), N0 / 1000, 10 * N0)
        return N, C / (6 * N)


# The constants of the paper's fit with alpha = beta, from the code published with it.
REPEATED = RepeatedData(
    Law(math.exp(0.6254804), math.exp(6.255414), math.exp(7.3049974), alpha=0.3526596, beta=0.3526596),
    R_D=15.387756,
    R_N=5.309743,
    largest=6 * 8.67e9 * 178e9,
)


def look_up(table: dict, name: str, kind: str):
    """Return table[name]. Raises ValueError, with all names, if there is no such name."""
    if name not in table:
        raise ValueError(f"{kind} {name}: unknown; there are {', '.join(table)}")
    return table[name]


def check_positive(**values: float | None) -> None:
    """Raise ValueError for a value that is given, not None, and outside of LEAST to MOST."""
    for name, value in values.items():
        if value is not None and not LEAST <= value <= MOST:
            given = f"{name.replace('_', ' ')} {min(value, 1e308):g}"  # an int may be larger than any float
            raise ValueError(f"{given}: expected a number above 0, from {LEAST:g} to {MOST:g}")


def allocation(N: float, D: float | None) -> dict:
    """Return N, D and D / N, as they appear in a plan. D is None where no number of tokens is enough."""
    return {"N": N, "D": D, "tokens_per_parameter": None if D is None else D / N}


def plan_laws(C: float, seed: int) -> dict[str, dict]:
    """Return N*, D* and the least loss at C by every published law, and the interval of Besiroglu et al."""
    laws = {}
    for name, published in LAWS.items():
        N, D = (float(x) for x in published.law.optimal(C))
        loss = float(published.law.loss(N, D)) if hasattr(published.law, "loss") else None
        far = beyond(C, published.compute)
        row = allocation(N, D) | {"loss": loss, "compute": published.compute, "beyond": far}
        laws[name] = row | {"title": published.title, "source": published.source, "note": published.note}
    laws["besiroglu"]["interval"] = bootstrap_interval(C, seed)
    return laws


def plan_other_sizes(law: Law, C: float) -> list[dict]:
    """Return models of SIZES times N* that reach the least loss of C, and what they cost."""
    rows = []
    for size in SIZES:
        N, D, extra = same_loss(law, C, size)
        reached = math.isfinite(D)
        row = allocation(N, D if reached else None)
        rows.append({"size": size, **row, "extra": extra if reached else None})
    return rows


def plan_own_run(law: Law | PowerLaw, run: tuple[float, float]) -> dict:
    """Return the run (N, D) with its loss, and the least compute for that loss, if the law gives a loss."""
    if not isinstance(law, Law):
        return allocation(*run)
    loss = float(law.loss(*run))
    return allocation(*run) | {"loss": loss, "optimal_compute": float(compute_for(law, loss))}


def plan_inference(law: Law, C: float, served: float) -> dict:
    """Return the model of the compute-optimal loss that is cheapest to train and serve, what its training
    takes, and the model to be served whose training takes C."""
    N, D, saving = inference_optimal(law, C, served)
    part = allocation(N, D) | {"served": served, "saving": saving, "training": 6 * N * D}
    N, D = inference_optimal_within(law, C, served)
    return part | {"within": allocation(N, D) | {"loss": float(law.loss(N, D))}}


def repeated_run(N: float, D: float, unique: float) -> dict:
    """Return a run (N, D) on `unique` unique tokens: epochs, what its tokens are worth, and its loss."""
    worth = float(effective(D, min(unique, D), REPEATED.R_D))
    more = {"epochs": D / unique, "worth": worth, "loss": float(REPEATED.loss(N, D, unique))}
    return allocation(N, D) | more


def plan_repeated_data(C: float, unique_tokens: float, run: tuple[float, float] | None) -> dict:
    """Return the best run at C on `unique_tokens`, the best with enough of them, and `run` (N, D) if it is
    given."""
    N, D = (float(x) for x in REPEATED.law.optimal(C))
    part = {
        "unique": unique_tokens,
        "limited": repeated_run(*REPEATED.optimal(C, unique_tokens), unique_tokens),
        "unlimited": allocation(N, D) | {"epochs": 1.0, "worth": D, "loss": float(REPEATED.law.loss(N, D))},
        "beyond": beyond(C, (1.0, REPEATED.largest)),  # no budget is less than 1
    }
    return part | ({"run": repeated_run(*run, unique_tokens)} if run else {})


def plan_flops(N: float, D: float) -> dict | None:
    """Return the FLOPs of a transformer of about N parameters on D tokens, or None if none is usual."""
    shape = shape_for(N)
    if shape is None:
        return None
    n_params, exact = count_parameters(shape), training_flops(shape) / SEQ_LEN
    return {
        "shape": vars(shape),
        "N": n_params,
        "D": D,
        "6ND": 6 * n_params * D,
        "exact": exact * D,
        "without_relative": exact / (6 * count_parameters(shape, relative=False)) - 1,
    }


def list_warnings(plan: dict) -> list[str]:
    """Return the reasons to doubt a plan."""
    law, found = plan["law"], []
    best = plan["laws"][law]
    if "same_loss" not in plan:
        found.append(
            f"law {law} is held here as an allocation alone; what other sizes cost for the same loss needs a "
            "law of loss"
        )
    if best["beyond"]:
        least, greatest = best["compute"]
        end = f"above the largest run, {short(greatest)},"
        if plan["compute"] < least:
            end = f"below the smallest run, {short(least)},"
        found.append(
            f"law {law} is extrapolated: {short(plan['compute'])} FLOPs are {best['beyond']:.1f} orders of "
            f"magnitude {end} that it was fitted to"
        )
    parts = {"the optimum": best, "your run": plan.get("run"), "to be served": plan.get("inference")}
    for name, part in parts.items():
        if part and part["tokens_per_parameter"] > MANY_TOKENS:
            found.append(f"{name}: {short(part['tokens_per_parameter'])} tokens per parameter; {TOO_HOPEFUL}")
    if "repeated" in plan:
        found += list_warnings_of_repeated_data(plan)
    return found


def list_warnings_of_repeated_data(plan: dict) -> list[str]:
    """Return the reasons to doubt the part of a plan with repeated data."""
    found = []
    far, epochs = plan["repeated"]["beyond"], plan["repeated"]["limited"]["epochs"]
    if far:
        found.append(
            f"the law of repeated data is extrapolated: {short(plan['compute'])} FLOPs are {far:.1f} orders "
            f"of magnitude above the largest run, {short(REPEATED.largest)}, that it was fitted to"
        )
    if epochs > MOST_EPOCHS:
        found.append(
            f"{short(epochs)} epochs: beyond {MOST_EPOCHS}, repeated tokens are worth next to nothing "
            "(Muennighoff et al. 2023), and the optimum is a plateau: much less compute reaches nearly the "
            "same loss; find more data"
        )
    return found


def make_plan(
    C: float,
    law_name: str = DEFAULT_LAW,
    *,
    run: tuple[float, float] | None = None,
    gpu: str = "h100",
    gpus: int = 8,
    mfu: float = DEFAULT_MFU,
    price: float | None = None,
    inference_tokens: float | None = None,
    unique_tokens: float | None = None,
    seed: int = 0,
) -> dict:
    """Return all that scaling/plan_report.py prints, as numbers for JSON; None where there is no such number.

    run: (N, D) of a run to compare with the optimum, with 6 N D = C. inference_tokens: tokens to be served in
    the model's life. unique_tokens: how many unique tokens there are to train on. seed: of the bootstrap.

    Raises ValueError for unknown names, for numbers out of range, and for inference_tokens with a law that is
    an allocation alone.
    """
    law = look_up(LAWS, law_name, "law").law
    look_up(DEVICES, gpu, "gpu")
    check_positive(gpus=gpus, price=price, inference_tokens=inference_tokens, unique_tokens=unique_tokens)
    check_mfu(mfu)
    if not 1 <= C <= MOST:
        raise ValueError(
            f"compute {C:g}: expected 1 to {MOST:g} FLOPs; beyond, float64 cannot tell losses apart"
        )
    if seed < 0:
        raise ValueError(f"seed {seed}: expected 0 or more")
    if inference_tokens and not isinstance(law, Law):
        laws = ", ".join(name for name, p in LAWS.items() if isinstance(p.law, Law))
        raise ValueError(
            f"law {law_name} is held here as an allocation alone; inference tokens need a law of loss: "
            f"choose one of {laws}"
        )

    # Each part of the plan has a key, which is left out where the law or the flags give no such part.
    plan = {"compute": C, "law": law_name, "laws": plan_laws(C, seed)}
    if isinstance(law, Law):
        plan["same_loss"] = plan_other_sizes(law, C)
    if run:
        plan["run"] = plan_own_run(law, run)
    if inference_tokens:
        plan["inference"] = plan_inference(law, C, inference_tokens)
    if unique_tokens:
        plan["repeated"] = plan_repeated_data(C, unique_tokens, run)
    plan["hardware"] = {"gpu": gpu, "gpus": gpus, "mfu": mfu, "pue": PUE, "co2_kg_per_kwh": CO2}
    plan["hardware"]["devices"] = {
        name: hardware_cost(C, device, gpus, mfu, price if price and name == gpu else device.price)
        for name, device in DEVICES.items()
    }
    planned = plan.get("run", plan["laws"][law_name])
    flops = plan_flops(planned["N"], planned["D"])
    if flops:
        plan["flops"] = flops
    plan["warnings"] = list_warnings(plan)
    return plan
