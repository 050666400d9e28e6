"""Probe: how well images are classified by the features of a trained model, which is not trained further.

    logistic regression     softmax(W f(x) + b) of the standardised features f(x); W and b are learned
    nearest neighbour       the label of most of the k training images with the most similar features (cosine)

Both classifiers use the features and labels of training images, and are measured on held-out ones. By default
the images are characters, and the held-out ones have nine fonts that no training image has. Two baselines
stand beside the figures, and small models often miss them: the same network with random weights, and pixels
in place of features.

    python -m evaluation.probe runs/vit/model
    python -m evaluation.probe runs/mae/model --data glyphs

Shapes: N training images, M held-out images, D width of the features.
"""

import importlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.baselines import logistic_regression, nearest_neighbour
from data.images import prepare
from data.rows import Rows, stack
from formats import command
from formats.open_model import concept_of, open_model

BATCH = 200  # images of which features are computed in one pass


def encoder_in(directory: str | Path) -> nn.Module:
    """Return the model in a directory that reads images, in float32.

    Some models, such as an MAE, wrap the encoder that is meant: their file has a function `unwrap` that
    returns it. Raises ValueError for a model without features of images, such as one of text.
    """
    model = open_model(directory).float().eval()
    unwrap = getattr(importlib.import_module(concept_of(directory)), "unwrap", None)
    encoder = unwrap(model) if unwrap is not None and hasattr(model, "model") else model
    if not hasattr(encoder, "features"):
        raise ValueError(
            f"{directory}: has no features of images; expected a model that has, such as runs/vit/model"
        )
    return encoder


@torch.no_grad()
def features(encoder: nn.Module, rows: Rows) -> tuple[Tensor, Tensor]:
    """Return the features, float32 (N, D), of all images, without augmentation, and their labels (N,)."""
    found, labels = [], []
    for start in range(0, len(rows), BATCH):
        batch = stack([rows[i] for i in range(start, min(start + BATCH, len(rows)))])
        found.append(encoder.features(encoder.normalized(batch["image"].float() / 255)))
        labels.append(batch["label"])
    return torch.cat(found), torch.cat(labels)


def probe(train: Tensor, labels: Tensor, held: Tensor, expected: Tensor, k: int) -> tuple[float, float]:
    """Return the accuracy of logistic regression, and of the k nearest neighbours, on held-out images.

    train, held: the features (N, D) and (M, D); labels, expected: the labels (N,) and (M,).
    """
    linear = logistic_regression(train, labels, held)
    near = nearest_neighbour(F.normalize(train), labels, F.normalize(held), k)
    return tuple((predicted == expected).float().mean().item() for predicted in (linear, near))


def table(encoder: nn.Module, train: Rows, held: Rows, k: int, seed: int) -> dict[str, tuple[float, float]]:
    """Return {source: the two accuracies of `probe`}. The sources of features are the model ("trained"), the
    same model with random weights, and the pixels. seed: of the random weights."""
    labels, expected = (torch.from_numpy(rows.labels) for rows in (train, held))
    torch.manual_seed(seed)
    sources = {"trained": encoder, "random weights": type(encoder)(encoder.config).eval()}
    found = {}
    for name, model in sources.items():
        parts = [features(model, rows)[0] for rows in (train, held)]
        found[name] = probe(parts[0], labels, parts[1], expected, k)
    pixels = [torch.from_numpy(rows.rows.reshape(len(rows), -1) / 255).float() for rows in (train, held)]
    return found | {"pixels": probe(pixels[0], labels, pixels[1], expected, k)}


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description="Measure the features of a model of images by classifying them.")
    add = parser.add_argument
    add("checkpoint", type=command.filled, help="directory of a model that reads images")
    add("--data", default="glyphs:fonts", help="images with classes, as for train.py (default %(default)s)")
    add("--val", metavar="FOLDER", help="held-out images (default: those of --data)")
    add("-k", type=int, default=1, help="neighbours that vote (default %(default)s)")
    add(
        "--seed",
        type=int,
        default=0,
        help="start of the random numbers of the random weights (default %(default)s)",
    )
    add(
        "--cache",
        type=command.path,
        default=Path("cache"),
        help="folder for the pixels (default %(default)s)",
    )
    args = parser.parse_args(argv)
    if args.k < 1:
        raise ValueError(f"-k {args.k}: expected at least 1")

    # The model, and images as it reads them.
    encoder = encoder_in(args.checkpoint)
    config = encoder.config
    dataset = prepare(args.data, config.size, args.cache, channels=config.n_channels, val=args.val)
    if len(dataset.labels) < 2:
        raise ValueError(f"--data {args.data}: no classes; expected a folder for each class")
    if args.k > len(dataset.train):
        raise ValueError(f"-k {args.k}: there are only {len(dataset.train)} images to learn from")

    # A line for each source of features.
    print(dataset.summary)
    print(f"{'right on held-out images':26} logistic regression  {args.k} nearest")
    for name, (linear, near) in table(encoder, dataset.train, dataset.val, args.k, args.seed).items():
        print(f"{name:26} {linear:19.1%} {near:10.1%}")
    print(f"{'chance':26} {1 / len(dataset.labels):19.1%} {1 / len(dataset.labels):10.1%}")


if __name__ == "__main__":
    command.run(main)
