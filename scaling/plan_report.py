"""`python chinchilla.py plan`: plan a training run by scaling/plan.py, and print the plan.

The budget is given in one of these ways:

    python chinchilla.py plan 1e22
    python chinchilla.py plan --params 7b                    the budget for which 7b is optimal
    python chinchilla.py plan --params 7b --tokens 2t        a run that you have in mind
    python chinchilla.py plan --gpus 8 --gpu h100 --days 3

Further parts of the plan: `--inference-tokens 2t --unique-tokens 25b --json plan.json`.
"""

import json
import textwrap
from argparse import ArgumentParser, Namespace

from chinchilla import DEFAULT_LAW, LAWS, MANY_TOKENS
from formats import command
from formats.atomic import replace_file
from formats.quantities import quantity, short
from scaling.hardware import CO2, DEFAULT_MFU, DEVICES, PUE, check_mfu, hardware_cost
from scaling.plan import RESAMPLES, TOO_HOPEFUL, budget_for, check_positive, look_up, make_plan
from scaling.shapes import SEQ_LEN

WIDTH = 100  # characters of a line of prose
# Units, the largest first, in days, kWh and kg.
TIME = {"years": 365.25, "days": 1, "h": 1 / 24, "min": 1 / 1440, "s": 1 / 86400, "ms": 1 / 86400e3}
ENERGY = {"GWh": 1e6, "MWh": 1e3, "kWh": 1, "Wh": 1e-3}
MASS = {"t": 1e3, "kg": 1, "g": 1e-3}


def cell(x: float | None) -> str:
    """Return a number in three digits with its unit prefix, or "-" for None."""
    return "-" if x is None else short(x)


def size_cells(row: dict) -> tuple[str, str, str]:
    """Return the cells of N, D and D / N."""
    return cell(row["N"]), cell(row["D"]), cell(row["tokens_per_parameter"])


def loss_cell(row: dict) -> str:
    return "-" if row["loss"] is None else f"{row['loss']:.4f}"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:+z.1f} %"


def in_units(value: float, units: dict[str, float], least: int = 1) -> str:
    """Return the value in the largest unit of which it has at least `least`."""
    for unit, size in units.items():
        if value >= least * size:
            return f"{short(value / size)} {unit}"
    return f"< {least} {unit}"


def dollars(value: float | None) -> str:
    if value is None:
        return "-"
    if value < 0.01:
        return "< 1 cent"
    return f"${value:.2f}" if value < 100 else f"${short(value)}"


def table(rows: list[tuple[str, ...]], left: int = 1) -> list[str]:
    """Return the rows as lines of text, the first `left` columns flush left and the others flush right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            text.ljust(width) if i < left else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(("  " + "  ".join(cells)).rstrip())
    return lines


def paragraph(text: str, indent: str = "  ") -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent=indent)


def model_in_words(row: dict) -> str:
    N, D, ratio = size_cells(row)
    return f"{N} on {D} tokens, {ratio} per parameter"


def laws_section(plan: dict) -> list[str]:
    """Return a table of the optimum by every published law, its interval, and the sources."""
    rows = [("law", "", "N", "D", "D/N", "loss", "C beyond its data")]
    rows.append(("", "", "parameters", "tokens", "tokens/N", "nats/token", "orders of 10"))
    sources = []
    for name, row in plan["laws"].items():
        side = "above" if plan["compute"] > row["compute"][1] else "below"
        far = f"{row['beyond']:.1f} orders {side}" if row["beyond"] else "within"
        marked = f"{name} *" if name == plan["law"] else name
        rows.append((marked, row["title"], *size_cells(row), loss_cell(row), far))
        sources += paragraph(f"{name}: {row['source']}; {row['note']}", indent="    ")
    ends = plan["laws"]["besiroglu"]["interval"]
    ends_in_words = [
        f"{name} {cell(ends[key][0])} to {cell(ends[key][1])}"
        for name, key in (("N", "N"), ("D", "D"), ("D/N", "tokens_per_parameter"))
    ]
    ends_in_words.append(f"loss {ends['loss'][0]:.3f} to {ends['loss'][1]:.3f}")
    interval = (
        f"besiroglu, 95 % of {RESAMPLES} refits of resampled points: {', '.join(ends_in_words)}; the "
        "points are taken as independent, which narrows it"
    )
    counts = (
        "N counts the head and not the embedding table (kaplan: neither), C = 6 N D. Losses are nats per "
        "token of each paper's own text and tokenizer: compare them within a law, not between laws"
    )
    title = "How large, on how many tokens (* is the law used below; the rule of thumb is D/N = 20)"
    return [title, *table(rows, left=2), *paragraph(counts), *paragraph(interval, indent="    "), *sources]


def other_sizes_section(plan: dict) -> list[str]:
    """Return a table of smaller and larger models with the optimum's loss."""
    rows = [
        ("N", "of N*", "D", "D/N", "more compute"),
        ("parameters", "", "tokens", "tokens/param.", "than C"),
    ]
    for row in plan["same_loss"]:
        N, D, ratio = size_cells(row)
        rows.append((N, cell(row["size"]), "never" if D == "-" else D, ratio, percent(row["extra"])))
    lines = table(rows, left=0)
    if any((row["tokens_per_parameter"] or 0) > MANY_TOKENS for row in plan["same_loss"]):
        lines += paragraph(f"D/N above {MANY_TOKENS}: {TOO_HOPEFUL}")
    best = plan["laws"][plan["law"]]
    return [f"Other sizes with the same loss, {loss_cell(best)}, by {plan['law']}", *lines]


def inference_section(plan: dict) -> list[str]:
    """Return the model to be served: of the optimum's loss, and of the budget alone."""
    part, best = plan["inference"], plan["laws"][plan["law"]]
    within = part["within"]
    text = (
        f"{model_in_words(part)}: as good as {cell(best['N'])} on {cell(best['D'])}, loss {loss_cell(best)}, "
        f"for {100 * part['saving']:z.1f} % fewer FLOPs of training and serving (Sardana and Frankle 2024). "
        f"Its training takes {cell(part['training'])} FLOPs, {over_budget(plan)}."
    )
    fits = f"Within the budget: {model_in_words(within)}, loss {loss_cell(within)}."
    return [f"To serve {cell(part['served'])} tokens, by {plan['law']}", *paragraph(text), *paragraph(fits)]


def over_budget(plan: dict) -> str:
    over = plan["inference"]["training"] / plan["compute"] - 1
    return f"{100 * over:.0f} % more than the budget"


def repeated_section(plan: dict) -> list[str]:
    """Return the best run with few unique tokens, above the best run with enough of them."""
    rows = [("unique tokens", "N", "D", "epochs", "worth new tokens", "loss")]
    rows.append(("", "parameters", "tokens", "", "tokens", "nats/token"))
    unique = cell(plan["repeated"]["unique"])
    parts = {"limited": unique, "run": f"{unique}, your run", "unlimited": "enough"}
    for part, title in parts.items():
        if row := plan["repeated"].get(part):
            rows.append((title, *(cell(row[key]) for key in ("N", "D", "epochs", "worth")), loss_cell(row)))
    return ["Data seen again, by Muennighoff et al. 2023 (arXiv 2305.16264)", *table(rows)]


def hardware_section(plan: dict) -> list[str]:
    """Return a table of time, rent, energy and CO2 on every device."""
    hardware = plan["hardware"]
    rows = [("", "GPU-hours", f"on {hardware['gpus']}", "$/hour", "rent", "energy", "CO2")]
    for name, row in hardware["devices"].items():
        hours = cell(row["gpu_hours"]) if row["gpu_hours"] >= 0.01 else "< 0.01"
        price = "-" if row["price"] is None else f"{row['price']:.2f}"
        cells = (dollars(row["dollars"]), in_units(row["kwh"], ENERGY), in_units(row["co2_kg"], MASS))
        marked = f"{name} *" if name == hardware["gpu"] else name
        rows.append((marked, hours, in_units(row["days"], TIME, least=2), price, *cells))
    note = (
        f"PUE {PUE}, {CO2} kg CO2 per kWh, the average of the USA (LLaMA, arXiv 2302.13971, section 6). "
        "Prices on demand, May 2026 (B200: March; sources in scaling/hardware.py); they move: give your own "
        "with --price"
    )
    title = f"On hardware, at {100 * hardware['mfu']:g} % of its peak (MFU)"
    return [title, *table(rows), *paragraph(note)]


def flops_section(plan: dict) -> list[str]:
    """Return the exact FLOPs of a transformer beside 6 N D."""
    part = plan["flops"]
    shape = part["shape"]
    transformer = (
        f"{cell(part['N'])} on {cell(part['D'])} tokens: {shape['layers']} layers of {shape['d_model']:,}, "
        f"{shape['heads']} heads of {shape['kv_size']}, feed-forward {shape['ffw']:,}, vocabulary "
        f"{shape['vocab']:,}"
    )
    rows = [
        ("6 N D", cell(part["6ND"]), ""),
        ("layers and head", cell(part["exact"]), percent(part["exact"] / part["6ND"] - 1)),
    ]
    note = (
        "N counts a thirteenth of each layer's weights for relative positions, which cost no FLOPs in this "
        f"count; a model without them takes {percent(part['without_relative'])} over its own 6 N D "
        "(Hoffmann et al. 2022, appendix F)"
    )
    which = "your N" if "run" in plan else "N*"
    title = f"FLOPs of a transformer of about {which}, sequences of {SEQ_LEN:,}"
    return [title, *paragraph(transformer), *table(rows), *paragraph(note)]


def run_in_words(plan: dict) -> str:
    """Return the run that was given, compared with the optimum of its compute."""
    run, best = plan["run"], plan["laws"][plan["law"]]
    if "loss" not in run:
        return model_in_words(run)
    saved = 1 - run["optimal_compute"] / plan["compute"]
    return (
        f"{model_in_words(run)}: loss {loss_cell(run)}; at best {loss_cell(best)} for as much "
        f"compute, or the same loss for {cell(run['optimal_compute'])} FLOPs, {100 * saved:z.1f} % fewer"
    )


def spent_in_words(plan: dict, C: float) -> str:
    """Return how long C FLOPs take on the chosen GPUs, and their rent."""
    hardware = plan["hardware"]
    chosen = hardware["devices"][hardware["gpu"]]
    device = DEVICES[hardware["gpu"]]
    row = hardware_cost(C, device, hardware["gpus"], hardware["mfu"], chosen["price"])
    price = "" if row["dollars"] is None else f" and {dollars(row['dollars'])}"
    return f"{in_units(row['days'], TIME, least=2)} on {hardware['gpus']} {hardware['gpu']}{price}"


def in_short(plan: dict) -> str:
    """Return the answer to the question that the flags pose, in a few sentences."""
    sentences = []
    if "run" in plan:
        spent = spent_in_words(plan, plan["compute"])
        sentences.append(f"{model_in_words(plan['run'])}, take {cell(plan['compute'])} FLOPs: {spent}.")
    if "inference" in plan:
        sentences.append(serving_in_short(plan))
    if "repeated" in plan:
        sentences.append(repeated_in_short(plan))
    if "inference" in plan and "repeated" in plan:
        sentences.append("The two answers are separate: no law here joins serving and repeated data.")
    return "In short: " + " ".join(sentences or [optimum_in_short(plan)])


def extrapolated(orders: float) -> str:
    return f" (extrapolated by {orders:.1f} orders of magnitude)" if orders else ""


def optimum_in_short(plan: dict) -> str:
    """Return the best model of the budget, and what half its size would cost."""
    best = plan["laws"][plan["law"]]
    text = (
        f"by {plan['law']}{extrapolated(best['beyond'])}, {cell(plan['compute'])} FLOPs are best spent on "
        f"{cell(best['N'])} parameters and {cell(best['D'])} tokens: {spent_in_words(plan, plan['compute'])}."
    )
    for other in plan.get("same_loss", ()):
        if other["size"] == 0.5 and other["extra"] is not None:
            text += (
                f" Half that size can be as good for {100 * other['extra']:.0f} % more compute, and then "
                "costs half as much to run."
            )
    return text


def serving_in_short(plan: dict) -> str:
    """Return the model to be served, what it takes beside the budget, and what fits in the budget."""
    part, best = plan["inference"], plan["laws"][plan["law"]]
    text = (
        f"to serve {cell(part['served'])} tokens, by {plan['law']}{extrapolated(best['beyond'])}, "
        f"{model_in_words(part)}, are as good as {cell(best['N'])} on {cell(best['D'])}, and "
        f"{100 * part['saving']:z.1f} % cheaper to train and serve."
    )
    spent = spent_in_words(plan, part["training"])
    if part["training"] / plan["compute"] < 1.005:
        return f"{text} Their training takes the budget: {spent}."
    within = part["within"]
    return (
        f"{text} Their training takes {cell(part['training'])} FLOPs, {over_budget(plan)} of "
        f"{cell(plan['compute'])}: {spent}. The budget is enough for {model_in_words(within)}, at a loss of "
        f"{loss_cell(within)} instead of {loss_cell(best)}: {spent_in_words(plan, plan['compute'])}."
    )


def repeated_in_short(plan: dict) -> str:
    """Return the best run on the unique tokens that there are, beside the best with enough of them."""
    part = plan["repeated"]
    limited, unlimited, unique = part["limited"], part["unlimited"], cell(part["unique"])
    run, text, spent = part.get("run"), "", f": {spent_in_words(plan, plan['compute'])}"
    if run:
        spent = ""
        if run["epochs"] > 1:
            text = f"Your run sees {unique} unique tokens {cell(run['epochs'])} times, which are worth "
            text += f"{cell(run['worth'])} new tokens. "
    if limited["epochs"] <= 1:
        enough = f"{unique} unique tokens are enough for the best model of {cell(plan['compute'])} FLOPs"
        return f"{text}{enough}, {model_in_words(limited)}, without a second epoch{spent}."
    return (
        f"{text}With {unique} unique tokens, by Muennighoff et al. 2023{extrapolated(part['beyond'])}, "
        f"{cell(plan['compute'])} FLOPs are best spent on {model_in_words(limited)}, in "
        f"{cell(limited['epochs'])} epochs{spent}. The loss is {loss_cell(limited)}; with enough tokens it "
        f"is {loss_cell(unlimited)} ({model_in_words(unlimited)})."
    )


def format_plan(plan: dict) -> str:
    """Return the plan as text, a section for each of its parts."""
    sections = [[f"{cell(plan['compute'])} FLOPs"], laws_section(plan)]
    if "run" in plan:
        sections.append([f"Your run, by {plan['law']}", *paragraph(run_in_words(plan))])
    if "same_loss" in plan:
        sections.append(other_sizes_section(plan))
    if "inference" in plan:
        sections.append(inference_section(plan))
    if "repeated" in plan:
        sections.append(repeated_section(plan))
    sections.append(hardware_section(plan))
    if "flops" in plan:
        sections.append(flops_section(plan))
    sections.append(paragraph(in_short(plan)))
    sections += [paragraph(f"warning: {warning}") for warning in plan["warnings"]]
    return "\n\n".join("\n".join(section) for section in sections)


def read_budget(args: Namespace) -> tuple[float, tuple[float, float] | None]:
    """Return C, and (N, D) or None: the run, if both were given.

    Raises ValueError unless the budget was given in exactly one way."""
    check_positive(params=args.params, tokens=args.tokens, gpus=args.gpus, days=args.days)
    ways = {
        "a number of FLOPs": args.compute,
        "--params or --tokens": args.params or args.tokens,
        "--gpus and --days": args.days,
    }
    given = [way for way, value in ways.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)}: each is a budget of its own; give one of them")
    if not given:
        more = " (--gpus alone is none)" if args.gpus else ""
        raise ValueError(
            f"no budget{more}: give FLOPs (1e22), --params 7b, --tokens 1t, or --gpus 8 --days 3"
        )
    if args.compute is not None:
        return args.compute, None
    if args.days is not None:
        if args.gpus is None:
            raise ValueError(f"--days {args.days:g}: of how many GPUs? give --gpus too")
        check_mfu(args.mfu)
        return look_up(DEVICES, args.gpu, "gpu").peak * args.mfu * args.gpus * args.days * 86400, None
    if args.params is not None and args.tokens is not None:
        return 6 * args.params * args.tokens, (args.params, args.tokens)
    return float(budget_for(look_up(LAWS, args.law, "law").law, args.params, args.tokens)), None


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("compute", nargs="?", type=quantity, help="FLOPs: 1e22")
    add("--params", type=quantity, help="N: 7b; the budget that it is optimal for, or with --tokens 6 N D")
    add("--tokens", type=quantity, help="D: 1t; the budget that it is optimal for, or with --params 6 N D")
    add("--days", type=float, help="the budget: what --gpus can compute in so many days")
    add("--gpus", type=int, help="number of GPUs (default 8)")
    add("--gpu", type=str.lower, default="h100", help=f"kind of GPU: {', '.join(DEVICES)} (default h100)")
    add(
        "--mfu",
        type=float,
        default=DEFAULT_MFU,
        help="share of the peak FLOP/s reached (default 0.4)",
    )
    add("--price", type=float, help="dollars per hour of one --gpu")
    add("--law", type=str.lower, default=DEFAULT_LAW, help=f"{', '.join(LAWS)} (default {DEFAULT_LAW})")
    add("--inference-tokens", type=quantity, help="tokens to be served in the model's life: 2t")
    add("--unique-tokens", type=quantity, help="unique tokens to train on: 25b (default: enough)")
    add("--seed", type=int, default=0, help="seed of the bootstrap (default 0)")
    add("--json", type=command.path, metavar="FILE", help="write all numbers to this file too")


def main(args: Namespace) -> int:
    """Make the plan, write and print it; return the exit code."""
    if args.json and (args.json.is_dir() or not args.json.parent.is_dir()):
        raise ValueError(f"--json {args.json}: expected a file name in a directory that exists")
    C, run = read_budget(args)
    plan = make_plan(
        C, args.law, run=run, gpu=args.gpu, gpus=args.gpus or 8, mfu=args.mfu, price=args.price,
        inference_tokens=args.inference_tokens, unique_tokens=args.unique_tokens, seed=args.seed,
    )  # fmt: skip
    if args.json:
        with replace_file(args.json) as new:
            new.write_text(json.dumps(plan, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    print(format_plan(plan))
    return 0
