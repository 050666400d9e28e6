"""What selection adds to a model that is seldom right: programs for examples, three seeds.

    python -m results.generate_and_verify --out results/generate_and_verify.json   half an hour a seed

For each seed, evaluation/generate_and_verify.py begins anew: it draws programs and problems, and trains a
model and two verifiers, one of which learns from labels that were exchanged at random. Samples of the grammar
take the place of the model's, with the same selection, to show what the model is worth.

    pass@k    the share of problems with a right program among k samples
    n@k       the share that is solved by the n programs that a rule selects from k samples, at most pass@k

Shown are the mean and the range over the seeds. Seeds that are in the file already are kept; a file that was
made with other flags is refused. The curves are drawn beside it.
"""

import argparse
import statistics
from pathlib import Path

from evaluation.generate_and_verify import RULES, SUBMISSIONS, share_solved, study, table
from formats import command
from results import seeds
from results.keep import Ended
from scaling.pictures import load_pyplot, save_figure

SEEDS = (0, 1, 2)
KS = (1, 10, 100, 1000)


def figures(rows: list[dict]) -> dict:
    """Return pass@k, n@k of each rule, and two shares of the filter: of samples that it removes, and of wrong
    programs among the rest. rows: the problems of one seed."""
    solved = {
        rule: {n: {k: share_solved(rows, rule, k, n) for k in KS if rule in rows[0]["ranks"][k]}
               for n in (1, SUBMISSIONS)}
        for rule in RULES if rule in rows[0]["ranks"][KS[0]]
    }  # fmt: skip
    n_passing = sum(row["passing"] for row in rows)
    wrong = sum(row["passing"] - row["right"] for row in rows) / max(1, n_passing)
    removed = 1 - n_passing / sum(row["samples"] for row in rows)
    passes = {k: statistics.mean(row["pass_at"][k] for row in rows) for k in KS}
    return {"pass_at": passes, "solved": solved, "removed": removed, "wrong_of_the_rest": wrong}


def draw(rows: list[dict], path: Path) -> None:
    """Draw the share solved over k, with one submission and with ten: mean and range over the seeds."""
    pyplot = load_pyplot()
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained", sharey=True)
    for n, axes in zip((1, SUBMISSIONS), panels, strict=True):
        lines = {"pass@k: at least one is right": [row["model"]["pass_at"] for row in rows]}
        lines |= {rule: [row["model"]["solved"][rule][str(n)] for row in rows]
                  for rule in rows[0]["model"]["solved"]}  # fmt: skip
        rule = "filter, cluster"
        lines[f"{rule}; no model"] = [row["grammar"]["solved"][rule][str(n)] for row in rows]
        for i, (name, curves) in enumerate(lines.items()):
            ks = [int(k) for k in curves[0]]
            style = {"color": "black", "linestyle": "--"} if i == 0 else {"color": f"C{i}", "marker": "."}
            shares = [[curve[str(k)] for k in ks] for curve in curves]
            seeds.draw(axes, ks, shares, alpha=0.1, label=name, **style)
        title = "one submission" if n == 1 else f"{n} submissions"
        axes.set(xscale="log", xlabel="samples k", ylabel="problems solved", title=title)
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    save_figure(figure, path, dpi=120)


def print_table(rows: list[dict]) -> None:
    """Print n@k of each rule: the mean and the range over the seeds."""
    print(f"{'source and rule':36} {'k':>5} {'1 submission':>22} {f'{SUBMISSIONS} submissions':>22}")
    for source in ("model", "grammar"):
        for rule, by_n in rows[0][source]["solved"].items():
            for k in by_n["1"]:
                line = f"{source + ': ' + rule:36} {k:>5}"
                for n in ("1", str(SUBMISSIONS)):
                    values = [row[source]["solved"][rule][n][k] for row in rows]
                    line += f" {statistics.mean(values):8.1%} ({min(values):.0%}-{max(values):.0%})".ljust(23)
                print(line)


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    steps, out = "updates of each verifier (default %(default)s)", Path("results/generate_and_verify.json")
    add("--steps", type=command.count, default=3000, help="updates of the model (default %(default)s)")
    add("--verifier-steps", type=command.count, default=300, help=steps)
    add("--problems", type=command.count, default=60, help="problems for each seed (default %(default)s)")
    add("--out", type=command.new_file, default=out, help="file for the figures, JSON (default %(default)s)")
    args = parser.parse_args(argv)

    made_with = {"steps": args.steps, "verifier_steps": args.verifier_steps, "problems": args.problems}
    about = {"command": "python -m results.generate_and_verify", **made_with}
    ended = Ended(args.out, about, rows="seeds", same=made_with)
    for seed in SEEDS:
        if ended.has(seed=seed):
            continue
        result = study(seed, args.steps, args.verifier_steps, args.problems, KS)
        print(f"seed {seed}\n{table(result, KS)}", flush=True)
        ended.add({"seed": seed} | {source: figures(result[source]) for source in ("model", "grammar")})
    print_table(ended.rows)
    draw(ended.rows, args.out.with_suffix(".png"))


if __name__ == "__main__":
    command.run(main)
