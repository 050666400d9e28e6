"""What does it take to teach a base model to answer? Adapters and classical ways on the same questions.

    python train.py --model gpt --steps 4000 --out runs/base
    python -m results.adapters --base runs/base/model --out results/adapters.json      an hour on two cores

Every run is one of train.py with the task instruct, on the built-in conversations about Python's standard
library, in rows of 256 tokens, 8 to a batch. Methods need very different learning rates. So the best rate of
each method is searched first, in steps of a factor sqrt(10) and runs of --search-steps updates, until both
neighbours of the best are worse. With this rate the method is trained for --steps updates with each of
--seeds seeds. The loss is that of held-out answers, about modules that the base has not seen. The rate is
chosen by the same loss, and seed 0 is both in the search and in the result.

    gain      (loss of the base - loss after), as a share of the mean gain of full fine-tuning
    seconds   of an update (forward, backward, optimizer), all methods in turn in one process: the median over
              --rounds, and the ratio to full fine-tuning
    memory    bytes of the weights, and the most that an update holds besides: activations, gradients,
              optimizer state
    file      bytes of adapter_model.safetensors, or of the model

The figures and the answers of every run are written to --out, and a plot beside it. Runs that are in it
already, from the same machine, are not repeated.
"""

import argparse
import contextlib
import math
import multiprocessing
import os
import statistics
import tempfile
from functools import partial
from pathlib import Path

import torch

import train
from engine import cpu
from engine.options import parse_arguments
from engine.run import prepare
from evaluation.small_runs import mean_and_range
from formats import command
from formats.figures import load_pyplot, save_figure
from formats.json_file import read_json, write_json
from posttraining.nf4 import n_bytes
from results.in_turn import measure_in_turn, peak_memory, seconds
from results.training_runs import logged

# The flags of each method, and the learning rate at which the search for the best begins.
METHODS = {
    "full": (["--train", "all"], 1e-3),
    "head alone": (["--train", "head"], 1e-3),
    "last layer": (["--train", "last:1"], 1e-3),
    "LoRA, r 1": (["--adapter", "lora", "--set", "r=1"], 1e-2),
    "LoRA, r 4": (["--adapter", "lora", "--set", "r=4"], 1e-2),
    "LoRA, r 16": (["--adapter", "lora"], 1e-2),
    "LoRA, r 64": (["--adapter", "lora", "--set", "r=64"], 1e-2),
    "DoRA, r 16": (["--adapter", "dora"], 1e-2),
    "IA3": (["--adapter", "ia3"], 10**-1.5),
    "QLoRA, r 16": (["--adapter", "qlora"], 1e-2),
    "PiSSA, r 16": (["--adapter", "pissa"], 1e-2),
}


def flags(name: str, base: str, steps: int, lr: float, seed: int, out: str) -> list[str]:
    """Return the flags of train.py for a run."""
    run = ["--model", "gpt", "--init-from", base, "--task", "instruct", "--out", out, "--dtype", "float32"]
    run += ["--steps", str(steps), "--lr", str(lr), "--seed", str(seed), "--eval-every", str(steps)]
    return run + METHODS[name][0]


def run(name: str, base: str, steps: int, lr: float, seed: int) -> dict:
    """Return the losses before and after a training run, its answers, and the bytes that it has saved."""
    with (
        tempfile.TemporaryDirectory() as out,
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        code = train.main(flags(name, base, steps, lr, seed, out))
        if code not in (0, 1):
            raise ValueError(f"{name}, learning rate {lr}: train.py ended with exit code {code}")
        losses = [row["val_loss"] for row in logged(Path(out)) if "val_loss" in row]
        if code == 1:  # the losses were not finite
            return {"name": name, "lr": lr, "seed": seed, "before": losses[0], "after": math.inf}
        # The answers of the last evaluation, which follow its title.
        text = (Path(out) / "samples.txt").read_text(encoding="utf-8")
        samples = text.rpartition("=== ")[2].partition("\n")[2]
        model = Path(out) / "model"
        adapter = model / "adapter_model.safetensors"
        file = adapter if adapter.exists() else model / "model.safetensors"
        result = {"name": name, "lr": lr, "seed": seed, "before": losses[0], "after": losses[-1]}
        return result | {"file": file.stat().st_size, "samples": samples.strip()}


def search(job: tuple[str, str, int]) -> dict:
    """Return the best learning rate of a method, and the losses of all rates that were tried.

    job: the method, the directory of the base, updates of a run.
    """
    torch.set_num_threads(1)
    name, base, steps = job
    tried: dict[float, float] = {}  # the loss by log10 of the rate

    def loss(k: float) -> float:
        if k not in tried:
            tried[k] = run(name, base, steps, 10**k, seed=0)["after"]
        return tried[k]

    best = math.log10(METHODS[name][1])
    while True:
        lower = min((best - 0.5, best, best + 0.5), key=loss)
        if lower == best:
            break
        best = lower
    return {"name": name, "lr": 10**best, "tried": {f"{10**k:.2g}": tried[k] for k in sorted(tried)}}


def repeat(job: tuple[str, str, int, float, int]) -> dict:
    """Return `run` of these arguments, with one thread."""
    torch.set_num_threads(1)
    return run(*job)


def costs(base: str, rounds: int) -> list[dict]:
    """Return the trained parameters, the memory and the time of an update of each method."""
    torch.set_num_threads(1)
    runs, result = {}, []
    with tempfile.TemporaryDirectory() as out, open(os.devnull, "w", encoding="utf-8") as nowhere:
        for name in METHODS:
            with contextlib.redirect_stdout(nowhere):
                argv = flags(name, base, 1, 1e-5, 0, str(Path(out) / name))
                runs[name] = prepare(parse_arguments(argv))

        def step(name: str) -> None:
            this = runs[name]
            loss, _ = this.loss(this.batches.peek()[0].batch)
            loss.backward()
            for optimizer in this.optimizers:
                optimizer.step()
            this.model.zero_grad(set_to_none=True)

        for name, this in runs.items():
            row = {"name": name, "trained": this.sizes.n_trained, "parameters": this.sizes.n_params}
            row |= {"weights": n_bytes(this.model), "step": peak_memory(partial(step, name))}
            result.append(row)
        times = measure_in_turn({name: partial(seconds, partial(step, name)) for name in METHODS}, rounds)
    for row in result:
        ratios = [a / b for a, b in zip(times[row["name"]], times["full"], strict=True)]
        row |= {"seconds": statistics.median(times[row["name"]]), "ratio": statistics.median(ratios)}
        row |= {"ratio_range": [min(ratios), max(ratios)]}
    return result


def gains(results: dict) -> dict[str, list[float]]:
    """Return for each method the gains of its seeds, as shares of the mean gain of full fine-tuning."""
    # The base of QLoRA is in 4 bits, but its gain, too, is measured from the base in full precision.
    before = next(r["before"] for r in results["runs"] if r["name"] == "full")
    gained: dict[str, list[float]] = {}
    for r in results["runs"]:
        gained.setdefault(r["name"], []).append(before - r["after"])
    whole = statistics.mean(gained["full"])
    return {name: [gain / whole for gain in values] for name, values in gained.items()}


def plot(results: dict, path: Path) -> None:
    """Draw the gain over the share that is trained, and over the memory of an update."""
    pyplot = load_pyplot()
    from matplotlib.ticker import FuncFormatter

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.4), layout="constrained", sharey=True)
    costs = {row["name"]: row for row in results["costs"]}
    for i, (name, values) in enumerate(gains(results).items()):
        cost, mean = costs[name], statistics.mean(values)
        spread = [[mean - min(values)], [max(values) - mean]]
        color = f"C{i}" if i < 10 else "black"
        marker = {"color": color, "marker": "osD^vP*Xph8"[i], "markersize": 7, "capsize": 3}
        left.errorbar(cost["trained"] / cost["parameters"], mean, spread, **marker)
        memory = (cost["weights"] + cost["step"]) / 1e6
        right.errorbar(memory, mean, spread, label=name, linestyle="", **marker)
    percent = FuncFormatter(lambda share, _: f"{100 * share:g}%")
    left.set(xscale="log", xlabel="share of the parameters that is trained")
    left.set_ylabel("gain in held-out loss, of that of full fine-tuning")
    left.xaxis.set_major_formatter(percent)
    left.yaxis.set_major_formatter(percent)
    right.set(xlabel="weights and the most a step allocates (MB)")
    for axes in (left, right):
        axes.axhline(1, color="black", linestyle=":", linewidth=1)
        axes.grid(alpha=0.3)
        axes.margins(x=0.1)
    figure.legend(loc="outside right center", fontsize=9)
    save_figure(figure, path)


def print_table(results: dict) -> None:
    """Print a line for each method."""
    shares = gains(results)
    print(f"{'':14} {'trained':>9} {'share':>8} {'rate':>7} {'loss':>26} {'gain':>6}", end="")
    print(f" {'step':>6} {'MB':>6} {'file':>10}")
    for cost in results["costs"]:
        name = cost["name"]
        runs = [r for r in results["runs"] if r["name"] == name]
        loss = mean_and_range([r["after"] for r in runs], ".4f")
        print(f"{name:14} {cost['trained']:9,} {cost['trained'] / cost['parameters']:8.2%}", end="")
        print(f" {runs[0]['lr']:7.2g} {loss:>26} {statistics.mean(shares[name]):6.1%}", end="")
        print(f" {cost['ratio']:5.2f}x {(cost['weights'] + cost['step']) / 1e6:6.1f} {runs[0]['file']:10,}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = command.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    base = "model/ of a run of train.py --model gpt"
    add("--base", type=command.filled, required=True, metavar="DIR", help=base)
    add("--steps", type=command.count, default=300, help="updates of a run (default %(default)s)")
    search = "updates of a run that tries a learning rate (default %(default)s)"
    add("--search-steps", type=command.count, default=150, help=search)
    add("--seeds", type=command.count, default=3, help="runs of each method (default %(default)s)")
    add("--rounds", type=command.count, default=21, help="rounds of measurement (default %(default)s)")
    add("--jobs", type=command.count, default=2, help="runs at a time, one thread each (default %(default)s)")
    add("--out", type=command.new_file, required=True, help="file for the figures, JSON; a plot is beside it")
    return parser.parse_args(argv)


def started(args: argparse.Namespace) -> dict:
    """Return what --out holds, or nothing yet. Raises ValueError if it is of another machine or other
    steps."""
    about = {"command": "python -m results.adapters --base runs/base/model --out results/adapters.json"}
    about |= {"cpu": cpu.name(), "torch": torch.__version__}
    about |= {"steps": args.steps, "search_steps": args.search_steps}
    if not args.out.exists():
        return about | {"search": [], "runs": [], "costs": []}
    results = read_json(args.out, "a file of figures")
    for name in ("cpu", "torch", "steps", "search_steps"):
        if results.get(name) != about[name]:
            raise ValueError(
                f"{args.out} holds runs made with {name} {results.get(name)!r}, and this call has "
                f"{about[name]!r}: name another file, or remove this one"
            )
    return results


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    results = started(args)
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        # The best learning rates.
        found = [r["name"] for r in results["search"]]
        jobs = [(name, args.base, args.search_steps) for name in METHODS if name not in found]
        for result in pool.imap(search, jobs):
            print(f"{result['name']:14} learning rate {result['lr']:.2g} of {result['tried']}", flush=True)
            results["search"].append(result)
            write_json(args.out, results, indent=1)

        # The runs with these rates.
        lr = {r["name"]: r["lr"] for r in results["search"]}
        done = {(r["name"], r["seed"]) for r in results["runs"]}
        every = [(name, seed) for seed in range(args.seeds) for name in METHODS]
        jobs = [(n, args.base, args.steps, lr[n], seed) for n, seed in every if (n, seed) not in done]
        for result in pool.imap(repeat, jobs):
            print(f"{result['name']:14} seed {result['seed']}: {result['after']:.4f}", flush=True)
            results["runs"].append(result)
            write_json(args.out, results, indent=1)
    if not results["costs"]:
        results["costs"] = costs(args.base, args.rounds)
        write_json(args.out, results, indent=1)
    plot(results, args.out.with_suffix(".png"))
    print_table(results)


if __name__ == "__main__":
    command.run(main)
