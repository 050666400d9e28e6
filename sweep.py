"""A scaling law from your own runs: train small GPTs of several widths, fit the law, predict a larger one.

One run of each size gives a whole curve of loss over tokens, if the learning rate is constant: where a
schedule would have decayed it, the *mean of the last weights* stands in (Hägele et al. 2024). At

    D_i = D_max / 2^(i/2) tokens       the mean of the weights over [0.8 D_i, D_i] is evaluated

so every budget has its slice of equal compute for the price of one run a size. The windows do not overlap,
since 0.8 > 1/sqrt(2): at each D_i there is nothing to remember of the mean, and a run goes on from there.

Sizes differ in width alone. All read the same text in the same order and are asked about the same held-out
rows, so that what is luck in one is luck in all. Compute is counted exactly, with attention and the head, and
a model counts for as many parameters as its FLOPs are worth, N = FLOPs per token / 6: with few parameters,
and a head that is most of them, any other count bends the law (Porian et al. 2024; Pearce and Song 2024).

From all these points the law foretells the loss of a model wider than any of them after `BEYOND` times the
compute of any of them; that is written down, and then the model is trained.

    python chinchilla.py sweep --minutes 20

In --out, sweep.json has the design and the findings, points.csv the points (for `chinchilla.py fit`),
sweep.png the curves, emergence.png how a smooth gain can look like a sudden ability (Schaeffer et al. 2023).
Stopped at any moment, the same command goes on where it was.
"""

import argparse
import csv
import json
import math
import multiprocessing
import shlex
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

import checkpoint
import data
import train
from chinchilla import Fit, Law, fit, interval, quantity, short
from isoflop import envelope, isoflop

BEYOND = 3  # FLOPs of the predicted run over those of the largest that the law is fitted to
MIN_SIZES = 4  # that a law can be fitted to
HELD_OUT = 1 << 16  # tokens that every model is asked about
WINDOW = 0.2  # weights of this last share of the tokens are averaged
LR_EXPONENT = 0.75  # how the best learning rate falls with width; by trial at widths 16, 48 and 128
RESAMPLES = 4000  # of the points, for intervals
SPANS = (1, 2, 4, 8, 12, 16)  # tokens in a row that are all to be right


@dataclass(frozen=True)
class Design:
    """A family of models; the widest is the one that is predicted."""

    widths: tuple[int, ...]
    n_layers: int
    d_head: int
    seq_len: int
    batch_size: int  # sequences
    first_point: int  # updates: before them the loss tells of the warm-up, not of the size
    lr: float  # constant, at width 32


DESIGNS = {
    "cpu": Design((16, 32, 48, 64, 80, 96, 112, 128, 192), 3, 16, 128, 8, 1000, 0.0043),
    "cuda": Design((64, 128, 192, 256, 384, 512, 768, 1024), 6, 64, 512, 32, 1000, 0.0043),
}


def train_flags(design: Design, width: int, args: argparse.Namespace) -> list[str]:
    """What train.py is told of one run, all but its length."""
    heads = width // design.d_head
    fields = dict(d_model=width, n_layers=design.n_layers, d_head=design.d_head, n_heads=heads)
    # Two thirds of the usual 4: with its three matrices SwiGLU has as many weights as a plain MLP.
    fields |= dict(n_kv_heads=heads, d_ff=8 * round(width / 3))
    flags = {
        "model": "gpt",
        "data": args.data,
        "tokenizer": args.tokenizer,
        "cache": args.cache,
        "device": args.device,
        "seq-len": design.seq_len,
        "batch-size": design.batch_size,
        "lr": args.lr_factor * design.lr * (32 / width) ** LR_EXPONENT,
        "schedule": "constant",
        "warmup": design.first_point // 10,
        "weight-decay": 0,
        "seed": args.seed,
        "out": args.out / f"width{width}",
    }
    said = [text for flag, value in flags.items() for text in (f"--{flag}", str(value))]
    return [*said, "--set", *(f"{field}={value}" for field, value in fields.items())]


def points_of(steps: float, first: int) -> list[int]:
    """Updates after which a run of so many is evaluated: the last, and each time by sqrt(2) fewer."""
    points = []
    while steps >= first:
        points.append(round(steps))
        steps /= math.sqrt(2)
    return points[::-1]


def begin_worker(n_threads: int, shared) -> None:
    global flops_done
    flops_done = shared
    torch.set_num_threads(n_threads)
    train.keep_freed_memory()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the first process says what there is to say


def measure_speed(flags: list[str]) -> dict:
    """Seconds of an update and of an evaluation, by trying, and what an update costs."""
    run = train.prepare(train.parse_arguments(flags))
    rows = held_out_rows(run)
    for _ in range(5):
        train.update(run)
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        for _ in range(10):
            train.update(run)
        seconds.append((time.perf_counter() - began) / 10)
    began = time.perf_counter()
    evaluate(run, run.model, rows)
    config = run.model.config
    return {
        "seconds": min(seconds),
        "evaluation": time.perf_counter() - began,
        "flops_per_token": run.model.flops_per_token(run.args.seq_len),
        "n_params": config.n_params,
        "n_without_head": config.n_params - config.vocab_size * config.d_model,
    }


def held_out_rows(run: train.Run) -> Tensor:
    """Rows (n, T + 1) from all over the held-out text, the same for every run."""
    tokens, T = run.dataset.val.tokens, run.args.seq_len
    n = max(1, min(HELD_OUT, len(tokens) - 1) // T)
    starts = np.linspace(0, len(tokens) - 1 - T, n).astype(int)
    return torch.from_numpy(np.stack([tokens[i : i + T + 1] for i in starts]).astype(np.int64))


@torch.no_grad()
def evaluate(run: train.Run, model: nn.Module, rows: Tensor) -> dict[str, float]:
    """Mean loss of the rows, and how often the likeliest token is right k times in a row: as often as a
    greedy continuation of k tokens is the text, since up to its first error it has read the text. Spans with
    a token that repeats the one before it do not count, or runs of blanks would be most of what is right."""
    losses, right, repeats = [], [], []
    for part in rows.split(4 * run.args.batch_size):
        tokens, targets = part[:, :-1].to(run.args.device), part[:, 1:].to(run.args.device)
        with train.autocast(run.args):
            logits = model(tokens).float()  # (B, T, V)
        losses.append(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none"))
        right.append(logits.argmax(dim=-1) == targets)
        repeats.append(targets == tokens)
    right, repeats = torch.cat(right), torch.cat(repeats)  # (n, T)
    found = {"val_loss": torch.cat(losses).double().mean().item(), "accuracy": right.double().mean().item()}
    for k in SPANS:
        counted = ~repeats.unfold(1, k, 1).any(dim=-1)  # (n, T - k + 1)
        n_right = (right.unfold(1, k, 1).all(dim=-1) & counted).sum()
        found[f"exact_{k}"] = n_right.item() / max(1, counted.sum().item())
    return found


def train_one(flags: list[str], points: list[int]) -> None:
    """Train one size, or go on with it, and write a row to its metrics.jsonl for each of the points."""
    args = train.parse_arguments([*flags, "--steps", str(points[-1])])
    args.resume = (args.out / "checkpoint").is_dir()
    run = train.prepare(args)
    rows = held_out_rows(run)
    flops = args.batch_size * args.seq_len * run.model.flops_per_token(args.seq_len)
    add_flops(run.step * flops)
    for point in (point for point in points if point > run.step):
        average, n_skipped = None, 0
        while run.step < point:
            loss, norm, *_ = train.update(run)
            n_skipped = 0 if torch.isfinite(loss + norm) else n_skipped + 1
            if n_skipped == train.MAX_SKIPPED:
                raise ValueError(f"{args.out}: no finite gradient at step {run.step}; lower --lr-factor")
            if run.step > (1 - WINDOW) * point:
                average = average or AveragedModel(run.model)
                average.update_parameters(run.model)
            add_flops(flops)
        row = {"step": point, "tokens": point * args.batch_size * args.seq_len}
        row |= evaluate(run, average.module.eval(), rows)
        train.append(args.out / "metrics.jsonl", json.dumps(row) + "\n")
        train.save(run)


def add_flops(n: float) -> None:
    with flops_done.get_lock():
        flops_done.value += n


def makespan(seconds: list[float], n_workers: int) -> float:
    """Until the last of n_workers is done that take the longest task first."""
    busy = [0.0] * n_workers
    for task in sorted(seconds, reverse=True):
        busy[busy.index(min(busy))] += task
    return max(busy)


def plan_runs(design: Design, speeds: list[dict], most_tokens: int, budget: float) -> list[dict]:
    """How long each width is trained if none may cost more than `budget` FLOPs, the widest BEYOND times as
    much; a width that this leaves with fewer than three points is left out."""
    runs = []
    for width, speed in zip(design.widths, speeds, strict=True):
        widest = width == design.widths[-1]
        tokens = min(most_tokens, (BEYOND if widest else 1) * budget / speed["flops_per_token"])
        points = points_of(tokens / (design.batch_size * design.seq_len), design.first_point)
        if len(points) >= 3:
            runs.append({"width": width, "points": points, **speed})
    return runs


def minutes(runs: list[dict], n_workers: int) -> float:
    """How long the runs take, by the speeds that were measured."""
    seconds = [run["points"][-1] * run["seconds"] + len(run["points"]) * run["evaluation"] for run in runs]
    # The widest comes last and alone, and several threads are not quite as good as several runs.
    return (makespan(seconds[:-1], n_workers) + seconds[-1] / max(1, 0.8 * n_workers)) / 60


@contextmanager
def workers(n: int):
    """A pool of n processes that share the cores, and the FLOPs that they have done. None of them is left
    behind if something goes wrong."""
    context = multiprocessing.get_context("spawn")
    shared = context.Value("d", 0.0)
    n_threads = max(1, torch.get_num_threads() // n)
    pool = ProcessPoolExecutor(n, context, begin_worker, (n_threads, shared))
    try:
        yield pool, shared
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    pool.shutdown()


def make_runs(runs: list[dict], design: Design, args: argparse.Namespace, n_workers: int) -> None:
    """Train every size to its last point, the dearest first, and show how far they are."""
    cost = {run["width"]: run["flops_per_token"] * run["points"][-1] for run in runs}
    tokens_per_update = design.batch_size * design.seq_len
    with workers(n_workers) as (pool, shared):
        waiting = {
            pool.submit(train_one, train_flags(design, run["width"], args), run["points"])
            for run in sorted(runs, key=lambda run: -run["seconds"] * run["points"][-1])
        }
        total = sum(cost.values()) * tokens_per_update
        with tqdm(total=total, unit="FLOP", unit_scale=True, dynamic_ncols=True) as bar:
            while waiting:
                done, waiting = wait(waiting, timeout=0.5)
                for future in done:
                    future.result()
                bar.update(shared.value - bar.n)


def design_runs(args: argparse.Namespace, design: Design, most_tokens: int, n_workers: int) -> list[dict]:
    """Try every width for a moment, and share out the compute that --minutes are enough for."""
    print(f"trying widths {design.widths[0]} to {design.widths[-1]} for their speed", file=sys.stderr)
    with workers(n_workers) as (pool, _):
        speeds = list(pool.map(measure_speed, [train_flags(design, width, args) for width in design.widths]))
    budgets = [args.budget] if args.budget else np.logspace(9, 24, 3001)
    plans = [plan_runs(design, speeds, most_tokens, budget) for budget in budgets]
    plans = [runs for runs in plans if len(runs) > MIN_SIZES and runs[-1]["width"] == design.widths[-1]]
    if not args.budget:
        plans = [runs for runs in plans if minutes(runs, n_workers) <= args.minutes]
    if not plans:
        asked = f"--budget {args.budget:.3g}" if args.budget else f"--minutes {args.minutes:g}"
        raise ValueError(f"{asked}: not enough here to train {MIN_SIZES} sizes and a larger one; give more")
    return plans[-1]


def read_rows(runs: list[dict], out: Path) -> list[dict]:
    """What was found at each point of the runs."""
    rows = []
    for run in runs:
        for line in (out / f"width{run['width']}" / "metrics.jsonl").read_text().splitlines():
            found = json.loads(line)
            N, D = run["flops_per_token"] / 6, found["tokens"]
            row = {"N": N, "D": D, "C": 6 * N * D, "loss": found["val_loss"], "width": run["width"]}
            row |= {"parameters": run["n_params"], "without_head": run["n_without_head"]}
            rows.append(row | {name: found[name] for name in ("accuracy", *(f"exact_{k}" for k in SPANS))})
    return rows


def write_csv(rows: list[dict], path: Path) -> None:
    with checkpoint.replace_file(path) as new, open(new, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: f"{value:.8g}" for name, value in row.items()})


def columns(rows: list[dict], *names: str) -> list[np.ndarray]:
    return [np.array([row[name] for row in rows], dtype=np.float64) for name in names]


def find_law(rows: list[dict], seed: int) -> tuple[Fit, np.ndarray, dict]:
    """The law of the points, resamples of it that draw whole sizes, and what there is to say of them."""
    N, D, L = columns(rows, "N", "D", "loss")
    of = fit(N, D, L)
    samples = of.bootstrap(RESAMPLES, seed, by_size=True)
    laws, names = Law(*samples.T), ("E", "A", "B", "alpha", "beta", "a")
    found = {name: getattr(of.law, name) for name in names}
    found |= {"rms of ln loss": float(np.sqrt(np.mean(of.residuals**2)))}
    found["intervals"] = {name: interval(getattr(laws, name)) for name in names}
    # Other counts of N: every parameter, or those of the layers alone, as Kaplan et al. 2020 have it.
    ways = {
        "with N all parameters": lambda: fit(*columns(rows, "parameters", "D", "loss")).law,
        "with N less the head": lambda: fit(*columns(rows, "without_head", "D", "loss")).law,
        "by approach 1": lambda: envelope(N, D, L),
        "by approach 2": lambda: isoflop(N, D, L).law,
    }
    found["other a"] = {}
    for name, way in ways.items():
        try:
            found["other a"][name] = way().a
        except ValueError as error:
            of.warnings.append(f"no a {name}: {error}")
    found["warnings"] = of.warnings
    return of, samples, found


def show_law(found: dict) -> None:
    print("\nlaw       value         95 % interval, by drawing sizes")
    for name, (low, high) in found["intervals"].items():
        print(f"{name:6} {found[name]:10.4g}         {low:.4g} to {high:.4g}")
    print(f"residuals of ln loss: {found['rms of ln loss']:.2%} rms")
    for name, value in found["other a"].items():
        print(f"a {name}: {value:.3f}")
    for warning in found["warnings"]:
        print(f"warning: {warning}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--minutes", type=quantity, default=20, help="how long it may take here (default %(default)s)")
    add("--budget", type=quantity, metavar="C", help="instead: FLOPs of the dearest run that is fitted")
    add("--data", default="stdlib", metavar="WHAT", help="as for train.py (default stdlib)")
    add("--tokenizer", default="bytes", metavar="WHAT", help="as for train.py (default bytes)")
    add("--lr-factor", type=quantity, default=1.0, metavar="X", help="times the learning rates of the design")
    add("--seed", type=int, default=0)
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--workers", type=int, metavar="N", help="runs at once (default: one for each core, or GPU)")
    add("--out", type=Path, default=Path("runs/sweep"), metavar="DIR", help="default runs/sweep")
    add("--cache", type=Path, default=Path("cache"), metavar="DIR", help="of tokens (default cache)")


def main(args: argparse.Namespace) -> int:
    n_workers = args.workers
    if n_workers is None:
        n_workers = torch.get_num_threads() if args.device == "cpu" else 1
    if n_workers < 1:
        raise ValueError(f"--workers {args.workers}: expected at least 1")
    design = DESIGNS[args.device]
    dataset = data.prepare(args.data, args.tokenizer, args.cache)
    train.check_writable(args.out)
    path = args.out / "sweep.json"
    asked = {
        "dataset": dataset.name,
        "seed": args.seed,
        "lr_factor": args.lr_factor,
        "design": asdict(design),
    }
    asked = json.loads(json.dumps(asked))  # as it comes back from the file
    if path.exists():
        state = json.loads(path.read_text())
        if state["asked"] != asked:
            raise ValueError(f"--out {args.out}: there is another sweep in it; name another directory")
    else:
        runs = design_runs(args, design, len(dataset.train.tokens), n_workers)
        state = {"command": shlex.join(["python", *sys.argv]), "asked": asked, "runs": runs}
        write_json(state, path)
    try:
        sweep(args, design, state, n_workers)
    except BrokenProcessPool:
        raise ValueError(
            "a run was killed, perhaps for want of memory (--workers 1 needs less); the same command goes "
            f"on from what is in {args.out}"
        ) from None
    except KeyboardInterrupt:
        print(f"interrupted; the same command goes on from what is in {args.out}", file=sys.stderr)
        return 130
    return 0


def write_json(state: dict, path: Path) -> None:
    with checkpoint.replace_file(path) as new:
        new.write_text(json.dumps(state, indent=2) + "\n")


def sweep(args: argparse.Namespace, design: Design, state: dict, n_workers: int) -> None:
    *fitted, widest = state["runs"]
    tokens_per_update = design.batch_size * design.seq_len
    print("width  parameters  FLOPs per token  tokens")
    for run in state["runs"]:
        print(
            f"{run['width']:5} {run['n_params']:11,} {run['flops_per_token']:16,}"
            f"  {short(run['points'][-1] * tokens_per_update)}"
        )
    print(
        f"about {minutes(state['runs'], n_workers):.0f} minutes in all; the last is to be predicted",
        flush=True,
    )
    make_runs(fitted, design, args, n_workers)
    rows = read_rows(fitted, args.out)
    write_csv(rows, args.out / "points.csv")
    of, samples, found = find_law(rows, args.seed)
    show_law(found)

    N, D = widest["flops_per_token"] / 6, widest["points"][-1] * tokens_per_update
    low, high = interval(Law(*samples.T).loss(N, D))
    prediction = {"N": N, "D": D, "loss": float(of.law.loss(N, D)), "interval": [low, high]}
    state |= {"law": found, "prediction": prediction}
    write_json(state, args.out / "sweep.json")
    print(
        f"\npredicted for width {widest['width']} after {short(D)} tokens: {prediction['loss']:.4f}"
        f" ({low:.4f} to {high:.4f})",
        flush=True,
    )
    make_runs([widest], design, args, 1)
    *_, largest = read_rows([widest], args.out)
    prediction |= {"measured": largest["loss"], "error": prediction["loss"] / largest["loss"] - 1}
    write_json(state, args.out / "sweep.json")
    print(f"measured {largest['loss']:.4f}: the prediction is off by {prediction['error']:+.2%}")
    plot_sweep(of, rows, largest, prediction, args.out / "sweep.png")
    plot_emergence([*rows, largest], args.out / "emergence.png")


def plot_sweep(of: Fit, rows: list[dict], largest: dict, prediction: dict, path: Path) -> None:
    """Loss over compute of all sizes, the frontier and the prediction; and valleys of equal compute."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    widths = sorted({row["width"] for row in rows})
    colors = dict(zip(widths, pyplot.cm.viridis(np.linspace(0, 0.9, len(widths))), strict=True))
    for width in widths:
        N, D, C, L = columns([row for row in rows if row["width"] == width], "N", "D", "C", "loss")
        left.plot(C, L, "o", color=colors[width], markersize=4, label=f"{short(N[0])}")
        tokens = np.geomspace(D[0] / 1.5, D[-1] * 1.5)
        left.plot(6 * N[0] * tokens, of.law.loss(N[0], tokens), color=colors[width], linewidth=0.8)
    compute = np.geomspace(min(row["C"] for row in rows), 1.5 * largest["C"])
    left.plot(compute, of.law.loss(*of.law.optimal(compute)), "k--", linewidth=1, label="frontier")
    low, high = prediction["interval"]
    left.errorbar(
        largest["C"],
        prediction["loss"],
        [[prediction["loss"] - low], [high - prediction["loss"]]],
        fmt="_",
        color="tab:red",
        capsize=4,
        label=f"{short(largest['N'])}, predicted",
    )
    left.plot(largest["C"], largest["loss"], "*", color="tab:red", markersize=11, label="and measured")
    left.set(xscale="log", xlabel="training FLOPs", ylabel="held-out loss (nats per token)")
    left.legend(fontsize=8, ncols=2, title="N", title_fontsize=8)

    budgets = np.geomspace(*np.quantile([row["C"] for row in rows], [0.1, 0.95]), 5)
    sizes = np.geomspace(min(row["N"] for row in rows) / 1.5, largest["N"] * 1.2)
    for budget, color in zip(budgets, pyplot.cm.plasma(np.linspace(0, 0.85, len(budgets))), strict=True):
        right.plot(sizes, of.law.loss(sizes, budget / (6 * sizes)), color=color, linewidth=0.8)
        for width in widths:
            mine = [row for row in rows if row["width"] == width]
            N, C, L = columns(mine, "N", "C", "loss")
            if C[0] <= budget <= C[-1]:
                right.plot(N[0], np.interp(math.log(budget), np.log(C), L), "o", color=color, markersize=4)
        right.plot([], [], "o-", color=color, markersize=4, label=f"{budget:.1e} FLOPs")
    lowest = of.law.optimal(budgets)
    right.plot(lowest[0], of.law.loss(*lowest), "k--", linewidth=1, label="N*")
    seen = [row["loss"] for row in rows]
    right.set(xscale="log", xlabel="N (FLOPs per token / 6)", ylim=(min(seen) - 0.05, max(seen) + 0.1))
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    save_figure(figure, path)


def plot_emergence(rows: list[dict], path: Path) -> None:
    """The same models by two measures: how often a token is right, and how often k in a row are."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # Only models that no other beats with less compute, so that the row is one of ever better ones.
    frontier = []
    for row in sorted(rows, key=lambda row: row["C"]):
        if not frontier or row["loss"] < frontier[-1]["loss"]:
            frontier.append(row)
    (C,) = columns(frontier, "C")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.4), layout="constrained")
    left.plot(C, *columns(frontier, "exact_1"), "o-", color="black", markersize=4)
    left.set(title="a token is right", ylim=(0, 1))
    for k, color in zip(SPANS[1:], pyplot.cm.viridis(np.linspace(0, 0.9, len(SPANS) - 1)), strict=True):
        (share,) = columns(frontier, f"exact_{k}")
        right.plot(C, share / share[-1], "o-", color=color, markersize=4, label=f"k = {k}, {share[-1]:.1%}")
    right.set(title="k tokens in a row are, over what the last model reaches", ylim=(0, 1.05))
    right.legend(title="and that is", fontsize=8)
    for axes in (left, right):
        axes.set(xscale="log", xlabel="training FLOPs of the best models")
        axes.grid(alpha=0.3)
    save_figure(figure, path)


def save_figure(figure, path: Path) -> None:
    with checkpoint.replace_file(path) as new:
        figure.savefig(new, dpi=110, format="png")
