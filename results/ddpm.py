"""Diffusion: what a network is asked to predict, and how much its words are exaggerated at sampling.

    python -m results.ddpm --out results/ddpm.json

The task is that of `python train.py --model ddpm`: letters from their names, 16 x 16 pixels. The U-Net and
the DiT, both of the size that is their default, learn to predict v, x_0 or eps, in runs of --steps updates of
64 images. Then the 130 pairs of a character and a style that were held out are drawn with each guidance w, by
25 steps of DDIM. A classifier that has learned from real images (vision/judge.py) says what it recognises in
them; beside that stands what it recognises in the real images of the same pairs, and how far the drawn ones
are from these, as a mean squared error of a pixel in [0, 1].

Every run is one of train.py in --work, and is not repeated if it is there. The figures are written to --out
after each run, and those in it are kept. A picture of the runs of the first seed that this call has measured
is drawn beside --out.
"""

from pathlib import Path

from torch import Tensor

from data import captions
from data.rows import Dataset, stack
from engine import pictures
from formats import command
from results.keep import Ended
from results.training_runs import run
from vision import conditions, ddpm, judge

MODELS = {"U-Net": "ddpm", "DiT": "dit"}
TARGETS = ("v", "x0", "eps")
GUIDANCE = (1.0, 2.0, 4.0)
SHOWN = 12  # pairs of the picture


def pairs(size: tuple[int, int], cache: Path) -> Dataset:
    """Return letters with captions at a size, as the default runs have them."""
    return conditions.as_dataset(captions.read("glyphs", size, cache))


def figures(module: ddpm.Diffusion, dataset: Dataset) -> tuple[dict, list[Tensor]]:
    """Return the figures of all held-out pairs by each guidance, and the images (n, C, h, w)."""
    opinion, chosen = judge.of(dataset), list(range(len(dataset.val)))
    batch = stack([dataset.val[i] for i in chosen])
    true = batch["image"].float() / 255
    found, drawn = {"real": opinion.rights(true, chosen)}, [true]
    for w in GUIDANCE:
        images = module.draw(batch["tokens"], len(chosen), guidance=w)
        error = (images - true).square().mean().item()
        found[f"w = {w:g}"] = opinion.rights(images, chosen) | {"squared error": error}
        drawn.append(images)
    return found, drawn


def measure(work: Path, network: str, target: str, seed: int, steps: int, shown: dict) -> dict:
    """Return the figures of one run; its images go to `shown`, under its name."""
    flags = ["--model", MODELS[network], "--set", f"target={target}", "--steps", str(steps)]
    out = work / f"{MODELS[network]}-{target}-{seed}"
    last = run(out, seed, *flags, "--cache", str(work / "cache"))
    module = ddpm.Diffusion.from_pretrained(out / "model").float().eval()
    found, shown[network, target] = figures(module, pairs(module.config.size, work / "cache"))
    return {"loss": last["val_loss"]} | found


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=command.new_file, required=True, help="file for the figures, which ends in .json")
    add(
        "--work", type=command.path, default=Path("runs/targets"), help="folder of runs (default %(default)s)"
    )
    add("--networks", nargs="+", choices=MODELS, default=list(MODELS), help="which (default: both)")
    add("--targets", nargs="+", choices=TARGETS, default=TARGETS, help="which (default: all)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds (default 0 1 2)")
    add("--steps", type=command.count, default=1000, help="updates of a run (default %(default)s)")
    args = parser.parse_args(argv)

    ended, shown = Ended(args.out, {"steps": args.steps}, same=("steps",)), {}
    for seed in args.seeds:
        for network in args.networks:
            for target in args.targets:
                key = {"network": network, "target": target, "seed": seed}
                if not ended.has(**key):
                    images = shown if seed == args.seeds[0] else {}
                    ended.add(key | measure(args.work, network, target, seed, args.steps, images))
    if shown:
        true = next(iter(shown.values()))[0]
        chosen = [i * len(true) // SHOWN for i in range(SHOWN)]
        rows = [row[chosen] for row in (true, *(images[2] for images in shown.values()))]  # with guidance 2
        labels = ("real", *(", ".join(key) for key in shown))
        pictures.save(args.out.parent, rows, labels=labels, name=f"{args.out.stem}.png")


if __name__ == "__main__":
    command.run(main)
