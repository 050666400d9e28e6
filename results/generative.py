"""Models that draw letters: what each family reaches from its default settings, under one measure.

    python -m results.generative --out results/generative.json        about 75 minutes of one core
    python -m results.generative --parts gan energy --seeds 0 --out results/generative.json

Parts, each with --seeds seeds, are the default runs of train.py with --model gan, energy, vae and flow. All
learn from the same letters ("glyphs:all"), of 16 x 16 pixels, the flow of 8 x 8. A VAE draws the probability
that a pixel is white, a flow levels, the others greys.

Each part is measured by the held-out loss, the seconds of training, and the figures of vision/frechet.py for
as many new images as are held out: the Fréchet distance, precision, recall, and how many letters the
judge finds. Beside them are the same figures of training images (the floor) and of images whose pixels are
taken from different training images, and how often the judge is right on held-out letters. The judge of 8 x 8
pixels is another one, so the figures of the flow compare only with its own floor. Besides:

    vae       ELBO, IWAE-10 and IWAE-100 on the same codes of 500 held-out images, in nats, and active units
    flow      bits per dimension of the held-out images by three densities without a network (a Gaussian of
              all logits, a histogram of each pixel, equally likely levels), and the largest error of logits
              that are computed back from z
    energy    the figures of the chains in the buffer of its checkpoint

Every run is one of train.py in --work, and is not repeated if it is there. The figures are written to --out
after each run, and those in it are kept. It holds one row for each part and seed.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file

from data.images import prepare
from data.rows import Dataset
from formats import command
from formats.open_model import open_model
from results.keep import Ended
from results.training_runs import run, seconds
from vision import drawing, flow, frechet, vae

PARTS = ("gan", "energy", "vae", "flow")
DATA = "glyphs:all"


@torch.no_grad()
def of_vae(model: vae.VAE, dataset: Dataset) -> dict:
    """Return the bounds in nats per held-out image, and the number of active units."""
    found = vae.measure(model, vae.binarized(drawing.some(dataset.val, vae.MEASURED)))
    bounds = {"ELBO" if K == 1 else f"IWAE-{K}": nats for K, nats in found.nats.items()}
    return bounds | {"active units": found.n_active}


@torch.no_grad()
def of_flow(model: flow.Flow, dataset: Dataset) -> dict:
    """Return bits per dimension of densities without a network, and the largest error of the inverse."""
    train, held = (drawing.some(rows) for rows in (dataset.train, dataset.val))
    levels = flow.to_levels(held, model.config.n_levels)
    x = flow.dequantized(levels, 0.5, model.config.n_levels).flatten(1)
    y, _ = flow.to_logits(x, model.config.alpha)
    error = (model.inverse(model(y)[0]) - y).abs().max().item()
    return {"densities": flow.densities(train, held, model.config), "inversion error": error}


def chains_of(out: Path) -> torch.Tensor:
    """Return the images (M, C, H, W) in [0, 1] of the M chains in the checkpoint of a run of energy.py."""
    (shard,) = (out / "checkpoint").glob("shard-*.safetensors")
    return (load_file(shard)["model.images"] + 1) / 2


def figures_of(work: Path, part: str, seed: int) -> dict:
    """Return the figures of one of PARTS with a seed."""
    out = work / f"{part}-{seed}"
    last = run(out, seed, "--model", part, "--data", DATA, "--cache", str(work / "cache"))
    figures = {"loss": last["val_loss"], "seconds": seconds(out)}

    # The figures of every part.
    model = open_model(out / "model").eval()
    dataset = prepare(DATA, model.config.size, work / "cache", channels=1)
    measure = frechet.of(dataset)
    found = measure.baselines() | {"drawn": measure(frechet.drawn(model, measure.n, seed))}
    if part == "energy":
        found["chains"] = measure(chains_of(out)[: measure.n])
    figures |= {"judge is right": measure.right, "images": measure.n}
    figures |= {name: values._asdict() for name, values in found.items()}

    # Those of this part alone.
    own = {"vae": of_vae, "flow": of_flow}.get(part)
    return figures | (own(model, dataset) if own else {})


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=command.new_file, required=True, help="file for the figures, JSON")
    work = Path("runs/generative")
    add("--work", type=command.path, default=work, help="folder of runs (default %(default)s)")
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="models (default all)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds (default 0 1 2)")
    args = parser.parse_args(argv)

    ended = Ended(args.out, {"data": DATA, "threads": torch.get_num_threads()}, same=("data",))
    for seed in args.seeds:
        for part in args.parts:
            if not ended.has(part=part, seed=seed):
                ended.add({"part": part, "seed": seed} | figures_of(args.work, part, seed))


if __name__ == "__main__":
    command.run(main)
