"""CLIP on letters and on scenes: what its default runs find and name that they have not seen together.

    python -m results.clip --out results/clip.json                        about half an hour of one core
    python -m results.clip --parts objectives --out results/siglip.json   a quarter of an hour more

Parts, each with --seeds seeds:

    glyphs        the default run, on letters. Of held-out pairs of a font and a character: how often the
                  model names the character and the style by prompts, and finds the caption of an image
    scenes        the default run with --data scenes, of two drawn objects each: how often the model finds a
                  scene by its caption, and prefers the right caption to one with the colours swapped, and to
                  one with the relation reversed. Measured for pairs of a colour and a shape that occur in the
                  training scenes, and for pairs that do not
    objectives    the default run with SigLIP's loss, and with AdamW for all weights

Beside the figures of the model stand those of chance. Every run is one of train.py in --work, and is not
repeated if it is there. The figures are written to --out after each run; those of other parts and seeds that
are in it stay.
"""

import argparse
from pathlib import Path

from data import captions
from data.tokenizer import get_tokenizer
from formats import command
from formats.json_file import read_json, write_json
from results.keep import machines
from results.training_runs import run
from vision import zero_shot
from vision.clip import CLIP

RUNS = {  # the flags of each part's runs
    "glyphs": {"clip": []},
    "scenes": {"clip": ["--data", "scenes"]},
    "objectives": {
        "sigmoid": ["--set", "objective=sigmoid"],
        "adamw": ["--optimizer", "adamw", "--lr", "1e-3"],
    },
}


def figures_of(work: Path, part: str, name: str, seed: int) -> dict[str, float]:
    """Return the figures of one of RUNS with a seed, and those of chance."""
    out, flags = work / f"{part}-{name}-{seed}", RUNS[part][name]
    figures = {"loss": run(out, seed, "--model", "clip", *flags)["val_loss"]}
    model, tokenizer = CLIP.from_pretrained(out / "model").eval(), get_tokenizer(str(out / "model"))
    data = flags[1] if flags[:1] == ["--data"] else "glyphs"
    parts = captions.read(data, model.config.size, work / "cache")
    rows = captions.as_dataset(parts, tokenizer, model.config.max_seq_len).val
    for what, (right, chance) in zero_shot.measure(model, tokenizer, rows).items():
        figures |= {what: right, f"chance, {what}": chance}
    return figures


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=command.new_file, required=True, help="file for the figures, JSON")
    add(
        "--work",
        type=command.path,
        default=Path("runs/clip-table"),
        help="folder of runs (default %(default)s)",
    )
    parts = ["glyphs", "scenes"]
    add("--parts", nargs="+", choices=list(RUNS), default=parts, help="parts to do (default glyphs scenes)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds (default 0 1 2)")
    args = parser.parse_args(argv)

    known = read_json(args.out, "a file of figures") if args.out.exists() else {}
    figures = known | machines(known)
    for seed in args.seeds:
        for part in args.parts:
            for name in RUNS[part]:
                figures.setdefault(f"{part}, {name}", {})[str(seed)] = figures_of(args.work, part, name, seed)
                write_json(args.out, figures, indent=1)


if __name__ == "__main__":
    command.run(main)
