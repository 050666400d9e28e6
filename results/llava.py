"""A model that sees: how often it is right about drawn scenes, beside a blind one and a random tower.

    python -m results.llava --out results/llava.json          about an hour of one core

For each seed three runs of train.py with the same steps and data:

    llava          the default run, whose tower is that of a CLIP that has learned captions of scenes
    blind          the same without the features, in training too: what language alone can guess
    random tower   the same with a tower drawn at random, which is frozen as well

Measured are the questions about scenes of vision/visual_questions.py, with pairs of a colour and a shape that
were seen, and with pairs that were not. Every run is one in --work, and is not repeated if it is there. The
figures are written to --out after each run.
"""

import argparse
import json
from pathlib import Path

import torch

from data.tokenizer import get_tokenizer
from engine import cpu
from formats import command
from formats.atomic import replace_file
from formats.open_model import open_model
from results.training_runs import run
from vision.visual_questions import scores

RUNS = {"llava": [], "blind": ["--set", "blind=True"], "random tower": ["--tower", "random"]}


def figures_of(work: Path, name: str, seed: int, steps: int | None, n: int) -> dict:
    """Return the loss of one of RUNS from one seed, and how often it is right, by kind of question."""
    out = work / f"{name.replace(' ', '-')}-{seed}"
    flags = ["--model", "llava", *RUNS[name], "--cache", str(work / "cache")]
    flags += [] if steps is None else ["--steps", str(steps)]
    loss = run(out, seed, *flags)["val_loss"]
    model, tokenizer = open_model(out / "model").eval(), get_tokenizer(str(out / "model"))
    return {"loss": loss} | scores(model, tokenizer, n)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=command.path, required=True, help="file for the figures")
    work = Path("runs/llava-results")
    add("--work", type=command.path, default=work, help="folder of runs (default %(default)s)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds (default 0 1 2)")
    add("--steps", type=int, help="updates of each run (default: those of the default run)")
    add("--scenes", type=int, default=250, help="scenes of each held-out part (default %(default)s)")
    args = parser.parse_args(argv)

    figures = {"cpu": cpu.name(), "torch": torch.__version__, "scenes": args.scenes}
    for seed in args.seeds:
        for name in RUNS:
            found = figures_of(args.work, name, seed, args.steps, args.scenes)
            figures.setdefault(name, {})[str(seed)] = found
            with replace_file(args.out) as new:
                new.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    command.run(main)
