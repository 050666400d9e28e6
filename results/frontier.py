"""Where are the methods under the exact frontier of reward and KL? Two betas and three seeds each.

    python -m results.frontier --out results/frontier.json        half an hour on two cores

The task is the Markov chain of posttraining/frontier.py, whose optimum is known at every KL. Each run is one
`train.py` with its defaults, for the on-policy methods 60 steps of 256 completions. Reward and KL of what it
leaves are exact, summed over all 65,536 sequences. The share is of the gain over the reference (reward 2)
that is possible at the run's own KL; outside is the probability that a sequence has a token that the chain
lacks. Runs that are in the file already are kept, so that methods can be added by --only. Writes the figure
beside the file.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import statistics
import tempfile
from pathlib import Path

import torch

import train
from engine import cpu
from formats.atomic import replace_file
from formats.open_model import open_model
from posttraining import frontier

METHODS = {  # the task and its settings; betas
    "PPO": ("ppo", ["method=ppo"], (1.0, 0.5)),
    "GRPO": ("ppo", ["method=grpo"], (1.0, 0.5)),
    "RLOO": ("ppo", ["method=rloo"], (1.0, 0.5)),
    "DPO": ("dpo", ["method=dpo"], (1.0, 0.5)),
    "IPO": ("dpo", ["method=ipo"], (0.2, 0.1)),  # tau, of another scale
    "KTO": ("dpo", ["method=kto"], (1.0, 0.5)),
    "online DPO": ("online_dpo", ["preferred=higher"], (1.0, 0.5)),
    "online DPO, drawn": ("online_dpo", ["preferred=drawn"], (1.0, 0.5)),
}
LEARNING_RATES = {"KTO": 1e-3}  # where it is not the default, which is 2.8e-3 for DPO
SEEDS = (0, 1, 2)


def run(job: tuple[str, float, int, Path]) -> dict:
    """Train one method with one beta and one seed, and return where it ends."""
    name, beta, seed, cache = job
    torch.set_num_threads(1)
    task, settings, _ = METHODS[name]
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        flags = ["--model", task, "--seed", seed, "--set", *settings, f"beta={beta}"]
        flags += ["--out", out, "--cache", cache, "--eval-every", 10_000]
        flags += ["--lr", LEARNING_RATES[name]] if name in LEARNING_RATES else []
        code = train.main([str(flag) for flag in flags])
        assert code == 0, f"{name}, beta {beta}, seed {seed}: exit code {code}"
        reward, kl, outside = frontier.exact_value(open_model(Path(out) / "model").eval())
    share = frontier.share_of_gain(reward, kl)
    row = {"method": name, "beta": beta, "seed": seed, "reward": reward, "kl": kl, "share": share}
    return row | {"outside": outside}


def print_table(rows: list[dict]) -> None:
    """Print mean and range over the seeds."""
    print(f"{'method':17} {'beta':>5} {'reward':>7} {'KL':>7} {'share of the gain':>26}")
    for name, beta in dict.fromkeys((row["method"], row["beta"]) for row in rows):
        own = [row for row in rows if (row["method"], row["beta"]) == (name, beta)]
        reward, kl, share = (statistics.mean(row[key] for row in own) for key in ("reward", "kl", "share"))
        least, most = min(row["share"] for row in own), max(row["share"] for row in own)
        print(f"{name:17} {beta:5g} {reward:7.3f} {kl:7.3f} {share:8.1%} ({least:.1%} to {most:.1%})")


def points(rows: list[dict]) -> list[tuple[str, float, float]]:
    """Return (label, reward, KL) of each run, with one label for all runs of a method."""
    labels = {}
    for name, (_, _, betas) in METHODS.items():
        unit = "tau" if name == "IPO" else "beta"
        labels[name] = f"{name}, {unit} " + " and ".join(f"{beta:g}" for beta in betas)
    return [(labels[row["method"]], row["reward"], row["kl"]) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS), help="these methods")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time (default 2)")
    parser.add_argument("--cache", type=Path, default=Path("cache"))
    parser.add_argument("--out", type=Path, default=Path("results/frontier.json"))
    args = parser.parse_args()

    rows = json.loads(args.out.read_text(encoding="utf-8"))["runs"] if args.out.exists() else []
    known = {(row["method"], row["beta"], row["seed"]) for row in rows}
    jobs = [
        (name, beta, seed, args.cache) for name in args.only for beta in METHODS[name][2] for seed in SEEDS
    ]
    about = {"command": "python -m results.frontier", "cpu": cpu.name(), "torch": torch.__version__}
    with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
        for row in pool.imap(run, [job for job in jobs if job[:3] not in known]):
            rows.append(row)
            with replace_file(args.out) as new:
                new.write_text(json.dumps(about | {"runs": rows}, indent=1) + "\n", encoding="utf-8")
            print_table([row])
    rows.sort(key=lambda row: (list(METHODS).index(row["method"]), -row["beta"], row["seed"]))
    print_table(rows)
    frontier.draw(args.out.with_suffix(".png"), points(rows))


if __name__ == "__main__":
    main()
