"""SAM beside Muon on few labels: how flat the minimum is that they find, and what they read of unseen fonts.

    python -m results.sam --out results/sam.json            about a quarter of an hour of one core

A ViT learns 62 letters and digits from 186 pictures in three fonts, and reads 558 in nine fonts never seen
(`--model vit --data glyphs:few`, 64 pictures in a batch, the default learning rate for all). Compared are

    muon             --steps updates with Muon, the default of images
    muon, twice      twice as many: the same number of passes, forward and backward, as SAM
    sam, RHO         --steps updates with Muon and --sam-rho RHO

Measured are the accuracy and the loss on the unseen fonts, and of the 186 pictures, as they are: the loss,
the loss at the worst point at a distance of 0.05, w + 0.05 g / |g|, and the largest eigenvalue of the Hessian
(Foret et al. 2021, sections 2 and 4.2), by power iteration.

Every run is one of train.py in --work, and is not repeated if it is there. The figures are written to --out
after each run, and those in it are kept.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.images import prepare
from data.rows import stack
from engine.optim import at_worst_point
from formats import command
from results.keep import Ended
from results.training_runs import run
from vision.vit import ViT

RADIUS = 0.05  # of the worst point that is measured, for all runs
TASK = ("--model", "vit", "--data", "glyphs:few", "--batch-size", "64", "--optimizer", "muon")


def largest_eigenvalue(loss: Callable[[], Tensor], weights: Sequence[Tensor], n_iterations: int) -> float:
    """Return the Hessian's eigenvalue of the largest size, of loss() in these weights, by power iteration.

    Each iteration multiplies the Hessian with a vector, as the gradient of (gradient of the loss) . vector
    (Pearlmutter 1994), and the estimate is the last v . H v with |v| = 1. loss must be differentiable twice.
    """
    generator = torch.Generator().manual_seed(0)
    v = [torch.randn(w.shape, generator=generator, dtype=w.dtype) for w in weights]
    gradient = torch.autograd.grad(loss(), weights, create_graph=True)
    estimate = torch.zeros(())
    for _ in range(n_iterations):
        norm = torch.sqrt(sum(x.square().sum() for x in v))
        v = [x / norm for x in v]
        along = sum((g * x).sum() for g, x in zip(gradient, v, strict=True))
        product = torch.autograd.grad(along, weights, retain_graph=True)
        estimate = sum((x * y).sum() for x, y in zip(v, product, strict=True))
        v = product
    return estimate.item()


def sharpness(directory: Path, cache: Path, n_iterations: int) -> dict[str, float]:
    """Return the figures of the 186 pictures for the model in a directory."""
    model = ViT.from_pretrained(
        directory, kernels="reference"
    ).eval()  # in operations that have two derivatives
    dataset = prepare("glyphs:few", model.config.size, cache, channels=1)
    batch = stack([dataset.train[i] for i in range(len(dataset.train))])
    images, labels = model.normalized(batch["image"].float() / 255), batch["label"]

    def loss() -> Tensor:
        return F.cross_entropy(model(images), labels)

    eigenvalue = largest_eigenvalue(loss, list(model.parameters()), n_iterations)
    here = loss()
    here.backward()
    with at_worst_point(model, RADIUS), torch.no_grad():
        worst = loss()
    return {"loss": here.item(), "loss at the worst point": worst.item(), "largest eigenvalue": eigenvalue}


def measure(work: Path, name: str, seed: int, flags: Sequence[str], n_iterations: int) -> dict:
    """Return the figures of one run from one seed."""
    out = work / f"{name.replace(', ', '-')}-{seed}"
    cache = str(work / "cache")
    last = run(out, seed, *TASK, "--cache", cache, *flags)
    held_out = {"unseen accuracy": last["val_accuracy"], "unseen loss": last["val_loss"]}
    return held_out | sharpness(out / "model", work / "cache", n_iterations)


def mean_and_range(rows: Sequence[dict], key: str) -> str:
    values = np.array([row[key] for row in rows])
    return f"{values.mean():.3f} ({values.min():.3f} to {values.max():.3f})"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=command.path, required=True, help="file for the figures")
    add("--work", type=command.path, default=Path("runs/sam"), help="folder of runs (default %(default)s)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds (default 0 1 2)")
    add("--rho", type=float, nargs="+", default=[0.05, 0.2], help="radii of SAM (default 0.05 0.2)")
    add("--steps", type=int, default=200, help="updates (default %(default)s)")
    add("--iterations", type=int, default=15, help="of the power iteration (default %(default)s)")
    args = parser.parse_args(argv)

    flags = {"muon": ["--steps", str(args.steps)], "muon, twice": ["--steps", str(2 * args.steps)]}
    flags |= {f"sam, {rho:g}": [*flags["muon"], "--sam-rho", str(rho)] for rho in args.rho}
    about = {"steps": args.steps, "iterations": args.iterations}
    ended = Ended(args.out, about, same=tuple(about))
    for seed in args.seeds:
        for name, own in flags.items():
            if not ended.has(name=name, seed=seed):
                of_run = partial(measure, args.work, name, seed, own)
                ended.add({"name": name, "seed": seed} | of_run(args.iterations))
    for name in flags:
        rows = [row for row in ended.rows if row["name"] == name]
        print(name, *(f"{key} {mean_and_range(rows, key)}" for key in list(rows[0])[2:]), sep="\n    ")


if __name__ == "__main__":
    command.run(main)
