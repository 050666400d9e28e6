"""Images without labels: what four objectives learn from them, and what that is worth with few labels.

    python -m results.pretext --out results/pretext.json                  about two hours of one core
    python -m results.pretext --parts ratio targets --out results/masking.json    an hour and a half

Parts, each with every seed of --seeds:

    encoders    the default runs of mae, maskfeat and simclr, and maskfeat that predicts pixels. All learn
                from letters of twelve fonts. Measured: the held-out loss; a probe (logistic regression on
                frozen features, and the nearest neighbour) on letters in nine fonts never seen; and
                fine-tuning on 186 labels, tested on the same nine fonts, beside the same model from scratch
    colorize    the default run, and the same network trained by squared error: how far from grey the balls
                of the held-out landscapes are, and how far from the nearer of the two colours a ball can have
    ratio       mae with 20 to 90 percent of the patches hidden, in runs of --steps updates: the held-out
                loss, and fine-tuning as above
    targets     the same of maskfeat that predicts HOG or pixels of the hidden patches

Every run is one of train.py in --work, and is not repeated if it is there. The figures are written to --out
after each run, and those in it are kept.
"""

from functools import partial
from pathlib import Path

import torch

from data.images import prepare
from data.rows import stack
from evaluation import probe
from formats import command
from formats.open_model import open_model
from results.keep import Ended
from results.training_runs import run
from vision import colorize

ENCODERS = {  # the flags of each, and the size of the model
    "mae": (["--model", "mae"], "tiny-4"),
    "maskfeat": (["--model", "maskfeat"], "tiny"),
    "maskfeat, pixels": (["--model", "maskfeat", "--set", "target=pixels"], "tiny"),
    "simclr": (["--model", "simclr"], "tiny"),
}
COLOURS = {"classes": [], "l2": ["--set", "objective=l2"]}
RATIOS = (0.2, 0.4, 0.6, 0.75, 0.9)
TARGETS = ("hog", "pixels")
FINE_TUNING = ["--model", "vit", "--data", "glyphs:few", "--steps", "200", "--batch-size", "64"]
N_PICTURES = 200  # held-out landscapes whose balls are measured


def fine_tuned(out: Path, seed: int, start: list[str]) -> float:
    """Return the share of letters in nine unseen fonts that a ViT reads after training on 186 labels.

    out: the folder of the run. start: flags of the weights that it starts from.
    """
    return run(out, seed, *FINE_TUNING, *start)["val_accuracy"]


def of_encoder(work: Path, name: str, seed: int) -> dict:
    """Return the figures of one of ENCODERS with one seed."""
    flags, size = ENCODERS[name]
    out = work / f"{name.replace(', ', '-')}-{seed}"
    figures = {"loss": run(out, seed, *flags)["val_loss"]}
    start = ["--init-from", str(out / "model"), "--set", "n_classes=62"]
    figures["fine-tuned"] = fine_tuned(out.with_name(f"{out.name}-few"), seed, start)
    figures["from scratch"] = fine_tuned(work / f"scratch-{size}-{seed}", seed, ["--size", size])

    # The probe, beside pixels and random weights.
    encoder = probe.encoder_in(out / "model")
    dataset = prepare("glyphs:fonts", encoder.config.size, work / "cache", channels=1)
    with torch.no_grad():
        found = probe.table(encoder, dataset.train, dataset.val, 1, seed)
    return figures | {f"probe, {source}": values for source, values in found.items()}


def of_colours(work: Path, name: str, seed: int) -> dict:
    """Return the figures of one of COLOURS with one seed: its loss, and the colours of its balls."""
    out = work / f"colorize-{name}-{seed}"
    last = run(out, seed, "--model", "colorize", *COLOURS[name])
    figures = {"loss": last["val_loss"], "distance": last["val_distance"]}
    model, dataset = open_model(out / "model").eval(), prepare("landscapes", (32, 32), work / "cache")
    lab = colorize.rgb_to_lab(stack([dataset.val[i] for i in range(N_PICTURES)])["image"] / 255)
    true = lab[:, 1:, :: colorize.STRIDE, :: colorize.STRIDE]
    with torch.no_grad():
        output = model(lab[:, :1])
    ways = {"squared error": 1.0} if name == "l2" else {"mean": 1.0, "annealed mean": None, "mode": 0.0}
    for way, temperature in ways.items():
        figures[way] = colorize.on_balls(model.colours(output, temperature), true)._asdict()
    return figures


def of_short_run(work: Path, model: str, change: str, seed: int, steps: int) -> dict:
    """Return the figures of a short run of mae or maskfeat with another setting, as mask_rate=0.2."""
    out = work / f"{model}-{change.partition('=')[2]}-short-{seed}"  # not the name of one of ENCODERS
    flags = ["--model", model, "--steps", str(steps), "--set", change]
    figures = {"loss": run(out, seed, *flags)["val_loss"]}
    start = ["--init-from", str(out / "model"), "--set", "n_classes=62"]
    return figures | {"fine-tuned": fine_tuned(out.with_name(f"{out.name}-few"), seed, start)}


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=command.new_file, required=True, help="file for the figures")
    work = Path("runs/pretext")
    add("--work", type=command.path, default=work, help="folder of runs (default %(default)s)")
    parts = ("encoders", "colorize", "ratio", "targets")
    add("--parts", nargs="+", choices=parts, default=parts[:2], help="what to do (default encoders colorize)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds (default 0 1 2)")
    add(
        "--steps",
        type=command.count,
        default=300,
        help="updates of each run of ratio and targets (default 300)",
    )
    args = parser.parse_args(argv)

    ended = Ended(args.out, {"steps of short runs": args.steps}, same=("steps of short runs",))
    for seed in args.seeds:
        measures = {}
        if "encoders" in args.parts:
            measures |= {name: partial(of_encoder, args.work, name, seed) for name in ENCODERS}
        if "colorize" in args.parts:
            measures |= {f"colorize, {name}": partial(of_colours, args.work, name, seed) for name in COLOURS}
        short = partial(of_short_run, args.work, seed=seed, steps=args.steps)
        if "ratio" in args.parts:
            measures |= {f"mae, {r:.0%}": partial(short, "mae", f"mask_rate={r}") for r in RATIOS}
        if "targets" in args.parts:
            measures |= {f"maskfeat, {t}, short": partial(short, "maskfeat", f"target={t}") for t in TARGETS}
        for name, measure in measures.items():
            if not ended.has(name=name, seed=seed):
                ended.add({"name": name, "seed": seed} | measure())


if __name__ == "__main__":
    command.run(main)
