"""LLaVA: how often it is right about drawn scenes, beside a blind model and one with a random vision tower.

    python -m results.llava --out results/llava.json          about an hour of one core

For each seed three runs of train.py with the same steps and data:

    llava          the default run, whose vision tower is that of a CLIP that has learned captions of scenes
    blind          the same without the features of the image, in training too: what can be guessed from the
                   question alone
    random tower   the same with a tower of random weights, which is frozen as well

All answer the questions of vision/visual_questions.py about scenes that are held out: "val" has pairs of a
colour and a shape that occur in training, "unseen" has pairs that do not, and ", blind" is the same model
without the features of the image. Every run is one of train.py in
--work, and is not repeated if it is there. The figures are written to --out after each run; those of other
seeds in it stay.
"""

from pathlib import Path

from data.tokenizer import get_tokenizer
from formats import command
from formats.json_file import read_json, write_json
from formats.open_model import open_model
from results.keep import machines
from results.training_runs import run
from vision.visual_questions import scores

RUNS = {"llava": [], "blind": ["--set", "blind=True"], "random tower": ["--tower", "random"]}


def figures_of(work: Path, name: str, seed: int, steps: int | None, n: int) -> dict:
    """Return the held-out loss of one of RUNS with one seed, and the share of right answers by kind and part.

    steps: None for those of the default run. n: scenes of each held-out part.
    """
    out = work / f"{name.replace(' ', '-')}-{seed}"
    flags = ["--model", "llava", *RUNS[name], "--cache", str(work / "cache")]
    flags += [] if steps is None else ["--steps", str(steps)]
    loss = run(out, seed, *flags)["val_loss"]
    model, tokenizer = open_model(out / "model").eval(), get_tokenizer(str(out / "model"))
    return {"loss": loss} | scores(model, tokenizer, n)


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=command.new_file, required=True, help="file for the figures")
    work = Path("runs/llava-results")
    add("--work", type=command.path, default=work, help="folder of runs (default %(default)s)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds (default 0 1 2)")
    add("--steps", type=command.count, help="updates of each run (default: those of the default run)")
    add("--scenes", type=command.count, default=250, help="scenes of each part (default %(default)s)")
    args = parser.parse_args(argv)

    known = read_json(args.out, "a file of figures") if args.out.exists() else {}
    if known.get("scenes", args.scenes) != args.scenes:
        raise ValueError(f"{args.out} holds figures of --scenes {known['scenes']}; name another file")
    figures = known | machines(known) | {"scenes": args.scenes}
    for seed in args.seeds:
        for name in RUNS:
            found = figures_of(args.work, name, seed, args.steps, args.scenes)
            figures.setdefault(name, {})[str(seed)] = found
            write_json(args.out, figures, indent=1)


if __name__ == "__main__":
    command.run(main)
