"""What is a calculator worth to a small model? Three models that answer in five ways, with three seeds.

    python -m results.tool_loop --out results/tool_loop.json          45 minutes of one core

evaluation/tool_loop.py explains the questions and the ways. The models of a seed have the same shape and
learn from the same questions: one to write an expression for the calculator, one to answer directly, both in
the same number of steps. A text with an expression has about three times as many tokens to learn from, so a
third model learns to answer directly in three times as many steps. All are tested on questions that none has
seen. Seeds that are in the file already are kept.
"""

import argparse
from pathlib import Path

from evaluation.small_runs import mean_and_range
from evaluation.tool_loop import study
from formats import command
from results.keep import Ended

SEEDS = (0, 1, 2)


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--steps", type=command.count, default=1000, help="steps of training of a model (default %(default)s)"
    )
    add("--problems", type=command.count, default=300, help="questions per seed (default %(default)s)")
    out = Path("results/tool_loop.json")
    add("--out", type=command.new_file, default=out, help="file for the figures (default %(default)s)")
    args = parser.parse_args(argv)

    made_with = {"steps": args.steps, "problems": args.problems}
    about = {"command": "python -m results.tool_loop", **made_with}
    ended = Ended(args.out, about, rows="seeds", same=made_with)
    for seed in SEEDS:
        if ended.has(seed=seed):
            continue
        shares, examples = study(seed, args.steps, args.problems, longer=3)
        ended.add({"seed": seed, "shares": shares, "examples": examples})
        print(f"seed {seed}:", ", ".join(f"{name} {share:.1%}" for name, share in shares.items()), flush=True)
    for name in ended.rows[0]["shares"]:
        print(f"{name:23} {mean_and_range([row['shares'][name] for row in ended.rows], '.1%')}")


if __name__ == "__main__":
    command.run(main)
