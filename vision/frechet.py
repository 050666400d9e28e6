"""Fréchet: how far drawn images are from real ones, by the features of a classifier trained on real ones.

    d^2 = |m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2))          means m and covariances C of features

The Fréchet distance of two Gaussians (Dowson and Landau 1982), squared, as in the FID (Heusel et al. 2017,
arXiv 1706.08500, equation 6). The features are the last hidden layer of a judge (vision/judge.py), a
classifier that learned on the training images which letter an image shows. FID takes the features of an
Inception network trained on photographs. So these distances cannot be compared with a published FID, and with
each other only for the same data and image size. An estimate of d^2 from n images is too large by about c / n
(Chong and Forsyth 2020, 1911.07023). All sets here have as many images as are held out, and the distance of
as many training images is printed beside each.

    precision     share of drawn images that lie within the manifold of real ones
    recall        share of real images that lie within the manifold of drawn ones
    letters       how many letters the judge finds among the drawn images within the manifold of real ones

A manifold is a union of balls around the features of its images. The ball of an image reaches to its third
nearest neighbour (improved precision and recall, Kynkäänniemi et al. 2019, 1904.06991, equation 1). Real
images here are the held-out ones. A model that draws a few good images again and again (mode collapse) has a
high precision, a low recall and few letters.

    python -m vision.frechet runs/gan/model runs/vae/model            figures of models that draw images

Shapes: N real images, n drawn ones, F features.
"""

import unicodedata
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data.images import prepare
from data.rows import Dataset, stack
from formats import command
from formats.open_model import open_model
from vision import judge

N_FEATURES = 256  # F, of the judge
LEAST = 2 * N_FEATURES  # images of a set: covariances of fewer are singular, or nearly so
NEIGHBOUR = 3  # the ball of an image reaches to this nearest neighbour
DATA = "glyphs:all"


# --- the distance


def gaussian_distance(m1: Tensor, c1: Tensor, m2: Tensor, c2: Tensor) -> float:
    """Return d^2 of the header for means (F,) and covariances (F, F), float64.

    tr (C_1 C_2)^(1/2) is the sum of the square roots of the eigenvalues of C_1 C_2. With S S = C_1, the
    matrix S C_2 S has the same eigenvalues. It is symmetric, so they are computed more exactly from it.
    """
    values, vectors = torch.linalg.eigh(c1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    eigenvalues = torch.linalg.eigvalsh(root @ c2 @ root).clamp(min=0)
    return ((m1 - m2).square().sum() + c1.trace() + c2.trace() - 2 * eigenvalues.sqrt().sum()).item()


def distance(a: Tensor, b: Tensor) -> float:
    """Return d^2 of the header between features (N, F) and (n, F), in squared units of the features."""
    a, b = a.double(), b.double()
    return gaussian_distance(a.mean(0), a.T.cov(), b.mean(0), b.T.cov())


# --- the manifolds


def radii(features: Tensor) -> Tensor:
    """Return the distance (N,) of each of the features (N, F) from its third nearest neighbour among them."""
    return torch.cdist(features, features).kthvalue(NEIGHBOUR + 1, dim=1).values  # the first is itself


def within(features: Tensor, manifold: Tensor) -> Tensor:
    """Return bool (n,): True where features (n, F) lie in a ball around any of manifold, features (N, F)."""
    return (torch.cdist(features, manifold) <= radii(manifold)).any(1)


# --- the figures of a set of images


class Figures(NamedTuple):
    """The figures of a set of drawn images, compared with the held-out ones."""

    distance: float  # d^2
    precision: float
    recall: float
    letters: int

    def __str__(self) -> str:
        return (
            f"Fréchet distance {self.distance:7.1f}  precision {self.precision:6.1%}  "
            f"recall {self.recall:6.1%}  letters {self.letters:3}"
        )


class Measure:
    """A judge of the letters in a data set, and the features of the held-out images."""

    def __init__(self, dataset: Dataset):
        """Train the judge, which takes some ten seconds of one core for 15,000 images of 16 x 16 pixels."""
        parts = [stack([rows[i] for i in range(len(rows))]) for rows in (dataset.train, dataset.val)]
        letters = [letter_of(label) for label in dataset.labels]
        numbers = {letter: i for i, letter in enumerate(sorted(set(letters)))}
        answer_of = torch.tensor([numbers[letter] for letter in letters])  # by the number of the class
        train, held = (answer_of[part["label"]] for part in parts)
        question = judge.Question("letter", len(numbers), train, held)
        self.judge = judge.train(parts[0]["image"].numpy(), [question], judge.STEPS)
        self.n = len(held)

        # The training images and the held-out ones, with the features of the latter.
        self.real, self.held = (part["image"].float() / 255 for part in parts)
        self.features, found = self.read(self.held)
        self.right = (found == held).float().mean().item()  # accuracy of the judge

    @torch.no_grad()
    def read(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features (n, F) of images (n, C, H, W) in [0, 1], and the numbers (n,) of the letters
        that the judge finds in them."""
        features = torch.cat([self.judge.features(part) for part in images.float().cpu().split(256)])
        return features, self.judge.heads[0](features).argmax(1)

    def __call__(self, images: Tensor) -> Figures:
        """Return the figures of images (n, C, H, W) in [0, 1]."""
        features, found = self.read(images)
        precise = within(features, self.features)
        return Figures(
            distance(features, self.features),
            precise.float().mean().item(),
            within(self.features, features).float().mean().item(),
            len(found[precise].unique()),
        )

    def baselines(self) -> dict[str, Figures]:
        """Return the figures of two sets, each of as many images as are held out: training images ("real"),
        the best to expect, and images that take each pixel from another training image ("pixels mixed")."""
        generator = torch.Generator().manual_seed(0)
        places = torch.arange(self.n) * len(self.real) // self.n
        pixels = self.real.flatten(1)
        rows = torch.randint(len(pixels), (self.n, pixels.shape[1]), generator=generator)
        mixed = pixels.gather(0, rows).view_as(self.held)
        return {"real": self(self.real[places]), "pixels mixed": self(mixed)}


def letter_of(label: str) -> str:
    """Return a character without its accents: "e" for "ế" and "ê". A longer label is returned as it is.

    The judge learns letters without accents, since accents have few pixels.
    """
    return unicodedata.normalize("NFD", label)[0] if len(label) == 1 else label


MEASURES: dict[str, Measure | None] = {}  # by the fingerprint of the data


def of(dataset: Dataset) -> Measure | None:
    """Return the Measure of a data set, whose judge is trained on the first call. Return None if there are no
    classes, or fewer than LEAST training or held-out images."""
    if dataset.fingerprint not in MEASURES:
        enough = len(dataset.labels) > 1 and min(len(dataset.train), len(dataset.val)) >= LEAST
        MEASURES[dataset.fingerprint] = Measure(dataset) if enough else None
    return MEASURES[dataset.fingerprint]


def in_words(dataset: Dataset, draw: Callable[[int], Tensor], name: str = "drawn") -> str:
    """Return lines of figures: those of the baselines, and those of draw(n), which returns n images
    (n, C, H, W) in [0, 1], with a name in front."""
    measure = of(dataset)
    if measure is None:
        return (
            f"no Fréchet distance: {len(dataset.val)} images held out, {len(dataset.train)} to learn from; "
            f"expected at least {LEAST} of each, and their classes"
        )
    rows = measure.baselines() | {name: measure(draw(measure.n))}
    judged = f"a judge of letters, right about {measure.right:.1%} of {measure.n} held-out images:"
    return "\n".join([judged, *(f"{name:13}{figures}" for name, figures in rows.items())])


# --- the command


def drawn(model: nn.Module, n: int, seed: int = 0) -> Tensor:
    """Return n images (n, C, H, W) in [0, 1] that a model draws with a seed."""
    return model.draw(n, torch.Generator().manual_seed(seed))


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description="Measure how far drawn images are from real ones.")
    add = parser.add_argument
    add("checkpoint", nargs="+", type=command.filled, help="directories of models that draw images")
    add("--data", default=DATA, help="the images that they learned from (default %(default)s)")
    add("--seed", type=int, default=0, help="seed of the draws (default %(default)s)")
    add("--cache", type=command.path, default=Path("cache"), help="folder of images (default %(default)s)")
    args = parser.parse_args(argv)
    for directory in args.checkpoint:
        model = open_model(directory).eval()
        reads_words = hasattr(model.config, "vocab_size")  # as latent diffusion does
        if reads_words or not (hasattr(model, "draw") and hasattr(model.config, "size")):
            expected = "expected a model that draws images without words, such as runs/gan/model"
            raise ValueError(f"{directory}: {expected}")
        dataset = prepare(args.data, model.config.size, args.cache, channels=model.config.n_channels)
        print(f"{directory}\n{in_words(dataset, partial(drawn, model, seed=args.seed))}", flush=True)


if __name__ == "__main__":
    command.run(main)
