"""What selection adds to a model that is seldom right: programs for examples, three seeds.

    python -m results.generate_and_verify --out results/generate_and_verify.json   half an hour a seed

Each seed is evaluation/generate_and_verify.py from the start: programs, a model, two verifiers (one learns
from labels that were exchanged at random), problems. Samples of the grammar in place of the model's show what
the model is worth, with the same selection. Figures are shares of all problems, then mean and range over the
seeds. pass@k is the share of problems with a right program among k samples: no selection of n from k solves
more. Seeds that are in the file already, made with the same flags, are kept. The curves are drawn beside it.
"""

import argparse
import statistics
from pathlib import Path

from evaluation.generate_and_verify import RULES, SUBMISSIONS, share_solved, study, table
from formats.atomic import replace_file
from results.keep import Ended

SEEDS = (0, 1, 2)
KS = (1, 10, 100, 1000)


def figures(rows: list[dict]) -> dict:
    """Return pass@k, n@k of each rule, and what the filter does, of the problems of one seed."""
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


def draw(seeds: list[dict], path: Path) -> None:
    """Draw the share solved over k, with one submission and with ten: mean and range over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained", sharey=True)
    for n, axes in zip((1, SUBMISSIONS), panels, strict=True):
        lines = {"pass@k: at least one is right": [seed["model"]["pass_at"] for seed in seeds]}
        lines |= {rule: [seed["model"]["solved"][rule][str(n)] for seed in seeds]
                  for rule in seeds[0]["model"]["solved"]}  # fmt: skip
        rule = "filter, cluster"
        lines[f"{rule}; no model"] = [seed["grammar"]["solved"][rule][str(n)] for seed in seeds]
        for i, (name, curves) in enumerate(lines.items()):
            ks = [int(k) for k in curves[0]]
            values = [[curve[str(k)] for curve in curves] for k in ks]
            style = {"color": "black", "linestyle": "--"} if i == 0 else {"color": f"C{i}", "marker": "."}
            axes.plot(ks, [statistics.mean(x) for x in values], label=name, **style)
            axes.fill_between(ks, [min(x) for x in values], [max(x) for x in values], alpha=0.1,
                              color=style["color"])  # fmt: skip
        title = "one submission" if n == 1 else f"{n} submissions"
        axes.set(xscale="log", xlabel="samples k", ylabel="problems solved", title=title)
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    with replace_file(path) as new:
        figure.savefig(new, format="png", dpi=120)


def print_table(seeds: list[dict]) -> None:
    """Print mean and range over the seeds, of n@k with the most samples that a rule has."""
    print(f"{'source and rule':36} {'k':>5} {'1 submission':>22} {f'{SUBMISSIONS} submissions':>22}")
    for source in ("model", "grammar"):
        for rule, by_n in seeds[0][source]["solved"].items():
            for k in by_n["1"]:
                row = f"{source + ': ' + rule:36} {k:>5}"
                for n in ("1", str(SUBMISSIONS)):
                    values = [seed[source]["solved"][rule][n][k] for seed in seeds]
                    row += f" {statistics.mean(values):8.1%} ({min(values):.0%}-{max(values):.0%})".ljust(23)
                print(row)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--steps", type=int, default=3000, help="of training the model (default %(default)s)")
    add("--verifier-steps", type=int, default=300, help="of each verifier (default %(default)s)")
    add("--problems", type=int, default=60, help="per seed (default %(default)s)")
    add("--out", type=Path, default=Path("results/generate_and_verify.json"),
        help="figures (default %(default)s)")  # fmt: skip
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
    main()
