"""What is a calculator worth to a small model? Four ways to answer (evaluation/tool_loop.py), three seeds.

    python -m results.tool_loop --out results/tool_loop.json          45 minutes of one core

Both models of a seed have the same shape, learn from the same questions for the same number of steps, and are
tested on questions that neither has seen. A text with an expression has about three times as many tokens to
learn from as an answer alone, so there is a third one: direct, with three times as many steps. Seeds that are
in the file already, made with the same flags, are kept.
"""

import argparse
import statistics
from pathlib import Path

from evaluation.tool_loop import study
from results.keep import Ended

SEEDS = (0, 1, 2)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--steps", type=int, default=1000, help="of training each model (default %(default)s)")
    add("--problems", type=int, default=300, help="questions per seed (default %(default)s)")
    add("--out", type=Path, default=Path("results/tool_loop.json"), help="figures (default %(default)s)")
    args = parser.parse_args(argv)

    made_with = {"steps": args.steps, "problems": args.problems}
    about = {"command": "python -m results.tool_loop", **made_with}
    ended = Ended(args.out, about, rows="seeds", same=made_with)
    for seed in SEEDS:
        if ended.has(seed=seed):
            continue
        shares, examples = study(seed, args.steps, args.problems, longer=3)
        ended.add({"seed": seed, "shares": shares, "examples": examples})
        print(
            f"seed {seed}: " + ", ".join(f"{name} {share:.1%}" for name, share in shares.items()), flush=True
        )
    for name in ended.rows[0]["shares"]:
        values = [row["shares"][name] for row in ended.rows]
        print(f"{name:22} {statistics.mean(values):6.1%} ({min(values):.1%} to {max(values):.1%})")


if __name__ == "__main__":
    main()
