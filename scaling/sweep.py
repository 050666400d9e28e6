"""A scaling law from your own runs: train small GPTs of several widths, fit the law, predict a larger one.

One run of each size gives a whole curve of loss over tokens, if the learning rate is constant: the *mean of
the last weights* replaces the decay at the end of a schedule (Hägele et al. 2024). At

    D_i = D_max / 2^(i/2) tokens       the mean of the weights over [0.8 D_i, D_i] is evaluated

so that one run per size gives a point at every budget. The windows do not overlap, since 0.8 > 1/sqrt(2). So
a run that is resumed at D_i has no average to restore.

Sizes differ in width alone. All are trained on the same text in the same order and evaluated on the same
held-out rows, so that chance favours no size. Compute is counted exactly, with attention and the head, and a
model counts as N = FLOPs per token / 6 parameters. In models as small as these, attention and the head are a
large share of the compute, and a count without them bends the law (Porian et al. 2024; Pearce and Song 2024).

The law of all these points predicts the loss of one more model, wider than any of them, after `BEYOND` times
the compute of any of them, as far as the text allows: no text is used twice. The prediction is written down,
and only then is that model trained.

    python chinchilla.py sweep --minutes 20

In --out: sweep.json, the design and the findings; points.csv, the points (for `chinchilla.py fit`);
sweep.png, the curves; emergence.png, how a smooth gain can look like a sudden ability (Schaeffer et al.
2023). After an interruption, the same command goes on from the last point of each run. The training is in
scaling/sweep_runs.py, the fit and the pictures in scaling/sweep_report.py.
"""

import argparse
import json
import math
import shlex
import sys
import tempfile
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from chinchilla import Law
from formats import atomic, command
from formats.quantities import quantity, short
from scaling.points import interval, positive_number
from scaling.sweep_report import EXACT, find_law, plot_emergence, plot_sweep, print_law, write_csv

# Functions import scaling.sweep_runs where they use it: it loads torch, which takes seconds, also of --help.

LEAST_MINUTES = 1  # no machine is known that needs less
BEYOND = 3  # FLOPs of the predicted run over those of the largest that the law is fitted to
MIN_SIZES = 4  # the fewest that a law is fitted to
LR_EXPONENT = 0.75  # how the best learning rate falls with width; by trial at widths 16, 48 and 128


@dataclass(frozen=True)
class Design:
    """A family of models of several widths. The widest that is trained is the one that is predicted."""

    widths: tuple[int, ...]
    n_layers: int
    d_head: int  # approximately: the heads share the width evenly
    seq_len: int
    batch_size: int  # sequences
    first_point: int  # updates: an earlier loss depends on the warm-up, not on the size
    lr: float  # constant, at width 32


DESIGNS = {
    "cpu": Design((16, 24, 32, 40, 48, 64, 80, 96, 128, 192), 3, 16, 128, 8, 1000, 0.0043),
    "cuda": Design((64, 96, 128, 192, 256, 320, 384, 512, 768), 6, 32, 256, 16, 500, 0.0043),
}


def train_flags(design: Design, width: int, args: argparse.Namespace) -> list[str]:
    """Return train.py's flags for the run of one width, without its number of steps."""
    heads = width // design.d_head
    fields = dict(d_model=width, n_layers=design.n_layers, d_head=width // heads, n_heads=heads)
    # d_ff is 2/3 of the usual 4 d_model: SwiGLU's three matrices then have the weights of a plain MLP's two.
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
    words = [text for flag, value in flags.items() for text in (f"--{flag}", str(value))]
    # Without torch.compile, which takes as long as many of these runs.
    return [*words, "--no-compile", "--set", *(f"{field}={value}" for field, value in fields.items())]


def points_of(steps: float, first: int) -> list[int]:
    """Return the updates after which a run of `steps` updates is evaluated: the last, and before it each
    1/sqrt(2) of the next one, down to `first`."""
    points = []
    while steps >= first * (1 - 1e-9):  # dividing twice by sqrt(2) is not quite halving
        points.append(round(steps))
        steps /= math.sqrt(2)
    return points[::-1]


def runs_within(design: Design, speeds: list[dict], most_tokens: int, budget: float) -> list[dict]:
    """Return for each width a run of at most `budget` FLOPs and most_tokens tokens. Widths that reach fewer
    than three points are left out."""
    runs = []
    for width, speed in zip(design.widths, speeds, strict=True):
        tokens = min(most_tokens, budget / speed["flops_per_token"])
        points = points_of(tokens / (design.batch_size * design.seq_len), design.first_point)
        if len(points) >= 3:
            runs.append({"width": width, "points": points, **speed})
    return runs


def plan_runs(design: Design, speeds: list[dict], most_tokens: int, budget: float) -> list[dict]:
    """Return the runs of a sweep whose fitted runs cost at most `budget` FLOPs each, the narrowest first.

    The last run is the one to be predicted: the widest that `BEYOND` times the budget is enough for."""
    larger = runs_within(design, speeds, most_tokens, BEYOND * budget)
    if not larger:
        return []
    predicted = larger[-1]
    fitted = [
        run for run in runs_within(design, speeds, most_tokens, budget) if run["width"] < predicted["width"]
    ]
    return [*fitted, predicted]


def makespan(seconds: list[float], n_workers: int) -> float:
    """Return the seconds until the last of n_workers is done, if each takes the longest task that is left."""
    busy = [0.0] * n_workers
    for task in sorted(seconds, reverse=True):
        busy[busy.index(min(busy))] += task
    return max(busy)


def minutes(runs: list[dict], n_workers: int) -> float:
    """Return the minutes that the runs take, by the speeds that were measured."""
    seconds = [run["points"][-1] * run["seconds"] + len(run["points"]) * run["evaluation"] for run in runs]
    # The last run is trained alone, with all threads, which is a little less efficient than runs in parallel.
    return (makespan(seconds[:-1], n_workers) + seconds[-1] / max(1, 0.8 * n_workers)) / 60


def choose_runs(
    args: argparse.Namespace, design: Design, speeds: list[dict], most_tokens: int, n_workers: int
) -> list[dict]:
    """Return the runs for --budget, or else the largest that --minutes are enough for.

    Raises ValueError if that is too little for MIN_SIZES sizes and a larger one."""
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
            f"--minutes {args.minutes:g}: expected at least {least}, the time for {MIN_SIZES} sizes and a "
            "larger one on this machine"
        )
    return within[-1]


def begin_or_resume(args: argparse.Namespace, design: Design, n_workers: int) -> dict:
    """Return the content of sweep.json: of the sweep that is in --out, or of a new one, which is not written.

    A new sweep begins with a trial of every width, which measures its speed, in a temporary directory. Raises
    ValueError for too little text or time, a damaged file, or a sweep of other settings in --out."""
    from scaling import sweep_runs

    text, n_tokens = sweep_runs.prepare_text(args)
    settings = {"dataset": text, "seed": args.seed, "lr_factor": args.lr_factor} | asdict(design)
    if (args.out / "sweep.json").exists():
        return read_state(args.out / "sweep.json", settings)
    needed = 2 * design.first_point * design.batch_size * design.seq_len
    if n_tokens < needed:
        raise ValueError(
            f"--data {args.data}: {n_tokens:,} tokens to train on, expected at least {needed:,}; give more "
            "text"
        )
    print(f"trying widths {design.widths[0]} to {design.widths[-1]} for their speed", file=sys.stderr)
    with tempfile.TemporaryDirectory() as trials:
        elsewhere = argparse.Namespace(**vars(args) | {"out": Path(trials)})
        all_flags = [train_flags(design, width, elsewhere) for width in design.widths]
        speeds = sweep_runs.measure_speeds(all_flags, n_workers)
    runs = choose_runs(args, design, speeds, n_tokens, n_workers)
    return {"command": shlex.join(["python", *sys.argv]), "asked": settings, "runs": runs}


def read_state(path: Path, settings: dict) -> dict:
    """Return the sweep in sweep.json. Raises ValueError if it is damaged, or has other settings."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        before, command, _ = state["asked"], state["command"], state["runs"]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error!r}); remove {path.parent} to begin anew, or name another --out"
        ) from None
    for name, value in json.loads(json.dumps(settings)).items():  # as they come back from a file
        if before.get(name) != value:
            raise ValueError(
                f"--out {path.parent}: the sweep in it has {name} {before.get(name)}, not {value}; its "
                f"command was {command}; name another directory"
            )
    return state


def write_json(state: dict, path: Path) -> None:
    with atomic.replace_file(path) as new:
        new.write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")


def make_runs(runs: list[dict], design: Design, args: argparse.Namespace, n_workers: int) -> None:
    """Train every size to its last point, those that take longest first."""
    from scaling import sweep_runs

    tokens_per_update = design.batch_size * design.seq_len
    total = sum(run["flops_per_token"] * run["points"][-1] for run in runs) * tokens_per_update
    runs = sorted(runs, key=lambda run: -run["seconds"] * run["points"][-1])
    jobs = [(train_flags(design, run["width"], args), run["points"]) for run in runs]
    sweep_runs.train_all(jobs, total, n_workers)


def read_rows(runs: list[dict], out: Path) -> list[dict]:
    """Return a row for each point of the runs. Raises ValueError for a metrics.jsonl that is damaged, or that
    lacks a loss or holds one that is not finite, which would spoil the figures of the whole sweep."""
    rows = []
    for run in runs:
        path = out / f"width{run['width']}" / "metrics.jsonl"
        try:
            for found in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
                N, D = run["flops_per_token"] / 6, found["tokens"]
                loss = positive_number(found["val_loss"], "val_loss")
                row = {"N": N, "D": D, "C": 6 * N * D, "loss": loss, "width": run["width"]}
                row |= {"parameters": run["n_params"], "without_head": run["n_without_head"]}
                rows.append(row | {name: found[name] for name in ("accuracy", *EXACT)})
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error!r}); remove {path.parent} to make it anew") from None
    return rows


def print_runs(runs: list[dict], tokens_per_update: int, n_workers: int) -> None:
    """Print the design of the sweep and how long it takes."""
    print("width  parameters  FLOPs per token         N  tokens D   D/N")
    for run in runs:
        N, D = run["flops_per_token"] / 6, run["points"][-1] * tokens_per_update
        cells = f"{run['flops_per_token']:16,}  {short(N):>8}  {short(D):>8}  {D / N:4.3g}"
        print(f"{run['width']:5} {run['n_params']:11,} {cells}")
    print(
        "parameters: all, with the embedding, which is the head too. N: FLOPs per token / 6, the size in the"
    )
    print("law and in the pictures. D/N: tokens per parameter at the end of the run (rule of thumb: 20)")
    print(f"about {minutes(runs, n_workers):.0f} minutes in all; the last is to be predicted", flush=True)


def run_sweep(state: dict, args: argparse.Namespace, design: Design, n_workers: int) -> None:
    """Train, fit the law, predict the largest run, train it, compare, and plot. state: of sweep.json."""
    *narrower, widest = state["runs"]
    tokens_per_update = design.batch_size * design.seq_len
    print_runs(state["runs"], tokens_per_update, n_workers)

    # The runs that the law is fitted to.
    make_runs(narrower, design, args, n_workers)
    rows = read_rows(narrower, args.out)
    write_csv(rows, args.out / "points.csv")
    law, samples, found = find_law(rows, args.seed)
    print_law(found)

    # The prediction. It is on disk before the run that tests it begins.
    N, D = widest["flops_per_token"] / 6, widest["points"][-1] * tokens_per_update
    low, high = interval(Law(*samples.T).loss(N, D))
    prediction = {"N": N, "D": D, "loss": float(law.loss(N, D)), "interval": [low, high]}
    state |= {"law": found, "prediction": prediction}
    write_json(state, args.out / "sweep.json")
    times = 6 * N * D / max(row["C"] for row in rows)
    print(f"\nwidth {widest['width']} after {short(D)} tokens, {times:.1f} times the compute of any of these")
    print(f"predicted: {prediction['loss']:.4f} ({low:.4f} to {high:.4f})", flush=True)

    # The test of it.
    make_runs([widest], design, args, 1)
    *_, largest = read_rows([widest], args.out)
    prediction |= {"measured": largest["loss"], "error": prediction["loss"] / largest["loss"] - 1}
    state["largest"] = largest  # all its measures, so that the pictures can be drawn again
    write_json(state, args.out / "sweep.json")
    print(f"measured:  {largest['loss']:.4f}: the prediction is off by {prediction['error']:+.2%}")
    plot_sweep(found, law, rows, largest, prediction, args.out / "sweep.png")
    plot_emergence([*rows, largest], args.out / "emergence.png")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--minutes",
        type=float,
        default=20,
        help=f"time that it may take here (default %(default)s; at least {LEAST_MINUTES}, on two CPU cores "
        "about 4: a short trial measures what this machine needs, before anything is written to --out)",
    )
    add("--budget", type=quantity, metavar="C", help="instead of --minutes: FLOPs of the largest fitted run")
    add(
        "--data",
        type=command.filled,
        default="stdlib",
        metavar="WHAT",
        help="as for train.py (default stdlib)",
    )
    add("--tokenizer", default="bytes", metavar="WHAT", help="as for train.py (default bytes)")
    add(
        "--lr-factor",
        type=float,
        default=1.0,
        metavar="X",
        help="multiply the design's learning rates by X (default 1)",
    )
    add("--seed", type=int, default=0, help="seed of the runs and of the resamples (default 0)")
    add(
        "--device",
        choices=("cpu", "cuda"),
        help="where the runs compute (default: cuda if there is a GPU, else cpu)",
    )
    add("--workers", type=int, metavar="N", help="runs in parallel (default: one per core; 1 on a GPU)")
    add(
        "--out",
        type=command.path,
        default=Path("runs/sweep"),
        metavar="DIR",
        help="results (default runs/sweep)",
    )
    add(
        "--cache",
        type=command.path,
        default=Path("cache"),
        metavar="DIR",
        help="for tokenised text (default cache)",
    )


def main(args: argparse.Namespace) -> int:
    """Run the sweep and return the exit code. Raises ValueError for arguments that are out of range."""
    for flag in ("minutes", "lr_factor", "workers"):
        value = getattr(args, flag)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{flag.replace('_', '-')} {value}: expected a number above 0")
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed}: expected at least 0")
    if args.budget is None and args.minutes < LEAST_MINUTES:
        raise ValueError(
            f"--minutes {args.minutes:g}: expected at least {LEAST_MINUTES}, and about 4 on two CPU cores"
        )
    from scaling import sweep_runs

    args.device = args.device or sweep_runs.default_device()
    n_workers = args.workers or sweep_runs.default_workers(args.device)
    design, lock = DESIGNS[args.device], None
    try:
        # Nothing is written to --out until the design is known to fit into the time.
        state = begin_or_resume(args, design, n_workers)
        lock = sweep_runs.lock_directory(args.out)
        path = args.out / "sweep.json"
        if path.exists():
            state = read_state(path, state["asked"])  # also one that another process began meanwhile
            print(f"going on with: {state['command']}", flush=True)
        else:
            write_json(state, path)
        run_sweep(state, args, design, n_workers)
    except BrokenProcessPool:
        raise ValueError(
            "a run was killed, perhaps for lack of memory (--workers 1 needs less); the same command goes "
            f"on from what is in {args.out}"
        ) from None
    except KeyboardInterrupt:
        print(f"interrupted; the same command goes on from what is in {args.out}", file=sys.stderr)
        return 130
    finally:
        if lock is not None:
            lock.release()
    return 0
