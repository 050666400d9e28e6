"""How near to the exact frontier of reward and KL do the methods come? Two betas and three seeds each.

    python -m results.frontier --out results/frontier.json        half an hour on two cores

The task is the Markov chain of posttraining/frontier.py, whose optimum is known at every KL. Each run is one
of train.py with its defaults, which for the on-policy methods are 60 steps of 256 completions. Reward and KL
of the trained model are exact: they are summed over all 65,536 sequences.

    share      the gain over the reference (reward 2), of the largest gain that the run's own KL allows
    outside    the probability that a sequence has a token that the chain lacks

Runs that are in the file already are kept, so --only can add methods. The figure is written beside the file.
"""

import argparse
import contextlib
import io
import multiprocessing
import statistics
import tempfile
from pathlib import Path

import torch

import train
from formats import command
from formats.open_model import open_model
from posttraining import frontier
from results.keep import Ended

METHODS = {  # the task, its settings, and the betas
    "PPO": ("ppo", ["method=ppo"], (1.0, 0.5)),
    "GRPO": ("ppo", ["method=grpo"], (1.0, 0.5)),
    "RLOO": ("ppo", ["method=rloo"], (1.0, 0.5)),
    "DPO": ("dpo", ["method=dpo"], (1.0, 0.5)),
    "IPO": ("dpo", ["method=ipo"], (0.2, 0.1)),  # tau, of another scale
    "KTO": ("dpo", ["method=kto"], (1.0, 0.5)),
    "online DPO": ("online_dpo", ["preferred=higher"], (1.0, 0.5)),
    "online DPO, drawn": ("online_dpo", ["preferred=drawn"], (1.0, 0.5)),
}
LEARNING_RATES = {"KTO": 1e-3}  # of methods whose rate is not the default, which is 2.8e-3 for DPO
SEEDS = (0, 1, 2)


def run(job: tuple[str, float, int, Path]) -> dict:
    """Train one method with one beta and one seed, and return a row with its exact reward and KL.

    job: the method, beta, the seed and the folder for tokenised data.
    """
    name, beta, seed, cache = job
    torch.set_num_threads(1)
    task, settings, _ = METHODS[name]
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        flags = ["--model", task, "--seed", seed, "--set", *settings, f"beta={beta}"]
        flags += ["--out", out, "--cache", cache, "--eval-every", 10_000]
        flags += ["--lr", LEARNING_RATES[name]] if name in LEARNING_RATES else []
        code = train.main([str(flag) for flag in flags])
        if code != 0:
            raise ValueError(f"{name}, beta {beta}, seed {seed}: train.py ended with exit code {code}")
        reward, kl, outside = frontier.exact_value(open_model(Path(out) / "model").eval())
    share = frontier.share_of_gain(reward, kl)
    row = {"method": name, "beta": beta, "seed": seed, "reward": reward, "kl": kl, "share": share}
    return row | {"outside": outside}


def print_table(rows: list[dict]) -> None:
    """Print a line for each method and beta: the means over the seeds, and the range of the share."""
    print(f"{'method':17} {'beta':>5} {'reward':>7} {'KL':>7} {'share of the gain':>26}")
    for name, beta in dict.fromkeys((row["method"], row["beta"]) for row in rows):
        own = [row for row in rows if (row["method"], row["beta"]) == (name, beta)]
        reward, kl, share = (statistics.mean(row[key] for row in own) for key in ("reward", "kl", "share"))
        least, most = min(row["share"] for row in own), max(row["share"] for row in own)
        print(f"{name:17} {beta:5g} {reward:7.3f} {kl:7.3f} {share:8.1%} ({least:.1%} to {most:.1%})")


def points(rows: list[dict]) -> list[tuple[str, float, float]]:
    """Return (label, reward, KL) of each run, where all runs of a method have one label."""
    labels = {}
    for name, (_, _, betas) in METHODS.items():
        unit = "tau" if name == "IPO" else "beta"
        labels[name] = f"{name}, {unit} " + " and ".join(f"{beta:g}" for beta in betas)
    return [(labels[row["method"]], row["reward"], row["kl"]) for row in rows]


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, out = parser.add_argument, Path("results/frontier.json")
    add("--only", nargs="+", choices=METHODS, default=list(METHODS), help="these methods (default: all)")
    add("--workers", type=command.count, default=2, help="runs at a time (default %(default)s)")
    cache = Path("cache")
    add("--cache", type=command.path, default=cache, help="folder for tokenised data (default %(default)s)")
    add("--out", type=command.new_file, default=out, help="file for the figures, JSON (default %(default)s)")
    args = parser.parse_args(argv)

    ended = Ended(args.out, {"command": "python -m results.frontier"}, rows="runs")
    jobs = [
        (name, beta, seed, args.cache)
        for name in args.only
        for beta in METHODS[name][2]
        for seed in SEEDS
        if not ended.has(method=name, beta=beta, seed=seed)
    ]
    with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
        for row in pool.imap(run, jobs):
            ended.add(row)
            print_table([row])
    # As in METHODS, and from the largest beta.
    rows = sorted(ended.rows, key=lambda row: (list(METHODS).index(row["method"]), -row["beta"], row["seed"]))
    print_table(rows)
    frontier.draw(args.out.with_suffix(".png"), points(rows))


if __name__ == "__main__":
    command.run(main)
