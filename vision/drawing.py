"""Drawing: what the commands of models that draw images have in common.

A model without a condition, such as vae.py and flow.py, has a method `draw(n, generator)`, which returns n
new images. Here are the loading of its data, images without classes, and its command, which draws images
from a trained model; and the flags of the commands that draw by diffusion.
"""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.rows import Dataset, Rows, stack
from engine import pictures
from engine.report import PICTURE
from formats import command
from vision.classify_images import load_images

SHOWN = 12  # images in a row of a picture
MOST = 5_000  # images at most, of training and held-out ones each, that baselines are computed from


def fit(config: Any, dataset: Dataset, seq_len: int) -> Any:
    """Return the config for the size and the channels of a data set's images. seq_len is not used."""
    C, height, width = dataset.train[0]["image"].shape
    return replace(config, image_size=(height, width), n_channels=C)


def load_data(args: Namespace, config: Any, guess: Callable[[Tensor, Tensor], str]) -> Dataset:
    """Return images, whose classes are read by vision/frechet.py alone, with a line about baselines.

    guess: returns this line for some training images and some held-out images, each (n, C, height, width)
    with values in [0, 1]. Raises ValueError for what `data.images.prepare` refuses.
    """
    dataset = load_images(args, config)
    return replace(dataset, guess=guess(*(some(rows) for rows in (dataset.train, dataset.val))))


def some(rows: Rows, most: int = MOST) -> Tensor:
    """Return at most `most` images (n, C, height, width) of evenly spaced rows, with values in [0, 1]."""
    n = min(most, len(rows))
    return stack([rows[i * len(rows) // n] for i in range(n)])["image"].float() / 255


def add_sampling(parser: command.Parser) -> None:
    """Add the flags of a command that draws rows of images by the sampler of a diffusion model."""
    add = parser.add_argument
    add("--n", type=int, default=8, help="images in a row (default %(default)s)")
    add("--guidance", type=float, default=2.0, help="w; 1: no guidance (default %(default)s)")
    add("--steps", type=int, default=50, help="time steps to visit, at most T (default %(default)s)")
    add("--eta", type=float, default=0.0, help="0: DDIM, 1: DDPM, or between (default %(default)s)")
    add("--seed", type=int, default=0, help="start of the random noise (default %(default)s)")
    add("--out", type=command.path, default=Path("drawn.png"), help="file to write (default %(default)s)")


def check_sampling(args: Namespace) -> None:
    """Raise ValueError for flags of `add_sampling` that cannot be."""
    if args.n < 1 or not 0 <= args.eta <= 1:
        raise ValueError(f"--n {args.n} --eta {args.eta}: expected at least 1 image, and --eta from 0 to 1")
    if args.out.suffix != ".png":
        raise ValueError(f"--out {args.out}: expected a name that ends in .png")


def save_rows(images: Tensor, args: Namespace) -> None:
    """Write images (n, C, height, width), args.n in a row, to args.out, and say so."""
    pictures.save(args.out.parent, images.split(args.n), name=args.out.name)
    print(f"{args.out}: {len(images)} images of {args.steps} steps")


def main(model_class: type[nn.Module]) -> None:
    """Draw images from the trained model that the command line names; model_class: its class."""
    parser = command.Parser(description="Draw images from a trained model.")
    add = parser.add_argument
    add("checkpoint", type=command.filled, help="directory of a model")
    add("-n", type=int, default=4 * SHOWN, help="how many images (default %(default)s)")
    add("--seed", type=int, default=0, help="seed of the draws (default %(default)s)")
    add(
        "--out",
        type=command.path,
        default=Path(PICTURE),
        help="file to write, whose name ends in .png, or a folder for picture.png (default %(default)s)",
    )
    args = parser.parse_args()
    if args.n < 1:
        parser.error(f"-n {args.n}: expected at least 1 image")
    model = model_class.from_pretrained(args.checkpoint).eval().float()
    path = args.out if args.out.suffix == ".png" else args.out / PICTURE
    images = model.draw(args.n, torch.Generator().manual_seed(args.seed))
    pictures.save(path.parent, images.split(SHOWN), name=path.name)
    print(f"{path}: {args.n} images")
