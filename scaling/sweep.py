"""A scaling law from your own runs: train small GPTs of several widths, fit the law, predict a larger one.

One run of each size gives a whole curve of loss over tokens, if the learning rate is constant: where a
schedule would have decayed it, the *mean of the last weights* stands in (Hägele et al. 2024). At

    D_i = D_max / 2^(i/2) tokens       the mean of the weights over [0.8 D_i, D_i] is evaluated

so every budget has its slice of equal compute for the price of one run a size. The windows do not overlap,
since 0.8 > 1/sqrt(2): at each D_i there is nothing to remember of the mean, and a run goes on from there.

Sizes differ in width alone. All read the same text in the same order and are asked about the same held-out
rows, so that what is luck in one is luck in all. Compute is counted exactly, with attention and the head. A
model counts for as many parameters as its FLOPs are worth, N = FLOPs per token / 6: where models are this
small, attention and the head are a large share, and a count without them bends the law (Porian et al. 2024;
Pearce and Song 2024).

From all these points the law foretells the loss of a model wider than any of them after `BEYOND` times the
compute of any of them, if the text is long enough: none is read twice. That is written down, and then the
model is trained.

    python chinchilla.py sweep --minutes 20

In --out, sweep.json has the design and the findings, points.csv the points (for `chinchilla.py fit`),
sweep.png the curves, emergence.png how a smooth gain can look like a sudden ability (Schaeffer et al. 2023).
Stopped at any moment, the same command goes on from the last point of each run.
"""

import argparse
import json
import math
import multiprocessing
import os
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

import data.text
import train
from chinchilla import Law, interval, quantity, short
from engine import cpu
from engine.run import open_directory
from formats import atomic
from scaling.sweep_report import EXACT, SPANS, find_law, plot_emergence, plot_sweep, show_law, write_csv

BEYOND = 3  # FLOPs of the predicted run over those of the largest that the law is fitted to
MIN_SIZES = 4  # that a law can be fitted to
HELD_OUT = 1 << 16  # tokens that every model is asked about
WINDOW = 0.2  # weights of this last share of the tokens are averaged
LR_EXPONENT = 0.75  # how the best learning rate falls with width; by trial at widths 16, 48 and 128

flops_done = None  # in a worker: FLOPs of all workers, in memory that they share


@dataclass(frozen=True)
class Design:
    """A family of models; the widest that is trained is the one that is predicted."""

    widths: tuple[int, ...]
    n_layers: int
    d_head: int  # about: heads share the width evenly
    seq_len: int
    batch_size: int  # sequences
    first_point: int  # updates: before them the loss tells of the warm-up, not of the size
    lr: float  # constant, at width 32


DESIGNS = {
    "cpu": Design((16, 24, 32, 40, 48, 64, 80, 96, 128, 192), 3, 16, 128, 8, 1000, 0.0043),
    "cuda": Design((64, 96, 128, 192, 256, 320, 384, 512, 768), 6, 32, 256, 16, 500, 0.0043),
}


def train_flags(design: Design, width: int, args: argparse.Namespace) -> list[str]:
    """What train.py is told of one run, all but its length."""
    heads = width // design.d_head
    fields = dict(d_model=width, n_layers=design.n_layers, d_head=width // heads, n_heads=heads)
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
    # Not compiled: that takes as long as many of these runs.
    return [*said, "--no-compile", "--set", *(f"{field}={value}" for field, value in fields.items())]


def points_of(steps: float, first: int) -> list[int]:
    """Updates after which a run of so many is evaluated: the last, and each time by sqrt(2) fewer."""
    points = []
    while steps >= first * (1 - 1e-9):  # dividing twice by sqrt(2) is not quite halving
        points.append(round(steps))
        steps /= math.sqrt(2)
    return points[::-1]


def begin_worker(n_threads: int, shared) -> None:
    global flops_done
    flops_done = shared
    torch.set_num_threads(n_threads)
    cpu.keep_memory()
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
    args.resume = any((args.out / name).is_dir() for name in ("checkpoint", "checkpoint.previous"))
    run = train.prepare(args)
    rows, parent = held_out_rows(run), multiprocessing.parent_process()
    flops = args.batch_size * args.seq_len * run.model.flops_per_token(args.seq_len)
    add_flops(run.step * flops)
    for point in (point for point in points if point > run.step):
        average = None
        while run.step < point:
            train.update(run)
            if run.n_skipped_in_a_row == train.MAX_SKIPPED:
                raise ValueError(f"{args.out}: no finite gradient at step {run.step}; lower --lr-factor")
            if run.step > (1 - WINDOW) * point:
                average = average or AveragedModel(run.model)
                average.update_parameters(run.model)
            add_flops(flops)
            if parent is not None and not parent.is_alive():
                os._exit(1)  # or else there would soon be two of this run
        row = {"step": point, "tokens": point * args.batch_size * args.seq_len, "skipped": run.n_skipped}
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
    """How long each width is trained if none may cost more than `budget` FLOPs, and the last, which is to be
    predicted, BEYOND times as much: the widest for which that is enough. Enough are three points; of the
    narrower widths those that have not so many are left out."""

    def runs_of(compute: float) -> list[dict]:
        found = []
        for width, speed in zip(design.widths, speeds, strict=True):
            tokens = min(most_tokens, compute / speed["flops_per_token"])
            points = points_of(tokens / (design.batch_size * design.seq_len), design.first_point)
            if len(points) >= 3:
                found.append({"width": width, "points": points, **speed})
        return found

    *_, widest = runs_of(BEYOND * budget) or [None]
    return [run for run in runs_of(budget) if run["width"] < widest["width"]] + [widest] if widest else []


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
    needed = 2 * design.first_point * design.batch_size * design.seq_len
    if most_tokens < needed:
        raise ValueError(
            f"--data {args.data}: {most_tokens:,} tokens to train on, expected at least {needed:,}; give "
            "more text"
        )
    print(f"trying widths {design.widths[0]} to {design.widths[-1]} for their speed", file=sys.stderr)
    with workers(n_workers) as (pool, _):
        speeds = list(pool.map(measure_speed, [train_flags(design, width, args) for width in design.widths]))
    budgets = [args.budget] if args.budget else np.logspace(9, 24, 3001)
    plans = [plan_runs(design, speeds, most_tokens, budget) for budget in budgets]
    plans = [runs for runs in plans if len(runs) > MIN_SIZES]
    if not plans:
        raise ValueError(
            f"--budget {args.budget:.3g}: not enough to train {MIN_SIZES} sizes and a larger one; give more"
        )
    if args.budget:
        return plans[0]
    within = [runs for runs in plans if minutes(runs, n_workers) <= args.minutes]
    if not within:
        least = math.ceil(min(minutes(runs, n_workers) for runs in plans))
        raise ValueError(
            f"--minutes {args.minutes:g}: expected at least {least}: so long {MIN_SIZES} sizes and a larger "
            "one take here"
        )
    return within[-1]


def read_rows(runs: list[dict], out: Path) -> list[dict]:
    """What was found at each point of the runs."""
    rows = []
    for run in runs:
        path = out / f"width{run['width']}" / "metrics.jsonl"
        try:
            for found in map(json.loads, path.read_text().splitlines()):
                N, D = run["flops_per_token"] / 6, found["tokens"]
                row = {"N": N, "D": D, "C": 6 * N * D, "loss": found["val_loss"], "width": run["width"]}
                row |= {"parameters": run["n_params"], "without_head": run["n_without_head"]}
                rows.append(row | {name: found[name] for name in ("accuracy", *EXACT)})
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error!r}); remove {path.parent} to make it anew") from None
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--minutes", type=float, default=20, help="how long it may take here (default %(default)s)")
    add("--budget", type=quantity, metavar="C", help="instead: FLOPs of the dearest run that is fitted")
    add("--data", default="stdlib", metavar="WHAT", help="as for train.py (default stdlib)")
    add("--tokenizer", default="bytes", metavar="WHAT", help="as for train.py (default bytes)")
    add("--lr-factor", type=float, default=1.0, metavar="X", help="times the learning rates of the design")
    add("--seed", type=int, default=0)
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--workers", type=int, metavar="N", help="runs at once (default: one for each core; 1 on a GPU)")
    add("--out", type=Path, default=Path("runs/sweep"), metavar="DIR", help="default runs/sweep")
    add("--cache", type=Path, default=Path("cache"), metavar="DIR", help="of tokens (default cache)")


def main(args: argparse.Namespace) -> int:
    for flag in ("minutes", "lr_factor", "workers"):
        value = getattr(args, flag)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{flag.replace('_', '-')} {value}: expected a number above 0")
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed}: expected at least 0")
    n_workers = args.workers or (torch.get_num_threads() if args.device == "cpu" else 1)
    lock = open_directory(args.out)
    try:
        sweep(args, DESIGNS[args.device], n_workers)
    except BrokenProcessPool:
        raise ValueError(
            "a run was killed, perhaps for want of memory (--workers 1 needs less); the same command goes "
            f"on from what is in {args.out}"
        ) from None
    except KeyboardInterrupt:
        print(f"interrupted; the same command goes on from what is in {args.out}", file=sys.stderr)
        return 130
    finally:
        lock.release()
    return 0


def begin_or_go_on(args: argparse.Namespace, design: Design, n_workers: int) -> dict:
    """What sweep.json holds: of the sweep that is in --out, or of a new one."""
    dataset = data.text.prepare(args.data, args.tokenizer, args.cache)
    path = args.out / "sweep.json"
    asked = {"dataset": dataset.name, "seed": args.seed, "lr_factor": args.lr_factor} | asdict(design)
    if not path.exists():
        runs = design_runs(args, design, len(dataset.train.tokens), n_workers)
        state = {"command": shlex.join(["python", *sys.argv]), "asked": asked, "runs": runs}
        write_json(state, path)
        return state
    try:
        state = json.loads(path.read_text())
        before, command, _ = state["asked"], state["command"], state["runs"]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error!r}); remove {args.out} to begin anew, or name another --out"
        ) from None
    for name, value in json.loads(json.dumps(asked)).items():  # as it comes back from a file
        if before.get(name) != value:
            raise ValueError(
                f"--out {args.out}: the sweep in it has {name} {before.get(name)}, not {value}; its command "
                f"was {command}; name another directory"
            )
    print(f"going on with: {command}", flush=True)
    return state


def write_json(state: dict, path: Path) -> None:
    with atomic.replace_file(path) as new:
        new.write_text(json.dumps(state, indent=2) + "\n")


def sweep(args: argparse.Namespace, design: Design, n_workers: int) -> None:
    """Design, runs, their law and its prediction; then the run that was predicted, and the pictures."""
    state = begin_or_go_on(args, design, n_workers)
    *narrower, widest = state["runs"]
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
    make_runs(narrower, design, args, n_workers)
    rows = read_rows(narrower, args.out)
    write_csv(rows, args.out / "points.csv")
    law, samples, found = find_law(rows, args.seed)
    show_law(found)

    N, D = widest["flops_per_token"] / 6, widest["points"][-1] * tokens_per_update
    low, high = interval(Law(*samples.T).loss(N, D))
    prediction = {"N": N, "D": D, "loss": float(law.loss(N, D)), "interval": [low, high]}
    state |= {"law": found, "prediction": prediction}
    write_json(state, args.out / "sweep.json")
    times = 6 * N * D / max(row["C"] for row in rows)
    print(f"\nwidth {widest['width']} after {short(D)} tokens, {times:.1f} times the compute of any of these")
    print(f"predicted: {prediction['loss']:.4f} ({low:.4f} to {high:.4f})", flush=True)
    make_runs([widest], design, args, 1)
    *_, largest = read_rows([widest], args.out)
    prediction |= {"measured": largest["loss"], "error": prediction["loss"] / largest["loss"] - 1}
    write_json(state, args.out / "sweep.json")
    print(f"measured:  {largest['loss']:.4f}: the prediction is off by {prediction['error']:+.2%}")
    plot_sweep(law, rows, largest, prediction, args.out / "sweep.png")
    plot_emergence([*rows, largest], args.out / "emergence.png")
