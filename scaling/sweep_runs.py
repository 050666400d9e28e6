"""The training runs of scaling/sweep.py: one size, evaluated at several points, and many sizes in parallel.

A run has a constant learning rate. At each point, a number of updates, the mean of the weights over the last
WINDOW of the updates is evaluated, and the run is saved, so that it can go on from there.
"""

import argparse
import json
import math
import multiprocessing
import os
import signal
import time
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import data.text
import train
from engine import cpu
from engine.checkpoint import is_begun, save
from engine.log import MAX_SKIPPED
from engine.run import Run, open_directory, prepare
from formats.progress import progress_bar
from scaling.sweep_report import SPANS

HELD_OUT = 1 << 16  # tokens that every model is evaluated on
WINDOW = 0.2  # the weights of this last share of the updates are averaged

flops_done = None  # in a worker: FLOPs done by all workers, in shared memory


# --- all that is used of train.py, engine/ and data/. Of the Run that `build_run` returns, the rest of this
# file reads args, model, sizes, step and n_skipped.


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_workers(device: str) -> int:
    """Return how many runs are trained in parallel: one for each core, or one on a GPU."""
    return torch.get_num_threads() if device == "cpu" else 1


def lock_directory(out: Path) -> FileLock:
    """Create the sweep's directory and return the lock on it. Raises ValueError if another process has it."""
    return open_directory(out)


def prepare_text(args: argparse.Namespace) -> tuple[str, int]:
    """Tokenise the text; return the name of the tokenised text, and its number of training tokens."""
    corpus = data.text.prepare(args.data, args.tokenizer, args.cache)
    return corpus.name, len(corpus.train.tokens)


def build_run(flags: list[str], n_steps: int | None = None) -> Run:
    """Return a run with train.py's flags: a trial, or with n_steps one that resumes its last checkpoint."""
    if n_steps is None:
        return prepare(train.parse_arguments(flags))
    args = train.parse_arguments([*flags, "--steps", str(n_steps)])
    args.resume = is_begun(args.out)
    return prepare(args)


def update_run(run: Run) -> None:
    """Do one update of the weights."""
    train.update(run)


def has_diverged(run: Run) -> bool:
    """Return True if too many updates in a row had a gradient that was not finite."""
    return run.n_skipped_in_a_row == MAX_SKIPPED


def save_run(run: Run) -> None:
    save(run)


def held_out_tokens(run: Run) -> np.ndarray:
    return run.dataset.val.tokens


def predict(run: Run, model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the logits (B, T, V), float32, for tokens (B, T), computed in the run's dtype."""
    with run.autocast():
        return model(tokens).float()


def keep_memory() -> None:
    cpu.keep_memory()


# --- the runs


def held_out_rows(run: Run) -> Tensor:
    """Return rows (n, T + 1) of tokens, spread evenly over the held-out text: the same for every run."""
    tokens, T = held_out_tokens(run), run.args.seq_len
    n = max(1, min(HELD_OUT, len(tokens) - 1) // T)
    starts = np.linspace(0, len(tokens) - 1 - T, n).astype(int)
    return torch.from_numpy(np.stack([tokens[i : i + T + 1] for i in starts]).astype(np.int64))


@torch.no_grad()
def evaluate(run: Run, model: nn.Module, rows: Tensor) -> dict[str, float]:
    """Return val_loss, the mean loss of the rows, accuracy, and exact_k for the k of SPANS: how often the
    likeliest token is right k times in a row.

    exact_k is how often a greedy continuation of k tokens equals the text, because up to its first error it
    has the text as its context. Spans with a token that repeats the one before it are not counted: most
    correct spans would be runs of blanks."""
    losses, right, repeats = [], [], []
    for part in rows.split(4 * run.args.batch_size):
        tokens, targets = part[:, :-1].to(run.args.device), part[:, 1:].to(run.args.device)
        logits = predict(run, model, tokens)  # (B, T, V)
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


def measure_speed(flags: list[str]) -> dict:
    """Return the seconds of an update and of an evaluation, by a trial, FLOPs per token, and sizes."""
    run = build_run(flags)
    rows = held_out_rows(run)
    for _ in range(5):
        update_run(run)
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        for _ in range(10):
            update_run(run)
        seconds.append((time.perf_counter() - began) / 10)
    began = time.perf_counter()
    evaluate(run, run.model, rows)
    config = run.model.config
    return {
        "seconds": min(seconds),
        "evaluation": time.perf_counter() - began,
        "flops_per_token": run.model.flops_per_token(run.args.seq_len),
        "n_params": run.sizes.n_params,
        "n_without_head": run.sizes.n_params - config.vocab_size * config.d_model,
    }


def train_one(flags: list[str], points: list[int]) -> None:
    """Train one size, from its last checkpoint if there is one, and write a row to its metrics.jsonl for each
    of the points that are left.

    Raises ValueError when too many updates in a row have a gradient that is not finite, and when the loss of
    a point is not finite."""
    run = build_run(flags, points[-1])
    args, rows, parent = run.args, held_out_rows(run), multiprocessing.parent_process()
    tokens_per_update = args.batch_size * args.seq_len
    flops_per_update = tokens_per_update * run.model.flops_per_token(args.seq_len)
    add_flops(run.step * flops_per_update)
    for point in [point for point in points if point > run.step]:
        # Train up to the point, and average the weights over the last part of the way.
        average = None
        while run.step < point:
            update_run(run)
            if has_diverged(run):
                raise ValueError(f"{args.out}: no finite gradient at step {run.step}; lower --lr-factor")
            if run.step > (1 - WINDOW) * point:
                average = average or AveragedModel(run.model)
                average.update_parameters(run.model)
            add_flops(flops_per_update)
            if parent is not None and not parent.is_alive():
                os._exit(1)  # or a restarted sweep would train this size a second time beside it

        # Evaluate the mean and save. Resuming removes rows that are newer than the checkpoint.
        row = {"step": point, "tokens": point * tokens_per_update, "skipped": run.n_skipped}
        row |= evaluate(run, average.module.eval(), rows)
        if not math.isfinite(row["val_loss"]):
            raise ValueError(f"{args.out}: loss {row['val_loss']} at step {point}; lower --lr-factor")
        with open(args.out / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        save_run(run)


def add_flops(n: float) -> None:
    with flops_done.get_lock():
        flops_done.value += n


def begin_worker(n_threads: int, shared) -> None:
    """Set up a worker process. shared: the FLOPs done by all workers."""
    global flops_done
    flops_done = shared
    torch.set_num_threads(n_threads)
    keep_memory()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # after Ctrl-C the main process alone prints a message


@contextmanager
def workers(n: int):
    """Yield a pool of n processes that share the cores, and the FLOPs that they have done, in shared memory.

    After an error, all processes are terminated."""
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


def measure_speeds(all_flags: list[list[str]], n_workers: int) -> list[dict]:
    """Return `measure_speed` of each width's flags, with as many in parallel as in the sweep itself."""
    with workers(n_workers) as (pool, _):
        return list(pool.map(measure_speed, all_flags))


def train_all(jobs: list[tuple[list[str], list[int]]], total_flops: float, n_workers: int) -> None:
    """Train every job (flags, points) in this order, n_workers in parallel, with a bar of the FLOPs done."""
    with workers(n_workers) as (pool, shared):
        waiting = {pool.submit(train_one, flags, points) for flags, points in jobs}
        with progress_bar(total=total_flops, unit="FLOP", unit_scale=True) as bar:
            while waiting:
                done, waiting = wait(waiting, timeout=0.5)
                for future in done:
                    future.result()
                bar.update(shared.value - bar.n)
