"""The default run of each of MODELS: what it reaches, beside the guess that its log begins with.

    python -m results.defaults --out results/defaults.json                        all of them, hours
    python -m results.defaults --out results/defaults.json --names igpt --seeds 0 1 2
    python -m results.defaults --out results/defaults.json --table                print the file as a table

Every run is one of train.py in --work: it is continued if it was interrupted, and not repeated if it has
ended. The figures are written to --out after each run, and those in it are kept. Minutes are those of the
steps, with the threads that the row names, on a machine that may have been busy. A model that needs another
one, as latent_diffusion needs an autoencoder, trains it first, if there is none.
"""

import argparse
import json
from pathlib import Path

import torch

from formats import command
from results.keep import Ended
from results.training_runs import run, seconds

MODELS = (
    "gpt", "moe", "bert", "electra", "deberta", "deberta_v3", "t5", "bart", "prefix_lm", "multi_token",
    "talking_heads", "local_global", "latent", "deepseek", "linear", "minimax", "moba", "native_sparse",
    "retro", "vit", "mae", "maskfeat", "simclr", "igpt", "spectrogram", "colorize", "clip", "llava",
    "ddpm", "dit", "autoencoder_kl", "latent_diffusion", "prior", "unclip", "vae", "flow",
    "gan", "energy", "dpo", "online_dpo", "ppo", "reward",
)  # fmt: skip
RUNS = {name: ["--model", name] for name in MODELS} | {
    "pegasus": ["--model", "t5", "--task", "pegasus"],
    "translate": ["--model", "t5", "--task", "translate"],
}


def measure(work: Path, name: str, seed: int) -> dict:
    """Return the figures of a default run with a seed."""
    out = work / f"{name}-{seed}"
    last = run(out, seed, *RUNS[name], "--cache", str(work / "cache"))
    start = json.loads((out / "run.json").read_text(encoding="utf-8"))["starts"][0]
    return {
        "command": " ".join(["python train.py", *RUNS[name]]),
        "steps": last["step"],
        "minutes": seconds(out) / 60,
        "threads": torch.get_num_threads(),
        "parameters": start["n_params"],
        "loss": start["loss"],
        "guess": start["guess"],
        "held out": {key: last[key] for key in last if key.startswith("val_") or key == "bits_per_byte"},
    }


def in_a_table(rows: list[dict]) -> str:
    """Return the rows as a table of Markdown, with a line for each command: the mean over its seeds, and the
    range where there are several."""
    lines = ["| command | minutes | held out | seeds | guess |", "|---|---|---|---|---|"]
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [row for row in rows if row["name"] == name]
        figures = []
        for key in own[0]["held out"]:
            values = [row["held out"][key] for row in own]
            spread = f" ({min(values):.4g} to {max(values):.4g})" if len(own) > 1 else ""
            figures.append(f"{key.removeprefix('val_')} {sum(values) / len(values):.4g}{spread}")
        minutes = sum(row["minutes"] for row in own) / len(own)
        guess = own[0]["guess"].replace("|", "\\|")
        lines.append(
            f"| `{own[0]['command']}` | {minutes:.1f} | {'; '.join(figures)} | {len(own)} | {guess} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=command.new_file, required=True, help="file for the figures, JSON")
    add(
        "--work",
        type=command.path,
        default=Path("runs/defaults"),
        help="folder of runs (default %(default)s)",
    )
    add("--names", nargs="+", choices=RUNS, default=list(RUNS), help="runs to make (default: all)")
    add("--seeds", type=int, nargs="+", default=[0], help="seeds (default 0)")
    add("--table", action="store_true", help="make no run, and print what the file holds as a table")
    args = parser.parse_args(argv)

    ended = Ended(args.out)
    if args.table and not ended.rows:
        raise ValueError(f"--table: there are no rows in {args.out}; make runs first, without --table")
    for seed in args.seeds if not args.table else ():
        for name in args.names:
            if not ended.has(name=name, seed=seed):
                ended.add({"name": name, "seed": seed} | measure(args.work, name, seed))
    print(in_a_table(ended.rows))


if __name__ == "__main__":
    command.run(main)
