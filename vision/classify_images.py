"""Classify images: the task that trains a ViT to name what an image shows.

    loss = -mean over images of log p(label | augmented image)

Every image to learn from is turned, scaled and shifted a little each time it is read (data/augment.py), since
without that a Transformer learns a few thousand images by heart. Held-out images are read as they are. By
default they are letters and digits in nine fonts that are not in the training set. The log begins with the
accuracy of classifiers of the pixels (data/baselines.py). A picture shows images with their labels.

    python train.py --model vit                                            letters in unseen fonts
    python train.py --model vit --data photos --set mirror=True            a folder for each class
    python train.py --model vit --data mnist --set warp=0.5                MNIST's files as published

Shapes: B batch, C channels, T tokens of an image, D model width.
"""

import math
from argparse import Namespace
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data import baselines
from data.augment import Augmentation, augment
from data.images import prepare
from data.rows import Dataset, Row, stack
from engine import parallel, pictures
from engine.activations import Precision
from vision import vit

MODEL, DATA = "vit", "glyphs:fonts"
OPTIMIZER, BATCH_SIZE, STEPS = "muon", 128, 600
LOSS, TOKEN_LOSS = "nats per image", ""
RIGHT, WRONG = "#1c7a3f", "#c4320f"  # colours of right and wrong labels in the picture
SHOWN = (4, 12)  # rows and columns of the picture


def load_images(args: Namespace, config: Any) -> Dataset:
    """Return the images that --data names, at the config's size, with the channels of a pretrained model or
    else their own. One process of each machine decodes them, and the others wait for it.

    Raises ValueError for what `data.images.prepare` refuses, and for --document-mask, which is about text.
    """
    if args.document_mask:
        raise ValueError("--document-mask: images have no documents; leave it out")
    channels = config.n_channels if args.init_from else None
    with parallel.one_per_machine_first():
        options = {"channels": channels, "val": args.val, "bad_images": args.bad_text}
        return prepare(args.data, config.size, args.cache, **options)


def load_data(args: Namespace, config: Any) -> Dataset:
    """Return images with classes, with a line about how well their pixels alone are classified.

    Raises ValueError for what `load_images` refuses, for images without classes, and for another number of
    classes than a pretrained model's.
    """
    dataset = load_images(args, config)
    n = len(dataset.labels)
    if n < 2:
        expected = "expected a folder for each class; --model mae learns from images alone"
        raise ValueError(f"--data {args.data}: {n} classes; {expected}")
    check_pretrained(args, config, n)
    return replace(dataset, guess=baselines.describe(dataset.train, dataset.val, n))


def check_pretrained(args: Namespace, config: Any, n: int) -> None:
    """Raise ValueError for a pretrained model whose number of classes is not n, that of the data."""
    if args.init_from and config.n_classes != n:
        raise ValueError(
            f"--init-from {args.init_from}: {config.n_classes} classes, {args.data} has {n}; add --set "
            f"n_classes={n} for a new classifier"
        )


def settings(config: Any) -> Augmentation:
    """Return the settings of the augmentation."""
    return Augmentation()


def make_batch(
    rows: list[Row], config: Augmentation, generator: torch.Generator, tokenizer: None
) -> dict[str, Tensor]:
    """Return "images" (B, C, height, width), augmented, with pixels in [0, 1], and "targets" (B,), labels."""
    batch = stack(rows)
    pixels = augment(batch["image"].float() / 255, batch["augment"], config, generator)
    return {"images": pixels, "targets": batch["label"]}


def save(model: nn.Module, dataset: Dataset, directory: Path) -> None:
    """Write the model with the names of the data's classes."""
    model.save_pretrained(directory, dataset.labels)


def tokens_per_row(model: vit.ViT, config: Any, seq_len: int) -> list[int]:
    """Return how many tokens of an image the model's layers compute, for the plan of --dry-run: T. In truth
    the last layer computes the class token alone where only that is read."""
    return [1 + model.config.n_patches]


def loss_bytes(model: vit.ViT, config: Any, n: int, seq_len: int, precision: Precision) -> dict[str, int]:
    """Return the memory that n images take outside the layers, as the fields of engine.activations.Loss."""
    (e, r, _), own = precision, model.config
    D, T = own.d_model, 1 + own.n_patches
    return {"inputs": input_bytes(own, n, e), "kept": n * (T * D * r + D * e + 8 * own.n_classes)}


def input_bytes(config: vit.Config, n: int, e: int) -> int:
    """Return the bytes of n images of a batch in float32, and of their patches, with e bytes per number."""
    return n * config.n_channels * math.prod(config.size) * (4 + e)


@torch.no_grad()
def show(model: nn.Module, dataset: Dataset, out: Path) -> str:
    """Draw some held-out images with the labels that the model gives them, green where they are right. Return
    the most frequent confusions among all held-out images, or among about a thousand evenly spaced ones of
    more."""
    val, device = dataset.val, next(model.parameters()).device
    batch = stack([val[i] for i in range(0, len(val), -(-len(val) // 1000))])
    images, targets = batch["image"].float() / 255, batch["label"].tolist()
    parts = [model(model.normalized(part.to(device))) for part in images.split(100)]
    return show_labels(images, torch.cat(parts).argmax(-1).tolist(), targets, dataset.labels, out, SHOWN)


def show_labels(
    images: Tensor,
    predicted: list[int],
    targets: list[int],
    labels: tuple[str, ...],
    out: Path,
    shown: tuple[int, int],
) -> str:
    """Draw some of the images (n, C, height, width), evenly spaced, with their predicted labels, green where
    they are the targets, and return how many are right and the most frequent confusions.

    predicted, targets: n numbers of labels each. shown: rows and columns of the picture, at most.
    """
    n_columns, n = shown[1], min(math.prod(shown), len(targets))
    chosen = [i * len(targets) // n for i in range(n)]
    lines = [chosen[i : i + n_columns] for i in range(0, len(chosen), n_columns)]
    pictures.save(
        out,
        [[images[i] for i in line] for line in lines],
        [[labels[predicted[i]] for i in line] for line in lines],
        [[RIGHT if predicted[i] == targets[i] else WRONG for i in line] for line in lines],
    )

    wrong = Counter((t, p) for t, p in zip(targets, predicted, strict=True) if t != p)
    n_right = len(targets) - wrong.total()
    taken = [f"{labels[t]} for {labels[p]} {n}x" for (t, p), n in wrong.most_common(12)]
    return f"{n_right} of {len(targets)} right; most often taken: {', '.join(taken) or 'none'}"
