"""Classify sounds: the task that trains an AST to name what is heard.

    loss = -mean over sounds of log p(label | augmented spectrogram)

A sound to learn from is changed each time it is read: its loudness, and as in SpecAugment (Park et al. 2019)
a band of mel filters and a stretch of time of its spectrogram are set to 0. Held-out sounds are read as they
are. By default they are chords that the same instrument never plays in training (data/notes.py). The log
begins with the accuracy of classifiers without a network. A picture shows spectrograms with their labels.

The filter bank is computed in `make_batch`, so by the thread that prepares the next batch.

    python train.py --model spectrogram                                     instruments
    python train.py --model spectrogram --data clips --set n_frames=498     a folder for each class, 5 s

Shapes: B batch, M mel filters.
"""

import math
from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from data.baselines import logistic_regression, nearest_neighbour
from data.rows import Dataset, Row, Rows, stack
from data.sounds import prepare
from engine import parallel
from engine.activations import Precision
from formats.config_values import check_values
from vision import spectrogram
from vision.classify_images import (  # noqa: F401  engine/contract.py finds `save` here
    check_pretrained,
    save,
    show_labels,
)

MODEL, DATA = "spectrogram", "notes"
OPTIMIZER, BATCH_SIZE, STEPS = "muon", 64, 600
LOSS, TOKEN_LOSS = "nats per sound", ""
SHOWN = (4, 6)  # rows and columns of the picture
MOST = 4_000, 1_000  # sounds to learn from and held out that baselines use
PART = 100  # sounds whose spectrograms are computed at once


@dataclass(frozen=True)
class Config:
    """Settings: what the model reads, and the largest changes of a sound to learn from."""

    model: spectrogram.Config
    frequency_mask: int  # mel filters that are set to 0
    time_mask: int  # frames that are set to 0
    gain: float = 6.0  # decibels that a sound becomes louder or softer
    MAY_BE_ZERO = ("frequency_mask", "time_mask", "gain")

    def __post_init__(self):
        check_values(self, model=(self.model,))
        if self.frequency_mask > self.model.n_mels or self.time_mask > self.model.n_frames:
            masks = f"frequency_mask {self.frequency_mask}, time_mask {self.time_mask}"
            raise ValueError(f"{masks}: expected at most {self.model.n_mels} and {self.model.n_frames}")


def settings(config: spectrogram.Config) -> Config:
    """Return the settings with the masks of AST's authors (section 3.1), at most 48 of 128 mel filters and
    192 of 1,024 frames, in proportion to the model's numbers of both."""
    return Config(config, config.n_mels * 3 // 8, config.n_frames * 3 // 16)


def load_data(args: Namespace, config: spectrogram.Config) -> Dataset:
    """Return sounds with classes, with a line about how well they are classified without a network.

    Raises ValueError for what `data.sounds.prepare` refuses, for sounds without classes, and for other
    classes than a pretrained model's.
    """
    if args.document_mask:
        raise ValueError("--document-mask: sounds have no documents; leave it out")
    with parallel.one_per_machine_first():
        options = {"val": args.val, "bad_sounds": args.bad_text}
        dataset = prepare(args.data, config.n_samples, spectrogram.RATE, args.cache, **options)
    n = len(dataset.labels)
    if n < 2:
        raise ValueError(f"--data {args.data}: {n} classes; expected a folder for each class")
    check_pretrained(args, config, n)
    return replace(dataset, guess=describe(dataset.train, dataset.val, n, config))


def pictures_of(rows: list[Row], config: spectrogram.Config) -> Tensor:
    """Return the spectrograms (B, frames, M) of rows, neither augmented nor normalised."""
    batch = stack(rows)
    return spectrogram.spectrograms(batch["sound"].float() / 32768, batch["length"], config)


def make_batch(
    rows: list[Row], config: Config, generator: torch.Generator, tokenizer: None
) -> dict[str, Tensor]:
    """Return "spectrograms" (B, frames, M), augmented where a sound is to be learned from and not normalised,
    and "targets" (B,), labels."""
    # Five random numbers for each sound: one for its loudness, and width and place of each mask.
    batch, u = stack(rows), torch.rand(len(rows), 5, generator=generator)
    chosen = batch["augment"]
    gains = 10 ** (torch.where(chosen, config.gain * (2 * u[:, 0] - 1), 0.0) / 20)
    waves = batch["sound"].float() / 32768 * gains[:, None]
    x = spectrogram.spectrograms(waves, batch["length"], config.model)

    # Mask before normalising, as the authors do, so that what is masked is 0 here.
    _, n_frames, n_mels = x.shape
    hidden = stretch(n_frames, config.time_mask, u[:, 1], u[:, 2])[:, :, None]
    hidden = hidden | stretch(n_mels, config.frequency_mask, u[:, 3], u[:, 4])[:, None]
    return {"spectrograms": x.masked_fill(hidden & chosen[:, None, None], 0.0), "targets": batch["label"]}


def stretch(n: int, most: int, width: Tensor, place: Tensor) -> Tensor:
    """Return bool (B, n), which is true in one stretch of 0 to `most` places of each row. width, place (B,):
    random numbers from 0 to 1 that decide its length and where it begins."""
    widths = (width * (most + 1)).long()[:, None]
    begins = (place[:, None] * (n - widths + 1)).long()
    places = torch.arange(n)
    return (places >= begins) & (places < begins + widths)


def describe(train: Rows, held: Rows, n_classes: int, config: spectrogram.Config) -> str:
    """Return one line: how often chance and two classifiers without a network are right on held-out sounds.

    Logistic regression reads the spectrogram's mean over time, the nearest neighbour all of it. Of large data
    sets they use some evenly spaced sounds, see MOST.
    """
    pictures, labels = [], []
    for rows, most in zip((train, held), MOST, strict=True):
        some = [rows[i] for i in range(0, len(rows), -(-len(rows) // most))]
        parts = [pictures_of(some[i : i + PART], config) for i in range(0, len(some), PART)]
        pictures.append(torch.cat(parts))
        labels.append(torch.tensor([int(row["label"]) for row in some]))
    means = [x.mean(dim=1) for x in pictures]
    linear = logistic_regression(means[0], labels[0], means[1])
    nearest = nearest_neighbour(pictures[0].flatten(1), labels[0], pictures[1].flatten(1))
    right = [(predicted == labels[1]).float().mean() for predicted in (linear, nearest)]
    return (
        f"on held-out sounds, chance is right for {1 / n_classes:.1%}, logistic regression on the mean "
        f"spectrum for {right[0]:.1%}, the nearest spectrogram for {right[1]:.1%}"
    )


def tokens_per_row(model: spectrogram.AST, config: Config, seq_len: int) -> list[int]:
    """Return how many tokens a sound has in the model's layers."""
    return [2 + model.config.n_patches]


def loss_bytes(
    model: spectrogram.AST, config: Config, n: int, seq_len: int, precision: Precision
) -> dict[str, int]:
    """Return the memory that n sounds take outside the layers, as the fields of engine.activations.Loss."""
    (e, r, _), own = precision, model.config
    D, T = own.d_model, 2 + own.n_patches
    inputs = own.n_frames * own.n_mels * (4 + e)
    return {"inputs": n * inputs, "kept": n * (T * D * r + 8 * own.n_classes)}


@torch.no_grad()
def show(model: nn.Module, dataset: Dataset, out: Path) -> str:
    """Draw the spectrograms of some held-out sounds with the labels that the model gives them, green where
    they are right. Return the most frequent confusions among all held-out sounds, or among about a thousand
    evenly spaced ones of more."""
    val, device, config = dataset.val, next(model.parameters()).device, model.config
    rows = [val[i] for i in range(0, len(val), -(-len(val) // 1000))]
    predicted, pictures = [], []
    for start in range(0, len(rows), PART):
        x = pictures_of(rows[start : start + PART], config)
        predicted += model(model.normalized(x.to(device))).argmax(-1).tolist()
        pictures.append(x)

    # Low frequencies lie at the bottom. Black is the logarithm of FLOOR, white is 5, which loud sounds reach.
    images = torch.cat(pictures).transpose(1, 2).flip(1)[:, None]  # (n, 1, M, frames)
    floor = math.log(spectrogram.FLOOR)
    images = ((images - floor) / (5 - floor)).clamp(0, 1)
    targets = [int(row["label"]) for row in rows]
    return show_labels(images, predicted, targets, dataset.labels, out, SHOWN)
