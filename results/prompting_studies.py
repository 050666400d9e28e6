"""The studies of prompting in evaluation/, with three seeds each: their figures and their pictures.

    python -m results.prompting_studies in_context scratchpad spelling injection

in_context.py, scratchpad.py, spelling.py and injection.py explain what is asked. results/NAME.json is written
after every seed of a study, and results/NAME.png for the first two. Seeds that are in the file already are
kept.
"""

import argparse
import importlib
import statistics
import time
from pathlib import Path

from formats import command
from formats.figures import load_pyplot, save_figure
from results.keep import Ended
from results.seeds import means

STUDIES = ("in_context", "scratchpad", "spelling", "injection")


def run(name: str, seeds: int, steps: int | None, folder: Path) -> None:
    """Make or complete the file of a study, print its table and draw its picture."""
    study, path = importlib.import_module(f"evaluation.{name}"), folder / f"{name}.json"
    about = {"command": f"python -m results.prompting_studies {name}", "steps": steps}
    ended = Ended(path, about, same=("steps",), indent=None)
    for seed in range(seeds):
        if ended.has(seed=seed):
            continue
        began = time.process_time()
        ended.add(*study.study(seed, steps))
        print(f"{name}, seed {seed}: {time.process_time() - began:.0f} s of one core", flush=True)
    print(study.table(ended.rows))
    if name in DRAWINGS:
        pyplot = load_pyplot()
        figure = DRAWINGS[name](pyplot, ended.rows)
        save_figure(figure, path.with_suffix(".png"))


def draw_in_context(pyplot, rows: list[dict]):
    """Return a picture of the loss: along training, a line per seed; by position, the mean of the seeds."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
    predictors = [name for name in rows[0]["by_position"] if name != "model"]
    depths = sorted({row["layers"] for row in rows})
    for i, name in enumerate(predictors, start=2):
        curve, style = means([row["by_position"][name] for row in rows]), {"color": f"C{i}", "ls": "--"}
        left.axhline(statistics.mean(curve), linewidth=1, **style)
        right.plot(range(1, len(curve) + 1), curve, linewidth=1, label=name, **style)
    for depth in depths:
        own, color = [row for row in rows if row["layers"] == depth], f"C{depth - 1}"
        for row in own:
            left.plot(*zip(*row["curve"], strict=True), color=color, linewidth=1)
        curve = means([row["by_position"]["model"] for row in own])
        right.plot(
            range(1, len(curve) + 1), curve, color=color, label=f"GPT, {depth} layer{'s' * (depth > 1)}"
        )
    left.set(xlabel="steps of training", ylabel="nats per symbol", ylim=(0.8, 1.16))
    left.set(title="mean of all positions, a line per seed")
    right.set(xlabel="position in the sequence", xscale="log", title="by position, mean of the seeds")
    right.legend(fontsize=8)
    return figure


def draw_scratchpad(pyplot, rows: list[dict]):
    """Return a picture of the share of right final answers over the number of swaps: a dot per seed, and a
    line through their mean."""
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for i, kind in enumerate(dict.fromkeys(row["kind"] for row in rows)):
        own = [row for row in rows if row["kind"] == kind]
        lengths = sorted({row["swaps"] for row in own})
        means = [statistics.mean(row["right"] for row in own if row["swaps"] == n) for n in lengths]
        style = {"marker": "o", "markersize": 4, "color": f"C{i}"}
        dots = [row["swaps"] + 0.08 * i for row in own], [row["right"] for row in own]
        axes.plot(*dots, linestyle="", alpha=0.5, **style)
        axes.plot([n + 0.08 * i for n in lengths], means, label=kind, color=f"C{i}")
    axes.axhline(1 / 3, color="0.5", linestyle=":", linewidth=1)  # of a guess: there are three cups
    axes.set(xlabel="swaps", ylabel="right final answers", ylim=(0, 1.03))
    axes.legend(fontsize=8)
    return figure


DRAWINGS = {"in_context": draw_in_context, "scratchpad": draw_scratchpad}


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("studies", nargs="*", metavar="STUDY", help=f"some of {', '.join(STUDIES)} (default: all)")
    add("--seeds", type=command.count, default=3, help="runs of each model (default %(default)s)")
    add("--steps", type=command.count, help="steps of each run (default: each study's own)")
    add("--out", type=command.path, default=Path("results"), help="folder of the files (default %(default)s)")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.studies if name not in STUDIES]:
        parser.error(f"{unknown[0]}: expected one of {', '.join(STUDIES)}")
    for name in args.studies or STUDIES:
        run(name, args.seeds, args.steps, args.out)


if __name__ == "__main__":
    command.run(main)
