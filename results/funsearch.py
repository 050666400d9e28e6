"""Does search beat chance, and a trained proposer a fixed one? Cap sets by four methods, three seeds each.

    python -m results.funsearch --out results/funsearch.json                about 25 minutes on one core
    python -m results.funsearch --out results/funsearch.json --methods random mutation islands    5 minutes

Every search (evaluation/funsearch.py) scores the same number of different programs, of the same grammar. The
score of a program is the size of the cap set that it makes. The examples from which the trained proposer
first learns are not scored, and do not count. The best program of each search then makes cap sets of all
dimensions up to 8, which shows if what was found for one dimension works for others. Runs that are in the
file already are kept; a file with another number of evaluations is refused. The curves are drawn beside it.
"""

import argparse
import statistics
import time
from dataclasses import asdict
from pathlib import Path

from evaluation.cap_sets import BEST_KNOWN, size
from evaluation.funsearch import METHODS, search
from formats import command
from results import seeds
from results.keep import Ended
from scaling.pictures import load_pyplot, save_figure

SEEDS = (0, 1, 2)
MARKS = (100, 300, 1000, 3000, 10_000)  # evaluations of the table


def run(method: str, n: int, n_evaluations: int, seed: int) -> dict:
    """Return a row with the figures of one search."""
    began = time.process_time()
    result = search(method, n, n_evaluations, seed)
    seconds = time.process_time() - began
    figures = asdict(result) | {"best": result.best.text, "score": result.best.scores[-1]}
    sizes = {str(m): size(result.best.text, m) for m in range(3, 9)}
    return {"method": method, "n": n, "seed": seed, **figures, "sizes": sizes, "cpu_seconds": seconds}


def best_after(row: dict, n_evaluations: int) -> int:
    """Return the best score of a search after so many evaluations."""
    return max(score for at, score in row["curve"] if at <= n_evaluations)


def print_table(rows: list[dict]) -> None:
    """Print for each method the mean best score over the seeds after each of MARKS evaluations, the range of
    the last scores, and the best program with its sizes."""
    print(
        f"{'n':>2} {'method':10}"
        + "".join(f"{mark:>9}" for mark in MARKS)
        + "   range   sizes for n = 3 ... 8"
    )
    for n, method in dict.fromkeys((row["n"], row["method"]) for row in rows):
        own = [row for row in rows if (row["n"], row["method"]) == (n, method)]
        means = [statistics.mean(best_after(row, mark) for row in own) for mark in MARKS]
        ends = [row["score"] for row in own]
        best = max(own, key=lambda row: row["score"])
        print(f"{n:2} {method:10}" + "".join(f"{mean:9.1f}" for mean in means), end="")
        print(f"   {min(ends)}-{max(ends)}   {', '.join(map(str, best['sizes'].values()))}   {best['best']}")


def draw(rows: list[dict], path: Path) -> None:
    """Draw the best score over evaluations: the mean over the seeds, and their range."""
    pyplot = load_pyplot()
    dimensions = sorted({row["n"] for row in rows})
    figure, panels = pyplot.subplots(
        1, len(dimensions), figsize=(5.5 * len(dimensions), 4), layout="constrained", squeeze=False
    )
    for n, axes in zip(dimensions, panels[0], strict=True):
        for i, method in enumerate(METHODS):
            own = [row for row in rows if (row["n"], row["method"]) == (n, method)]
            if not own:
                continue
            marks = sorted({at for row in own for at, _ in row["curve"]} | {own[0]["n_evaluations"]})
            scores = [[best_after(row, mark) for mark in marks] for row in own]
            style = {"drawstyle": "steps-post", "color": f"C{i}", "label": method}
            seeds.draw(axes, marks, scores, alpha=0.15, **style)
        axes.axhline(BEST_KNOWN[n], color="grey", linestyle="--", label="best known")
        axes.set(xscale="log", xlabel="evaluations", ylabel="points", title=f"cap sets, n = {n}")
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
    save_figure(figure, path, dpi=120)


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="these methods (default: all)")
    dimensions = range(3, 9)
    add("--n", nargs="+", type=int, choices=dimensions, default=[5, 6], help="dimensions (default 5 6)")
    text = "programs that each search scores (default %(default)s)"
    add("--evaluations", type=command.count, default=10_000, help=text)
    out = Path("results/funsearch.json")
    add("--out", type=command.new_file, default=out, help="file for the figures, JSON (default %(default)s)")
    args = parser.parse_args(argv)

    about = {"command": "python -m results.funsearch", "evaluations": args.evaluations}
    ended = Ended(args.out, about, rows="runs", same=("evaluations",))
    for n in args.n:
        for seed in SEEDS:
            for method in args.methods:
                if ended.has(n=n, method=method, seed=seed):
                    continue
                row = run(method, n, args.evaluations, seed)
                print(f"n {n}, {method}, seed {seed}: {row['score']} points", flush=True)
                ended.add(row)
    rows = sorted(ended.rows, key=lambda row: (row["n"], list(METHODS).index(row["method"]), row["seed"]))
    print_table(rows)
    draw(rows, args.out.with_suffix(".png"))


if __name__ == "__main__":
    command.run(main)
