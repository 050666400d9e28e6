"""SAM beside Muon on few labels: how flat the minimum is that each finds, and how well it reads unseen fonts.

    python -m results.sam --out results/sam.json            about a quarter of an hour of one core

A ViT learns 62 letters and digits from 186 pictures in three fonts, and reads 558 in nine fonts never seen
(`--model vit --data glyphs:few`, 64 pictures in a batch, the default learning rate for all). Compared are

    muon             --steps updates with Muon, the default of images
    muon, twice      twice as many: the same number of passes, forward and backward, as SAM
    sam, RHO         --steps updates with Muon and --sam-rho RHO

Measured are the accuracy and the loss on the unseen fonts, and three figures of the 186 pictures, without
augmentation: the loss, the loss at w + 0.05 g / |g|, which is about the worst point at a distance of 0.05
from the weights w (g is the gradient), and the largest eigenvalue of the Hessian by power iteration (Foret et
al. 2021, sections 2 and 4.2).

Every run is one of train.py in --work, and is not repeated if it is there. The figures are written to --out
after each run, and those in it are kept.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from data.images import prepare
from data.rows import stack
from engine.optim import at_worst_point
from evaluation.small_runs import mean_and_range
from formats import command
from results.keep import Ended
from results.training_runs import run
from vision.vit import ViT

RADIUS = 0.05  # of the worst point that is measured, for all runs
TASK = ("--model", "vit", "--data", "glyphs:few", "--batch-size", "64", "--optimizer", "muon")


def largest_eigenvalue(loss: Callable[[], Tensor], weights: Sequence[Tensor], n_iterations: int) -> float:
    """Return the eigenvalue of largest size of the Hessian H of loss() in these weights, by power iteration.

    An iteration maps v, with |v| = 1, to H v, which is the gradient of (gradient of the loss) . v, see
    Pearlmutter 1994. The estimate is v . H v of the last one. loss() must be differentiable twice.
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
    """Return the loss of a model on the 186 pictures, and two figures of how sharp that minimum is."""
    # The reference operations have second derivatives.
    model = ViT.from_pretrained(directory, kernels="reference").eval()
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
    """Return the figures of one run with one seed, made with these flags of train.py."""
    out = work / f"{name.replace(', ', '-')}-{seed}"
    cache = str(work / "cache")
    last = run(out, seed, *TASK, "--cache", cache, *flags)
    held_out = {"unseen accuracy": last["val_accuracy"], "unseen loss": last["val_loss"]}
    return held_out | sharpness(out / "model", work / "cache", n_iterations)


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=command.new_file, required=True, help="file for the figures")
    add("--work", type=command.path, default=Path("runs/sam"), help="folder of runs (default %(default)s)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds (default 0 1 2)")
    add("--rho", type=float, nargs="+", default=[0.05, 0.2], help="radii of SAM (default 0.05 0.2)")
    add("--steps", type=command.count, default=200, help="updates (default %(default)s)")
    add(
        "--iterations",
        type=command.count,
        default=15,
        help="steps of the power iteration (default %(default)s)",
    )
    args = parser.parse_args(argv)

    flags = {"muon": ["--steps", str(args.steps)], "muon, twice": ["--steps", str(2 * args.steps)]}
    flags |= {f"sam, {rho:g}": [*flags["muon"], "--sam-rho", str(rho)] for rho in args.rho}
    about = {"steps": args.steps, "iterations": args.iterations}
    ended = Ended(args.out, about, same=tuple(about))
    for seed in args.seeds:
        for name, own in flags.items():
            if not ended.has(name=name, seed=seed):
                figures = measure(args.work, name, seed, own, args.iterations)
                ended.add({"name": name, "seed": seed} | figures)
    for name in flags:
        rows = [row for row in ended.rows if row["name"] == name]
        keys = [key for key in rows[0] if key not in ("name", "seed")]
        lines = [f"{key} {mean_and_range([row[key] for row in rows], '.3f')}" for key in keys]
        print(name, *lines, sep="\n    ")


if __name__ == "__main__":
    command.run(main)
