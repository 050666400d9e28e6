"""Planning a training run: how large, on how many tokens, on what, for how much, and what if.

    compute-optimal     least L(N, D) with 6 N D = C                                     Hoffmann et al. 2022
    the same loss       D such that L(N, D) = L(N*, D*), for any other N                        de Vries 2023
    to be served        least 6 N D + 2 N D_served with L(N, D) = L(N*, D*)         Sardana and Frankle 2024
    out of data         least E + A / N'^alpha + B / D'^beta with 6 N D = C          Muennighoff et al. 2023
                        D' = U + U R (1 - exp(-(D/U - 1) / R)),  U unique tokens seen D/U times,  R = 15.4
    on hardware         GPU-hours = C / (peak FLOP/s x MFU x 3600),  kWh = GPU-hours x kW x PUE

L and the laws are chinchilla.py's. Six FLOPs for each parameter and token are two for the forward pass, four
for the backward one, and none for attention; `training_flops` counts as appendix F of Hoffmann et al. does.

This is the arithmetic; scaling/plan_report.py is the command, `python chinchilla.py plan 1e22`, and prints it.

Units: N parameters, D tokens, C FLOPs, losses nats per token, power in watts, prices US dollars.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np

from chinchilla import DEFAULT_LAW, LAWS, MANY_TOKENS, Law, PowerLaw, beyond, fit, interval, points, short

RESAMPLES = 400
SEQ_LEN = 2048
SIZES = (0.125, 0.25, 0.5, 0.75, 1, 1.5, 2, 4)  # of the compute-optimal one, at the same loss
TOO_HOPEFUL = "laws fitted near 20 overstate what tokens so far beyond are worth (Sardana and Frankle 2024)"
MOST_EPOCHS = 40  # after which repeated tokens are worth next to nothing (Muennighoff et al. 2023)
LEAST, MOST = 1e-9, 1e50  # of any number given: what is worked out of these stays in float64's range


def minimum(f, low: float, high: float) -> float:
    """Where f, which takes an array and has one valley, is least between low and high, both positive.

    A flat bottom leaves about half of float64's digits: 8.
    """
    for _ in range(14):
        x = np.geomspace(low, high, 33)
        i = int(np.argmin(f(x)))
        low, high = x[max(i - 1, 0)], x[min(i + 1, 32)]
    return float(math.sqrt(low * high))


def budget_for(law: Law | PowerLaw, params: float | None = None, tokens: float | None = None):
    """C for which that many parameters, or else tokens, are optimal: N* and D* are powers of C."""
    N1, D1 = law.optimal(1.0)
    if params is not None:
        return np.power(params / N1, 1 / law.a)
    return np.power(tokens / D1, 1 / (1 - law.a))


def compute_for(law: Law, loss):
    """C of the optimal run that reaches this loss: L* - E is a power of C. The loss must be above E."""
    reducible = law.loss(*law.optimal(1.0)) - law.E
    return np.power((loss - law.E) / reducible, -(law.alpha + law.beta) / (law.alpha * law.beta))


@cache
def refits(seed: int) -> Law:
    """RESAMPLES laws, as one of arrays: fits of resampled points of Hoffmann et al., which are what Besiroglu
    et al. fitted. Here delta is 1e-3; their own point is the limit as delta goes to 0."""
    return Law(*fit(*points()).bootstrap(RESAMPLES, seed).T)


def bootstrap_interval(C: float, seed: int = 0) -> dict[str, list[float]]:
    """95 % intervals of N*, D*, D*/N* and the loss there, by the resampled laws."""
    law = refits(seed)
    N, D = law.optimal(C)
    values = {"N": N, "D": D, "tokens_per_parameter": D / N, "loss": law.loss(N, D)}
    return {name: list(interval(v)) for name, v in values.items()}


def same_loss(law: Law, C: float, size: float) -> tuple[float, float, float]:
    """(N, D, extra): the model of `size` times N* which reaches the loss of the optimum at C, and the share
    of C that it takes more; inf where no number of tokens is enough.

    Half of N* costs 21 % more by the coefficients of de Vries 2023 ("Go smol or go home"), 26 % by those of
    Besiroglu et al.
    """
    N0, D0 = law.optimal(C)
    N = size * N0
    D = law.tokens_for(N, law.loss(N0, D0))
    return float(N), float(D), float(6 * N * D / C - 1)


def inference_optimal(law: Law, C: float, served: float) -> tuple[float, float, float]:
    """(N, D, saving): of all models as good as the optimal one of C, the cheapest to train and then to run on
    `served` tokens, read and written; and the share of all those FLOPs that it saves.

    Sardana and Frankle 2024, arXiv 2401.00448. A FLOP of serving counts like one of training, though serving
    runs at a lower MFU, which favours small models still more.
    """
    N0, D0 = law.optimal(C)
    loss = law.loss(N0, D0)

    def total(N):
        return N * (6 * law.tokens_for(N, loss) + 2 * served)

    smallest = (law.A / (loss - law.E)) ** (1 / law.alpha)  # would need infinitely many tokens
    N = minimum(total, smallest, N0)
    return N, float(law.tokens_for(N, loss)), float(1 - total(N) / total(N0))


def effective(total, unique, R: float):
    """Tokens that repeated ones are worth: all is as good as new at first, and 1 + R times `unique` at most
    (Muennighoff et al. 2023, section 3). Parameters beyond what the data need are discounted likewise."""
    return unique * (1 + R * (1 - np.exp(-(total / unique - 1) / R)))


@dataclass(frozen=True)
class RepeatedData:
    """A law for tokens that are seen more than once (Muennighoff et al. 2023, arXiv 2305.16264)."""

    law: Law
    R_D: float
    R_N: float
    largest: float  # FLOPs of the largest run it was fitted to

    def loss(self, N, D, unique):
        """Of N parameters after D tokens, of which `unique` are different."""
        # With more unique tokens than are ever seen, the rest must not count: the optimum would run away to
        # huge models on almost no tokens.
        unique = np.minimum(unique, D)
        N_unique = np.minimum(N, self.law.optimal(budget_for(self.law, tokens=unique))[0])
        return self.law.loss(effective(N, N_unique, self.R_N), effective(D, unique, self.R_D))

    def optimal(self, C: float, unique: float) -> tuple[float, float]:
        """(N, D) of least loss with 6 N D = C."""
        N0 = float(self.law.optimal(C)[0])
        N = minimum(lambda N: self.loss(N, C / (6 * N), unique), N0 / 1000, 10 * N0)
        return N, C / (6 * N)


# Constants of their fit with alpha = beta, from the code published with the paper.
REPEATED = RepeatedData(
    Law(
        E=math.exp(0.6254804),
        A=math.exp(6.255414),
        B=math.exp(7.3049974),
        alpha=0.3526596,
        beta=0.3526596,
    ),
    R_D=15.387756,
    R_N=5.309743,
    largest=6 * 8.67e9 * 178e9,
)


@dataclass(frozen=True)
class Shape:
    """A transformer of Hoffmann et al. 2022, tables A4 and A9."""

    d_model: int
    ffw: int
    kv_size: int
    heads: int
    layers: int
    vocab: int = 32000


def parameters(shape: Shape, relative: bool = True) -> int:
    """Weights, biases and norms, with the head and without the embedding; relative: also those of relative
    positions, a thirteenth of a layer. That is the count that agrees with all 50 rows of table A9. Heads
    times kv_size need not be d_model: in six rows it is not."""
    d, f, q = shape.d_model, shape.ffw, shape.kv_size * shape.heads
    attention = 3 * (d * q + q) + (q * d + d)  # q, k, v; output
    if relative:
        attention += d * q + 2 * q  # keys, 2 biases
    feedforward = (d * f + f) + (f * d + d)
    return shape.layers * (attention + feedforward + 4 * d) + 2 * d + d * shape.vocab


def training_flops(shape: Shape, seq_len: int = SEQ_LEN, vocab_products: int = 1) -> int:
    """FLOPs of forward and backward pass over one sequence of seq_len tokens, by appendix F of Hoffmann et
    al. 2022. The backward pass is twice the forward one.

    vocab_products: how many products with the vocabulary are counted. 1 is the head; an embedding is looked
    up, at no cost. The appendix prints terms for both, 2. Its table A4, which compares with 6 N D, comes out
    with 0 alone.
    """
    S, d, q = seq_len, shape.d_model, shape.kv_size * shape.heads
    projections = 6 * S * d * q + 2 * S * q * d
    attention = 2 * S * S * q + 3 * shape.heads * S * S + 2 * S * S * q
    forward = shape.layers * (projections + attention + 4 * S * d * shape.ffw)
    return 3 * (forward + vocab_products * 2 * S * shape.vocab * d)


def shape_for(N: float) -> Shape | None:
    """The shape nearest N of those like table A9's: feed-forward 4 d_model wide, heads of 128 or, up to
    d_model 1024, 64; and 64 to 128 of d_model for each layer. None if the nearest is more than 10 % away, as
    below some 8 million parameters, where the head is nearly all there is."""
    shapes = []
    widths = ((64, 1024, 64), (1024, 2048, 128), (2048, 8192, 256), (8192, 65537, 1024))
    for d in (d for step in widths for d in range(*step)):
        kv = 64 if d <= 1024 else 128
        one, two = (parameters(Shape(d, 4 * d, kv, d // kv, layers)) for layers in (1, 2))
        layers = round(1 + (N - one) / (two - one))
        shapes.append(Shape(d, 4 * d, kv, d // kv, min(max(layers, math.ceil(d / 128)), d // 64)))
    best = min(shapes, key=lambda shape: abs(math.log(parameters(shape) / N)))
    return best if abs(parameters(best) / N - 1) <= 0.1 else None


@dataclass(frozen=True)
class Device:
    name: str
    peak: float  # FLOP/s of dense bf16 matrix products, float32 accumulation
    watts: float  # thermal design power, the board's limit
    price: float | None = None  # dollars an hour


# Peaks and watts from each maker's data sheet. Prices: on demand, May 2026, the middle of the range that
# mercatus-ai.com/blog/cloud-gpu-pricing gives for specialised clouds (A100 1.10-1.50, H100 2.50-3.50, H200
# 3.50-4.50 dollars; over all clouds 0.80-3.00, 1.99-5.00, 2.50-7.00); B200: Spheron, 17 March 2026. No price
# was found for the others, and none is guessed.
DEVICES = {
    "v100": Device("NVIDIA V100 SXM2", 125e12, 300),  # fp16: it has no bf16
    "a100": Device("NVIDIA A100 SXM 80GB", 312e12, 400, 1.30),
    "l40s": Device("NVIDIA L40S", 362e12, 350),
    "rtx4090": Device("NVIDIA RTX 4090", 165.2e12, 450),  # Ada whitepaper, appendix A
    "h100": Device("NVIDIA H100 SXM", 989e12, 700, 3.00),
    "h200": Device("NVIDIA H200 SXM", 989e12, 700, 4.00),
    "b200": Device("NVIDIA B200", 2250e12, 1000, 6.03),
    "mi300x": Device("AMD Instinct MI300X", 1307e12, 750),
}
DEFAULT_MFU = 0.4  # the GPU-hours of Llama 2 (Touvron et al. 2023, table 2) imply 0.38 to 0.43
# Touvron et al. 2023 (LLaMA, arXiv 2302.13971), section 6; the model card of Llama 2 counts so too.
PUE = 1.1  # power of the whole data centre over that of its computers
CO2 = 0.385  # kg per kWh, the average of the USA


def gpu_hours(C: float, device: Device, mfu: float = DEFAULT_MFU) -> float:
    """mfu: the share of peak FLOP/s that goes into 6 N D; that of Chowdhery et al. 2022, appendix B, counts
    attention too."""
    return C / (device.peak * mfu * 3600)


def energy(hours: float, watts: float, pue: float = PUE) -> float:
    """kWh of so many GPU-hours at full power, without the hosts' CPUs and network."""
    return hours * watts / 1000 * pue


def cost(C: float, device: Device, gpus: int, mfu: float, price: float | None) -> dict:
    hours = gpu_hours(C, device, mfu)
    kwh = energy(hours, device.watts)
    return {
        "name": device.name,
        "gpu_hours": hours,
        "days": hours / gpus / 24,
        "price": price,
        "dollars": None if price is None else price * hours,
        "kwh": kwh,
        "co2_kg": kwh * CO2,
    }


def known(table: dict, name: str, what: str):
    if name not in table:
        raise ValueError(f"{what} {name}: unknown; there are {', '.join(table)}")
    return table[name]


def positive(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not LEAST <= value <= MOST:
            told = f"{name.replace('_', ' ')} {min(value, 1e308):g}"  # an int may be larger than any float
            raise ValueError(f"{told}: expected a number above 0, from {LEAST:g} to {MOST:g}")


def share_of_peak(mfu: float) -> None:
    if not 1e-4 <= mfu <= 1:
        raise ValueError(f"mfu {mfu:g}: expected a share of the peak, from 0.0001 to 1, such as 0.4")


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
    """All that scaling/plan_report.py prints, as numbers that JSON can hold; None where there is no such number.

    run: (N, D) to be judged, with 6 N D = C. inference_tokens: to be served over the model's life.
    unique_tokens: how many different ones there are to train on. Raises ValueError for what is unknown or out
    of range, and for inference_tokens with what is no Law.
    """
    published = known(LAWS, law_name, "law")
    known(DEVICES, gpu, "gpu")
    positive(gpus=gpus, price=price, inference_tokens=inference_tokens, unique_tokens=unique_tokens)
    share_of_peak(mfu)
    if not 1 <= C <= MOST:
        raise ValueError(
            f"compute {C:g}: expected 1 to {MOST:g} FLOPs: beyond, losses are no longer told apart"
        )
    if seed < 0:
        raise ValueError(f"seed {seed}: expected 0 or more")
    is_law = isinstance(published.law, Law)
    if inference_tokens and not is_law:
        laws = ", ".join(name for name, p in LAWS.items() if isinstance(p.law, Law))
        raise ValueError(
            f"law {law_name} is held here as an allocation alone; inference tokens need a law of loss: "
            f"choose one of {laws}"
        )

    plan = {"compute": C, "law": law_name, "laws": {}}
    for name, p in LAWS.items():
        N, D = (float(x) for x in p.law.optimal(C))
        loss = float(p.law.loss(N, D)) if hasattr(p.law, "loss") else None
        row = allocation(N, D) | {"loss": loss, "compute": p.compute, "beyond": beyond(C, p.compute)}
        plan["laws"][name] = row | {"title": p.title, "source": p.source, "note": p.note}
    best = plan["laws"][law_name]
    plan["laws"]["besiroglu"]["interval"] = bootstrap_interval(C, seed)

    if is_law:
        plan["same_loss"] = []
        for size in SIZES:
            N, D, extra = same_loss(published.law, C, size)
            reached = math.isfinite(D)
            row = allocation(N, D if reached else None)
            plan["same_loss"].append({"size": size, **row, "extra": extra if reached else None})
    if run:
        plan["run"] = allocation(*run)
        if is_law:
            loss = float(published.law.loss(*run))
            plan["run"] |= {"loss": loss, "optimal_compute": float(compute_for(published.law, loss))}
    if inference_tokens:
        N, D, saving = inference_optimal(published.law, C, inference_tokens)
        plan["inference"] = allocation(N, D) | {"served": inference_tokens, "saving": saving}
    if unique_tokens:
        N, D = REPEATED.optimal(C, unique_tokens)
        worth = float(effective(D, min(unique_tokens, D), REPEATED.R_D))
        loss = float(REPEATED.loss(N, D, unique_tokens))
        limited = allocation(N, D) | {"epochs": D / unique_tokens, "worth": worth, "loss": loss}
        N, D = (float(x) for x in REPEATED.law.optimal(C))
        unlimited = allocation(N, D) | {"epochs": 1.0, "worth": D, "loss": float(REPEATED.law.loss(N, D))}
        plan["repeated"] = {
            "unique": unique_tokens,
            "limited": limited,
            "unlimited": unlimited,
            "beyond": beyond(C, (1.0, REPEATED.largest)),  # no budget is less than 1
        }

    plan["hardware"] = {"gpu": gpu, "gpus": gpus, "mfu": mfu, "pue": PUE, "co2_kg_per_kwh": CO2}
    plan["hardware"]["devices"] = {
        name: cost(C, device, gpus, mfu, price if price and name == gpu else device.price)
        for name, device in DEVICES.items()
    }
    planned = plan.get("run", best)
    shape = shape_for(planned["N"])
    if shape:
        D, exact = planned["D"], training_flops(shape) / SEQ_LEN
        plan["flops"] = {
            "shape": vars(shape),
            "N": parameters(shape),
            "D": D,
            "6ND": 6 * parameters(shape) * D,
            "exact": exact * D,
            "without_relative": exact / (6 * parameters(shape, relative=False)) - 1,
        }
    plan["warnings"] = warnings(plan)
    return plan


def allocation(N: float, D: float | None) -> dict:
    return {"N": N, "D": D, "tokens_per_parameter": None if D is None else D / N}


def warnings(plan: dict) -> list[str]:
    """What of a plan not to believe."""
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
    for what, part in parts.items():
        if part and part["tokens_per_parameter"] > MANY_TOKENS:
            found.append(f"{what}: {short(part['tokens_per_parameter'])} tokens per parameter; {TOO_HOPEFUL}")
    if "repeated" not in plan:
        return found
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
