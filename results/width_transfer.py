"""Does the best learning rate change when a model gets wider, and does width transfer prevent it?

    python -m results.width_transfer --out results/width_transfer.json        half an hour on two cores

A GPT (4 layers, heads of 32, the inner width of the MLP 11/4 of the model's) has width 64, 128 or 256. Each
is trained at six learning rates a factor of 2 apart, with two seeds of weights and batches, on the bytes of
the source text of Python's library (8 rows of 128 per update), in three ways: without width transfer, with
--mup 128 and with --mup 256 (engine/optim.py). The loss is that of 128 rows of held-out text at the end.
Printed are the best learning rate by the mean over the seeds, and that of the lowest point of a parabola
through the best mean and its two neighbours.

The figures of every run are written to --out, and a picture beside it: means, and bars from the smallest to
the largest of the seeds. Started again, the script skips the runs that --out holds.
"""

import argparse
import itertools
import math
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from torch import nn

import data.text
import gpt
from data.rows import Loader
from engine import contract, cpu
from engine.optim import make_optimizers, set_learning_rate, transfer_width, width_factors
from formats import command
from formats.figures import load_pyplot, save_figure
from formats.json_file import read_json, write_json
from formats.progress import progress_bar

WIDTHS = (64, 128, 256)
BASES = (None, 128, 256)  # of --mup
SEEDS = (0, 1)
RATES = [2.0**-e for e in range(11, 5, -1)]
HEAD = 32  # width of a head
T, BATCH = 128, 8  # tokens of a row, rows of an update
COMMAND = "python -m results.width_transfer --out results/width_transfer.json"


def run(width: int, base: int | None, lr: float, seed: int, steps: int, cache: Path) -> float | None:
    """Train one model with width transfer from the width `base`, or without if that is None. Return its
    validation loss, or None if that is not finite."""
    # The model, its rescaled weights, and its optimizer.
    torch.set_num_threads(1)
    dataset = data.text.as_rows(data.text.prepare("stdlib", "bytes", cache), T)
    torch.manual_seed(seed)
    n_heads = width // HEAD
    config = gpt.Config(4, n_heads, width, width * 11 // 4, n_kv_heads=n_heads // 2, qk_norm=True)
    model = gpt.GPT(contract.fit(config, dataset, T))
    args = argparse.Namespace(optimizer="adamw", lr=lr, weight_decay=0.1, mup=base, device="cpu")
    args.steps, args.warmup, args.schedule, args.schedule_from = steps, steps // 10, "cosine", 0
    if base:
        transfer_width(model, base, width_factors)
    (optimizer,) = make_optimizers(model, args)

    # Train it.
    loader = Loader(dataset.train, seed)
    for step in range(steps):
        set_learning_rate([optimizer], step, args)
        batch = gpt.make_batch(loader.read(step * BATCH, BATCH), model.config, None)
        loss, _ = model.loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.zero_grad()

    # Measure it on 128 held-out rows, 16 at a time.
    parts = []
    for first in range(0, 128, 16):
        rows = [dataset.val[i] for i in range(first, first + 16)]
        with torch.no_grad():
            parts.append(model.loss(gpt.make_batch(rows, model.config, None))[0].item())
    loss = sum(parts) / len(parts)
    return loss if math.isfinite(loss) else None


def curve(results: list[dict], width: int, base: int | None) -> dict[float, list[float]]:
    """Return the losses of all seeds by learning rate, where all are finite.

    Transfer from a model's own width changes nothing, so there the runs without transfer count.
    """
    base = None if base == width else base
    found = {lr: [] for lr in RATES}
    for r in results:
        if (r["width"], r["mup"]) == (width, base):
            found[r["lr"]].append(math.inf if r["loss"] is None else r["loss"])
    return {lr: losses for lr, losses in found.items() if losses and max(losses) < math.inf}


def means(losses: dict[float, list[float]]) -> dict[float, float]:
    """Return the mean over the seeds by learning rate."""
    return {lr: sum(of_seeds) / len(of_seeds) for lr, of_seeds in losses.items()}


def lowest(losses: dict[float, float]) -> float:
    """Return the learning rate at the minimum of a parabola, over log lr, through the best point and its two
    neighbours."""
    rates = list(losses)
    middle = min(max(rates.index(min(losses, key=losses.get)), 1), len(rates) - 2)
    low, best, high = (losses[rate] for rate in rates[middle - 1 : middle + 2])
    return rates[middle] * 2 ** ((low - high) / (2 * (low - 2 * best + high)))


def draw(results: list[dict], path: Path) -> None:
    """Draw loss over learning rate: a panel for each base, a curve for each width, a star at its best."""
    pyplot = load_pyplot()
    figure, panels = pyplot.subplots(1, len(BASES), figsize=(13, 4.4), sharey=True, layout="constrained")
    for axes, base in zip(panels, BASES, strict=True):
        for width in WIDTHS:
            losses = curve(results, width, base)
            mean = means(losses)
            bars = [[abs(end(losses[lr]) - mean[lr]) for lr in mean] for end in (min, max)]
            rates = list(mean)
            line = axes.errorbar(rates, mean.values(), bars, marker=".", capsize=2, label=f"width {width}")
            best = min(mean, key=mean.get)
            axes.plot(best, mean[best], marker="*", markersize=15, color=line[0].get_color())
        axes.set_xscale("log", base=2)
        axes.set(xlabel="--lr")
        axes.set_title(f"--mup {base}" if base else "without transfer", fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    panels[0].set(ylabel="validation loss (nats per token)")
    save_figure(figure, path)


def saved_results(out: Path | None, machine: dict) -> list[dict]:
    """Return the runs that `out` holds. Raises ValueError if they are of another machine or other steps."""
    if not out or not out.exists():
        return []
    saved = read_json(out)
    if any(saved.get(key) != value for key, value in machine.items()):
        raise ValueError(f"{out} is of another machine or other steps than {machine}; name another file")
    return saved["results"]


def train_all(args: argparse.Namespace, machine: dict) -> list[dict]:
    """Return the results of all runs. Make those that args.out lacks, several at once, and save each one."""
    results = saved_results(args.out, machine)
    done = [{key: r[key] for key in r.keys() - {"loss"}} for r in results]
    runs = [
        {"width": width, "mup": base, "lr": lr, "seed": seed}
        for seed, width, base, lr in itertools.product(SEEDS, reversed(WIDTHS), BASES, RATES)
        if base != width
    ]
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(run, *r.values(), args.steps, args.cache): r for r in runs if r not in done}
        for future in progress_bar(as_completed(futures), total=len(futures), unit="run"):
            results.append(futures[future] | {"loss": future.result()})
            if args.out:
                write_json(args.out, {"command": COMMAND, **machine, "results": results}, indent=1)
    return results


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, cache, n_cores = parser.add_argument, Path("cache"), os.cpu_count()
    add("--steps", type=command.count, default=300, help="updates of a run (default %(default)s)")
    add(
        "--jobs",
        type=command.count,
        default=n_cores,
        help="runs at once, a thread each (default %(default)s)",
    )
    add("--cache", type=command.path, default=cache, help="folder for tokenised text (default %(default)s)")
    add("--out", type=command.new_file, help="write the figures as JSON, and a picture beside them")
    args = parser.parse_args(argv)
    data.text.prepare("stdlib", "bytes", args.cache)
    machine = {"cpu": cpu.name(), "torch": torch.__version__, "steps": args.steps}
    results = train_all(args, machine)
    for base, width in itertools.product(BASES, WIDTHS):
        mean = means(curve(results, width, base))
        best = min(mean, key=mean.get)
        figures = f"best {mean[best]:.4f} at {best:.5f}, parabola's at {lowest(mean):.5f}"
        print(f"mup {base!s:4}, width {width:3}: {figures}")
    if args.out:
        draw(results, args.out.with_suffix(".png"))


if __name__ == "__main__":
    command.run(main)
